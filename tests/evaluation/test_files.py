"""Rows of benchmarks: official JSON, JSON lines, VLMEvalKit's TSV, parquet of Hugging Face datasets."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from polymodal.errors import DataError, MediaError
from polymodal.evaluation import files
from polymodal.evaluation.files import (
    Row,
    field,
    find_file,
    json_rows,
    literal,
    need_file,
    parquet_rows,
    read_json,
    read_lines,
    rows_in,
    tsv_rows,
)
from polymodal.media.image import open_image
from polymodal.media.source import read_bytes

pytestmark = pytest.mark.usefixtures("private_cache")


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (6, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def coded(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


def colour_of(source: Any) -> tuple[int, int, int]:
    pixel = open_image(source).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel  # type: ignore[return-value]


RED, BLUE = (255, 0, 0), (0, 0, 255)


def tsv(path: Path, head: Sequence[str], *rows: Sequence[Any]) -> Path:
    """A table as pandas writes it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([head, *rows])
    return path


HEAD = ("index", "question", "image")


def test_images_are_unpacked_and_shared_by_index(tmp_path: Path) -> None:
    rows = list(
        tsv_rows(
            tsv(
                tmp_path / "t.tsv", HEAD,
                (7, "before the image that it shares", "9"), (9, 'it says "red"\n\tand more', coded("red")),
                (10, "shares", "9"), (11, "two", str([coded("red"), coded("blue")])), (12, "none", ""),
            )
        )
    )  # fmt: skip
    assert [row["question"] for row in rows][1] == 'it says "red"\n\tand more'
    assert [[colour_of(image) for image in row["image"]] for row in rows[:4]] == [[RED], [RED], [RED], [RED, BLUE]]
    assert rows[4]["image"] == ""


def test_images_are_told_apart_by_content_whatever_the_index_says(tmp_path: Path, private_cache: Path) -> None:
    head = ("question", "image")
    one, two = tsv_rows(tsv(tmp_path / "t.tsv", head, ("a", coded("red")), ("b", coded("blue"))))
    assert (colour_of(one["image"][0]), colour_of(two["image"][0])) == (RED, BLUE)
    hostile = [("../../../escape", "a", coded("red")), ("/etc/x", "b", coded("blue")), ("a\0b", "c", coded("green"))]
    rows = list(tsv_rows(tsv(tmp_path / "h.tsv", HEAD, *hostile)))
    assert all(row["image"][0].is_relative_to(private_cache) for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"t.tsv", "h.tsv", "cache"}
    again = list(tsv_rows(tsv(tmp_path / "t.tsv", head, ("a", coded("blue")))))  # the file has changed
    assert colour_of(again[0]["image"][0]) == BLUE


def test_a_byte_order_mark_and_line_breaks_in_base64(tmp_path: Path) -> None:
    text = coded("red")
    path = tsv(tmp_path / "t.tsv", HEAD, (1, "a", f"{text[:40]}\n{text[40:]}\n"))
    path.write_text("\ufeff" + path.read_text())
    (row,) = tsv_rows(path)
    assert row["index"] == "1" and colour_of(row["image"][0]) == RED


def test_a_cell_of_fifty_megabytes(tmp_path: Path) -> None:
    data = png("red") + bytes(37_000_000)  # 49 MB of text
    (row,) = tsv_rows(tsv(tmp_path / "t.tsv", HEAD, (1, "a", base64.b64encode(data).decode())))
    assert row["image"][0].stat().st_size == len(data)


def test_a_cell_that_is_too_large_names_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit(500)
    monkeypatch.setattr(files, "MAX_CELL", 500)
    try:
        with pytest.raises(DataError, match=r"t\.tsv: after line 2: .*at most 500 characters a cell"):
            list(tsv_rows(tsv(tmp_path / "t.tsv", ("index", "q"), (1, "a"), (2, "x" * 600))))
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("index\tquestion\timage\n1\ta\n", "line 2: has more or fewer cells"),
        ("index\tquestion\timage\n1\ta\t\tx\n", "line 2: has more or fewer cells"),
        ("index\tquestion\timage\n1\ta\t5\n", "line 2: `image` is '5', which is the index of no row"),
        (f"index\tquestion\timage\n1\ta\t{'!' * 70}\n", "line 2: `image` is no base64"),
        (f"index\tquestion\timage\n1\ta\t{coded('red')[:-2]}\n", "line 2: `image` is no base64"),
        (f"index\tquestion\timage\n1\ta\t[{'1, ' * 40}]\n", "line 2: `image` holds 1, not base64"),
        (f"index\tquestion\timage\n1\ta\t['{'x' * 70}\n", "is no list"),
        ('index\tquestion\timage\n1\t"never closed\t\n2\tb\t\n', "after line 1"),
        ("index\tquestion\timage_path\n1\ta\t../x.png\n", "`image_path` '../x.png' leaves the folder of t.tsv"),
        ("index\tquestion\timage_path\n1\ta\t/etc/passwd\n", "leaves the folder"),
        ("index\tquestion\timage_path\n1\ta\t['a.png', '../../x']\n", "leaves the folder"),
        ("index\tquestion\timage_path\n1\ta\t[3]\n", "leaves the folder"),
    ],
)
def test_tables_that_cannot_be_used(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=r"t\.tsv") as error:
        list(tsv_rows(tmp_path / "t.tsv"))
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_table_in_another_encoding_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes("index\tquestion\n1\tétoile\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        list(tsv_rows(tmp_path / "t.tsv"))
    for path, said in ((tmp_path, "is a directory"), (tmp_path / "none.tsv", "no such file")):
        with pytest.raises(DataError, match=said):
            list(tsv_rows(path))


def test_images_beside_a_table(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png(name))
    head = ("index", "image_path")
    one, two = tsv_rows(
        tsv(tmp_path / "t.tsv", head, (1, "images/red.png"), (2, "['images/red.png', 'images/blue.png']"))
    )
    assert [colour_of(image) for image in one["image"] + two["image"]] == [RED, RED, BLUE]


def parquet(path: Path, rows: dict[str, Any], schema: Any = None, groups: int = 2) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(rows, schema=schema), path, row_group_size=groups)
    return path


def test_parquet_gives_sources_and_plain_values(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "named.png").write_bytes(png("blue"))
    red, blue, named = {"bytes": png("red")}, {"bytes": png("blue")}, {"path": "named.png"}
    rows = {
        "question": ["a", "b", "c"], "options": [["x"], [], None], "image": [red, None, named],
        "images": [[red, blue], [blue], []], "raw": [png("red"), png("blue"), None],
    }  # fmt: skip
    schema = pa.schema([
        ("question", pa.string()), ("options", pa.list_(pa.string())), ("image", cell), ("images", pa.list_(cell)),
        ("raw", pa.binary()),
    ])  # fmt: skip
    a, b, c = parquet_rows(parquet(tmp_path / "t.parquet", rows, schema))
    assert [row["question"] for row in (a, b, c)] == ["a", "b", "c"] and [a["options"], b["options"]] == [["x"], []]
    assert colour_of(a["image"]) == RED and b["image"] is None and colour_of(c["image"]) == BLUE
    assert [colour_of(image) for image in a["images"]] == [RED, BLUE] and colour_of(b["images"]) == BLUE
    assert c["images"] is None and colour_of(a["raw"]) == RED and colour_of(b["raw"]) == BLUE
    with pytest.raises(DataError, match="row 3: has no `answer`"):
        field(a, "answer", "row 3", str)


def test_parquet_of_nothing_but_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    rows = {"image": [{"bytes": png("red")}, {"bytes": png("blue")}, {"bytes": png("red")}]}
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary())]))])
    found = list(parquet_rows(parquet(tmp_path / "t.parquet", rows, schema)))
    assert [colour_of(row["image"]) for row in found] == [RED, BLUE, RED]


def test_parquet_that_names_files_elsewhere_or_is_damaged(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = parquet(tmp_path / "t.parquet", {"image": [{"path": "../x.png"}]}, pa.schema([("image", cell)]))
    (row,) = parquet_rows(path)
    with pytest.raises(MediaError, match="leaves the folder"):
        read_bytes(row["image"])
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet: not a whole parquet file"):
        list(parquet_rows(tmp_path / "cut.parquet"))


def test_official_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.json"
    path.write_text('\ufeff{"questions": []}')
    assert read_json(path, "questions") == {"questions": []}
    for text, said in (
        ("{", "cannot be read as JSON"), ("[" * 10**5, "cannot be read as JSON"), ("[]", "has no `questions`"),
        ('{"annotations": []}', "has no `questions`"), ("<html>", "cannot be read as JSON"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=said) as error:
            read_json(path, "questions")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_json(path)
    monkeypatch.setattr(files, "MAX_JSON", 2)
    with pytest.raises(DataError, match="larger than 2 bytes"):
        read_json(path)
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y\u0085"}\n\n{"a": 2}\r\n', encoding="utf-8", newline="")
    assert [row["a"] for row in read_lines(path)] == ["x\u2028y\u0085", 2]
    for data, said in (
        (b'{"a": 1}\n{"a": ', "line 2 is no JSON"), (b'{"a": 1}\n[2]\n', "line 2: expected an object, found list"),
        (b'{"a": 1}\n\xff\n', "cannot be read"), (b"[" * 10**5, "line 1"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(DataError, match=said):
            list(read_lines(path))


def test_values_of_a_row() -> None:
    assert field({"a": 1}, "a", "row", int, str) == 1
    for row, said in (({"a": True}, "`a` is True, expected int"), ({"a": None}, "`a` is None"), ([], "has no `a`")):
        with pytest.raises(DataError, match=said):
            field(row, "a", "row", int)
    assert literal("['a', 'b']", "row") == ["a", "b"] and literal(["a"], "row") == ["a"]
    for text in ("['a'", "__import__('os')", "(" * 5000):
        with pytest.raises(DataError, match="is no list"):
            literal(text, "row")


def test_finding_files(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/x.json", "b/x.json", "b/y.tsv"):
        (tmp_path / name).write_text("index\n1\n")
    assert find_file(tmp_path, "z.json", "x.json") == tmp_path / "b" / "x.json"
    assert find_file(tmp_path, "z.json") is None
    with pytest.raises(DataError, match=r"none of z\.json, w\*"):
        need_file(tmp_path, "z.json", "w*")
    assert [dict(row) for row in rows_in(tmp_path, "*.parquet", "y.tsv")] == [{"index": "1"}]
    with pytest.raises(DataError, match=r"none of \*\.parquet is in it"):
        list(rows_in(tmp_path, "*.parquet"))


def test_rows_are_those_of_the_first_form_that_is_there(tmp_path: Path) -> None:
    for name in ("a/x-0.tsv", "a/x-1.tsv", "b/y-0.tsv", "c/y-1.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"name\n{name}\n")
    (tmp_path / "a" / "q.json").write_text('[{"name": "one"}, {"name": "two"}]')

    def places(*forms: Any) -> list[tuple[str, str]]:
        return [(row["name"], row.where.removeprefix(f"{tmp_path}/")) for row in rows_in(tmp_path, *forms)]

    shards = [("a/x-0.tsv", "a/x-0.tsv: line 2"), ("a/x-1.tsv", "a/x-1.tsv: line 2")]
    assert places("none.tsv", ("q.json", json_rows), "x-*.tsv") == [
        ("one", "a/q.json: row 0"),
        ("two", "a/q.json: row 1"),
    ]
    assert places("x-*.tsv", ("q.json", json_rows)) == shards
    with pytest.raises(DataError, match=r"y-\*\.tsv is in .*b and .*c; give the folder of this benchmark"):
        places("y-*.tsv")
    assert [name for name, _ in places("*/y-*.tsv")] == ["b/y-0.tsv", "c/y-1.tsv"]  # as many folders as there are


def test_a_column_is_asked_for_by_all_its_names() -> None:
    row = Row({"a": None, "b": "x", "n": 7, "gone": "nan", "image": ["p"], "B": "no"}, "t.tsv: line 2")
    assert (row.text("a", "b"), row.text("n"), row.text("gone", default="-"), row.id("index", "n")) == (
        "x",
        "7",
        "-",
        "7",
    )
    assert (row.value(str, "z", "b"), row.texts("answers", "b"), row.image()) == ("x", ("x",), "p")
    faults: list[tuple[Any, str]] = [
        (lambda: row.text("z"), "the column `z` is not there"),
        (lambda: row.text("gone"), "the column `gone` is empty"),
        (lambda: row.value(str, "n"), "`n` is 7, expected str"), (lambda: row.value(str, "z"), "has no `z`"),
        (lambda: row.id("b"), "`b` is 'x', expected a number"),
        (lambda: row.options("z"), "has no options in z or A, B"),
        (lambda: Row({}, row.where).image(), "`image` holds 0 images, expected one"),
        (lambda: Row([1], row.where), "line 2 is [1], expected an object"),
    ]  # fmt: skip
    for fault, said in faults:
        with pytest.raises(DataError, match=re.escape(said)) as error:
            fault()
        assert str(error.value).startswith("t.tsv: line 2")

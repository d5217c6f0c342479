"""Tar archives and parquet files: images stay inside and are read one by one; damage is found and named."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from polymodal.data.load import iter_rows, load_records, row_record
from polymodal.data.readers import parquet as texts
from polymodal.data.readers.base import CAPTION
from polymodal.data.readers.registry import FORMATS, detect_format
from polymodal.errors import DataError, MediaError
from polymodal.media import source as table
from polymodal.media.image import open_image
from polymodal.media.source import describe, read_bytes, read_column
from polymodal.messages import Audio, Document, FileSlice, Image, TableCell, Text, Video, assistant, system, user


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (3, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def red(source: Any) -> int:
    pixel = open_image(source).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


def reds(path: Path, **options: Any) -> list[list[int]]:
    """The colour of each record's images, decoded through their sources."""
    records = load_records(path, **options)
    parts = [[part for message in record.messages for part in message.parts] for record in records]
    return [[red(part.source) for part in found if isinstance(part, Image)] for found in parts]


def faults(path: Path, **options: Any) -> list[str]:
    found = []
    for row in iter_rows(path, **options):
        try:
            row_record(row)
        except DataError as error:
            assert str(error).startswith(row.where) and "\n" not in str(error)
            found.append(str(error).removeprefix(f"{path}: "))
    return found


def tar(path: Path, members: dict[str, bytes | str | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def turns(*values: str, **fields: Any) -> str:
    said = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return json.dumps({**fields, "conversations": said})


def test_tar_of_every_kind_of_sample(tmp_path: Path) -> None:
    long = "n" * 150  # needs a second header
    path = tar(
        tmp_path / "shard-0.tar",
        {
            "a/001.jpg": png(1),
            "a/001.txt": "A cat.\n",
            "a/001.json": json.dumps({"url": "http://x", "caption": "other"}),  # img2dataset writes both
            "a/001.cls": "7",
            "002.0.png": png(2),
            "002.1.png": png(3),
            "002.json": turns("<image>\nor\n<image>?", "The first.", id="two", kind="choice", image=["x.png", "y.png"]),
            f"{long}.png": png(4),
            f"{long}.json": json.dumps({"question": "Red?", "answer": "yes"}),
            "004.b.png": png(5),
            "004.a.png": png(6),
            "004.json": turns("<image> then <image>", "A", images=["a.png", "004.b.png"]),
            "005.json": turns("Only text?", "Yes."),
            "006.mp4": b"video",
            "006.json": turns("<video>", "A film."),
        },
    )
    assert detect_format(path) == "webdataset"
    records = load_records(path)
    assert [(r.id, r.kind, r.source) for r in records] == [
        ("a/001", "caption", "shard-0"),
        ("two", "choice", "shard-0"),
        (long, "vqa", "shard-0"),
        ("004", "conversation", "shard-0"),
        ("005", "conversation", "shard-0"),
        ("006", "conversation", "shard-0"),
    ]
    assert reds(path, kind="x") == [[1], [2, 3], [4], [6, 5], [], []]  # the fourth lists its images by name
    assert records[0].messages[0].parts[1:] == (Text(CAPTION),)
    assert records[0].messages[1] == assistant("A cat.")
    assert records[2].messages[0].text == "Red?"
    video = records[5].messages[0].parts[0]
    assert isinstance(video, Video) and isinstance(video.source, FileSlice)
    assert read_bytes(video.source) == b"video"
    assert describe(video.source) == f"{path}: 006.mp4"


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_tar_members_that_are_refused(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar",
        {
            "good.png": png(1),
            "good.txt": "good",
            "../up.png": png(2),
            "../up.txt": "slip",
            "/etc/abs.png": png(2),
            "a/../../b.png": png(2),
            "c\\..\\..\\d.png": png(2),
            "soft.png": link("soft.png", "/etc/passwd"),
            "soft.txt": "a link",
            "hard.png": link("hard.png", "good.png", tarfile.LNKTYPE),
            "pipe.png": link("pipe.png", "", tarfile.FIFOTYPE),
            "mute.png": png(2),
            "blind.txt": "no image",
            "empty.png": png(2),
            "empty.txt": " \n",
            "bad.png": png(2),
            "bad.json": '{"caption": ',
            "list.png": png(2),
            "list.json": "[1]",
            "latin.png": png(2),
            "latin.txt": b"caf\xe9",
            "two.txt": "a",
            "two.b.txt": "b",
            "count.png": png(2),
            "count.json": turns("<image> <image>", "A"),
            "good2.png": png(9),
            "good2.txt": "good",
            "good.txt ": "x",
            "sub": link("sub", "", tarfile.DIRTYPE),
        },
    )
    found = faults(path)
    expected = [
        "sample ../up: member ../up.png: its name leaves the archive",
        "sample /etc/abs: member /etc/abs.png: its name is absolute",
        "sample a/../../b: member a/../../b.png: its name leaves the archive",
        "sample c\\: member c\\..\\..\\d.png: its name leaves the archive",
        "sample soft: member soft.png: is a link",
        "sample hard: member hard.png: is a link",
        "sample pipe: member pipe.png: is not a plain file",
        "sample mute: has no text; add a .txt",
        "sample blind: has no image and no conversation",
        "sample empty: has no text",
        "sample bad: member bad.json is not valid JSON",
        "sample list: member list.json must be a JSON object",
        "sample latin: member latin.txt is not UTF-8 text (byte 3)",
        "sample two: has two .txt members; keep one",
        "sample count: 2 <image> placeholders but 1 items in `images`",
        "sample good: its members do not follow one another",
    ]
    assert len(found) == len(expected)
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(start)
    good = [row_record(row) for row in iter_rows(path) if row.error is None and row.id.startswith("good")]
    assert [red(record.messages[0].media[0].source) for record in good] == [1, 9]
    with pytest.raises(DataError, match=r"sample \.\./up"):
        load_records(path)


def test_tar_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = tar(
        tmp_path / "whole.tar", {f"{i}.{end}": data for i in range(3) for end, data in (("png", png(i)), ("txt", "c"))}
    )
    content = whole.read_bytes()
    blocks = 3 * 4  # each sample: two headers, two contents
    for size in [*range(512, blocks * 512 + 1, 512), *range(700, blocks * 512, 997)]:
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[:size])
        rows = list(iter_rows(cut))
        good = [row_record(row) for row in rows if row.error is None]
        assert [record.id for record in good] == ["0", "1", "2"][: len(good)]
        assert len(good) >= (size - 1) // 2048  # a sample that is whole is not lost
        assert [red(record.messages[0].media[0].source) for record in good] == list(range(len(good)))
        errors = [str(row.error) for row in rows if row.error is not None]
        assert len(errors) in (1, 2) and any("cut off" in e or "has no text" in e for e in errors), (size, errors)


def test_tar_damaged_in_the_middle_is_noticed(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar", {f"{i}.{end}": data for i in range(3) for end, data in (("png", png(i)), ("txt", "c"))}
    )
    content = bytearray(path.read_bytes())
    content[2048 + 20] ^= 0xFF  # the header of 1.png: its checksum is wrong, which tarfile takes for the end
    path.write_bytes(content)
    assert faults(path) == [
        "sample (end): damaged header at byte 2048; what follows cannot be read, fetch the archive again"
    ]
    assert len(list(iter_rows(path))) == 2


def test_tars_that_were_joined_by_cat_are_noticed(tmp_path: Path) -> None:
    parts = [tar(tmp_path / f"{n}.tar", {f"{n}.png": png(n), f"{n}.txt": "c"}) for n in range(2)]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert len(list(iter_rows(path))) == 2
    (found,) = faults(path)
    assert "more follows after the end at byte 2048; join archives with `tar --concatenate`, not `cat`" in found


def test_not_a_tar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tar: no such file"):
        load_records(tmp_path / "none.tar")
    (tmp_path / "x.tar").write_bytes(b"hello" * 500)
    with pytest.raises(DataError, match=r"x\.tar: not a tar archive"):
        load_records(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"z\.tar: is compressed, so its members cannot be read one by one"):
        load_records(tmp_path / "z.tar")
    with pytest.raises(DataError, match=r"e\.tar: the archive holds no samples"):
        load_records(tar(tmp_path / "e.tar", {}))


def test_shards_of_a_folder(tmp_path: Path) -> None:
    shards = tmp_path / "set"
    shards.mkdir()
    for i in (1, 0):
        tar(shards / f"{i}.tar", {f"{i}.png": png(i), f"{i}.txt": "c"})
    assert reds(shards) == [[0], [1]]
    assert {record.source for record in load_records(shards)} == {"set"}
    assert reds(shards / "*.tar") == [[0], [1]]


def test_a_slice_has_limits(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"0123456789")
    assert read_bytes(FileSlice(path, 2, 3)) == b"234"
    with pytest.raises(MediaError, match=r"x\.bin: byte 2: 3 bytes, at most 2 are allowed"):
        read_bytes(FileSlice(path, 2, 3), limit=2)
    with pytest.raises(MediaError, match=r"x\.bin: a\.jpg: the file ends before it"):
        read_bytes(FileSlice(path, 8, 3, "a.jpg"))
    with pytest.raises(MediaError, match="0 bytes"):
        read_bytes(FileSlice(path, 8, 0))
    with pytest.raises(MediaError, match="no such file"):
        read_bytes(FileSlice(tmp_path / "none", 0, 1))


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, Any], types: dict[str, Any] | None = None, group: int = 2) -> Path:
    arrays = {name: pa.array(values, type=(types or {}).get(name)) for name, values in columns.items()}
    parquet.write_table(pa.table(arrays), path, row_group_size=group)
    return path


def cell(value: int) -> dict[str, Any]:
    return {"bytes": png(value), "path": f"{value}.png"}


def test_parquet_with_texts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train-0.parquet",
        {
            "images": [[cell(1)], [cell(2), cell(3)], [cell(4)]],
            "texts": [[{"user": f"Q{i} <image>", "assistant": "A"}, {"user": "R", "assistant": "B"}] for i in range(3)],
            "source": ["x", "y", None],
        },
        {"images": pa.list_(STRUCT)},
    )
    assert detect_format(path) == "parquet"
    records = load_records(path)
    assert records[1].messages == (
        user(
            Image(TableCell(path, 0, 1, "images", 0, tmp_path)),
            Image(TableCell(path, 0, 1, "images", 1, tmp_path)),
            "Q1 <image>",
        ),
        assistant("A"),
        user("R"),
        assistant("B"),
    )
    assert [(r.id, r.kind, r.source) for r in records] == [
        ("train-0-0", "conversation", "x"),
        ("train-0-1", "conversation", "y"),
        ("train-0-2", "conversation", "train-0"),
    ]
    assert reds(path) == [[1], [2, 3], [4]]
    assert describe(records[2].messages[0].media[0].source) == f"{path}: row 0 of row group 1, `images`[0]"


def test_parquet_reads_no_image_to_list_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": [cell(1)] * 3, "caption": ["c"] * 3}, {"image": STRUCT})
    monkeypatch.setattr("polymodal.data.readers.parquet.read_column", lambda *a: pytest.fail("images were read"))
    assert len(load_records(path)) == 3
    assert reds(path) == [[1], [1], [1]]


@pytest.mark.parametrize("group", [1, 3, 100])
def test_parquet_forms(tmp_path: Path, group: int) -> None:
    said = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    parts = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    path = tmp_path / "x.parquet"
    write(
        path,
        {"id": ["a", "b", "c"], "image": [cell(1), cell(2), cell(3)], "conversations": [said] * 3},
        {"image": STRUCT},
        group,
    )
    assert reds(path) == [[1], [2], [3]]
    assert [record.id for record in load_records(path)] == ["a", "b", "c"]
    write(
        path,
        {
            "images": [[png(1)], [png(2)], []],
            "messages": [parts, parts, [{**m, "content": m["content"][-1:]} for m in parts]],
        },
        {"images": pa.list_(pa.binary())},
        group,
    )
    assert reds(path) == [[1], [2], []]
    write(
        path,
        {"image": [png(5), png(6)], "question": ["Q", "R"], "answers": [["x", "y", "y"], ["z"]], "question_id": [8, 9]},
        None,
        group,
    )
    assert reds(path) == [[5], [6]]
    first = load_records(path, prompt="Briefly.")[0]
    assert (first.id, first.kind) == ("8", "vqa")
    assert [m.text for m in first.messages] == ["Q\nBriefly.", "y"]
    write(
        path,
        {
            "image": [png(7)],
            "question": ["Q"],
            "multiple_choice_answer": ["m"],
            "answers": [[{"answer": "x", "answer_id": 1}]],
        },
        None,
        group,
    )
    assert load_records(path)[0].messages[1].text == "m"


def test_parquet_says_what_json_says_of_marks_keys_and_no_image(tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    turn = pa.struct([(name, pa.string()) for name in ("from", "value", "role", "content")] + [("weight", pa.int64())])
    rows = [chat, [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}], chat, chat]
    columns = {
        "conversations": rows,
        "images": [[None], [""], [], None],
        "tools": [None, "", None, "[{}]"],
        "system_prompt": [None, None, "S", None],
    }
    path = write(tmp_path / "x.parquet", columns, {"conversations": pa.list_(turn), "images": pa.list_(pa.string())})
    assert faults(path) == [
        "row 3: `tools`[0] must be an object with `function` and its `name`, as in OpenAI's requests"
    ]
    records = [row_record(row).messages for row in list(iter_rows(path))[:3]]
    assert records[0] == (user("Q"), assistant("A")) and records[2] == (system("S"), user("Q"), assistant("A"))
    assert [message.train for message in records[1]] == [True, False]


def test_parquet_without_bytes_has_paths_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "1.png").write_bytes(png(1))
    images = [
        {"bytes": None, "path": "p/1.png"},
        cell(2),
        {"bytes": None, "path": "../x.png"},
        {"bytes": None, "path": None},
        None,
    ]
    path = write(tmp_path / "x.parquet", {"image": images, "text": ["c"] * 5}, {"image": STRUCT})
    assert faults(path) == ["row 4: a caption without an image; fill `image` or `images`"]
    sources = [row_record(row).messages[0].media[0].source for row in iter_rows(path) if row.number < 4]
    assert [red(source) for source in sources[:2]] == [1, 2]
    with pytest.raises(MediaError, match=r"row 0 of row group 1, `image`: '\.\./x\.png' leaves the folder"):
        red(sources[2])
    with pytest.raises(MediaError, match="the cell is empty"):
        red(sources[3])
    path = write(tmp_path / "y.parquet", {"image": ["p/1.png", "../x.png"], "text": ["c", "c"]})
    assert [red(row_record(row).messages[0].media[0].source) for row in iter_rows(path) if row.number == 0] == [1]
    assert "row 1: messages[0].content[0]: `image`: '../x.png' leaves the folder" in faults(path)[0]


def test_parquet_broken_rows_and_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet",
        {"image": [png(1)] * 4, "question": ["Q", "", "Q", None], "answer": ["A", "A", " ", "A"]},
    )
    assert faults(path) == [
        "row 1: the question is missing or empty",
        "row 2: the answer is missing or empty",
        "row 3: the question is missing or empty",
    ]
    with pytest.raises(DataError, match=r"none of the columns conversations, .*; found image, label"):
        load_records(write(tmp_path / "y.parquet", {"image": [png(1)], "label": [1]}))
    with pytest.raises(DataError, match="`question` without multiple_choice_answer"):
        load_records(write(tmp_path / "y.parquet", {"image": [png(1)], "question": ["Q"]}))
    texts = [[{"user": "Q", "assistant": ""}], None, []]
    found = faults(write(tmp_path / "z.parquet", {"texts": texts}))
    problem = "`texts` must be a list of turns with `user` and `assistant`, none of them empty"
    assert found == [f"row {i}: {problem}" for i in range(3)]


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet", {"image": [png(i) for i in range(6)], "text": [f"caption {i}" * 9 for i in range(6)]}
    )
    content = path.read_bytes()
    cut = tmp_path / "cut.parquet"
    for size in (4, 100, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"cut\.parquet: not a whole parquet file"):
            load_records(cut)
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        load_records(tmp_path / "none.parquet", format="parquet")
    # The text of the second row group is damaged: its rows are one fault, the others are read.
    group = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = group.dictionary_page_offset or group.data_page_offset
    damaged = bytearray(content)
    damaged[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    cut.write_bytes(damaged)
    rows = list(iter_rows(cut))
    assert [row.number for row in rows] == [0, 1, 2, 3, 4]
    assert str(rows[2].error).startswith(f"{cut}: rows 2 to 3: row group 1 is damaged")
    assert [row_record(row).messages[1].text[:9] for row in rows if row.error is None] == [
        f"caption {i}" for i in (0, 1, 4, 5)
    ]


def test_cells_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": [png(1), None]})
    with pytest.raises(MediaError, match=r"row 0 of row group 0, `image`: [\d]+ bytes, at most 10 are allowed"):
        read_bytes(TableCell(path, 0, 0, "image"), limit=10)
    for broken, complaint in (
        (TableCell(path, 0, 1, "image"), "the cell is empty"),
        (TableCell(path, 0, 2, "image"), "no such row"),
        (TableCell(path, 1, 0, "image"), "no column `image` in row group 1"),
        (TableCell(path, 0, 0, "picture"), "no column `picture`"),
        (TableCell(tmp_path / "none", 0, 0, "image"), "cannot be read"),
    ):
        with pytest.raises(MediaError, match=complaint):
            read_bytes(broken)
    monkeypatch.setattr(table, "MAX_GROUP_BYTES", 10)
    table._column.cache_clear()
    with pytest.raises(MediaError, match=r"row group 0 has [\d]+ bytes, at most 10"):
        read_bytes(TableCell(path, 0, 0, "image"))


def bomb(path: Path, name: str, times: int) -> Path:
    """A file of half a megabyte whose one text, of ten, is said many times."""
    lone = pa.DictionaryArray.from_arrays(pa.array([0] * times, "int32"), pa.array(["x" * 10 * 2**20]))
    columns = {name: lone}
    if name == "messages":
        turns = pa.StructArray.from_arrays([pa.array(["user"] * times), lone], ["role", "content"])
        columns = {name: pa.ListArray.from_arrays(pa.array([0, times], "int32"), turns)}
    if name == "image":
        lone = pa.DictionaryArray.from_arrays(lone.indices, lone.dictionary.cast("binary"))
        image = pa.StructArray.from_arrays([lone, pa.array(["a"] * times)], ["bytes", "path"])
        columns = {name: image, "caption": pa.array(["c"] * times)}
    parquet.write_table(pa.table(columns), path, dictionary_pagesize_limit=2**30, store_schema=False)
    assert path.stat().st_size < 2**20
    return path


@pytest.mark.parametrize("name", ["caption", "messages"])
def test_parquet_texts_are_measured_before_they_are_written_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = faults(bomb(tmp_path / "x.parquet", name, 60))
    assert "the texts of row group 0 have 629,1" in found and "at most 536,870,912 are allowed" in found
    monkeypatch.setattr(texts, "_MAX_TEXTS", 2**20)
    parquet.write_table(pa.table({"caption": ["x" * 2**21]}), tmp_path / "y.parquet", use_dictionary=False)
    assert "the texts of row group 0 have 2,097,1" in faults(tmp_path / "y.parquet")[0]


def test_parquet_images_that_are_one_image_are_kept_once(tmp_path: Path) -> None:
    rows = list(iter_rows(bomb(tmp_path / "x.parquet", "image", 240)))
    assert len(rows) == 240
    sources = [row_record(row).messages[0].media[0].source for row in rows[::60]]
    assert [len(read_bytes(source)) for source in sources] == [10 * 2**20] * 4
    assert read_column(tmp_path / "x.parquet", 0, "image").nbytes < 16 * 2**20


def test_a_row_group_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": [png(i) for i in range(6)]}, group=3)
    table._column.cache_clear()
    assert [red(TableCell(path, i // 3, i % 3, "image")) for i in range(6)] == list(range(6))
    assert table._column.cache_info().misses == 2


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": [png(1)], "text": ["c"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        DataError,
        match=r"reading parquet needs pyarrow, which is installed but cannot be .*pip install 'polymodal\[data\]'",
    ):
        load_records(path)


def every_form(root: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The same five images with their captions in each form: where, and what the reader is told."""
    folder = root / "folder"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(png(i))
        (folder / f"{i}.txt").write_text(f"caption {i}")
        for name in (f"COCO_train2014_{i:012d}.jpg", f"{i}.jpg"):
            (root / name).write_bytes(png(i))

    def put(name: str, data: Any, **options: Any) -> tuple[Path, dict[str, Any]]:
        (root / name).write_text(json.dumps(data))
        return root / name, options

    numbers, asked = range(5), {"question": CAPTION, "questionId": 0, "question_id": 0, "imageId": "", "image": ""}
    chats = [
        [{"role": "user", "content": f"<image>{CAPTION}"}, {"role": "assistant", "content": f"caption {i}"}]
        for i in numbers
    ]
    parts = [[{"type": "image", "image": f"{i}.jpg"}, {"type": "text", "text": CAPTION}] for i in numbers]
    questions = [{"question_id": i, "image_id": i, "question": CAPTION} for i in numbers]
    answers = [{"question_id": i, "image_id": i, "multiple_choice_answer": f"caption {i}"} for i in numbers]
    annotations, _ = put("answers.json", {"annotations": answers})
    members = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    columns = {"image": [cell(i) for i in numbers], "caption": [f"caption {i}" for i in numbers]}
    llava = [json.loads(turns(f"<image>\n{CAPTION}", f"caption {i}", image=f"{i}.jpg")) for i in numbers]
    messages = [{"images": [f"{i}.jpg"], "messages": chats[i]} for i in numbers]
    return {
        "folder": (folder, {}),
        "json": put("rows.json", [*llava[:3], *messages[3:]]),
        "llava": put("llava.json", llava),
        "messages": put("messages.json", messages),
        "openai": put(
            "openai.json", [{"messages": [{"role": "user", "content": parts[i]}, chats[i][1]]} for i in numbers]
        ),
        "coco": put(
            "coco.json",
            {
                "images": [{"id": i, "file_name": f"{i}.jpg"} for i in numbers],
                "annotations": [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in numbers],
            },
        ),
        "vqav2": put(
            "v.json", {"data_subtype": "train2014", "questions": questions}, annotations=annotations, prompt=""
        ),
        "gqa": put(
            "g.json", {str(i): {**asked, "imageId": f"{i}", "answer": f"caption {i}"} for i in numbers}, prompt=""
        ),
        "textvqa": put(
            "t.json",
            {"data": [{"question": CAPTION, "image_id": f"{i}", "answers": [f"caption {i}"]} for i in numbers]},
            prompt="",
        ),
        "docvqa": put(
            "d.json",
            {"data": [{**asked, "image": f"{i}.jpg", "answers": [f"caption {i}"]} for i in numbers]},
            prompt="",
        ),
        "parquet": (write(root / "x.parquet", columns), {}),
        "webdataset": (tar(root / "x.tar", members), {}),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_says_the_same(form: str, tmp_path: Path) -> None:
    path, options = every_form(tmp_path)[form]
    for how in ("auto", form):
        if how == "auto":
            found = {"llava": "json", "messages": "json", "openai": "json"}.get(form, form)
            assert detect_format(path) == found
        records = load_records(path, kind="caption", format=how, **options)
        assert len(records) == 5
        for i in (3, 0, 4, 1, 2):  # any order, as training wants them
            asked, answered = records[i].messages
            assert (asked.text, answered.text, records[i].kind) == (CAPTION, f"caption {i}", "caption")
            assert red(asked.media[0].source) == i


@settings(max_examples=60, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 8 * 512 - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_tar_is_a_fault_and_no_crash(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    tar(path, {"a.png": png(1), "a.txt": "c", "b.png": png(2), "b.json": turns("<image>", "A")})
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position] = value
    path.write_bytes(content)
    try:
        rows = list(iter_rows(path))
    except DataError:  # the first header is no header any more
        return
    for row in rows:
        try:
            for part in row_record(row).messages[0].media:
                open_image(part.source)
        except (DataError, MediaError) as error:
            assert "\n" not in str(error)


def test_videos_sounds_and_documents_in_an_archive(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "s.tar",
        {
            "1.mp4": b"v",
            "1.json": turns("<video>Q", "A", video={"path": "1.mp4", "num_frames": 4}),
            "2.b.webm": b"b",
            "2.a.webm": b"a",
            "2.json": turns("<video>Q<video>", "A", videos=[{"video": "a.webm", "fps": 2}, "b.webm"]),
            "3.opus": b"s",
            "3.txt": "A bell.",
            "4.pdf": b"d",
            "4.json": json.dumps({"question": "Who?", "answer": "Ann"}),
            "5.pdf": b"d",
            "5.json": turns("<document>Q", "A", documents=[{"path": "else.pdf", "pages": "2"}]),
            "6.wav": b"s",
            "6.json": turns("<audio>Q", "A", transcript="hello"),
        },
    )

    def member(name: str) -> Any:
        return next(part.source for r in records for part in r.messages[0].media if part.source.name == name)

    records = load_records(path)
    assert [record.messages[0] for record in records] == [
        user(Video(member("1.mp4"), num_frames=4), "Q"),
        user(Video(member("2.a.webm"), fps=2), "Q", Video(member("2.b.webm"))),
        user(Audio(member("3.opus")), CAPTION.replace("image", "audio")),
        user(Document(member("4.pdf")), "Who?"),
        user(Document(member("5.pdf"), pages="2"), "Q"),
        user(Audio(member("6.wav")), "Q"),
    ]
    assert records[5].extra == {"transcript": "hello"}


def test_videos_sounds_and_documents_in_parquet(tmp_path: Path) -> None:
    said = [[{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": "A"}]] * 3
    clips = [
        {"bytes": b"v", "path": None, "num_frames": 4, "fps": None},
        {"bytes": None, "path": "v.mp4", "num_frames": None, "fps": 2.0},
        {"bytes": b"w", "path": None, "num_frames": None, "fps": None},
    ]
    path = write(tmp_path / "v.parquet", {"conversations": said, "video": clips})
    root = path.parent
    assert [record.messages[0].parts[0] for record in load_records(path)] == [
        Video(TableCell(path, 0, 0, "video", root=root), num_frames=4),
        Video(TableCell(path, 0, 1, "video", root=root), fps=2.0),
        Video(TableCell(path, 1, 0, "video", root=root)),
    ]
    paths = write(tmp_path / "p.parquet", {"conversations": said, "videos": [["a.mp4"], ["b.mp4"], ["c.mp4"]]})
    assert [record.messages[0].parts[0] for record in load_records(paths)] == [
        Video(root / "a.mp4"), Video(root / "b.mp4"), Video(root / "c.mp4")
    ]  # fmt: skip
    listed = write(tmp_path / "l.parquet", {"conversations": said[:1], "videos": [clips[:1]]})
    assert load_records(listed)[0].messages[0].parts[0] == Video(
        TableCell(listed, 0, 0, "videos", 0, root), num_frames=4
    )
    speech = {"audio": [{"bytes": b"s", "path": "x.wav"}], "text": ["a bell"], "transcript": ["ding"]}
    record = load_records(write(tmp_path / "a.parquet", speech))[0]
    assert record.messages[0].parts[0] == Audio(TableCell(tmp_path / "a.parquet", 0, 0, "audio", root=root))
    assert record.extra == {"transcript": "ding"} and record.messages[1].text == "a bell"
    asked = {"document": [{"bytes": b"d", "path": None, "pages": "1-2"}], "question": ["Who?"], "answer": ["Ann"]}
    record = load_records(write(tmp_path / "d.parquet", asked))[0]
    assert record.messages[0].parts[0] == Document(
        TableCell(tmp_path / "d.parquet", 0, 0, "document", root=root), pages="1-2"
    )
    prose = {"document": ["Once upon a time."], "question": ["Who?"], "answer": ["Ann"]}
    assert load_records(write(tmp_path / "t.parquet", prose))[0].messages[0].parts == (Text("Who?"),)

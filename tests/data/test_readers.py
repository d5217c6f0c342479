"""Readers for official VQA and caption files, JSON rows and folders: small files, whole and broken."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from polymodal.data.load import KINDS, iter_rows, load_records, record_from_json, record_to_json, row_record
from polymodal.data.readers.base import CAPTION, SHORT_ANSWER, best_answer
from polymodal.data.readers.conversations import Record
from polymodal.data.readers.registry import FORMATS, detect_format
from polymodal.errors import ConfigError, DataError
from polymodal.media.source import read_bytes
from polymodal.messages import Audio, Document, FileSlice, Image, Message, TableCell, Text, Video, assistant, user


def put(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def faults(path: Path, **options: Any) -> list[str]:
    """What is wrong with each broken row; rows are read to the end."""
    found = []
    for row in iter_rows(path, **options):
        try:
            row_record(row)
        except DataError as error:
            assert str(error).startswith(row.where) and "\n" not in str(error)
            found.append(str(error))
    return found


def question(number: int, image: int, text: str = "How many?") -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number: int, image: int, answer: str, *others: str) -> dict[str, Any]:
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate((answer, *others))]
    return {
        "question_id": number,
        "image_id": image,
        "multiple_choice_answer": answer,
        "answers": answers,
        "answer_type": "number",
        "question_type": "how many",
    }


def vqav2(folder: Path, questions: list[Any], annotations: list[Any], subtype: str = "train2014") -> tuple[Path, Path]:
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": subtype, "license": {}}
    return (
        put(folder / "questions.json", {**head, "questions": questions}),
        put(folder / "annotations.json", {**head, "annotations": annotations}),
    )


def test_vqav2(tmp_path: Path) -> None:
    questions, annotations = vqav2(
        tmp_path, [question(10, 9), question(11, 9, " What? ")], [annotation(11, 9, "dog"), annotation(10, 9, "2")]
    )
    first, second = load_records(questions, tmp_path / "pictures", annotations=annotations)
    image = Image(tmp_path / "pictures/COCO_train2014_000000000009.jpg")
    assert first == Record(
        "10", (user(image, f"How many?\n{SHORT_ANSWER}"), assistant("2")), "vqa", "questions", {"answer_type": "number"}
    )
    assert second.messages == (user(image, f"What?\n{SHORT_ANSWER}"), assistant("dog"))
    bare = load_records(questions, annotations=annotations, prompt="", kind="counting", source="vqa2")[0]
    assert (bare.messages[0].text, bare.kind, bare.source) == ("How many?", "counting", "vqa2")
    assert (
        load_records(questions, annotations=annotations, prompt="Briefly.")[0].messages[0].text == "How many?\nBriefly."
    )


def test_vqav2_images_in_the_folder_of_their_split(tmp_path: Path) -> None:
    files = vqav2(tmp_path, [question(1, 7)], [annotation(1, 7, "a")], "test-dev2015")
    name = "COCO_test2015_000000000007.jpg"
    put(tmp_path / "test2015" / name, "")
    record = load_records(files[0], annotations=files[1])[0]
    assert record.messages[0].media == (Image(tmp_path / "test2015" / name),)


def test_vqav2_broken_rows_do_not_lose_good_ones(tmp_path: Path) -> None:
    questions, annotations = vqav2(
        tmp_path,
        [
            question(1, 1),
            question(2, 1),
            question(3, 1),
            question(4, 1),
            question(1, 1),
            {"question_id": 6},
            question(7, 1),
        ],
        [
            annotation(1, 1, "a"),
            annotation(3, 2, "a"),
            annotation(4, 1, " "),
            annotation(5, 1, "a"),
            annotation(7, 1, "b"),
        ],
    )
    found = faults(questions, annotations=annotations)
    for complaint, message in zip(
        [
            r"question 1: question_id 2 has no annotation in .*annotations.json",
            "question 2: question_id 3 is about image 1, its annotation about 2",
            "question 3: question_id 4: the answer is missing or empty",
            "question 4: question_id 1 has no annotation in .*, or comes twice",
            "question 5: needs `question_id`, `image_id` and `question`",
        ],
        found,
        strict=True,
    ):
        assert re.search(complaint, message)
    rows = list(iter_rows(questions, annotations=annotations))
    assert [row.number for row in rows] == list(range(7))  # annotation 5 is of another part of the questions
    assert [row_record(row).id for row in rows if row.error is None] == ["1", "7"]
    with pytest.raises(DataError, match="question_id 2 has no annotation"):
        load_records(questions, annotations=annotations)


def test_vqav2_wrong_files(tmp_path: Path) -> None:
    questions, annotations = vqav2(tmp_path, [question(1, 1)], [annotation(1, 1, "a"), annotation(1, 1, "a")])
    with pytest.raises(DataError, match="format vqav2 needs its second file; set `annotations`"):
        load_records(questions)
    with pytest.raises(DataError, match="these are VQAv2's annotations; give the questions"):
        load_records(annotations)
    with pytest.raises(DataError, match=r"annotation 1: question_id 1 comes twice"):
        load_records(questions, annotations=annotations)
    with pytest.raises(DataError, match="no `annotations`; give v2_mscoco"):
        load_records(questions, annotations=questions)
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        load_records(questions, annotations=tmp_path / "none.json")
    cut = put(tmp_path / "cut.json", annotations.read_text()[:-30])
    with pytest.raises(DataError, match=r"cut\.json: not valid JSON: .* after 1 elements of `annotations`"):
        load_records(questions, annotations=cut)


def test_gqa(tmp_path: Path) -> None:
    entry = {
        "imageId": "n1",
        "question": "Is it red?",
        "answer": "yes",
        "fullAnswer": "Yes, it is.",
        "isBalanced": True,
    }
    put(tmp_path / "images" / "n1.jpg", "")
    path = put(
        tmp_path / "q.json", {"0712": entry, "0713": {**entry, "answer": ""}, "0714": {**entry, "imageId": "n2"}}
    )
    assert detect_format(path) == "gqa"
    assert faults(path) == [f"{path}: question '0713': needs `imageId`, `question` and `answer`"]
    rows = [row_record(row) for row in iter_rows(path) if row.error is None]
    assert [(row.id, row.kind, row.messages) for row in rows] == [
        ("0712", "vqa", (user(Image(tmp_path / "images/n1.jpg"), f"Is it red?\n{SHORT_ANSWER}"), assistant("yes"))),
        ("0714", "vqa", (user(Image(tmp_path / "images/n2.jpg"), f"Is it red?\n{SHORT_ANSWER}"), assistant("yes"))),
    ]
    shards = tmp_path / "train_all"
    put(shards / "b.json", {"2": entry})
    put(shards / "a.json", {"1": entry})
    assert [record.id for record in load_records(shards, tmp_path, format="gqa")] == ["1", "2"]
    with pytest.raises(DataError, match="expected an object of questions by id"):
        load_records(put(tmp_path / "list.json", [entry]), format="gqa")


def test_textvqa_with_and_without_ocr(tmp_path: Path) -> None:
    entry = {"image_id": "ab", "question": "what brand?", "question_id": 5, "answers": ["nokia", "Nokia", "nokia", ""]}
    path = put(tmp_path / "t.json", {"dataset_type": "train", "data": [entry, {**entry, "answers": []}]})
    assert detect_format(path) == "textvqa"
    assert len(faults(path)) == 1
    row = next(iter_rows(path))
    record = row_record(row)
    assert (record.id, record.kind, record.messages[1].text) == ("5", "ocr", "nokia")
    assert record.messages[0] == user(Image(tmp_path / "ab.jpg"), f"what brand?\n{SHORT_ANSWER}")
    ocr = put(tmp_path / "ocr.json", {"data": [{"image_id": "ab", "ocr_tokens": ["NOKIA", "5"]}]})
    asked = row_record(next(iter_rows(path, annotations=ocr))).messages[0].text
    assert asked == f"what brand?\nReference OCR token: NOKIA, 5\n{SHORT_ANSWER}"
    other = put(tmp_path / "other.json", {"data": [{"image_id": "zz", "ocr_tokens": []}]})
    assert "image_id ab is not in" in faults(path, annotations=other)[0]
    with pytest.raises(DataError, match=r"data\[0\]: no list `ocr_tokens`"):
        load_records(path, annotations=path)


def test_rows_inside_an_object_are_not_taken_for_textvqa(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}] * 3
    for indent in (None, 1):
        path = put(tmp_path / "w.json", json.dumps({"version": 1, "data": rows}, indent=indent))
        assert detect_format(path) == "json"
        assert faults(path) == [
            f"{path}: line 1: expected `conversations` (LLaVA) or `messages`, found data, version; "
            "where the rows are its list `data`, give that list alone"
        ]


def test_docvqa_and_infographics(tmp_path: Path) -> None:
    entry = {
        "questionId": 3,
        "question": "Date?",
        "image": "documents/x_1.png",
        "answers": ["May 1", "may 1"],
        "docId": 4,
    }
    head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "train"}
    path = put(tmp_path / "d.json", {**head, "data": [entry]})
    assert detect_format(path) == "docvqa"
    record = load_records(path)[0]
    assert (record.id, record.kind) == ("3", "ocr")
    assert record.messages == (
        user(Image(tmp_path / "documents/x_1.png"), f"Date?\n{SHORT_ANSWER}"),
        assistant("May 1"),
    )
    put(tmp_path / "spdocvqa_images" / "x_1.png", "")
    assert load_records(path)[0].messages[0].media == (Image(tmp_path / "spdocvqa_images/x_1.png"),)
    path = put(
        tmp_path / "i.json",
        {"data": [{"questionId": 1, "question": "Q", "image_local_name": "1.jpeg", "answers": ["A"]}]},
    )
    assert load_records(path)[0].messages[0].media == (Image(tmp_path / "1.jpeg"),)
    path = put(tmp_path / "test.json", {"data": [{"questionId": 1, "question": "Q", "image": "a"}]})
    assert "data[0]: needs `image`, `question` and `answers`" in faults(path)[0]
    path = put(tmp_path / "slip.json", {"data": [{**entry, "image": "../../etc/passwd"}]})
    assert "data[0]: messages[0].content[0]: `image`: '../../etc/passwd' leaves the folder" in faults(path)[0]
    with pytest.raises(DataError, match="no list `data`; give"):
        load_records(put(tmp_path / "none.json", {"questions": []}), format="docvqa")


def test_coco_captions_in_either_order(tmp_path: Path) -> None:
    images = [{"id": 9, "file_name": "000000000009.jpg", "height": 1}]
    captions = [
        {"id": 1, "image_id": 9, "caption": "A cat.\n"},
        {"id": 2, "image_id": 8, "caption": "A dog."},
        {"id": 3, "image_id": 9, "caption": " "},
        {"id": 4, "image_id": 9, "caption": "Two <image> cats."},
    ]
    path = put(tmp_path / "captions_train2017.json", {"info": {}, "images": images, "annotations": captions})
    turned = put(tmp_path / "turned.json", {"annotations": captions, "images": images})
    for file in (path, turned):
        assert detect_format(file) == "coco"
        assert faults(file) == [
            f"{file}: annotation 1: no image with id 8 in `images`",
            f"{file}: annotation 2: `caption` is missing or empty",
        ]
    put(tmp_path / "train2017" / "000000000009.jpg", "")
    good = [row_record(row) for row in iter_rows(path) if row.error is None]
    image = Image(tmp_path / "train2017/000000000009.jpg")
    assert [(r.id, r.kind, r.source) for r in good] == [("1", "caption", path.stem), ("4", "caption", path.stem)]
    assert good[0].messages == (user(image, CAPTION), assistant("A cat."))
    assert good[1].messages[1] == assistant("Two <image> cats.")
    silent = row_record(next(iter_rows(path, prompt="")))
    assert silent.messages[0] == user(image)
    with pytest.raises(DataError, match="no `images` with `file_name`"):
        load_records(put(tmp_path / "none.json", {"annotations": captions}), format="coco")


def test_folder(tmp_path: Path) -> None:
    root = tmp_path / "cats"
    for name, text in [
        ("b.JPG", ""),
        ("b.txt", "A cat.\n"),
        ("sub/a.png", ""),
        ("sub/a.txt", "Two\ncats"),
        (".x.png", ""),
    ]:
        put(root / name, text)
    first, second = load_records(root)
    assert first == Record("b", (user(Image(root / "b.JPG"), CAPTION), assistant("A cat.")), "caption", "cats")
    assert (second.id, second.messages[1].text) == ("sub/a", "Two\ncats")
    for name in ("c.png", "d.txt", "e.png", "e.jpg", "e.txt", "f.png", "f.txt", "g.png"):
        put(root / name, "")
    (root / "g.txt").write_bytes(b"\xff")
    (root / "loop").symlink_to(root)
    found = faults(root)
    for fault, complaint in zip(
        found,
        [
            "c: c.png has no caption; add c.txt",
            "d: d.txt has no image",
            "e: one image and one .txt must have this name, found e.jpg, e.png, e.txt",
            "f: f.txt: the file is empty",
            r"g: g.txt is not UTF-8 text \(byte 0\)",
        ],
        strict=True,
    ):
        assert re.search(complaint, fault), (fault, complaint)
    assert sum(row.error is None for row in iter_rows(root)) == 2


def test_openai_text_is_text(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "<image>?"}]},
        {"role": "assistant", "content": "A"},
    ]
    path = put(
        tmp_path / "o.jsonl",
        "\n".join(map(json.dumps, [{"messages": turns}, turns, {"messages": turns, "images": ["a"]}])),
    )
    expected = (user(Image("data:image/png;base64,AA=="), "<image>?"), assistant("A"))
    rows = list(iter_rows(path, format="openai"))
    assert [row_record(row).messages for row in rows[:2]] == [expected, expected]
    assert faults(path, format="openai") == [
        f"{path}: line 3: format openai has media in its content parts, not in `images`"
    ]
    plain = put(tmp_path / "p.jsonl", json.dumps({"messages": [{"role": "user", "content": "<image>"}, turns[1]]}))
    assert load_records(plain, format="openai")[0].messages[0] == user("<image>")
    with pytest.raises(DataError, match="no `image` key"):
        load_records(plain)


def test_a_format_that_is_named_is_the_only_one(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ]
    path = put(tmp_path / "m.json", rows)
    assert [record.messages for record in load_records(path)] == [(user("Q"), assistant("A"))] * 2
    assert faults(path, format="llava") == [
        f"{path}: record 1: expected `conversations` (format llava), found messages"
    ]
    assert faults(path, format="messages") == [
        f"{path}: record 0: expected `messages` (format messages), found conversations"
    ]


def test_broken_lines_do_not_lose_good_ones(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    half = json.dumps({"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "A"}]})
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\n".join([good.encode(), b'{"messages": [', b'{"a": "\xff"}', half.encode(), b"[" * 9999, good.encode()])
    )
    found = faults(path)
    for fault, complaint in zip(
        found,
        ["line 2: not valid JSON", "line 3: not UTF-8", "line 4: .*half of a surrogate pair", "line 5: "],
        strict=True,
    ):
        assert re.search(complaint, fault)
    assert [row.line for row in iter_rows(path) if row.error is None] == [1, 4, 6]


def test_options_that_a_format_has_not(tmp_path: Path) -> None:
    path = put(tmp_path / "m.json", [{"messages": []}])
    with pytest.raises(DataError, match="has no second file; take `annotations` out"):
        load_records(path, annotations=path)
    with pytest.raises(DataError, match="has its own questions; take `prompt` out"):
        load_records(path, prompt="Describe.")
    with pytest.raises(ConfigError, match="unknown data format 'vqa2'; did you mean 'vqav2'"):
        load_records(path, format="vqa2")
    with pytest.raises(DataError, match=r"no file matches the pattern"):
        load_records(tmp_path / "x-*.json")
    with pytest.raises(DataError, match="it is a folder; give a file of format coco"):
        load_records(tmp_path, format="coco")
    (tmp_path / "a.json.gz").write_bytes(b"\x1f\x8b\x08rest")
    with pytest.raises(DataError, match="is compressed; unpack it first"):
        load_records(tmp_path / "a.json.gz")


@pytest.mark.parametrize("form", ["auto", *(name for name in FORMATS if name != "folder")])
def test_pipes_and_devices_are_refused_unopened(form: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path / "pi*.json", Path("/dev/zero")):
        with pytest.raises(DataError, match="is not a regular file; give a file"):
            list(iter_rows(path, format=form, annotations=path if form == "vqav2" else None))
    if form in ("vqav2", "textvqa"):
        questions = vqav2(tmp_path, [question(1, 1)], [])[0]
        with pytest.raises(DataError, match=r"pipe\.json: is not a regular file"):
            list(iter_rows(questions, format=form, annotations=pipe))


def test_links_inside_the_image_root_are_followed_and_paths_may_not_leave_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk" / "a.png"
    put(elsewhere, "x")
    root = tmp_path / "data"
    root.mkdir()
    (root / "images").symlink_to(elsewhere.parent)
    (root / "b.png").symlink_to(elsewhere)
    for name in ("images/a.png", "b.png"):
        messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A"}]
        path = put(root / "rows.json", [{"image": name, "messages": messages}])
        assert load_records(path)[0].messages[0].media == (Image(root / name),)
        assert read_bytes(root / name) == b"x"
    put(root / "rows.json", [{"image": "../disk/a.png", "messages": messages}])
    with pytest.raises(DataError, match="leaves the folder"):
        load_records(path)


def test_patterns_join_files(tmp_path: Path) -> None:
    for name in ("b", "a"):
        row = {"id": name, "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
        put(tmp_path / f"part-{name}.jsonl", json.dumps(row))
    rows = list(iter_rows(tmp_path / "part-*.jsonl"))
    assert [(row.number, row.data["id"]) for row in rows] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        (["b", "a", "a", "b"], "b"),
        (["x", " y", "y "], "y"),
        ([{"answer": "2"}, {"answer": "3"}, {"answer": "3"}], "3"),
        ("word ", "word"),
        (["", None, 4], ""),
        ([], ""),
        (None, ""),
    ],
)
def test_best_answer(answers: Any, best: str) -> None:
    assert best_answer(answers) == best


def test_records_survive_being_written(tmp_path: Path) -> None:
    record = Record(
        "1",
        (
            user(
                Image(tmp_path / "a"),
                "<image>",
                Image("data:,a"),
                Image(FileSlice(tmp_path / "s.tar", 512, 9, "a.jpg")),
            ),
            Message("assistant", ()),
            user(Audio(TableCell(tmp_path / "t.parquet", 0, 3, "audio", 1, tmp_path)), Text("")),
        ),
        "vqa",
        "set",
        {"kinds": ["x"]},
    )
    assert record_from_json(json.loads(json.dumps(record_to_json(record)))) == record
    with pytest.raises(DataError, match="record 1: its image is in memory"):
        record_to_json(Record("1", (user(Image(b"bytes")),)))


def test_kinds() -> None:
    assert {"caption", "vqa", "reasoning", "ocr", "conversation"} == set(KINDS)


def test_a_folder_of_videos_and_sounds(tmp_path: Path) -> None:
    root = tmp_path / "clips"
    for name, text in [("a.mp4", ""), ("a.txt", "A dog."), ("b.ogg", ""), ("b.txt", "A bell."), ("c.mp4", "")]:
        put(root / name, text)
    for name, text in [("d.mp4", ""), ("d.jpg", ""), ("d.txt", "A cat."), ("e.pdf", ""), ("e.txt", "A letter.")]:
        put(root / name, text)
    found = []
    for row in iter_rows(root):
        try:
            found.append(row_record(row).messages[0].parts)
        except DataError as error:
            assert "c: c.mp4 has no caption; add c.txt" in str(error)
    assert found == [
        (Video(root / "a.mp4"), Text(CAPTION.replace("image", "video"))),
        (Audio(root / "b.ogg"), Text(CAPTION.replace("image", "audio"))),
        (Image(root / "d.jpg"), Text(CAPTION)),
        (Document(root / "e.pdf"), Text(CAPTION.replace("image", "document"))),
    ]

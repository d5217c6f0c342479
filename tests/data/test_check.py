"""`polymodal data check` on a file with planted faults, which ships beside this test."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymodal.backends import load_processor
from polymodal.cli import main
from polymodal.data.check.check import Summary, check_files, summary_json
from polymodal.data.check.fix import add_placeholder
from polymodal.data.check.rows import FAULTS
from polymodal.data.load import iter_rows, load_records, row_record
from polymodal.data.readers.conversations import read_record
from polymodal.errors import DataError
from polymodal.messages import Image, user
from polymodal.processing.processor import Processor
from tests.media.makers import clip, many_pages, tone, wav
from tests.processing.tool_templates import QWEN3

PLANTED = Path(__file__).parent / "planted"
BAD = PLANTED / "bad.jsonl"

DROPPED = {
    3: "broken-json",
    5: "not-utf8",
    6: "not-an-object",
    7: "unknown-form",
    8: "no-turns",
    9: "bad-field",
    10: "unknown-role",
    12: "role-order",
    13: "placeholder-count",
    14: "placeholder-count",
    15: "misplaced-medium",
    16: "empty-answer",
    17: "empty-question",
    18: "no-answer",
    19: "missing-file",
    20: "missing-file",
    21: "outside-root",
    22: "remote-file",
    23: "empty-file",
    24: "damaged-image",
    25: "not-an-image",
    26: "too-many-pixels",
    28: "unsupported-medium",
    29: "too-long",
    30: "duplicate-row",
    39: "unsupported-key",
}
"""Line of each row that training could not use, and why: 24 faults, two of them planted twice."""

WARNED = {
    31: "duplicate-id",
    32: "outer-space",
    33: "control-token",
    34: "bad-characters",
    35: "unanswered",
    36: "tiny-image",
    37: "thin-image",
    40: "other-placeholder",
}
"""Line of each row that trains, and that its owner should look at."""

GOOD = (1, 2, 4, 11, 27, 38)
MAX_LENGTH = 450


@pytest.fixture(scope="module")
def processor(tiny_model_folder: Path) -> Processor:
    return load_processor(tiny_model_folder)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_check(path: Path, processor: Processor, output: Path, **options: Any) -> Summary:
    output.mkdir(exist_ok=True)
    return check_files([path], processor, output, max_length=MAX_LENGTH, **options)


def test_every_planted_fault_is_found_and_no_good_row_is_lost(processor: Processor, tmp_path: Path) -> None:
    summary = run_check(BAD, processor, tmp_path)
    dropped, warned = lines_of(tmp_path / "dropped.jsonl"), lines_of(tmp_path / "warnings.jsonl")
    assert {line["line"]: line["code"] for line in dropped} == DROPPED
    assert {line["line"]: line["code"] for line in warned} == WARNED
    assert len({*DROPPED.values(), *WARNED.values()}) >= 20
    # Each row has the one fault that was planted in it, so nothing is reported that is not there.
    assert all(line["all"] == [line["code"]] for line in (*dropped, *warned))
    assert all(line["reason"] and line["advice"] for line in dropped)
    named = {line["line"]: line["id"] for line in dropped}
    assert named[19] == "fault-missing-file" and named[3] == ""
    assert summary.rows == len(BAD.read_bytes().splitlines()) == len(DROPPED) + len(WARNED) + len(GOOD)
    assert len(summary.tokens) == len(WARNED) + len(GOOD)


def test_the_table_of_faults_is_covered_by_the_planted_file() -> None:
    not_planted = {"broken-row", "unreadable-file", "template-refused", "nothing-trained", "dropped-reasoning"}
    not_planted |= {"damaged-video", "damaged-sound", "damaged-document", "bad-setting"}  # see below
    assert {*DROPPED.values(), *WARNED.values()} | not_planted == set(FAULTS)
    assert all(FAULTS[code].severity == "drop" for code in DROPPED.values())
    assert all(FAULTS[code].severity == "warn" for code in WARNED.values())


def test_fix_repairs_what_has_one_outcome_and_touches_no_good_row(processor: Processor, tmp_path: Path) -> None:
    summary = run_check(BAD, processor, tmp_path, fix=True)
    before, after = BAD.read_bytes().splitlines(), (tmp_path / "bad.fixed.jsonl").read_bytes().splitlines()
    for line in GOOD:
        assert before[line - 1] in after
    assert summary.files[0].repaired == 8
    assert dict(summary.repairs) == {
        "role names": 1,
        "placeholder added": 1,
        "placeholder replaced": 1,
        "path mended": 1,
        "new id": 1,
        "answer trimmed": 1,
        "control characters removed": 1,
        "last question removed": 1,
    }
    fixed = {row["id"]: row for row in map(json.loads, after)}
    assert len(fixed) == len(after) == len(GOOD) + len(WARNED) + 3
    assert [turn["from"] for turn in fixed["fault-unknown-role"]["conversations"]] == ["human", "gpt"]
    assert fixed["fault-placeholder-count"]["conversations"][0]["value"] == "<image>\nWhich colour has the triangle?"
    assert fixed["fault-other-placeholder"]["conversations"][0]["value"] == "<image>\nWhich form?"
    assert fixed["fault-path-case"]["image"] == "pictures/Yellow-Circle.png"
    assert fixed["fault-outer-space"]["conversations"][1]["value"] == "Six."
    assert fixed["fault-bad-characters"]["conversations"][1]["value"] == "In the square."
    assert len(fixed["fault-unanswered"]["conversations"]) == 2
    assert fixed["good-2-2"]["conversations"][0]["value"] == "<image>\nIs it a square?"
    # What was written is read by training without a word, and holds nothing more to repair.
    assert len(load_records(tmp_path / "bad.fixed.jsonl", PLANTED)) == len(after)
    again = run_check(tmp_path / "bad.fixed.jsonl", processor, tmp_path / "again", image_root=PLANTED, fix=True)
    assert again.dropped == [] and not again.repairs
    assert (tmp_path / "again" / "bad.fixed.fixed.jsonl").read_bytes().splitlines() == after


OTHERS = {
    "none": "What is it?",
    "qwen": "<|vision_start|><|image_pad|><|vision_end|>What is it?",
    "qwen-vl": "Picture 1: <img>red-circle.png</img>\nWhat is it?",
    "upper": "<IMAGE>\nWhat is it?",
    "phi": "<|image_1|>\nWhat is it?",
    "minicpm": "<image_00>\nWhat is it?",
    "mistral": "[IMG]What is it?",
    "xcomposer": "<ImageHere>What is it?",
    "minigpt4": "<Img><ImageHere></Img>What is it?",
    "internvl": "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is it?",
    "gemma": "<start_of_image>What is it?",
    "gemma processed": "<start_of_image><image_soft_token><image_soft_token><end_of_image>What is it?",
    "glm": "<|begin_of_image|><|image|><|end_of_image|>What is it?",
    "mmmu": "<image 1>What is it?",
    "internlm": "<IMG_CONTEXT>What is it?",
    "minicpm-v 2.6": "<image>./</image>\nWhat is it?",
    "closed": "<image/>What is it?",
    "html": '<img src="red-circle.png">What is it?',
}


@pytest.mark.parametrize(("key", "who", "what"), [("conversations", "from", "value"), ("messages", "role", "content")])
def test_fix_replaces_the_placeholders_of_other_tools(key: str, who: str, what: str, tmp_path: Path) -> None:
    for name, text in OTHERS.items():
        data = {"image": "red-circle.png", key: [{who: "user", what: text}, {who: "assistant", what: "A circle."}]}
        add_placeholder(data, tmp_path)
        gap = "\n" if key == "conversations" or "\n" in text else ""
        assert data[key][0][what] == f"<image>{gap}What is it?", name


@pytest.mark.parametrize(
    ("images", "text", "mended"),
    [
        (["a.png", "b.png"], "<|image_1|> or <|image_2|>?", "<image> or <image>?"),
        (["a.png", "b.png"], "<img>x/a.png</img> or <img>b.png</img>?", "<image> or <image>?"),
        (["a.png", "b.png"], "<|image_2|> or <|image_1|>?", ""),
        (["a.png", "b.png"], "<img>b.png</img> or <img>a.png</img>?", ""),
        (["a.png", "b.png"], "Is [IMG] red?", ""),
        ("a.png", "Is [IMG] or [IMG] red?", ""),
        ("a.png", "<img>b.png</img>What?", ""),
        ("a.png", "<image>\nIs <|image_pad|> a token?", ""),
    ],
)
def test_fix_leaves_placeholders_that_with_two_meanings(images: Any, text: str, mended: str, tmp_path: Path) -> None:
    data = {"images": images, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A."}]}
    add_placeholder(data, tmp_path)
    assert data["messages"][0]["content"] == (mended or text)


def test_fix_reads_images_by_name(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image_01> or\n<image_00>?"}, {"role": "assistant", "content": "The first."}]
    data = {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "conversations": turns}
    with pytest.raises(DataError, match=r"`image` names its media by placeholder .*; write <image> in the text"):
        read_record(data, tmp_path, "x")
    add_placeholder(data, tmp_path)
    assert data["image"] == ["b.png", "a.png"]
    first = read_record(data, tmp_path, "x").messages[0]
    assert first == user(Image(tmp_path / "b.png"), " or", Image(tmp_path / "a.png"), "?")


def test_the_mission_s_own_format_is_checked_fixed_and_read(processor: Processor, tmp_path: Path) -> None:
    shutil.copytree(PLANTED / "pictures", tmp_path / "pictures")
    rows = []
    for number, (question, answer) in enumerate(
        [("<image>\nDescribe this image.", "A red circle."), ("<image>\n描述这张图片中的内容", "一个红色的圆。")]
    ):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"r{number}", "image": "pictures/red-circle.png", "conversations": turns})
    rows.append({**rows[1], "id": "bare", "conversations": [{**turns[0], "content": "描述"}, turns[1]]})
    rows.append(
        {"id": "role", "image": "", "conversations": [{**turns[0], "role": "User", "content": "你好"}, turns[1]]}
    )
    for name, text in (("m.json", json.dumps(rows, ensure_ascii=False)), ("m.jsonl", "\n".join(map(json.dumps, rows)))):
        data = tmp_path / name
        data.write_text(text, encoding="utf-8")
        summary = run_check(data, processor, tmp_path / "out", fix=True)
        assert not summary.dropped and not summary.warnings
        assert dict(summary.repairs) == {"placeholder added": 1, "role names": 1}
        fixed = load_records(tmp_path / "out" / f"m.fixed{data.suffix}", tmp_path)
        assert [record.messages[1].text for record in fixed] == ["A red circle.", *["一个红色的圆。"] * 3]
        assert [record.messages[0].text for record in fixed] == [
            "Describe this image.",
            "描述这张图片中的内容",
            "描述",
            "你好",
        ]
        assert [len(record.messages[0].media) for record in fixed] == [1, 1, 1, 0]


def test_marks_on_turns_are_followed_and_said(
    tiny_model_folder: Path, processor: Processor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(**mark: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"Add {mark}."}, {"role": "assistant", "content": "BAD", **mark}]
        return {"messages": [*turns, {"role": "user", "content": "Again."}, {"role": "assistant", "content": "Two."}]}

    marks: list[dict[str, Any]] = [{"loss": False}, {"weight": 0}, {"train": False}, {"loss": True}]
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps(row(**mark)) + "\n" for mark in [*marks, {"reasoning_details": ["one and one"]}])
    )
    argv = ["data", "check", str(data), "--model", str(tiny_model_folder), "--output", str(tmp_path / "out")]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "3 answers are shown and not trained (loss: false, weight: 0, train: false)" in said
    assert "1  unsupported-key" in said and "5 rows: 4 good, 0 to look at, 1 to drop" in said
    assert "`reasoning_details` cannot be followed" in lines_of(tmp_path / "out" / "dropped.jsonl")[0]["reason"]
    for raw, mark in zip(iter_rows(data), marks, strict=False):
        sample = processor(row_record(raw).messages)
        trained = processor.tokenizer.decode(sample.input_ids[sample.loss_mask])
        assert ("BAD" in trained) == ("loss" in mark and mark["loss"]) and "Two." in trained


def test_the_same_text_about_another_image_is_another_row(processor: Processor, tmp_path: Path) -> None:
    shutil.copytree(PLANTED / "pictures", tmp_path / "pictures")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A form."}]
    shutil.copy(tmp_path / "pictures" / "red-circle.png", tmp_path / "pictures" / "copy.png")
    names = ["red-circle.png", "green-square.jpg", "blue-triangle.png", "copy.png"]
    rows = [{"id": name, "image": f"pictures/{name}", "conversations": turns} for name in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    summary = run_check(tmp_path / "rows.json", processor, tmp_path / "out")
    assert [(line["id"], line["code"]) for line in summary.dropped] == [("copy.png", "duplicate-row")]


@pytest.mark.parametrize(("question", "answer", "code"), [("Q", " ", "empty-answer"), (" ", "A", "empty-question")])
def test_check_and_training_refuse_the_same_empty_turns(
    question: str, answer: str, code: str, processor: Processor, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "e", "conversations": turns}]))
    summary = run_check(tmp_path / "rows.json", processor, tmp_path / "out")
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / "rows.json")
    assert summary.dropped[0]["code"] == caught.value.code == code
    assert str(caught.value).endswith(summary.dropped[0]["reason"])


def test_a_list_with_a_broken_element_keeps_the_others(processor: Processor, tmp_path: Path) -> None:
    shutil.copytree(PLANTED / "pictures", tmp_path / "pictures")
    rows = BAD.read_bytes().splitlines()
    broken = (
        b'{"id": "x", "conversations": [{"from": "human", "value": "a "quoted" word"}, {"from": "gpt", "value": "b"}]}'
    )
    pieces = [rows[0], broken, rows[1], rows[3]]
    data = tmp_path / "list.json"
    data.write_bytes(b"[\n" + b",\n".join(pieces) + b"\n]\n")
    summary = run_check(data, processor, tmp_path / "out", fix=True)
    assert [(line["line"], line["code"]) for line in summary.dropped] == [(3, "broken-json")]
    assert json.loads((tmp_path / "out" / "list.fixed.json").read_bytes()) == [
        json.loads(row) for row in (rows[0], rows[1], rows[3])
    ]
    data.write_bytes(b"[\n" + b",\n".join([rows[0], rows[1]]) + b",\n" + rows[3][:40])
    cut = run_check(data, processor, tmp_path / "out")
    assert [(line["line"], line["code"]) for line in cut.dropped] == [(4, "broken-json")]
    assert len(cut.tokens) == 2


def test_a_row_that_the_template_refuses_is_found(processor: Processor, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "Half a \ud83d"}, {"from": "gpt", "value": "Pair."}]
    data.write_text(json.dumps({"id": "half", "conversations": turns}) + "\n")
    summary = run_check(data, processor, tmp_path / "out")
    assert summary.dropped[0]["code"] == "template-refused"
    repaired = run_check(data, processor, tmp_path / "out", fix=True)
    assert repaired.dropped == [] and "control characters removed" in repaired.repairs


def test_other_formats_are_checked_and_not_fixed(processor: Processor, tmp_path: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    for name, text in (("red-circle.png", "A circle."), ("cut-off.jpg", "Noise."), ("dot.png", None)):
        shutil.copy(PLANTED / "pictures" / name, folder)
        if text is not None:
            (folder / name).with_suffix(".txt").write_text(text)
    summary = run_check(folder, processor, tmp_path / "out")
    assert sorted(line["code"] for line in summary.dropped) == ["broken-row", "damaged-image"]
    assert summary.kinds == {"caption": 1}
    with pytest.raises(Exception, match="--fix writes JSON"):
        run_check(folder, processor, tmp_path / "out", fix=True)


def test_the_verb_writes_a_page_that_loads_nothing(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "check", str(BAD), "--model", str(tiny_model_folder), "--output", str(tmp_path / "out")]
    assert main([*argv, "--max-length", str(MAX_LENGTH)]) == 1
    said = capsys.readouterr()
    assert "40 rows: 6 good, 8 to look at, 26 to drop" in said.out
    assert "more than --max-dropped 1%" in said.err
    assert re.search(r" missing-file .*\n +such as .*bad\.jsonl: line \d+: .*: no such file", said.out), said.out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 9 and page.count("data:image/jpeg;base64,") >= 6
    assert "<script" not in page and 'src="http' not in page and "href=" not in page
    assert all(f"<code>{code}</code>" in page for code in {*DROPPED.values(), *WARNED.values()})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dropped"] == 26 and summary["faults"]["missing-file"] == 2
    assert main([*argv, "--max-length", str(MAX_LENGTH), "--max-dropped", "70%"]) == 0
    assert main([*argv, "--max-dropped", "lots"]) == 2
    assert main(["data", "check", str(tmp_path / "no.jsonl"), "--model", str(tiny_model_folder)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([*argv, "--image-root", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"polymodal: error: --image-root {tmp_path / 'none'}: no such folder\n"


def test_text_of_the_data_cannot_become_markup(processor: Processor, tmp_path: Path) -> None:
    from polymodal.data.check.report import to_html

    data = tmp_path / "rows.jsonl"
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    turns = [{"from": "human", "value": f"<image>{evil}"}, {"from": "gpt", "value": evil}]
    shutil.copytree(PLANTED / "pictures", tmp_path / "pictures")
    rows = [
        {"id": evil, "kind": evil, "source": evil, "image": "pictures/red-circle.png", "conversations": turns},
        {"id": evil, "conversations": [{"from": evil, "value": evil}]},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = to_html(run_check(data, processor, tmp_path / "out"), model=evil, max_length=MAX_LENGTH, fixed=False)
    assert "<script" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page


def test_inspect_shows_a_row_as_it_is_trained(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "row.html"
    argv = ["data", "inspect", str(BAD), "--model", str(tiny_model_folder), "--color", "never"]
    assert main([*argv, "--index", "1", "--html", str(page)]) == 0
    said = capsys.readouterr()
    assert "⟨image 1: 16 tokens⟩" in said.out and "⟦Green." in said.out
    assert "line 2: id good-2, kind vqa" in said.err
    assert "data:image/png;base64," in page.read_text(encoding="utf-8")
    assert main([*argv, "--index", "2"]) == 2
    assert "line 3" in capsys.readouterr().err
    assert main([*argv, "--index", "99"]) == 2
    assert "no row 99; the last is 39" in capsys.readouterr().err


def test_reasoning_and_tools_are_counted_and_refused_by_name(
    tiny_model_folder: Path, processor: Processor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4."}]
    function = {"name": "add", "arguments": {"a": 2}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    rows: list[dict[str, Any]] = [
        {"messages": turns},
        {"messages": [turns[0], {**turns[1], "reasoning_content": "Two, two."}]},
        {"messages": [turns[0], call, {"role": "tool", "content": "4"}, turns[1]], "tools": [{"function": function}]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["data", "check", str(data), "--model", str(tiny_model_folder), "--output", str(tmp_path / "out")]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "rows with reasoning_content: 1, tool_calls: 1, tools: 1" in said and "2 to drop" in said
    dropped = lines_of(tmp_path / "out" / "dropped.jsonl")
    assert [line["code"] for line in dropped] == ["template-refused"] * 2
    no_place = "the tokenizer's chat template has no place for it"
    assert dropped[0]["reason"].startswith(f"message 2: `reasoning_content`: {no_place}")
    assert dropped[1]["reason"].startswith(f"message 1: `tools`: {no_place}")
    later = {"messages": [*rows[1]["messages"], {"role": "user", "content": "Sure?"}, {**turns[1], "content": "Yes."}]}
    with data.open("a") as file:
        file.write(json.dumps(later) + "\n")
    template = processor.with_template(QWEN3)
    summary = run_check(data, template, tmp_path / "taken")
    assert not summary.dropped and summary.fields == {"reasoning_content": 2, "tool_calls": 1, "tools": 1}
    assert [(line["row"], line["code"], line["reason"]) for line in summary.warnings] == [
        (3, "dropped-reasoning", "turn 2: its reasoning is left out, since a question follows")
    ]


@pytest.fixture(scope="module")
def senses(senses_folder: Path) -> Processor:
    return load_processor(senses_folder)


def media_rows(folder: Path) -> Path:
    """Good rows with a video, a sound and a document; then one row for each fault, and one said twice."""
    folder.mkdir(exist_ok=True)
    clip(folder / "a.mp4", frames=9, rate=4)
    clip(folder / "b.mp4", frames=6, rate=4)
    tone(folder / "a.wav", 0.5)
    (folder / "b.wav").write_bytes(wav(np.ones(22050, "<i2"), rate=44_100))
    (folder / "a.pdf").write_bytes(many_pages(3))
    (folder / "same.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    (folder / "none.wav").write_bytes(wav(np.zeros(0, "<i2")))
    (folder / "cut.pdf").write_bytes(many_pages(3)[:60])
    (folder / "empty.mp4").write_bytes(b"")
    media = [
        ({"video": {"path": "a.mp4", "num_frames": 2}}, "<video>What moves?"),
        ({"videos": ["b.mp4"]}, "<video>What moves?"),
        ({"audio": "a.wav"}, "<audio>What sounds?"),
        ({"audios": ["b.wav", "a.wav"]}, "<audio><audio>Which is louder?"),
        ({"document": {"path": "a.pdf", "pages": "2-3"}}, "<document>What is it?"),
        ({"video": {"path": "same.mp4", "num_frames": 2}}, "<video>What moves?"),
        ({"video": "cut.mp4"}, "<video>What?"),
        ({"audio": "none.wav"}, "<audio>What?"),
        ({"document": "cut.pdf"}, "<document>What?"),
        ({"video": "empty.mp4"}, "<video>What?"),
        ({"video": "gone.mp4"}, "<video>What?"),
        ({"video": {"path": "a.mp4", "times": [99]}}, "<video>What?"),
        ({"document": {"path": "a.pdf", "pages": "7"}}, "<document>What?"),
        ({"video": "a.mp4"}, "What?"),
        ({"audio": "A.WAV"}, "<audio>What is heard?"),
    ]
    rows = []
    for number, (record, question) in enumerate(media):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"A {number % 5}."}]
        rows.append({"id": str(number), **record, "messages": turns})
    path = folder / "media.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_documents_of_a_row_share_the_pages_of_a_conversation(senses: Processor, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(many_pages(12))
    messages = [{"role": "user", "content": "<document><document>?"}, {"role": "assistant", "content": "A"}]
    row = {"id": "0", "documents": ["a.pdf", "a.pdf"], "messages": messages}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    summary = run_check(tmp_path / "rows.jsonl", senses, tmp_path / "out")
    (line,) = summary.dropped
    assert line["code"] == "damaged-document" and "8" in line["reason"]


def test_videos_sounds_and_documents_are_decoded_and_counted(senses: Processor, tmp_path: Path) -> None:
    summary = run_check(media_rows(tmp_path / "data"), senses, tmp_path / "out")
    found = {line["id"]: line["code"] for line in lines_of(tmp_path / "out" / "dropped.jsonl")}
    assert found == {
        "5": "duplicate-row",
        "6": "damaged-video",
        "7": "damaged-sound",
        "8": "damaged-document",
        "9": "empty-file",
        "10": "missing-file",
        "11": "bad-setting",
        "12": "damaged-document",  # it has three pages
        "13": "placeholder-count",
        "14": "missing-file",
    }
    assert summary.videos == [(9, 2.25), (6, 1.5)]
    assert summary.sounds == [(0.5, 16_000), (0.5, 44_100), (0.5, 16_000)]
    assert summary.pages == [2] and len(summary.tokens) == 5 and min(summary.tokens) > 16
    plain = json.loads(summary_json(summary))
    assert plain["videos"] == 2 and plain["video_frames"] == 15 and plain["video_seconds"] == 3.75
    assert plain["sounds"] == 3 and plain["sound_rates"] == {"16000": 2, "44100": 1} and plain["pages"] == 2


def test_fix_keeps_videos_sounds_and_documents(senses: Processor, tmp_path: Path) -> None:
    path = media_rows(tmp_path / "data")
    run_check(path, senses, tmp_path / "out", fix=True)
    before = path.read_text().splitlines()
    after = (tmp_path / "out" / "media.fixed.jsonl").read_text().splitlines()
    assert after[:5] == before[:5]
    mended = [json.loads(line) for line in after[5:]]
    assert [row["messages"][0]["content"] for row in mended] == ["<video>What?", "<audio>What is heard?"]
    assert mended[1]["audio"] == "a.wav"


def test_the_verb_shows_videos_and_sounds(
    senses_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = media_rows(tmp_path / "data"), tmp_path / "out"
    argv = ["data", "check", str(path), "--model", str(senses_folder), "--output", str(out), "--max-length", "450"]
    assert main([*argv, "--max-dropped", "90%"]) == 0
    said = capsys.readouterr().out
    assert "decoded 2 videos, 15 video frames, 3 sounds, 1 documents, 2 pages; 3.8 s of video, 1.5 s of sound" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 3 and "a.wav</code>" in page  # two videos and a page
    assert all(title in page for title in ("Frames of a video", "Seconds of a sound", "Pages of a document"))


def test_a_model_without_ears_is_given_no_sound(processor: Processor, tmp_path: Path) -> None:
    run_check(media_rows(tmp_path / "data"), processor, tmp_path)
    found = {line["id"]: (line["code"], line["reason"]) for line in lines_of(tmp_path / "dropped.jsonl")}
    assert found["0"] == ("unsupported-medium", "the model takes no video")
    assert found["2"] == ("unsupported-medium", "the model takes no audio") and "4" not in found

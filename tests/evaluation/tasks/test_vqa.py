"""VQAv2, GQA and TextVQA: read in every layout, asked as published, scored, submitted; end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.mini import open_answers as mini
from benchmarks.evaluation.mini.__main__ import WRITERS
from polymodal.cli import main
from polymodal.errors import DataError
from polymodal.evaluation.results import table
from polymodal.evaluation.runner import prompt_text
from polymodal.evaluation.tasks import TASKS, find_data, find_task
from tests.evaluation.tasks.open_answers import (
    change,
    check_fault,
    check_forms,
    check_prompt,
    read,
    run_command,
    says,
    score,
    submission,
)


@pytest.mark.parametrize(
    ("name", "split", "forms"),
    [
        ("vqav2", "val", ["official", "hub"]),  # VLMEvalKit has no TSV of it
        ("vqav2", "test", ["official", "hub"]),
        ("gqa", "testdev", ["official", "hub", "tsv"]),
        ("textvqa", "val", ["official", "hub", "tsv"]),
        ("textvqa", "test", ["official", "hub"]),
        ("textvqa_ocr", "val", ["official", "hub"]),
    ],
)
def test_every_form_gives_the_same_examples(tmp_path: Path, name: str, split: str, forms: list[str]) -> None:
    check_forms(tmp_path, name, split, forms)


@pytest.mark.parametrize("name", ["vqav2", "gqa", "textvqa", "textvqa_ocr"])
def test_the_prompt_is_the_published_one(tmp_path: Path, name: str) -> None:
    examples = read(tmp_path, name, TASKS[name].splits[0])
    check_prompt(examples[0], name)
    assert TASKS[name].max_new_tokens == 16


def test_ocr_tokens_are_asked_for_by_name_and_an_image_without_any_keeps_the_line(tmp_path: Path) -> None:
    plain, ocr = (read(tmp_path, name, "val") for name in ("textvqa", "textvqa_ocr"))
    assert all("Reference OCR token" not in prompt_text(example.messages) for example in plain)
    assert "\nReference OCR token: \nAnswer" in prompt_text(ocr[3].messages)
    assert "\nReference OCR token: EXIT, 12\nAnswer" in prompt_text(ocr[4].messages)
    assert "\nReference OCR token: Cafe, Rio\nAnswer" in prompt_text(ocr[5].messages)
    # Only the first letter is made a capital: the rest may be a name.
    assert prompt_text(plain[0].messages).startswith("<image>What is written here in Capitals?\n")
    assert prompt_text(plain[1].messages).startswith("<image>What does the sign say?\n")
    mini.TSV["textvqa"](tmp_path / "tsv", 2)
    check_fault(tmp_path / "tsv", "textvqa_ocr", "val", "TextVQA_VAL.tsv: line 2: has no `ocr_tokens`")
    (tmp_path / "official" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    check_fault(tmp_path / "official", "textvqa_ocr", "val", "none of TextVQA_Rosetta_OCR_v0.2_val.json is in it")


def test_vqav2_is_scored_by_type_of_answer(tmp_path: Path) -> None:
    examples = read(tmp_path, "vqav2", "val", count=6)
    right = [example.references[0] for example in examples]
    # Eight of ten said what is right, case aside; one each "maybe" and "can't tell".
    scores = score(
        "vqav2", "val", examples, [right[0].upper() + ".", right[1], "maybe", "Nothing", "cant tell", right[5]]
    )
    assert scores["score"] == pytest.approx((1 + 1 + 0.3 + 0 + 0.3 + 1) / 6)
    assert {key: scores["figures"][key] for key in ("yes/no", "number", "other")} == pytest.approx(
        {"yes/no": 0.5, "number": 0.65, "other": 0.65}
    )
    assert [(row["kind"], row["n"]) for row in scores["kinds"]] == [("yes/no", 2), ("number", 2), ("other", 2)]
    assert "| vqav2 val | vqa accuracy | 6 | 60.0% |" in table([scores]) and "| - yes/no |" in table([scores])
    assert scores["interval"][0] < 0.6 < scores["interval"][1]


def test_gqa_is_scored_by_type_of_question_and_without_what_is_not_balanced(tmp_path: Path) -> None:
    examples = read(tmp_path, "gqa", "testdev", count=5)
    right = [example.references[0] for example in examples]
    said = [right[0] + ".", right[1].upper(), "perhaps", right[3], right[4] + " "]
    scores = score("gqa", "testdev", examples, said)
    assert scores["figures"] == pytest.approx(
        {"score": 0.8, "binary": 2 / 3, "open": 1.0, "verify": 2 / 3, "query": 1.0, "attr": 0.8}
    )
    change(tmp_path / "official" / "testdev_balanced_questions.json", lambda d: d["202000002"].update(isBalanced=False))
    examples = list(TASKS["gqa"].read(tmp_path / "official", "testdev"))
    scores = score("gqa", "testdev", examples, said)
    assert (scores["score"], scores["n"], sum(row["n"] for row in scores["kinds"])) == (1.0, 5, 4)


def test_textvqa_counts_who_agrees(tmp_path: Path) -> None:
    examples = read(tmp_path, "textvqa", "val", count=4)
    scores = score("textvqa", "val", examples, ["Open", "unanswerable", None, "taxi?"])
    assert scores["score"] == pytest.approx((1 + 0.3 + 0 + 1) / 4) and scores["failed"] == 1
    assert "| textvqa val | textvqa accuracy | 4 (1 failed) | 57.5% |" in table([scores])


def test_vqav2_sends_every_id_of_test2015_and_what_llava_makes_of_an_answer(tmp_path: Path) -> None:
    mini.OFFICIAL["vqav2"](tmp_path, 6)
    mini.HUB["vqav2"](tmp_path / "hub", 6)
    # Three of them are test-dev's; the third failed.
    sent = submission("vqav2", "testdev", tmp_path, ["A red  Circle.", "Two", None])
    assert submission("vqav2", "testdev", tmp_path / "hub", ["A red  Circle.", "Two", None]) == sent
    assert sent == (
        b'[{"question_id": 393226000, "answer": "red circle"}, {"question_id": 393226001, "answer": "2"}, '
        b'{"question_id": 393233000, "answer": ""}, {"question_id": 393233001, "answer": ""}, '
        b'{"question_id": 393240000, "answer": ""}, {"question_id": 393240001, "answer": ""}]'
    )


def test_gqa_and_textvqa_send_arrays(tmp_path: Path) -> None:
    mini.OFFICIAL["gqa"](tmp_path / "gqa", 3)
    assert submission("gqa", "testdev", tmp_path / "gqa", ["Yes.", "dark red", None]) == (
        b'[{"questionId": "202000000", "prediction": "yes"}, {"questionId": "202000001", "prediction": "dark red"}, '
        b'{"questionId": "202000002", "prediction": ""}]'
    )
    assert (tmp_path / "gqa" / "out" / "testdev_balanced_predictions.json").is_file()
    mini.OFFICIAL["textvqa"](tmp_path / "textvqa", 3)
    assert submission("textvqa", "test", tmp_path / "textvqa", ["Open", "Caf\u00e9"]) == (
        b'[{"question_id": 34602, "answer": "Open"}, {"question_id": 34603, "answer": "Caf\\u00e9"}, '
        b'{"question_id": 34604, "answer": ""}]'
    )


@pytest.mark.parametrize(("name", "split"), [("vqav2", "testdev"), ("vqav2", "test"), ("textvqa", "test")])
def test_secret_answers_give_no_score(tmp_path: Path, name: str, split: str) -> None:
    examples = read(tmp_path, name, split)
    assert all(example.references == () for example in examples)
    scores = score(name, split, examples, ["yes"] * len(examples))
    assert scores["score"] is None and f"| {name} ({split}) |" in table([scores])


def _vqav2(folder: Path, fault: str) -> None:
    questions, notes = (folder / f"v2_{name}_val2014_{of}.json" for name, of in NAMES)
    if fault == "no annotations":
        notes.unlink()
    elif fault == "no annotation":
        change(notes, lambda d: d["annotations"].pop())
    elif fault == "annotation twice":
        change(notes, lambda d: d["annotations"].append(d["annotations"][0]))
    elif fault == "question twice":
        change(questions, lambda d: d["questions"].append(d["questions"][0]))
    elif fault == "no images":
        for file in folder.rglob("*.jpg"):
            file.unlink()
    elif fault == "wrong type":
        change(questions, lambda d: d["questions"][1].update(question=None))
    elif fault == "wrong id":
        change(questions, lambda d: d["questions"][1].update(question_id="four"))
    elif fault == "not JSON":
        questions.write_text('{"questions": [')
    elif fault == "another file":
        questions.write_text("[]")
    elif fault == "no object":
        change(questions, lambda d: d.update(questions=[7]))


NAMES = (("OpenEnded_mscoco", "questions"), ("mscoco", "annotations"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no annotations", "none of v2_mscoco_val2014_annotations.json is in it"),
        ("no annotation", "v2_mscoco_val2014_annotations.json: has nothing about `question_id` 393232001"),
        ("annotation twice", "annotations.json: row 4: `question_id` 393225000 comes twice"),
        ("question twice", "question 393225000 comes twice"),
        ("no images", "neither COCO_val2014_000000393225.jpg nor the images after it are in it"),
        ("wrong type", "questions.json: row 1: `question` is None, expected str"),
        ("wrong id", "annotations.json: has nothing about `question_id` four"),
        ("not JSON", "questions.json: cannot be read as JSON"),
        ("another file", "questions.json: has no `questions`"),
        ("no object", "questions.json: row 0 is 7, expected an object"),
    ],
)
def test_faults_of_official_files_are_one_line(tmp_path: Path, fault: str, message: str) -> None:
    mini.OFFICIAL["vqav2"](tmp_path, 4)
    _vqav2(tmp_path, fault)
    check_fault(tmp_path, "vqav2", "val", message)


def test_faults_of_gqa_and_textvqa_are_one_line(tmp_path: Path) -> None:
    mini.OFFICIAL["gqa"](tmp_path / "gqa", 2)
    questions = tmp_path / "gqa" / "testdev_balanced_questions.json"
    change(questions, lambda d: d["202000001"].pop("answer"))
    check_fault(tmp_path / "gqa", "gqa", "testdev", "questions.json: question 202000001: has no `answer`")
    change(questions, lambda d: d["202000001"].update(answer="red", types="query"))
    check_fault(tmp_path / "gqa", "gqa", "testdev", "question 202000001: `types` is 'query', expected an object")
    questions.write_text("[]")
    check_fault(tmp_path / "gqa", "gqa", "testdev", "the file is [], expected an object")
    mini.HUB["gqa"](tmp_path / "hub", 2)
    (file,) = (tmp_path / "hub" / "testdev_balanced_images").iterdir()
    file.unlink()
    check_fault(tmp_path / "hub", "gqa", "testdev", "none of testdev_balanced_images/*.parquet is in it")
    mini.OFFICIAL["textvqa"](tmp_path / "textvqa", 2)
    questions = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    change(questions, lambda d: d["data"][1].update(answers=["a", 7]))
    check_fault(tmp_path / "textvqa", "textvqa", "val", "row 1: `answers` is 7, expected str")
    change(questions, lambda d: d["data"][1].pop("answers"))
    check_fault(tmp_path / "textvqa", "textvqa", "val", "row 1: has no `answers`")
    change(questions, lambda d: d["data"][1].update(image_id="../../etc/passwd"))
    check_fault(tmp_path / "textvqa", "textvqa", "val", "the image '../../etc/passwd.jpg' leaves the folder")


def test_parquet_of_two_benchmarks_is_not_mixed(tmp_path: Path) -> None:
    mini.HUB["vqav2"](tmp_path / "a", 2)
    mini.HUB["textvqa"](tmp_path / "b", 2)
    check_fault(tmp_path, "vqav2", "val", "give the folder of this benchmark")
    check_fault(tmp_path / "b", "vqav2", "testdev", "none of v2_OpenEnded_mscoco_test-dev2015_questions.json")


def test_testdev_needs_the_questions_of_test2015_before_anything_is_asked(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mini.OFFICIAL["vqav2"](tmp_path / "vqav2", 4)
    (tmp_path / "vqav2" / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    assert main(["eval", str(tiny_model_folder), "--tasks", "vqav2_testdev", "--data-root", str(tmp_path)]) == 2
    assert "none of v2_OpenEnded_mscoco_test2015_questions.json" in capsys.readouterr().err


def test_a_split_that_is_not_there_and_a_lost_image(
    tmp_path: Path, tiny_model_folder: Path, private_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mini.OFFICIAL["gqa"](tmp_path / "gqa", 4)
    argv = ["eval", str(tiny_model_folder), "--data-root", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*argv, "--tasks", "gqa_train"]) == 2
    assert "gqa has the splits testdev, val" in capsys.readouterr().err
    assert main([*argv, "--tasks", "gqa_val"]) == 2
    assert "none of val_balanced_questions.json" in capsys.readouterr().err
    (tmp_path / "gqa" / "images" / "n161314.jpg").unlink()
    assert main([*argv, "--tasks", "gqa", "--max-new-tokens", "2"]) == 1
    out = capsys.readouterr().out
    assert "4 (1 failed)" in out and "1 of 4 items failed; first:" in out and "n161314.jpg" in out


def test_the_hub_is_asked_for_a_splits_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(name: str, repo_type: str, allow_patterns: list[str] | None) -> str:
        asked.append((name, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name, split in (("vqav2", "val"), ("gqa", "testdev"), ("infographicvqa", "test"), ("ocrbench", "test")):
        assert find_data(TASKS[name], split, None) == tmp_path
    assert asked == [
        ("lmms-lab-encoder/VQAv2", "dataset", ["data/validation-*"]),
        ("lmms-lab-encoder/GQA", "dataset", ["testdev_balanced_*/*"]),
        ("lmms-lab-encoder/DocVQA", "dataset", ["InfographicVQA/test-*"]),
        ("echo840/OCRBench", "dataset", None),
    ]
    with pytest.raises(DataError, match="COCO-Caption has no split karpathy; give --data-root with its official files"):
        find_data(TASKS["coco_caption"], "karpathy", None)


def test_tasks_that_share_files_share_a_folder(tmp_path: Path) -> None:
    for name in mini.OFFICIAL:
        assert WRITERS[name] is mini.OFFICIAL[name]
        (tmp_path / name).mkdir()
    assert find_data(TASKS["textvqa_ocr"], "val", tmp_path) == tmp_path / "textvqa"
    assert find_data(TASKS["textvqa_ocr"], "val", tmp_path / "textvqa") == tmp_path / "textvqa"
    assert find_task("textvqa_ocr_test") == (TASKS["textvqa_ocr"], "test")


@pytest.fixture
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A backend, as the arguments of `polymodal eval`."""
    if request.param == "ours":
        return [str(request.getfixturevalue("tiny_model_folder")), "--device", "cpu"]
    if request.param == "transformers":
        tiny_vlm: Callable[[str], Path] = request.getfixturevalue("tiny_vlm")
        return [str(tiny_vlm("llava_next")), "--device", "cpu"]
    server: Any = request.getfixturevalue("server")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.plays(says("Yes."))
    return ["openai:tiny", "--base-url", server.url]


@pytest.mark.parametrize("model", ["ours", "transformers", "endpoint"], indirect=True)
@pytest.mark.parametrize(
    ("name", "split"), [("vqav2", "val"), ("gqa", "testdev"), ("textvqa", "val"), ("docvqa", "val")]
)
def test_from_the_folder_to_the_results(
    model: list[str], name: str, split: str, tmp_path: Path, private_cache: Path, request: pytest.FixtureRequest
) -> None:
    mini.OFFICIAL[name](tmp_path / "data" / name, 4)
    found = run_command(model, name, split, tmp_path / "data", tmp_path / "out")
    assert 0 <= found["score"] <= 1 and found["interval"][0] <= found["score"] <= found["interval"][1]
    assert found["decoding"]["temperature"] == 0
    if model[0] == "openai:tiny":
        expected = {"vqav2": 0.25, "gqa": 0.0, "textvqa": 0.0, "docvqa": 0.0}
        assert found["score"] == expected[name] and found["answers"] == ["Yes."] * 4
        (message,) = request.getfixturevalue("server").bodies[0]["messages"]
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]
        assert message["content"][1]["text"].endswith("\nAnswer the question using a single word or phrase.")
        key = "prediction" if name == "gqa" else "answer"
        assert {row[key] for row in found["sent"]} == {"yes" if name in ("vqav2", "gqa") else "Yes."}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"][f"{name}_{split}"]["n"] == 4

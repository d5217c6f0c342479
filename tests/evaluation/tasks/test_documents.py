"""DocVQA, InfographicVQA, ChartQA and OCRBench: read in every layout, asked as published, scored and submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evaluation.mini import open_answers as mini
from polymodal.evaluation.results import table
from polymodal.evaluation.tasks import TASKS
from tests.evaluation.tasks.open_answers import change, check_fault, check_forms, check_prompt, read, score, submission

LIMITS = {"docvqa": 32, "infographicvqa": 32, "chartqa": 16, "ocrbench": 128}


@pytest.mark.parametrize(
    ("name", "split", "forms"),
    [
        ("docvqa", "val", ["official", "hub", "tsv"]),
        ("docvqa", "test", ["official", "hub"]),
        ("infographicvqa", "val", ["official", "hub", "tsv"]),
        ("infographicvqa", "test", ["official", "hub"]),
        ("chartqa", "test", ["official", "hub", "tsv"]),
        ("ocrbench", "test", ["official", "hub", "tsv"]),
    ],
)
def test_every_form_gives_the_same_examples(tmp_path: Path, name: str, split: str, forms: list[str]) -> None:
    check_forms(tmp_path, name, split, forms, count=10)


@pytest.mark.parametrize("name", LIMITS)
def test_the_prompt_is_the_published_one(tmp_path: Path, name: str) -> None:
    check_prompt(read(tmp_path, name, TASKS[name].splits[0])[0], name)
    assert TASKS[name].max_new_tokens == LIMITS[name]


def test_docvqa_and_infographicvqa_are_scored_by_types_of_which_a_question_may_have_several(tmp_path: Path) -> None:
    examples = read(tmp_path / "docvqa", "docvqa", "val", count=4)
    assert examples[1].references == ("Ortega",)
    # A letter of six is missing; the other spelling of the total; more than half is wrong.
    scores = score("docvqa", "val", examples, ["12", "Ortga", "26.00", "Smith"])
    assert scores["figures"] == pytest.approx(
        {"score": (3 - 1 / 6) / 4, "table/list": 1.0, "form": 1.0, "handwritten": 5 / 12}
    )
    assert "| docvqa val | anls | 4 | 70.8% |" in table([scores]) and "| - handwritten |" in table([scores])
    examples = read(tmp_path / "infographicvqa", "infographicvqa", "val", count=2)
    scores = score("infographicvqa", "val", examples, ["11", None])
    assert scores["figures"] == {"score": 0.5, "single span": 0.5, "counting": 0.0} and scores["failed"] == 1


def test_chartqa_is_the_mean_of_its_halves_however_large_they_are(tmp_path: Path) -> None:
    examples = read(tmp_path, "chartqa", "test", count=5)
    assert [example.kind for example in examples] == ["human"] * 3 + ["augmented"] * 2
    # 5% off is right, and letters in either case.
    scores = score("chartqa", "test", examples, ["21", "23.0", "20", "c", "A"])
    assert scores["figures"] == pytest.approx({"score": (2 / 3 + 1 / 2) / 2, "human": 2 / 3, "augmented": 1 / 2})
    assert scores["score"] == pytest.approx(7 / 12)
    only = score("chartqa", "test", examples[:3], ["21", "23.0", "20"])
    assert only["figures"] == pytest.approx({"score": 2 / 3, "human": 2 / 3})


def test_ocrbench_is_out_of_1000_and_formulas_are_compared_without_spaces(tmp_path: Path) -> None:
    examples = read(tmp_path, "ocrbench", "test", count=10)
    said = ["It says open.", "bakery", "1984!", *["?"] * 6, "x+1=3"]
    scores = score("ocrbench", "test", examples, said)
    assert scores["figures"] == pytest.approx(
        {
            "score": 0.4, "Text Recognition": 0.3, "Scene Text-centric VQA": 0.0, "Doc-oriented VQA": 0.0,
            "Key Information Extraction": 0.0, "Handwritten Mathematical Expression Recognition": 0.1,
        }
    )  # fmt: skip
    assert "| ocrbench test | ocrbench | 10 | 400.0 |" in table([scores])
    assert "| - Text Recognition | | | 300.0 |" in table([scores])
    assert score("ocrbench", "test", examples, [*["?"] * 9, "X + 1 = 3"])["score"] == 0.0  # case counts there


def test_the_competition_gets_every_id_as_a_number(tmp_path: Path) -> None:
    mini.OFFICIAL["docvqa"](tmp_path / "docvqa", 3)
    expected = b'[{"questionId": 59153, "answer": "12"}, {"questionId": 59154, "answer": ""}, '
    expected += b'{"questionId": 59155, "answer": ""}]'
    assert submission("docvqa", "test", tmp_path / "docvqa", ["12", None]) == expected
    mini.HUB["docvqa"](tmp_path / "hub", 3)  # whose ids are texts
    assert submission("docvqa", "test", tmp_path / "hub", ["12", None]) == expected
    mini.OFFICIAL["infographicvqa"](tmp_path / "infographicvqa", 3)
    assert submission("infographicvqa", "test", tmp_path / "infographicvqa", ["11%", "a", "b"]) == (
        b'[{"questionId": 98313, "answer": "11%"}, {"questionId": 98314, "answer": "a"}, '
        b'{"questionId": 98315, "answer": "b"}]'
    )


@pytest.mark.parametrize("name", ["docvqa", "infographicvqa"])
def test_secret_answers_give_no_score(tmp_path: Path, name: str) -> None:
    examples = read(tmp_path, name, "test")
    assert all(example.references == () for example in examples)
    assert score(name, "test", examples, ["yes"] * len(examples))["score"] is None


def test_documents_and_infographics_of_one_snapshot_are_told_apart(tmp_path: Path) -> None:
    for name in ("docvqa", "infographicvqa"):
        mini.HUB[name](tmp_path, 2)
    asked = {name: list(TASKS[name].read(tmp_path, "val")) for name in ("docvqa", "infographicvqa")}
    assert [example.id for example in asked["docvqa"]] == ["49153", "49154"]
    assert [example.id for example in asked["infographicvqa"]] == ["98313", "98314"]


def test_older_names_of_the_official_files(tmp_path: Path) -> None:
    for name, old in (("docvqa", "val_v1.0.json"), ("infographicvqa", "infographicVQA_val_v1.0.json")):
        mini.OFFICIAL[name](tmp_path / name, 2)
        (file,) = (tmp_path / name).glob("*withQT.json")
        file.rename(file.with_name(old))
        assert len(list(TASKS[name].read(tmp_path / name, "val"))) == 2


def test_faults_are_one_line(tmp_path: Path) -> None:
    mini.OFFICIAL["docvqa"](tmp_path / "docvqa", 2)
    file = tmp_path / "docvqa" / "val_v1.0_withQT.json"
    change(file, lambda d: d["data"][1].update(answers=[]))
    check_fault(tmp_path / "docvqa", "docvqa", "val", "row 1: `answers` is empty")
    change(file, lambda d: d["data"][1].pop("answers"))
    check_fault(tmp_path / "docvqa", "docvqa", "val", "row 1: has no `answers`")
    change(file, lambda d: d["data"][1].update(answers=["a"], questionId=49153))
    check_fault(tmp_path / "docvqa", "docvqa", "val", "question 49153 comes twice")
    change(file, lambda d: d["data"][1].update(questionId="a5"))
    check_fault(tmp_path / "docvqa", "docvqa", "val", "row 1: `questionId` is 'a5', expected a number")
    change(file, lambda d: d["data"][1].update(image=None))
    check_fault(tmp_path / "docvqa", "docvqa", "val", "row 1: `image` is None, expected str")
    mini.OFFICIAL["chartqa"](tmp_path / "chartqa", 4)
    (file,) = (tmp_path / "chartqa").rglob("test_augmented.json")
    change(file, lambda d: d[0].update(label=7))
    check_fault(tmp_path / "chartqa", "chartqa", "test", "test_augmented.json: row 0: `label` is 7, expected str")
    file.unlink()
    check_fault(tmp_path / "chartqa", "chartqa", "test", "test_augmented.json")
    mini.TSV["chartqa"](tmp_path / "tsv", 2)
    tsv = tmp_path / "tsv" / "ChartQA_TEST.tsv"
    tsv.write_text(tsv.read_text().replace("test_human", "test_machine"))
    check_fault(
        tmp_path / "tsv", "chartqa", "test", "ChartQA_TEST.tsv: line 2: is of 'machine', expected human or augmented"
    )
    mini.OFFICIAL["ocrbench"](tmp_path / "ocrbench", 2)
    change(tmp_path / "ocrbench" / "OCRBench.json", lambda d: d[1].pop("answers"))
    check_fault(tmp_path / "ocrbench", "ocrbench", "test", "row 1: `answers` is None, expected list or str")
    check_fault(
        tmp_path / "ocrbench", "docvqa", "val", "none of val_v1.0_withQT.json, val_v1.0.json, DocVQA/validation-"
    )

"""POPE and MME: read in every form, asked as published, scored as by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.mini import choices
from polymodal.errors import DataError
from polymodal.evaluation.results import table
from polymodal.evaluation.runner import limited
from polymodal.evaluation.task import Example
from polymodal.evaluation.tasks import TASKS, read_examples
from tests.evaluation.tasks.scripted import assert_golden_prompt, plain, predicted, results_of, run_with

POPE, MME = TASKS["pope"], TASKS["mme"]


@pytest.fixture(autouse=True)
def own_cache(private_cache: Path) -> None:
    """TSVs are unpacked into it."""


def written(name: str, folder: Path, count: int) -> list[Example]:
    choices.WRITERS[name](folder, count)
    return read_examples(TASKS[name], "test", folder)


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_the_first_question_is_asked_as_published(name: str, tmp_path: Path) -> None:
    choices.WRITERS[name](tmp_path, 4)
    assert_golden_prompt(TASKS[name], tmp_path)


def test_every_form_of_pope_gives_the_same_questions(tmp_path: Path) -> None:
    official, rows = plain(written("pope", tmp_path / "official", 4)), choices.pope_rows(4)
    choices.parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows)
    merged = [{**row, "index": row["question_id"], "category": "random,popular,adversarial"} for row in rows[:4]]
    choices.tsv(tmp_path / "kit" / "POPE.tsv", merged)  # each question once
    for form in ("hub", "kit"):
        assert plain(read_examples(POPE, "test", tmp_path / form)) == official
    assert len(official) == 12 and official[0][2]


def test_every_form_of_mme_gives_the_same_questions(tmp_path: Path) -> None:
    official, rows = plain(written("mme", tmp_path / "official", 8)), choices.mme_rows(8)
    choices.parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows)
    tables = [{**row, "index": number, "image_path": row["question_id"]} for number, row in enumerate(rows)]
    choices.tsv(tmp_path / "kit" / "MME.tsv", tables)
    for row in rows:  # the tables of the official evaluation, images in the folders of the release
        choices.save(
            tmp_path / "eval" / "release" / row["category"] / "images" / Path(row["question_id"]).name, row["image"]
        )
    lines: dict[str, str] = {}
    for row in rows:
        name = Path(row["question_id"]).name
        lines[row["category"]] = lines.get(row["category"], "") + f"{name}\t{row['question']}\t{row['answer']}\n"
    for task, text in lines.items():
        choices.save(tmp_path / "eval" / "eval_tool" / "Your_Results" / f"{task}.txt", text)
    for form in ("hub", "kit", "eval"):
        assert plain(read_examples(MME, "test", tmp_path / form)) == official, form
    assert len(official) == 8 and official[0][2]


def pope_answers(examples: list[Example]) -> Mapping[str, str]:
    """All of the random kind right, of the popular always yes, of the adversarial always no."""
    said = {"random": lambda e: e.references[0].title(), "popular": lambda _: "Yes", "adversarial": lambda _: "No."}
    return {e.id: said[e.kind](e) for e in examples}


def test_pope_is_the_mean_of_three_f1(tmp_path: Path) -> None:
    examples = written("pope", tmp_path, 4)  # of each kind two yes and two no
    document = predicted(POPE, tmp_path, pope_answers(examples))
    assert document["figures"] == pytest.approx(
        {
            "mean_f1": (1 + 2 / 3 + 0) / 3,
            "random f1": 1, "random accuracy": 1, "random precision": 1, "random recall": 1, "random yes_ratio": 1 / 2,
            "popular f1": 2 / 3, "popular accuracy": 1 / 2, "popular precision": 1 / 2, "popular recall": 1,
            "popular yes_ratio": 1, "adversarial f1": 0, "adversarial accuracy": 1 / 2, "adversarial precision": 0,
            "adversarial recall": 0, "adversarial yes_ratio": 0,
        }
    )  # fmt: skip
    assert "| pope test | mean f1 | 12 | 55.6% |" in table([document])


def test_a_variant_reaches_the_figures(tmp_path: Path) -> None:
    examples = written("pope", tmp_path, 4)
    said = {e.id: f"{e.references[0]}, I think" for e in examples}
    assert predicted(POPE, tmp_path, said)["figures"]["mean_f1"] == 1
    assert predicted(POPE, tmp_path, said, variant="lmms_eval")["figures"]["mean_f1"] == 0


def test_a_question_that_failed_is_neither_yes_nor_no(tmp_path: Path) -> None:
    examples = written("pope", tmp_path, 4)
    failed = {e.id: None if e.id.endswith("/1") else e.references[0] for e in examples}  # a yes of each kind
    figures = results_of(POPE, run_with(POPE, examples, failed))["figures"]
    assert (figures["random precision"], figures["random recall"]) == (1, 1 / 2)
    assert (figures["random accuracy"], figures["random yes_ratio"]) == (3 / 4, 1 / 4)


def test_mme_needs_both_questions_of_an_image(tmp_path: Path) -> None:
    examples = written("mme", tmp_path, 8)
    said: dict[str, str | None] = {e.id: e.references[0] for e in examples}
    said["existence/0003.png#2"] = "Yes"
    said |= {f"code_reasoning/0002.png#{n}": answer for n, answer in ((1, "No"), (2, None))}
    document = results_of(MME, run_with(MME, examples, said))
    assert document["figures"] == {
        "perception": 325.0, "cognition": 0.0, "existence": 125.0, "color": 200.0, "code_reasoning": 0.0
    }  # fmt: skip
    low, high = document["interval"]
    assert low <= 325 <= high <= 400
    assert "| mme test | perception | 8 (1 failed) | 325.0 |" in table([document])
    assert "| - existence | | | 125.0 | |" in table([document])


def test_limit_keeps_pairs(tmp_path: Path) -> None:
    kept = limited(written("mme", tmp_path, 8), 1, MME.group)
    assert [e.id for e in kept] == [
        f"{name}.png#{n}" for name in ("existence/0000", "color/0001", "code_reasoning/0002") for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("name", "file", "text", "says"),
    [
        ("pope", "coco_pope_random.json", '{"image": "a.jpg", "label": "yes"}\n', "line 1: the column `text` is not"),
        ("pope", "coco_pope_random.json", "{\n", "coco_pope_random.json: line 1 is no JSON"),
        ("pope", "coco_pope_random.json", '["text"]\n', "line 1: expected an object, found list"),
        (
            "pope",
            "coco_pope_random.json",
            '{"image": "../a.jpg", "text": "?", "label": "yes"}\n',
            "'../a.jpg' leaves the",
        ),
        ("mme", "existence.txt", "a.jpg\tIs it?\n", "line 1 is not an image, a question and an answer"),
        ("mme", "existence/a.txt", "Is it? Yes\n", "line 1 is not an image, a question and an answer"),
    ],
)
def test_a_broken_file_is_named(name: str, file: str, text: str, says: str, tmp_path: Path) -> None:
    choices.save(tmp_path / file, text)
    choices.save(tmp_path / "a.jpg", b"0")
    with pytest.raises(DataError, match=says.replace("`", ".")) as error:
        read_examples(TASKS[name], "test", tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_kind_of_pope_that_is_missing_is_named(tmp_path: Path) -> None:
    written("pope", tmp_path, 2)
    (tmp_path / "coco_pope_popular.json").unlink()
    with pytest.raises(DataError, match=r"coco_pope_popular.json"):
        read_examples(POPE, "test", tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": "maybe"}, "row 0: the right answer is 'maybe', expected yes or no"),
        ({"category": "tables"}, "row 0: .category. is 'tables', none of MME's 14 tasks"),
        ({"question_id": "existence/7.png"}, "7.png has 1 questions; MME has two to each image"),
    ],
)
def test_what_could_not_be_scored_is_named_before_the_model_is_asked(
    change: dict[str, str], says: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = choices.mme_rows(2)
    rows[0].update(change)
    choices.parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    with pytest.raises(DataError, match=says):
        read_examples(MME, "test", tmp_path)

"""Yes/no answers, and POPE's and MME's sums, against vectors from their own code and from the harnesses."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from polymodal.errors import PolymodalError
from polymodal.metrics.yes_no import mme, mme_totals, parse_mme, parse_pope, pope, pope_aggregate

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str, key: str = "cases") -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))[key]


def test_pope_cases() -> None:
    for case in golden("pope"):
        said, right = case["prediction"], case["references"]
        assert parse_pope(said) == case["parsed"], case
        assert parse_pope(said, variant="vlmevalkit") == case["parsed_vlmevalkit"], case
        assert pope(said, right) == case["score"], case
        assert pope(said, right, variant="lmms_eval") == case["score_lmms_eval"], case
        assert pope(said, right, variant="vlmevalkit") == float(case["parsed_vlmevalkit"] == right[0]), case


def test_mme_cases() -> None:
    for case in golden("mme"):
        said = case["prediction"]
        assert parse_mme(said) == case["parsed"], case
        assert parse_mme(said, variant="lmms_eval") == case["parsed_lmms_eval"], case
        assert parse_mme(said, variant="vlmevalkit") == case["parsed_vlmevalkit"], case


@pytest.mark.parametrize("corpus", golden("pope", "aggregates"))
def test_pope_aggregates(corpus: dict[str, Any]) -> None:
    found = pope_aggregate(corpus["predictions"], corpus["labels"])
    assert found == pytest.approx({key: corpus[key] for key in found}, abs=1e-6)
    assert set(found) == set(corpus) - {"predictions", "labels"}


def test_pope_harness_sums() -> None:
    said, right = ["yes", "Yes.", "no", "maybe"], ["yes", "yes", "no", "yes"]
    lmms = pope_aggregate(said, right, variant="lmms_eval")
    # "Yes." and "maybe" cannot be read: neither counts for recall; the ratio is that of the right answers.
    assert (lmms["accuracy"], lmms["recall"], lmms["yes_ratio"]) == (0.5, 1.0, 0.75)
    vlm = pope_aggregate(said, right, variant="vlmevalkit")
    assert (vlm["accuracy"], vlm["recall"], vlm["yes_ratio"]) == (0.75, pytest.approx(2 / 3), 0.5)
    never = pope_aggregate(["no", "no"], ["yes", "no"])
    assert (never["precision"], never["recall"], never["f1"]) == (0.0, 0.0, 0.0)


def mme_of(rows: list[dict[str, str]]) -> dict[str, float]:
    return mme_totals((row["task"], row["image"], mme(row["prediction"], [row["answer"]])) for row in rows)


@pytest.mark.parametrize("corpus", golden("mme", "aggregates"))
def test_mme_aggregates(corpus: dict[str, Any]) -> None:
    rows = corpus["rows"]
    for order in (rows, random.Random(0).sample(rows, len(rows))):
        found = mme_of(order)
        expected = {"perception": corpus["perception"], "cognition": corpus["cognition"], **corpus["per_task"]}
        assert found == pytest.approx(expected, abs=1e-6)


def row(task: str, image: str, answer: str, prediction: str) -> dict[str, str]:
    return {"task": task, "image": image, "answer": answer, "prediction": prediction}


def test_mme_keeps_images_of_one_name_in_two_tasks_apart() -> None:
    rows = [row(task, "1.jpg", answer, "Yes") for task in ("count", "OCR") for answer in ("Yes", "No")]
    assert mme_of(rows) == {"perception": 100.0, "cognition": 0.0, "count": 50.0, "OCR": 50.0}


def test_mme_faults_are_named() -> None:
    with pytest.raises(PolymodalError, match=r"count: 1\.jpg has 1 answers"):
        mme_of([row("count", "1.jpg", "Yes", "Yes")])
    with pytest.raises(PolymodalError, match=r"unknown task of MME 'color '.*'color'"):
        mme_of([row("color ", "1.jpg", "Yes", "Yes")])


@pytest.mark.parametrize("metric", [pope, mme])
def test_labels_are_yes_or_no(metric: Any) -> None:
    assert metric("yes", ["Yes"]) == 1.0
    with pytest.raises(PolymodalError, match="not 'maybe'"):
        metric("yes", ["maybe"])
    with pytest.raises(PolymodalError, match="unknown variant"):
        metric("yes", ["yes"], variant="none")


def test_pope_needs_an_answer_for_each_question() -> None:
    with pytest.raises(PolymodalError, match="1 answers to 2 questions"):
        pope_aggregate(["yes"], ["yes", "no"])
    with pytest.raises(PolymodalError, match="0 answers to 0"):
        pope_aggregate([], [])

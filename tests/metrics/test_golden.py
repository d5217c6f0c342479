"""Every score of the golden files, by every metric of `METRICS` and each of its variants.

A file's extra keys are options of the metric; a column `score_<name>` is what `variant="<name>"` gives. What a metric
makes of the text before it compares (`normalized`, `parsed`) is looked up in `READINGS`.
"""

import json
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from polymodal.metrics import METRICS, score
from polymodal.metrics.vqa import normalize_answer

FILES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "golden").glob("*.json"))}

# Columns whose variant has another name than the column says, or that are no score of one answer (None).
COLUMNS: dict[tuple[str, str], str | None] = {
    ("mmmu_open", "score_lmms_eval_snapshot_possible"): None,  # the list of what a random choice could have scored
    ("wer", "score_basic_normalizer"): "basic",
    ("wer", "score_raw_jiwer"): "raw",
}

# What stands in a column that is no score: a function of the prediction.
READINGS: dict[tuple[str, str], Callable[[str], Any]] = {
    ("textvqa_accuracy", "normalized"): partial(normalize_answer, variant="m4c"),
    ("vqa_normalize", "normalized"): normalize_answer,
    ("vqa_normalize", "normalized_m4c"): partial(normalize_answer, variant="m4c"),
    ("vqa_normalize", "normalized_vlmevalkit"): partial(normalize_answer, variant="vlmevalkit"),
}


def cases(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(FILES[name].read_text(encoding="utf-8"))["cases"]
    return found


def variant_of(name: str, column: str) -> str | None:
    """The variant that a column holds the scores of."""
    if column != "score" and not column.startswith("score_"):
        return None
    return COLUMNS.get((name, column), "official" if column == "score" else column.removeprefix("score_"))


@pytest.mark.parametrize("name", [name for name in FILES if name in METRICS])
def test_scores(name: str) -> None:
    takes = set(signature(METRICS[name]).parameters) - {"variant"}
    wrong, seen = [], 0
    for case in cases(name):
        options = {key: value for key, value in case.items() if key in takes - {"prediction", "references"}}
        for column, expected in case.items():
            variant = variant_of(name, column)
            if variant is None or expected is None:
                continue
            chosen = {} if variant == "official" else {"variant": variant}
            given = score(name, case["prediction"], case["references"], **options, **chosen)
            seen += 1
            if not (type(given) is float and abs(given - expected) <= 1e-6):
                wrong.append(f"{column} of {case['prediction']!r} is {expected}, not {given!r} ({case.get('note')})")
    assert not wrong, "\n".join(wrong)
    assert seen or all(case["score"] is None for case in cases(name))


@pytest.mark.parametrize(("name", "column"), READINGS)
def test_readings(name: str, column: str) -> None:
    read = READINGS[name, column]
    wrong = [
        f"{column} of {case['prediction']!r} is {case[column]!r}, not {given!r}"
        for case in cases(name)
        if (given := read(case["prediction"])) != case[column]
    ]
    assert not wrong, "\n".join(wrong)

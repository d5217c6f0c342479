"""The letters of multiple-choice answers against vectors from the benchmarks' and the harnesses' own code."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polymodal.errors import PolymodalError
from polymodal.metrics.mmmu import mmmu_multiple_choice, mmmu_open, parse_mmmu_choice, parse_mmmu_open
from polymodal.metrics.multiple_choice import (
    extract_letter,
    mmbench_extract,
    mmstar,
    mvbench,
    parse_mmbench,
    parse_mmstar,
    parse_scienceqa,
    parse_videomme,
    scienceqa,
    videomme_extract,
)

GOLDEN = Path(__file__).parents[1] / "golden"
ANIMALS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


def golden(name: str, key: str = "cases") -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))[key]


SCORES: list[tuple[Callable[..., float], str, str, tuple[str, ...]]] = [
    (mmmu_multiple_choice, "official", "score", ("options",)),
    (mmmu_open, "official", "score", ("gold_is_list",)),
    (mmbench_extract, "official", "score", ("options",)),
    (scienceqa, "official", "score", ("n_choices",)),
    (scienceqa, "lmms_eval", "score_lmms_eval", ("n_choices",)),
    (mmstar, "official", "score", ()),
    (mmstar, "lmms_eval", "score_lmms_eval", ()),
    (mvbench, "official", "score", ()),
    (mvbench, "lmms_eval", "score_lmms_eval", ()),
]


@pytest.mark.parametrize(("metric", "variant", "column", "keys"), SCORES)
def test_every_golden_score(metric: Callable[..., float], variant: str, column: str, keys: tuple[str, ...]) -> None:
    scored = [case for case in golden(metric.__name__) if case[column] is not None]
    assert scored
    for case in scored:
        options = {key: case[key] for key in keys}
        found = metric(case["prediction"], case["references"], variant=variant, **options)
        assert found == pytest.approx(case[column], abs=1e-6), case


PARSED: list[tuple[Callable[..., str | None], str, str, str, tuple[str, ...]]] = [
    (parse_mmmu_choice, "mmmu_multiple_choice", "official", "parsed", ("options",)),
    (parse_mmmu_choice, "mmmu_multiple_choice", "lmms_eval", "parsed_lmms_eval", ("options",)),
    (parse_mmmu_choice, "mmmu_multiple_choice", "vlmevalkit", "parsed_vlmevalkit_can_infer", ("options",)),
    (parse_mmbench, "mmbench_extract", "official", "parsed", ("options",)),
    (parse_mmbench, "mmbench_extract", "lmms_eval", "parsed_lmms_eval_mmbench", ("options",)),
    (parse_mmbench, "mmbench_extract", "lmms_eval_static", "parsed_lmms_eval_mcq_extract", ("options",)),
    (parse_videomme, "videomme_extract", "official", "parsed", ()),
    (parse_videomme, "videomme_extract", "lmms_eval", "parsed_lmms_eval", ()),
]


@pytest.mark.parametrize(("parse", "name", "variant", "column", "keys"), PARSED)
def test_every_golden_letter(
    parse: Callable[..., str | None], name: str, variant: str, column: str, keys: tuple[str, ...]
) -> None:
    for case in golden(name):
        found = parse(case["prediction"], variant=variant, **{key: case[key] for key in keys})
        assert found == (case[column] or None), case


def test_mmmu_open_candidates() -> None:
    for case in golden("mmmu_open"):
        # JSON has no infinities: the vectors write them, and NaN, as text.
        found = [
            str(each) if str(each) in ("nan", "inf", "-inf") else each for each in parse_mmmu_open(case["prediction"])
        ]
        assert found == case["parsed"], case


def test_mmmu_open_as_lmms_eval_once_did() -> None:
    for case in golden("mmmu_open"):
        found = mmmu_open(case["prediction"], case["references"], variant="lmms_eval_snapshot")
        assert found in case["score_lmms_eval_snapshot_possible"], case


def test_mmmu_open_takes_a_stored_list_apart() -> None:
    stored = "['eight', '8']"
    assert mmmu_open("8.0", [stored]) == 1.0
    assert mmmu_open("8.0", [stored], gold_is_list=False) == 0.0
    assert mmmu_open("3", ["[3, 4]"]) == 0.0  # an interval
    assert mmmu_open("[3, 4]", ["[3, 4]"]) == 1.0
    assert mmmu_open("5", ["[unfinished"]) == 0.0


def test_mmmu_open_keeps_marks_that_are_no_single_mark() -> None:
    assert parse_mmmu_open("the answer is ?!") == ["?!"]
    assert parse_mmmu_open("the answer is ?") == ["the answer is ?"]


def test_mmmu_draws_only_where_no_letter_is_found() -> None:
    for case in golden("mmmu_multiple_choice"):
        assert (parse_mmmu_choice(case["prediction"], case["options"]) is None) == case["random_fallback"], case


def test_mmmu_draw_depends_on_the_question_alone() -> None:
    letters = "ABCD"

    def drawn(**options: Any) -> str:
        return next(letter for letter in letters if mmmu_multiple_choice("?", [letter], options=ANIMALS, **options))

    first = [drawn(item=f"validation_{number}") for number in range(40)]
    random.seed(1)
    again = [drawn(item=f"validation_{number}") for number in reversed(range(40))]
    assert first == again[::-1]
    assert set(first) == set(letters)
    assert first != [drawn(item=f"validation_{number}", seed=1) for number in range(40)]
    assert drawn() == drawn()
    for options in ({"random_fallback": False}, {"variant": "vlmevalkit"}):
        assert not any(mmmu_multiple_choice("?", [letter], options=ANIMALS, **options) for letter in letters)


def test_options_in_a_list() -> None:
    assert parse_mmmu_choice("I believe that it is a cat", list(ANIMALS.values())) == "C"
    assert mmbench_extract("rabbit", ["B"], options=list(ANIMALS.values())) == 1.0


@pytest.mark.parametrize("options", [None, "['cat', 'dog']", []])
def test_no_options_is_an_error(options: Any) -> None:
    with pytest.raises(PolymodalError, match="needs `options`"):
        mmmu_multiple_choice("A", ["A"], options=options)
    with pytest.raises(PolymodalError, match="needs `options`"):
        mmbench_extract("A", ["A"], options=options)


def test_unknown_variant_names_the_known() -> None:
    for metric in (mmbench_extract, mmmu_multiple_choice, mmmu_open, mmstar, mvbench, scienceqa, videomme_extract):
        options = {"options": ANIMALS} if metric in (mmbench_extract, mmmu_multiple_choice) else {}
        with pytest.raises(PolymodalError, match=r"unknown variant 'lmms'.*lmms_eval"):
            metric("A", ["A"], variant="lmms", **options)


@pytest.mark.parametrize("group", golden("mmbench_extract", "circular_groups"))
def test_circular_groups(group: dict[str, Any]) -> None:
    passes = [(row, {letter: row[letter] for letter in "ABCD" if letter in row}) for row in group["passes"]]
    right = [mmbench_extract(row["prediction"], [row["GT"]], options=options) for row, options in passes]
    assert min(right) == group["hit"]


def test_nan_options() -> None:
    for case in golden("mmbench_extract", "nan_option_cases"):
        assert parse_mmbench(case["prediction"], case["options"]) == case["vlmevalkit_can_infer_with_real_NaN_dropped"]
        assert parse_mmbench(case["prediction"], case["options"], variant="lmms_eval") == case["lmms_eval_can_infer"]
    for missing in (None, float("nan"), ""):
        assert parse_mmbench("yes banana", {"A": "yes", "B": "no", "C": missing}) == "A"


def test_mmbench_letters_beyond_d() -> None:
    options = dict(zip("ABCDEF", ("one", "two", "three", "four", "five", "six"), strict=True))
    long = "The answer is E. This follows from the long row of numbers that is drawn"
    assert parse_mmbench("Option F", options) == "F"
    assert parse_mmbench(long, options) is None  # "answer is X" knows A to D
    assert parse_mmbench(long.replace("E.", "D."), options) == "D"
    assert parse_mmbench("six", options) == "F"
    assert parse_mmbench("six", options, variant="lmms_eval") is None


def test_what_no_heuristic_reads_is_wrong_also_for_z() -> None:
    assert parse_mmbench("Spider", ANIMALS) is None
    assert mmbench_extract("Spider", ["Z"], options=ANIMALS) == 0.0
    assert mmbench_extract("I'm sorry, but without the image provided I can't", ["A"], options=ANIMALS) == 0.0


def test_scienceqa_index() -> None:
    for case in golden("scienceqa"):
        letter = parse_scienceqa(case["prediction"], n_choices=case["n_choices"])
        assert (ord(letter) - ord("A") if letter else -1) == case["parsed_index"], case
    assert parse_scienceqa("E", n_choices=3) is None
    assert parse_scienceqa("The answer is A. No: The answer is B.") is None


def test_mmstar_first_character() -> None:
    assert [parse_mmstar(text) for text in ("Answer: B", "(b) dog", "the answer is d", "yes", "")] == [
        "A", "B", "D", None, None
    ]  # fmt: skip


def test_extract_letter_takes_the_last_of_the_surest_form() -> None:
    assert extract_letter("(A) looks right, but (B) is better") == "B"
    assert extract_letter("the answer is A. No, the best answer is C then (D)") == "D"  # the rest of the text counts
    assert extract_letter("Failed to obtain answer via API.") == "A"
    assert extract_letter("...") is None


def test_mvbench_empty_answer_is_officially_right() -> None:
    for empty in ("", ".", " (B)"):
        assert mvbench(empty, ["(A) red"]) == 1.0
    assert mvbench("", ["(A) red"], variant="lmms_eval") == 0.0


def test_videomme_scores_letters() -> None:
    assert videomme_extract("Answer: C", ["C"]) == 1.0
    assert videomme_extract("Best option: A", ["A"]) == 0.0  # the B of Best
    assert videomme_extract("Best option: A", ["A"], variant="lmms_eval") == 1.0
    assert videomme_extract("b", ["B"]) == 0.0

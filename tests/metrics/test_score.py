"""The one door to all metrics: what it takes, and what it says about what it cannot take."""

import subprocess
import sys
from inspect import signature
from typing import Any

import pytest

import polymodal
from polymodal.errors import ConfigError, DataError
from polymodal.metrics import METRICS, score


def test_a_plain_import_is_enough() -> None:
    code = (
        "import sys, polymodal; assert 'numpy' not in sys.modules; print(polymodal.metrics.score('gqa', 'A.', ['a']))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1.0\n"


def test_the_example_of_the_docstring() -> None:
    assert polymodal.metrics.score("chartqa_relaxed", "104", ["100"]) == 1
    assert score("vqa_accuracy", "Black.", ["black"] * 10) == 0
    assert score("vqa_accuracy", "Black.", ["black"] * 10, variant="lmms_eval") == 1


def test_exact_and_contains() -> None:
    assert score("exact", "The dogs.", ["dog"]) == score("contains", "two dogs", ["dog"]) == 1
    assert score("exact", "two dogs", ["dog"]) == score("contains", "hotdogs", ["dog"]) == 0


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("anlz", {}, "unknown metric 'anlz'; did you mean 'anls'?"),
        ("", {}, "known: anls, aokvqa"),
        ("anls", {"varient": "official"}, "unknown option of metric 'anls' 'varient'; did you mean 'variant'?"),
        ("exact", {"variant": "lmms_eval"}, "unknown option of metric 'exact' 'variant'; known: none"),
        ("aokvqa", {"setting": "direct"}, "did you mean 'direct_answer'?"),
    ],
)
def test_an_unknown_name(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        score(name, "yes", ["yes"], **options)
    assert says in str(caught.value)


def has_only_variants(name: str) -> bool:
    parameters = signature(METRICS[name]).parameters
    required = [option for option in parameters.values() if option.default is option.empty]
    return "variant" in parameters and len(required) == 2


@pytest.mark.parametrize("name", filter(has_only_variants, METRICS))
def test_an_unknown_variant(name: str) -> None:
    with pytest.raises(ConfigError, match=r"variant.*'lmms-eval'"):
        score(name, "yes", ["yes"], variant="lmms-eval")


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("prediction", "references", "says"),
    [
        (None, ["yes"], "the prediction is None, not a string"),
        (3, ["yes"], "the prediction is 3, not a string"),
        ("yes", "yes", "the references are 'yes', not a list of strings"),
        ("yes", None, "the references are None, not a list of strings"),
        ("yes", {"yes"}, "not a list of strings"),
        ("yes", [], "no references"),
        ("yes", ["yes", 3], "a reference is 3, not a string"),
        ("yes", [{"answer": "yes"}], "not a string"),
    ],
)
def test_what_is_no_answer(name: str, prediction: Any, references: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"metric '{name}'") as caught:
        score(name, prediction, references)
    assert says in str(caught.value)


def test_an_option_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def needy(prediction: str, references: list[str], *, choices: list[str]) -> float:
        return float(prediction in choices)

    monkeypatch.setitem(METRICS, "needy", needy)
    with pytest.raises(ConfigError, match="'needy' needs choices"):
        score("needy", "a", ["a"])
    assert score("needy", "a", ["a"], choices=["a"]) == 1

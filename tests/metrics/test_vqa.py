"""The traps of the VQA family's scores, each with what an obvious implementation would give instead."""

import sys

import pytest

from polymodal.errors import ConfigError, DataError
from polymodal.metrics.documents import anls, chartqa_relaxed, ocrbench
from polymodal.metrics.vqa import aokvqa, gqa, normalize_answer, textvqa_accuracy, vqa_accuracy


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_one_annotator_is_left_out_and_not_all_who_agree(agree: int, expected: float) -> None:
    references = ["cat"] * agree + [f"dog {number}" for number in range(10 - agree)]
    assert vqa_accuracy("cat", references) == pytest.approx(expected)
    assert textvqa_accuracy("cat", references) == pytest.approx(expected)


def test_a_unanimous_answer_is_compared_as_it_stands() -> None:
    assert vqa_accuracy("STOP", ["stop"] * 10) == 0
    assert vqa_accuracy(" stop\n", ["stop\t"] * 10) == 1
    assert vqa_accuracy("STOP", ["stop"] * 9 + ["halt"]) == 1
    assert vqa_accuracy("STOP", ["stop"] * 9 + ["Stop"]) == 1
    assert textvqa_accuracy("STOP", ["stop"] * 10) == 1


def test_a_single_annotator_agrees_with_nobody() -> None:
    assert vqa_accuracy("cat", ["cat"]) == 0


def test_only_32_periods_go() -> None:
    assert normalize_answer("x." * 40) == "x" * 32 + "x." * 8


@pytest.mark.parametrize(
    ("answer", "official", "m4c"),
    [
        ("red,blue", "red blue", "redblue"),
        ("1,000-2,000", "10002000", "1000 2000"),
        ("t - shirt", "t shirt", "t shirt"),
        ("t-shirt", "t shirt", "t shirt"),
        ("3.5.", "3.5", "3.5"),
        ("that's", "that's", "that 's"),
        ("A", "", ""),
        ("None", "0", "0"),
        ("dont its im", "don't its im", "don't its im"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("yall'd've", "y'all'd've", "y'all'd've"),
        ("yalldve", "yalldve", "yalldve"),
        ("5:30 $1 50% yes。", "5:30 $1 50% yes。", "5:30 $1 50% yes。"),
    ],
)
def test_normalized_answers(answer: str, official: str, m4c: str) -> None:
    assert normalize_answer(answer) == official
    assert normalize_answer(answer, "m4c") == m4c


def test_a_mark_beside_a_space_anywhere_goes_everywhere() -> None:
    assert normalize_answer("a-b c -d") == "ab c d"
    assert normalize_answer("x-y z-w") == "x y z w"


def test_what_vlmevalkit_and_lmms_eval_make_of_it() -> None:
    assert normalize_answer("3.", "vlmevalkit") == "3."
    # Two commas between digits are a number to M4C's pattern, and to lmms-eval, which uses it.
    assert normalize_answer("1,,2-3", "lmms_eval") == "123"
    assert normalize_answer("1,,2-3") == "1 2 3"
    with pytest.raises(ConfigError, match="did you mean 'lmms_eval'"):
        normalize_answer("x", "lmms-eval")


@pytest.mark.parametrize("count", [1, 9, 11])
def test_textvqa_has_ten_references(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} references, but TextVQA has exactly 10"):
        textvqa_accuracy("cat", ["cat"] * count)


@pytest.mark.parametrize(
    ("prediction", "gold", "official", "official_raw", "lmms_eval", "vlmevalkit"),
    [
        ("Yes..", "yes", 1, 0, 1, 0),
        ("yes ", "yes", 0, 0, 1, 1),
        ("tshirt", "t-shirt", 0, 0, 1, 0),
        ("TV", "TV", 0, 1, 1, 1),
    ],
)
def test_gqa(
    prediction: str, gold: str, official: float, official_raw: float, lmms_eval: float, vlmevalkit: float
) -> None:
    assert gqa(prediction, [gold]) == official
    assert gqa(prediction, [gold], variant="official_raw") == gqa(prediction, [gold], variant="raw") == official_raw
    assert gqa(prediction, [gold], variant="lmms_eval") == lmms_eval
    assert gqa(prediction, [gold], variant="vlmevalkit") == vlmevalkit


def test_aokvqa() -> None:
    assert aokvqa("cat", ["cat", "cat", "dog"]) == pytest.approx(2 / 3)  # nobody is left out
    assert aokvqa("cat", ["cat"], setting="multiple_choice", choices=["cat", "dog"]) == 1
    assert aokvqa("A", ["cat"], setting="multiple_choice", choices=["cat", "dog"]) == 0
    with pytest.raises(DataError, match="'cow' is none of the choices cat, dog"):
        aokvqa("cat", ["cow"], setting="multiple_choice", choices=["cat", "dog"])


def test_anls_measures_the_raw_strings_in_capitals() -> None:
    assert anls("ß", ["x"]) == 0.5
    assert anls("ß", ["x"], variant="m4c_stvqa") == 0
    assert anls("   ", ["a"]) == pytest.approx(2 / 3)
    assert anls("   ", ["a"], variant="lmms_eval") == 0
    assert anls("", [""]) == 1


def test_anls_keeps_a_half_but_for_pix2struct() -> None:
    assert anls("ab", ["a"]) == 0.5
    assert anls("ab", ["a"], variant="pix2struct") == 0
    assert anls("abc", ["a"]) == 0


def test_anls_takes_the_nearest_reference() -> None:
    assert anls("abcd", ["xyz", "abce"]) == 0.75


def test_anls_of_none() -> None:
    assert anls("None", ["none"]) == 1
    assert anls("None", ["none"], variant="mp_docvqa") == anls(" ", [" "], variant="mp_docvqa") == 0


def test_anls_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ConfigError, match=r"pip install 'polymodal\[eval\]'"):
        anls("a", ["a"])


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("105", "100", 1),
        ("1.05", "1", 0),
        ("1910", "2010", 1),
        ("0.0", "0", 0),
        ("5", "5%", 0),
        ("1,000", "1000", 0),
        ("nan", "nan", 0),
        ("yes", "Yes", 1),
    ],
)
def test_chartqa(prediction: str, target: str, expected: float) -> None:
    assert chartqa_relaxed(prediction, [target]) == expected


def test_vlmevalkit_takes_a_list_in_a_string_for_several_references() -> None:
    assert chartqa_relaxed("2013", ["[2011, 2015]"], variant="vlmevalkit") == 1
    assert chartqa_relaxed("[2011, 2015]", ["[2011, 2015]"], variant="vlmevalkit") == 0
    assert chartqa_relaxed("[Asia, Europe]", ["[Asia, Europe]"], variant="vlmevalkit") == 1
    assert chartqa_relaxed("2013", ["[2011, 2015]"]) == 0


def test_a_reference_is_read_and_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert chartqa_relaxed("x", ["[print('run')]", "[" * 10_000], variant="vlmevalkit") == 0
    assert capsys.readouterr().out == ""


def test_ocrbench() -> None:
    assert ocrbench("It says STOP", ["go", "stop"]) == 1
    assert ocrbench("x\n+ 1", ["x+1"]) == 0
    assert ocrbench("x\n+ 1", ["x+1"], dataset="HME100k") == 1
    assert ocrbench("X+1", ["x+1"], dataset="HME100k") == 0
    assert ocrbench("１２", ["12"]) == 0
    assert ocrbench("１２", ["12"], variant="lmms_eval") == 1
    assert ocrbench("１２", ["12"], dataset="HME100k", variant="lmms_eval") == 0

"""Word and character error rates, after each normaliser, of the golden utterances and of the cases that surprise."""

import json
import sys
from pathlib import Path

import pytest

from polymodal.errors import ConfigError, DataError
from polymodal.metrics import score, speech
from polymodal.metrics.speech import cer, corpus_cer, corpus_wer, normalize, wer

GOLDEN = Path(__file__).parent.parent / "golden"
UTTERANCES = json.loads((GOLDEN / "wer.json").read_text(encoding="utf-8"))["cases"]
TEXTS = json.loads((GOLDEN / "whisper_normalizer.json").read_text(encoding="utf-8"))["cases"]
COLUMNS = {"score": "official", "score_lmms_eval": "lmms_eval", "score_raw_jiwer": "raw"}
COLUMNS["score_basic_normalizer"] = "basic"


@pytest.mark.parametrize("column", COLUMNS)
def test_golden_word_error_rates(column: str) -> None:
    given = [score("wer", c["prediction"], c["references"], variant=COLUMNS[column]) for c in UTTERANCES]
    assert given == pytest.approx([case[column] for case in UTTERANCES], abs=1e-6)


def test_golden_character_error_rates() -> None:
    given = [score("cer", case["prediction"], case["references"]) for case in UTTERANCES]
    assert given == pytest.approx([case["cer_raw_jiwer"] for case in UTTERANCES], abs=1e-6)


def test_golden_counts_make_the_corpus() -> None:
    cases = UTTERANCES
    counts = [case["counts_normalized"] for case in cases]
    edits = sum(of["sub"] + of["dele"] + of["ins"] for of in counts)
    words = sum(of["hits"] + of["sub"] + of["dele"] for of in counts)
    said, gold = [case["prediction"] for case in cases], [case["references"] for case in cases]
    assert corpus_wer(said, gold) == pytest.approx(edits / words, abs=1e-6)
    assert corpus_wer(said, gold) != pytest.approx(sum(case["score"] for case in cases) / len(cases), abs=1e-3)


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case["prediction"])
def test_golden_normalizers(case: dict[str, str]) -> None:
    assert normalize(case["prediction"]) == case["normalized"]
    assert normalize(case["prediction"], "basic") == case["normalized_basic"]


def test_golden_normalized_utterances() -> None:
    for case in UTTERANCES:
        assert normalize(case["prediction"]) == case["normalized_prediction"]
        assert normalize(case["references"][0]) == case["normalized_reference"]


def test_words_that_only_the_package_rewrites() -> None:
    assert normalize("Kinda, sorta; dunno 'cause") == "kinda sorta dunno cause"
    assert normalize("gonna shoulda colour") == "going to should have color"


def test_nothing_said_and_nothing_to_hear() -> None:
    assert wer("", ["hello world"]) == 1
    assert wer("", [""]) == 0
    assert wer("hello world", [""]) == 2  # insertions, as jiwer counts
    assert wer("uh [noise]", ["um"]) == 0
    assert cer("", [""]) == 0
    assert corpus_wer(["hello", "a b c"], [[""], ["a b c"]]) == pytest.approx(1 / 3)


def test_a_corpus_is_no_mean() -> None:
    said, gold = ["a", "b c d e"], [["x"], ["b c d e"]]
    assert corpus_wer(said, gold) == pytest.approx(1 / 5)
    assert corpus_cer(["ab", "abcdefgh"], [["ax"], ["abcdefgh"]]) == pytest.approx(1 / 10)


def test_the_nearest_of_several_references() -> None:
    assert wer("a cat", ["the dog", "a cat"]) == 0
    assert corpus_wer(["a cat", "x"], [["the dog sat", "a dog"], ["x"]]) == pytest.approx(1 / 3)


def test_variants() -> None:
    said, gold = "Twenty-one colours.", ["21 colors"]
    rates = [wer(said, gold, variant=variant) for variant in ("official", "basic", "raw")]
    assert rates == [0, pytest.approx(1.5), 1]
    assert cer(said, gold) == cer(said, gold, variant="raw") > 0
    assert cer(said, gold, variant="english") == 0
    # Tags of Whisper's own go before anything else, even one that the normalisers leave half of.
    assert wer("<|0.00|> hello <|x>y|>", ["hello"], variant="lmms_eval") == 0
    assert wer("it costs $5", ["it costs 5"], variant="lmms_eval") == 0
    assert wer("it costs $5", ["it costs 5"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("text", ["9" * 5000, "one million " + "million " * 3000])
def test_a_number_longer_than_python_reads(text: str) -> None:
    assert wer(text, [text]) == 0


def test_what_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="1 transcripts but references of 2 utterances"):
        corpus_wer(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="utterance 1: the references are 'b'"):
        corpus_cer(["a", "b"], [["a"], "b"])
    with pytest.raises(ConfigError, match="did you mean 'lmms_eval'"):
        wer("a", ["a"], variant="lmms-eval")
    with pytest.raises(ConfigError, match="variant of cer"):
        cer("a", ["a"], variant="lmms_eval")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ConfigError, match=r"wer needs jiwer, which is not installed: pip install 'polymodal\[eval\]'"):
        wer("a", ["a"])
    monkeypatch.undo()
    speech._whisper.cache_clear()
    monkeypatch.setitem(sys.modules, "whisper_normalizer.basic", None)
    with pytest.raises(
        ConfigError,
        match=r"needs whisper-normalizer, which is installed but cannot be imported: .* \(pip install .polymodal",
    ):
        wer("a", ["a"])

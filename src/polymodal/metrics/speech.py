"""How far a transcript is from what was said: word and character error rate, of one utterance and of a corpus.

WER is counted after Whisper's English normaliser (Radford et al. 2022, arXiv:2212.04356, appendix C), which most tables
use; which normaliser it was moves the figure by points. Rates are jiwer's: edits / words of the reference, so above 1
where a transcript runs on, and the number of insertions where the reference is empty.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from polymodal.errors import DataError, unknown_name
from polymodal.utils.extras import extra

# A variant's normaliser. CER is published over the text as it stands, and for languages without spaces.
_WER = {"official": "english", "basic": "basic", "raw": "raw", "lmms_eval": "lmms_eval"}
_CER = {"official": "raw", "basic": "basic", "raw": "raw", "english": "english"}
# What the package whisper-normalizer rewrites besides, and OpenAI's own does not.
_NOT_WHISPERS = ("kinda", "sorta", "dunno", "cause")


def wer(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """Word error rate of an utterance, against the nearest reference."""
    return corpus_wer([prediction], [references], variant=variant)


def cer(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """Character error rate of an utterance, against the nearest reference."""
    return corpus_cer([prediction], [references], variant=variant)


def corpus_wer(predictions: Sequence[str], references: Sequence[Sequence[str]], *, variant: str = "official") -> float:
    """Word error rate of a corpus: all edits / all words of the references, not the mean over utterances."""
    if variant not in _WER:
        raise unknown_name("variant of wer", variant, _WER)
    return _rate(*_counted(predictions, references, _jiwer("wer").process_words, _WER[variant]))


def corpus_cer(predictions: Sequence[str], references: Sequence[Sequence[str]], *, variant: str = "official") -> float:
    """Character error rate of a corpus: all edits / all characters of the references."""
    if variant not in _CER:
        raise unknown_name("variant of cer", variant, _CER)
    return _rate(*_counted(predictions, references, _jiwer("cer").process_characters, _CER[variant]))


def normalize(text: str, normalizer: str = "english") -> str:
    """A transcript as it is compared: by Whisper's "english" or "basic" normaliser, "lmms_eval" (both), or "raw"."""
    if normalizer == "raw":
        return text
    english, basic = _whisper()
    if normalizer == "basic":
        return basic(text)
    if normalizer == "lmms_eval":
        # It drops words that are nothing but punctuation afterwards, of which the basic normaliser has left none.
        text = re.sub(r"\s+", " ", re.sub(r"<\|.*?\|>", " ", text))
        return basic(normalize(re.sub(" ?([!,.?;:])", r"\1", text).lstrip(" ")))
    try:
        return english(text)
    except (AssertionError, ValueError):  # a number of more digits than Python reads, from a model that goes in circles
        return basic(text)


@lru_cache(maxsize=100_000)
def word_count(reference: str, variant: str = "official") -> int:
    """The words of a reference as `wer` counts them, by which utterances are weighed in a corpus."""
    return len(normalize(reference, _WER[variant]).split())


def _counted(
    predictions: Sequence[str], references: Sequence[Sequence[str]], align: Callable[[str, str], Any], normalizer: str
) -> tuple[int, int]:
    """Edits and length of the references, summed; of several references the nearest."""
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} transcripts but references of {len(references)} utterances")
    edits = length = 0
    for number, (prediction, accepted) in enumerate(zip(predictions, references)):
        if isinstance(accepted, str) or not accepted:
            raise DataError(f"utterance {number}: the references are {accepted!r:.80}, not a list of at least one text")
        said = normalize(prediction, normalizer)
        counts = []
        for reference in accepted:
            of = align(normalize(reference, normalizer), said)
            counts.append((of.substitutions + of.deletions + of.insertions, of.hits + of.substitutions + of.deletions))
        nearest = min(counts, key=lambda count: _rate(*count))
        edits, length = edits + nearest[0], length + nearest[1]
    return edits, length


def _rate(edits: int, length: int) -> float:
    return edits / length if length else float(edits)


def _jiwer(metric: str) -> Any:
    return extra("jiwer", f"{metric} needs", "polymodal[eval]")


@cache
def _whisper() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Whisper's English and basic normalisers."""
    english = extra("whisper_normalizer.english", "wer needs", "polymodal[eval]").EnglishTextNormalizer()
    basic = extra("whisper_normalizer.basic", "wer needs", "polymodal[eval]").BasicTextNormalizer()
    for word in _NOT_WHISPERS:
        english.replacers.pop(rf"\b{word}\b", None)
    return english, basic

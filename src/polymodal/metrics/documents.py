"""Answers read off documents and charts: ANLS, ChartQA's relaxed accuracy, OCRBench.

The rules are those of the Robust Reading Competition's script for DocVQA (ANLS: Biten et al. 2019, arXiv:1907.00490),
of pix2struct (Methani et al. 2020, arXiv:1909.00997: numbers may be 5% off) and of OCRBench's example.py.
"""

import ast
from collections.abc import Sequence

from polymodal.errors import unknown_name
from polymodal.utils.extras import extra

_HARNESSES = ("official", "lmms_eval", "vlmevalkit")
_ANLS = (*_HARNESSES, "mp_docvqa", "m4c_stvqa", "pix2struct")


def anls(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """ANLS: 1 - edit distance / length to the nearest reference; 0 where it is below a half."""
    if variant not in _ANLS:
        raise unknown_name("variant of anls", variant, _ANLS)
    Levenshtein = extra("rapidfuzz.distance", "anls needs", "polymodal[eval]").Levenshtein
    if variant == "lmms_eval":
        prediction = prediction.strip()
    official = variant in _HARNESSES
    said = _folded(prediction, variant)
    if variant == "mp_docvqa" and said in ("", "none"):
        return 0.0
    distances = []
    for reference in references:
        gold = _folded(reference, variant)
        # The script measures the raw strings, so that spare blanks count as right, and in capitals: "ß" is two long.
        long = (prediction.upper(), reference.upper()) if official else (said, gold)
        distances.append(Levenshtein.distance(said, gold) / max(1, *map(len, long)))
    nearest = min(distances)
    return 0.0 if nearest > 0.5 or (variant == "pix2struct" and nearest == 0.5) else 1 - nearest


def chartqa_relaxed(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """ChartQA: a number within 5% of a reference, or else the same text, case aside."""
    if variant not in _HARNESSES:
        raise unknown_name("variant of chartqa_relaxed", variant, _HARNESSES)
    if variant != "official":
        prediction = prediction.strip()
    if variant == "vlmevalkit":  # A reference that looks like a list in Python is taken for several
        references = [target for reference in references for target in _listed(reference)]
    return float(any(_is_near(prediction, target) for target in references))


def ocrbench(prediction: str, references: Sequence[str], *, dataset: str = "", variant: str = "official") -> float:
    """OCRBench: whether the answer contains a reference, case aside; for HME100k case counts and spaces do not."""
    if variant not in ("official", "lmms_eval"):
        raise unknown_name("variant of ocrbench", variant, ["official", "lmms_eval"])

    def plain(text: str) -> str:
        if dataset == "HME100k":
            return text.strip().replace("\n", "").replace(" ", "")
        if variant == "lmms_eval":
            text = text.translate(_HALF_WIDTH)
        return text.lower().strip().replace("\n", " ")

    said = plain(prediction)
    return float(any(plain(reference) in said for reference in references))


_HALF_WIDTH = {0xFEE0 + code: code for code in range(0x21, 0x7F)} | {0x3000: 0x20}


def _folded(text: str, variant: str) -> str:
    """What the edit distance is taken of: blanks collapsed, or only those at the ends, or none, by variant."""
    text = text.lower()
    if variant == "pix2struct":
        return text
    return text.strip() if variant in ("mp_docvqa", "m4c_stvqa") else " ".join(text.split())


def _is_near(prediction: str, target: str) -> bool:
    said, right = _number(prediction), _number(target)
    if said is not None and right:  # A target of 0 is compared as text, NaN is near nothing
        return abs(said - right) / abs(right) <= 0.05
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    """Read a number as Python does; with a percent sign, a hundredth of it."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _listed(text: str) -> list[str]:
    """The entries of what looks like a list in Python, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return [text]
    return [str(entry) for entry in value] if isinstance(value, list) else [text]

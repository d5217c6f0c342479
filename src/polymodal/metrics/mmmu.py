"""MMMU: the letter of a multiple-choice answer and the candidates of an open one, by the published scripts.

Where no letter is found the official script draws one with Python's global generator, so its score depends on the order
of the questions. Here the draw depends on the question alone, and `parse_mmmu_choice` is None there: report how many.
"""

import ast
import random
import re
from collections.abc import Sequence

from polymodal.metrics.multiple_choice import Options, chosen, is_right, lettered, parse_mmbench

# How a letter may stand, surest first; of several, the last in brackets or between spaces.
_OFFICIAL_FORMS = ("({})", " {} ")
_LMMS_EVAL_FORMS = ("({})", "{} ", "{}.")  # without the space before: "USA flag" means A

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def parse_mmmu_choice(text: str, options: Options, *, variant: str = "official") -> str | None:
    """The letter that an answer means; None where the published script draws one (VLMEvalKit's never does)."""
    if variant == "vlmevalkit":
        return parse_mmbench(text, options)
    forms = chosen({"official": _OFFICIAL_FORMS, "lmms_eval": _LMMS_EVAL_FORMS, "vlmevalkit": ()}, variant)
    by_letter = lettered(options)
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in forms:
        last = form if form == "({})" else " {} "
        if found := [letter for letter in by_letter if form.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(last.format(letter)))
    lowered = text.lower()
    if len(text.split()) > 5 and (found := [each for each in by_letter if by_letter[each].lower() in lowered]):
        return max(found, key=lambda letter: lowered.rfind(by_letter[letter].lower()))
    return None


def mmmu_letter(text: str, options: Options, *, variant: str = "official", seed: int = 0, item: str = "") -> str | None:
    """The letter that an answer means, or that is drawn for want of one."""
    # From `seed` and `item`, the question's id; without one, from the answer and the options.
    letter = parse_mmmu_choice(text, options, variant=variant)
    if letter is None and variant != "vlmevalkit":
        by_letter = lettered(options)
        draw = random.Random(f"{seed}/{item or [text, *by_letter.values()]}")  # a text seeds alike everywhere
        letter = draw.choice(list(by_letter))
    return letter


def mmmu_multiple_choice(
    prediction: str,
    references: Sequence[str],
    *,
    options: Options,
    variant: str = "official",
    random_fallback: bool = True,
    seed: int = 0,
    item: str = "",
) -> float:
    """Score a multiple-choice question; `random_fallback=False` counts as wrong what has no letter."""
    if not random_fallback:
        return is_right(parse_mmmu_choice(prediction, options, variant=variant), references)
    return is_right(mmmu_letter(prediction, options, variant=variant, seed=seed, item=item), references)


def _normalized(text: str) -> list[str | float]:
    """A number rounded to two places, or lower-case text; one character with a space, lest every word contain it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _conclusions(text: str) -> list[str]:
    """Of each line, the shortest rest after a word such as "is" or "answer"; the whole text where there is none."""
    # The published split also names ". " before a capital letter, which lower-case text never has.
    text = text.strip().strip(".").lower()
    lines, found = text.split("\n"), []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for indicator in (*_INDICATORS, *("=" * (number == len(lines)))):
            if indicator in line:
                rest = line.split(indicator)[-1].strip()
                if not shortest or len(rest) < len(shortest):
                    shortest = rest
        if shortest and shortest not in tuple(":,.!?;'"):
            found.append(shortest)
    return found or [text]


def parse_mmmu_open(text: str) -> list[str | float]:
    """The candidates of an open answer: its conclusions, then the numbers in them, both sorted as text."""
    conclusions = _conclusions(text)
    numbers = [number for each in conclusions for form in _NUMBERS for number in re.findall(form, each)]
    candidates = dict.fromkeys(value for each in (*conclusions, *numbers) for value in _normalized(each))
    return sorted(candidates, key=lambda value: (isinstance(value, float), str(value)))


def accepted(references: Sequence[str], gold_is_list: bool | None = None) -> list[str]:
    """The right answers, with those that the dataset stores as the text of a Python list taken apart."""
    if gold_is_list is not None or len(references) != 1 or not references[0].startswith("["):
        return list(references)
    try:
        stored = ast.literal_eval(references[0])
    except (ValueError, SyntaxError):
        return list(references)
    # An interval, [3, 4], is one answer.
    return stored if stored and all(isinstance(each, str) for each in stored) else list(references)


def mmmu_open(
    prediction: str, references: Sequence[str], *, variant: str = "official", gold_is_list: bool | None = None
) -> float:
    """Score an open question: a right text within a candidate, or an equal number; "no" is found in "unknown"."""
    # A reference that is the text of a list means any of it, unless `gold_is_list` says what it is. The snapshot
    # is lmms-eval before 2026-08-24, which looks for the right text in single characters and finds next to nothing.
    candidates = parse_mmmu_open(prediction)
    if chosen({"official": False, "lmms_eval": False, "lmms_eval_snapshot": True}, variant):
        candidates = list(str(candidates[0]))
    right = [value for reference in accepted(references, gold_is_list) for value in _normalized(reference)]
    texts = [value for value in right if isinstance(value, str)]
    return float(
        any(any(text in each for text in texts) if isinstance(each, str) else each in right for each in candidates)
    )

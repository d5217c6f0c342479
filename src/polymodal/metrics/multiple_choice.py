"""Which letter an answer to a multiple-choice question means, and whether it is the right one.

Every benchmark reads answers by a rule of its own, and published numbers hold under that rule alone, oddities included:
an empty answer is right in MVBench, "Answer: B" means A in MMStar. Variants: `official` is the benchmark's own scorer
(for MMBench and Video-MME, VLMEvalKit's without a judge); `lmms_eval` and `vlmevalkit` are those harnesses', to compare
with their numbers. Nothing is drawn at random here; MMMU, which does, is in `mmmu.py`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, TypeVar

from polymodal.errors import DataError, unknown_name
from polymodal.metrics.vqa import without_punctuation

T = TypeVar("T")
Options = Mapping[str, Any] | Sequence[Any]
"""Texts by letter, or in the order of the letters."""

FAILED = "-"
"""Instead of a letter, where a judge gave none."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILURE = "Failed to obtain answer via API"
_LMMS_FRAMES = (
    "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).",
)  # fmt: skip
_SUPERLATIVES = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_ANSWER_PHRASES = (
    *(f"{article}{noun} is" for article in ("", "the ") for noun in _SUPERLATIVES),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def chosen(variants: Mapping[str, T], variant: str) -> T:
    """The entry of a variant, or the error that names those there are."""
    if variant not in variants:
        raise unknown_name("variant", variant, variants)
    return variants[variant]


def lettered(options: Options) -> dict[str, str]:
    """Option texts by letter, without those that are None or NaN."""
    if not options or isinstance(options, str):
        raise DataError(f"this metric needs `options`, a list of texts or texts by letter; found {options!r}")
    by_letter = options if isinstance(options, Mapping) else dict(zip(ascii_uppercase, options, strict=False))
    return {letter: str(text) for letter, text in by_letter.items() if text is not None and text == text}


def is_right(letter: str | None, references: Sequence[str]) -> float:
    """Whether a letter is one of the right ones; None never is."""
    return float(letter is not None and letter in {reference.strip().upper() for reference in references})


def extract_letter(text: str, letters: Iterable[str] = "ABCDEFGH") -> str | None:
    """lmms-eval's extract_mcq_answer: of all letters that look like an answer, the last of the surest form."""
    letters = list(letters)
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found = [  # how sure, where, which
        (sure, text.rfind(form.format(letter)), letter)
        for sure, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
        for letter in letters
    ]
    lowered = text.lower()
    for phrase in _ANSWER_PHRASES:
        if (at := lowered.find(phrase)) >= 0:
            found += [(7, text.find(letter, at + len(phrase)), letter) for letter in letters]
    if bare[:1] in letters and not bare[1:2].isalpha():
        found.append((10, 0, bare[0]))
    if bare[-1:] in letters and not bare[-2:-1].isalpha():
        found.append((9, len(text) - 1, bare[-1]))
    found = [each for each in found if each[1] >= 0]
    # The last resort is a capital letter anywhere, also within a word: "Teddy Bear" means B.
    found = found or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else None


def _infer_option(text: str, letters: Sequence[str]) -> str | None:
    """VLMEvalKit's can_infer_option: one lone letter among the last five words, or "answer is X"."""
    if _API_FAILURE in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    # Only A to D here, also where there are more options; of either case, and without a word boundary.
    verbose = re.search(r"answer\s+is\s+\**([abcd])", text, re.IGNORECASE)
    return verbose[1].upper() if verbose and verbose[1].upper() in letters else None


def _only_option_within(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option whose text the answer contains."""
    lowered = text.lower()
    within = [letter for letter, option in options.items() if option.lower() in lowered]
    return within[0] if len(within) == 1 else None


def _can_infer(text: str, options: Options) -> str | None:
    """VLMEvalKit's can_infer."""
    # Published tables write a missing option as "nan", or leave the cell empty.
    present = {letter: option for letter, option in lettered(options).items() if option.strip() not in ("", "nan")}
    if letter := _infer_option(text, list(present)):
        return letter
    too_long = len(text.lower()) > 2 * sum(map(len, present.values()))
    return None if too_long else _only_option_within(text, present)


def _can_infer_lmms_eval(text: str, options: Options) -> str | None:
    """lmms-eval's rule for MMBench: "nan" stays an option, letters reach to E and option texts to D."""
    words, letters = text.split(), "ABCDE"
    if _API_FAILURE not in text:
        # An A among more than three words may be an article; it counts with punctuation only.
        frames = _LMMS_FRAMES if "A" in words and len(words) > 3 else ("{}", *_LMMS_FRAMES)
        for frame in frames:
            named = [letter for letter in letters if frame.format(letter) in words]
            if len(named) == 1:
                return named[0]
    return _only_option_within(text, {letter: text for letter, text in lettered(options).items() if letter in "ABCD"})


_MMBENCH: dict[str, Callable[[str, Options], str | None]] = {
    "official": _can_infer,
    "vlmevalkit": _can_infer,
    "lmms_eval": _can_infer_lmms_eval,
    "lmms_eval_static": lambda text, options: extract_letter(text, sorted(lettered(options))),
}


def parse_mmbench(text: str, options: Options, *, variant: str = "official") -> str | None:
    """The letter that an answer means by heuristics alone; `Z` is a refusal, None where a judge would be asked."""
    return chosen(_MMBENCH, variant)(text, options)


def mmbench_extract(
    prediction: str,
    references: Sequence[str],
    *,
    options: Options,
    variant: str = "official",
    judged: Mapping[str, str] | None = None,
) -> float:
    """One pass of MMBench: by heuristics, `exact_matching`, else by a letter in `judged`, else wrong."""
    letter = parse_mmbench(prediction, options, variant=variant) or (judged or {}).get(prediction)
    return is_right(letter, references)


def named_choice(text: str, choices: Sequence[str]) -> str:
    """The choice that an answer names, by its text or else as MMBench reads it; the answer itself where none is."""
    letter = None if text in choices else parse_mmbench(text, choices)
    return lettered(choices).get(letter, text) if letter else text


def aokvqa_choice(prediction: str, references: Sequence[str], *, choices: Sequence[str]) -> float:
    """A-OKVQA's multiple choice, officially the choice's text, asked by letter: what was named is compared."""
    return float(named_choice(prediction, choices) in references)


def _scienceqa_official(text: str) -> str | None:
    if re.match(r"[A-E](\Z|\. )", text):
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)  # the period takes any character, but there must be one
    return said[0] if len(said) == 1 else None


def _scienceqa_lmms_eval(text: str) -> str | None:
    text = text.strip()
    return text[:1].upper() if len(text) == 1 or (text[:1].isupper() and text[1] == ".") else None


_SCIENCEQA = {"official": _scienceqa_official, "lmms_eval": _scienceqa_lmms_eval}


def parse_scienceqa(text: str, *, n_choices: int | None = None, variant: str = "official") -> str | None:
    """The letter that an answer to ScienceQA means; the official rule knows five choices at most."""
    letter = chosen(_SCIENCEQA, variant)(text)
    known = ascii_uppercase if variant != "official" else ascii_uppercase[: min(n_choices or 5, 5)]
    return letter if letter and letter in known else None


def scienceqa(
    prediction: str, references: Sequence[str], *, variant: str = "official", n_choices: int | None = None
) -> float:
    """ScienceQA by LLaVA's script."""
    return is_right(parse_scienceqa(prediction, n_choices=n_choices, variant=variant), references)


def _mmstar_official(text: str) -> str | None:
    """The first character, or that after one of three openings: "apple" and "Answer: B" mean A."""
    text = text.lower().strip().replace("\n", " ")
    firsts = (text.removeprefix(opening)[:1] for opening in ("", "(", "option ", "the answer is "))
    return next((first.upper() for first in firsts if first and first in "abcd"), None)


_MMSTAR: dict[str, Callable[[str], str | None]] = {
    "official": _mmstar_official,
    "lmms_eval": lambda text: extract_letter(text, "ABCD"),
}


def parse_mmstar(text: str, *, variant: str = "official") -> str | None:
    """The letter that an answer to MMStar means."""
    return chosen(_MMSTAR, variant)(text)


def mmstar(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """One question of MMStar; the official number is the mean over all, lmms-eval's the mean of 18 categories."""
    return is_right(parse_mmstar(prediction, variant=variant), references)


def _mvbench_official(text: str, reference: str) -> bool:
    """Whether the first words, split at single spaces, contain each other: so an empty answer or "." is right."""
    said, option = text.lower().split(" ")[0], reference.lower().split(" ")[0]
    return said.replace(".", "") in option or option in said


def parse_mvbench(text: str) -> str:
    """lmms-eval's reading: the letter of "B. text", else the first letter A to E that stands alone, else the text."""
    if listed := re.match(r"([A-E])\.\s*.+$", text.strip(), re.IGNORECASE):
        return listed[1].upper()
    plain = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    for mark in "'\")(":
        plain = plain.strip(mark)
    plain = plain.strip().lower()
    alone = re.search(r"\b[A-E]\b", plain, re.IGNORECASE)
    return alone[0].upper() if alone else plain


_MVBENCH: dict[str, Callable[[str, str], bool]] = {
    "official": _mvbench_official,
    "lmms_eval": lambda text, reference: parse_mvbench(text) == parse_mvbench(reference),
}


def mvbench(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """One question of MVBench; a reference is "(B) text". Officially an empty answer is right: report how many are."""
    right = chosen(_MVBENCH, variant)
    return float(any(right(prediction, reference) for reference in references))


def _videomme_regex(text: str) -> str | None:
    # Of the published list of openings to remove, those without a letter A to D change nothing. For want of a comma,
    # "Best answer:" and "Best option:" are removed only where one follows the other, so "Best answer: C" means B.
    text = text.strip().replace("Best answer:Best option:", "").replace("Answer:", "")
    first = re.search("[ABCD]", text)
    return first[0] if first else None


_VIDEOMME: dict[str, Callable[[str], str | None]] = {
    "official": _videomme_regex,
    "vlmevalkit": _videomme_regex,
    "lmms_eval": lambda text: extract_letter(text, "ABCD"),
}


def parse_videomme(text: str, *, variant: str = "official") -> str | None:
    """The letter that an answer to Video-MME means: the first A, B, C or D, also within a word."""
    return chosen(_VIDEOMME, variant)(text)


def videomme_extract(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """One question of Video-MME; the official accuracy leaves out those whose letter is None, so count them."""
    return is_right(parse_videomme(prediction, variant=variant), references)

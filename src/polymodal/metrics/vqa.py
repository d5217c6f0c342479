"""Short answers about an image: VQAv2, TextVQA, GQA, A-OKVQA, with the quirks that published figures carry.

The rules are those of GT-Vision-Lab/VQA (`vqaEval.py`, Antol et al. 2015, arXiv:1505.00468), of M4C's processor that
EvalAI runs for TextVQA, of LLaVA's conversion for GQA and of allenai/aokvqa.
"""

import re
import string
from collections.abc import Callable, Sequence

from polymodal.errors import DataError, unknown_name

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
# A word of these that lacks exactly one of its apostrophes gets it back; all others stay ("its", "lets", "shes").
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTIONS.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the published table has this one the wrong way round

# Whether M4C's tokeniser goes first, the comma that takes all marks with it, and the period that goes.
_NORMALIZERS = {
    "official": (False, r"\d,\d", r"\.(?!\d)"),
    "m4c": (True, r"\d,+\d", r"\.(?!\d)"),
    "lmms_eval": (False, r"\d,+\d", r"\.(?!\d)"),
    "vlmevalkit": (False, r"\d,\d", r"(?<!\d)\.(?!\d)"),
}
_PERIODS = 32  # The published code hands `re.UNICODE` to `sub` as its count: further periods stay


def normalize_answer(answer: str, variant: str = "official") -> str:
    """Give an answer the form in which VQA compares it; "m4c" is what LLaVA writes into submissions to EvalAI."""
    if variant not in _NORMALIZERS:
        raise unknown_name("way to normalize", variant, _NORMALIZERS)
    if _NORMALIZERS[variant][0]:
        answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    bare = without_punctuation(_one_line(answer), variant)
    words = (_DIGITS.get(word, word) for word in bare.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str, variant: str = "official") -> str:
    """Drop a mark that stands beside a space anywhere, or all where a comma joins digits; else put a space for it."""
    _, comma, period = _NORMALIZERS[variant]
    joined = re.search(comma, text)
    marks = {ord(mark): "" if joined or f"{mark} " in text or f" {mark}" in text else " " for mark in _MARKS}
    return re.sub(period, "", text.translate(marks), count=_PERIODS)


def vqa_accuracy(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """VQAv2: the mean over annotators of min(1, how many of the others gave this answer / 3)."""
    if variant == "m4c" or variant not in _NORMALIZERS:
        raise unknown_name("variant of vqa_accuracy", variant, set(_NORMALIZERS) - {"m4c"})
    plain = [_one_line(answer) for answer in references]
    if variant == "official" and len(set(plain)) == 1:
        # Where all agree, the answer may be text in the image: compared as it stands, with case and punctuation.
        return _agreement(_one_line(prediction), plain)
    return _agreement(normalize_answer(prediction, variant), [normalize_answer(text, variant) for text in plain])


def textvqa_accuracy(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """TextVQA: as `vqa_accuracy`, but always normalized, by M4C's processor; the references are exactly ten."""
    ways = {"official": "m4c", "lmms_eval": "m4c", "vlmevalkit": "vlmevalkit"}
    if variant not in ways:
        raise unknown_name("variant of textvqa_accuracy", variant, ways)
    if len(references) != 10:
        raise DataError(f"textvqa_accuracy: {len(references)} references, but TextVQA has exactly 10 to a question")
    said, *answers = (normalize_answer(text, ways[variant]) for text in (prediction, *references))
    return _agreement(said, answers)


def gqa(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """GQA: whether the answer equals the gold one after LLaVA's conversion; `official_raw` converts nothing."""
    if variant not in _GQA:
        raise unknown_name("variant of gqa", variant, _GQA)
    convert, convert_gold = _GQA[variant]
    return float(convert(prediction) in map(convert_gold, references))


def aokvqa(
    prediction: str,
    references: Sequence[str],
    *,
    setting: str = "direct_answer",
    choices: Sequence[str] | None = None,
    variant: str = "official",
) -> float:
    """A-OKVQA, where nothing is normalized: min(1, matches / 3), or with `multiple_choice` the right choice's text."""
    if variant != "official":
        raise unknown_name("variant of aokvqa", variant, ["official"])
    if setting not in ("direct_answer", "multiple_choice"):
        raise unknown_name("setting of aokvqa", setting, ["direct_answer", "multiple_choice"])
    if setting == "direct_answer":
        return min(1.0, list(references).count(prediction) / 3)
    if choices is not None and references[0] not in choices:
        raise DataError(f"aokvqa: the right answer {references[0]!r} is none of the choices {', '.join(choices)}")
    return float(prediction == references[0])


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _agreement(said: str, answers: Sequence[str]) -> float:
    """Leave one annotator out at a time, by who they are and not by what they said."""
    same, total = list(answers).count(said), len(answers)
    return (same * min(1, max(0, same - 1) / 3) + (total - same) * min(1, same / 3)) / total


def _bare(answer: str) -> str:
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


# What is made of the prediction, and of the gold answer.
_GQA: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "official": (lambda said: said.rstrip(".").lower(), str),
    "official_raw": (str, str),
    "raw": (str, str),
    "lmms_eval": (lambda said: _bare(said.strip()), _bare),
    "vlmevalkit": (lambda said: said.strip().lower(), lambda gold: gold.strip().lower()),
}

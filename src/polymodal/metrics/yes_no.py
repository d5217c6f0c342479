"""POPE and MME: questions whose answer is yes or no, one at a time and as their benchmarks sum them up.

Variants as in `multiple_choice.py`: `official`, `lmms_eval`, `vlmevalkit`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from polymodal.errors import DataError, unknown_name
from polymodal.metrics.multiple_choice import chosen
from polymodal.metrics.vqa import without_punctuation

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

Parser = Callable[[str], str]


def _label(text: str) -> str:
    """A right answer: yes or no."""
    label = text.strip().rstrip(".").lower()
    if label not in ("yes", "no"):
        raise DataError(f"the right answer of a yes/no question must be yes or no, not {text!r}")
    return label


def _whole_words(text: str) -> str:
    """VLMEvalKit's YOrN_Extraction: whichever of the words yes and no is there without the other."""
    words = without_punctuation(text.lower(), "vlmevalkit").split()
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else "unknown"


def _pope_official(text: str) -> str:
    """No, where one of three words is in the first sentence; anything else is yes, also "", "NO" and "None"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _pope_lmms_eval(text: str) -> str:
    text = text.lower().strip()
    return text if text in ("yes", "no") else "unknown"


_POPE: dict[str, Parser] = {"official": _pope_official, "lmms_eval": _pope_lmms_eval, "vlmevalkit": _whole_words}


def parse_pope(text: str, *, variant: str = "official") -> str:
    """What an answer to POPE says: yes or no, and in the harnesses unknown."""
    return chosen(_POPE, variant)(text)


def pope(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """One question of POPE."""
    return float(parse_pope(prediction, variant=variant) in map(_label, references))


def pope_aggregate(
    predictions: Sequence[str | None], labels: Sequence[str], *, variant: str = "official"
) -> dict[str, float]:
    """Counts, accuracy, precision, recall, F1 (yes is positive) and the share of yes; a share of nothing is 0."""
    # A question that failed is None, which is neither yes nor no.
    if not labels or len(predictions) != len(labels):
        raise DataError(f"{len(predictions)} answers to {len(labels)} questions; POPE needs one for each")
    said = ["unknown" if each is None else parse_pope(each, variant=variant) for each in predictions]
    pairs = list(zip(said, map(_label, labels), strict=True))
    count = pairs.count
    tp, fp, tn, fn = count(("yes", "yes")), count(("yes", "no")), count(("no", "no")), count(("no", "yes"))
    if variant != "lmms_eval":  # whose recall leaves out what it cannot read
        fn += count(("unknown", "yes"))
    # Its ratio is that of the right answers, the others' that of the model's.
    yes = sum(pair[variant == "lmms_eval"] == "yes" for pair in pairs)
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    shares = {"accuracy": (tp + tn) / len(pairs), "precision": precision, "recall": recall, "f1": f1}
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn, **shares, "yes_ratio": yes / len(pairs)}


def _mme_official(text: str) -> str:
    """Yes or no within the first four characters, unstripped: "north" is no, "the answer is yes" neither."""
    return next((word for word in ("yes", "no") if word in text.lower()[:4]), "other")


def _mme_lmms_eval(text: str) -> str:
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _mme_official(text)


_MME: dict[str, Parser] = {"official": _mme_official, "lmms_eval": _mme_lmms_eval, "vlmevalkit": _whole_words}


def parse_mme(text: str, *, variant: str = "official") -> str:
    """What an answer to MME says: yes, no, or neither ("other", in VLMEvalKit "unknown")."""
    return chosen(_MME, variant)(text)


def mme(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """One question of MME."""
    return float(parse_mme(prediction, variant=variant) in map(_label, references))


def mme_totals(scores: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """Of questions as task, image and score: two sums, and of each task 100 times accuracy and images all right."""
    # Images of one name in two tasks are two.
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task, image, right in scores:
        if task not in PERCEPTION + COGNITION:
            raise unknown_name("task of MME", task, PERCEPTION + COGNITION)
        images[task][image].append(right)
    for task, of_task in images.items():
        for image, both in of_task.items():
            if len(both) != 2:
                raise DataError(f"MME {task}: {image} has {len(both)} answers; the score needs both of an image")
    per_task = {
        task: sum(50 * sum(both) + 100 * min(both) for both in of_task.values()) / len(of_task)
        for task, of_task in images.items()
    }
    sums = {
        name: sum((per_task[task] for task in tasks if task in per_task), 0.0)
        for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {**sums, **per_task}

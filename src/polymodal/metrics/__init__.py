"""Scores of single answers: the published rule of each benchmark, and what other harnesses make of it.

`METRICS` names them; `score` is the door. The default, `variant="official"`, is the benchmark's own script with all its
quirks; `lmms_eval`, `vlmevalkit` and others give the figure which that harness would print for the same answer. Figures
over a dataset (a mean by kind of question, F1) are the business of `evaluation/tasks/`.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from polymodal.errors import ConfigError, DataError, unknown_name
from polymodal.metrics.captions import bleu, cider, rouge_l
from polymodal.metrics.documents import anls, chartqa_relaxed, ocrbench
from polymodal.metrics.mmmu import mmmu_multiple_choice, mmmu_open
from polymodal.metrics.multiple_choice import (
    aokvqa_choice,
    mmbench_extract,
    mmstar,
    mvbench,
    scienceqa,
    videomme_extract,
)
from polymodal.metrics.speech import cer, wer
from polymodal.metrics.text import exact_match, mentions, word_recall
from polymodal.metrics.vqa import aokvqa, gqa, textvqa_accuracy, vqa_accuracy
from polymodal.metrics.yes_no import mme, pope

METRICS: dict[str, Callable[..., float]] = {
    "anls": anls,
    "aokvqa": aokvqa,
    "aokvqa_choice": aokvqa_choice,
    "bleu": bleu,
    "cer": cer,
    "chartqa_relaxed": chartqa_relaxed,
    "contains": mentions,
    "exact": exact_match,
    "gqa": gqa,
    "mmbench_extract": mmbench_extract,
    "mme": mme,
    "mmmu_multiple_choice": mmmu_multiple_choice,
    "mmmu_open": mmmu_open,
    "mmstar": mmstar,
    "mvbench": mvbench,
    "ocrbench": ocrbench,
    "pope": pope,
    "rouge_l": rouge_l,
    "scienceqa": scienceqa,
    "textvqa_accuracy": textvqa_accuracy,
    "videomme_extract": videomme_extract,
    "vqa_accuracy": vqa_accuracy,
    "wer": wer,
    "word_recall": word_recall,
}

CORPUS_METRICS: dict[str, Callable[..., list[float]]] = {"cider": cider}
"""Metrics that weigh an answer by all the others' references; of (predictions, references) they give scores."""


def score(name: str, prediction: str, references: Sequence[str], **options: Any) -> float:
    """Score one answer by the rule of a benchmark.

    Needs no model and no network. The answer is scored as it stands: what the rule does not strip (a prefix such as
    "The answer is", a special token) counts against it.

    Args:
        name: The metric, a key of `METRICS`, such as "vqa_accuracy", "anls" or "chartqa_relaxed".
        prediction: What the model answered.
        references: The accepted answers, as the benchmark has them; for VQA those of all its annotators (TextVQA has
            exactly ten).
        **options: What the metric takes besides. Most have `variant`: "official" (the default), or the name of a
            harness whose rule differs, such as "lmms_eval" or "vlmevalkit". `ocrbench` takes `dataset`, `aokvqa`
            takes `setting`; `mmmu_multiple_choice` and `mmbench_extract` need the `options`, `scienceqa` takes
            `n_choices`, `bleu` takes `n`.

    Returns:
        The score, between 0 and 1 (but for error rates and CIDEr, whose own scale it is).

    Raises:
        ConfigError: No such metric, option or variant; an option is missing; an extra is not installed.
        DataError: The prediction is no string, or the references are not what the rule needs.

    Example:
        >>> import polymodal
        >>> polymodal.metrics.score("chartqa_relaxed", "104", ["100"])
        1.0
        >>> polymodal.metrics.score("vqa_accuracy", "Black.", ["black"] * 10)
        0.0
        >>> polymodal.metrics.score("vqa_accuracy", "Black.", ["black"] * 10, variant="lmms_eval")
        1.0
    """
    if name in CORPUS_METRICS:
        raise ConfigError(
            f"metric {name!r} weighs an answer by a whole corpus: CORPUS_METRICS[{name!r}](answers, references)"
        )
    if name not in METRICS:
        raise unknown_name("metric", str(name), METRICS)
    known = {key: of for key, of in signature(METRICS[name]).parameters.items() if of.kind is of.KEYWORD_ONLY}
    for key in options:
        if key not in known:
            raise unknown_name(f"option of metric {name!r}", key, known)
    if not isinstance(prediction, str):
        raise DataError(f"metric {name!r}: the prediction is {prediction!r:.80}, not a string")
    if isinstance(references, str) or not isinstance(references, Sequence):
        raise DataError(f"metric {name!r}: the references are {references!r:.80}, not a list of strings")
    if not references:
        raise DataError(f"metric {name!r}: no references; an answer is scored against at least one")
    for reference in references:
        if not isinstance(reference, str):
            raise DataError(f"metric {name!r}: a reference is {reference!r:.80}, not a string")
    lacking = [key for key, of in known.items() if of.default is of.empty and key not in options]
    if lacking:
        raise ConfigError(f"metric {name!r} needs {' and '.join(lacking)} beside the references")
    return METRICS[name](prediction, references, **options)

"""What a benchmark is: examples to ask, a metric for the answers, and the figures that its papers print.

A task is plain data. `read` turns its files into `Example`s, `metric` names a scorer of `polymodal.metrics`,
`aggregate` makes figures of scored `Sample`s, `submit` writes what the benchmark's server takes. None of them sees the
model.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from polymodal.errors import ConfigError, DataError, unknown_name
from polymodal.messages import Image, Message, user
from polymodal.metrics import CORPUS_METRICS, METRICS, score
from polymodal.utils.files import make_folder, write_text


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: Its name in the benchmark, as text.
        messages: What the model is asked; ends with a user message.
        references: The right answers, in the form that the metric takes; empty where the split keeps them secret.
        kind: A group that gets a row of its own in the table, such as an answer type or a subject.
        metric: The scorer, where it is not the task's.
        options: Further arguments of the scorer, such as `options={"A": "cat", ...}`. Plain values of JSON.
        extra: What `aggregate` and `submit` need besides. Plain values of JSON.
    """

    id: str
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    kind: str = ""
    metric: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """An example's answer and score: a line of `samples.jsonl`, from which a score can be taken again.

    Attributes:
        id: The example's.
        kind: The example's.
        prompt: The texts of the conversation, media shown as `<image>`.
        references: The example's.
        metric: The scorer.
        options: The example's.
        extra: The example's.
        answer: What the model said, before any parsing; None where it failed.
        error: Why it failed.
        score: Of `answer`, 0 for a failure; None where the references are secret.
        blind: What the model said about grey images; None where it was not asked or failed.
        blind_score: Of `blind`.
        key: A hash of model, prompt, media and sampling, which names the answer in the cache.
    """

    id: str
    kind: str
    prompt: str
    references: tuple[str, ...]
    metric: str
    options: Mapping[str, Any]
    extra: Mapping[str, Any]
    answer: str | None
    error: str | None = None
    score: float | None = None
    blind: str | None = None
    blind_score: float | None = None
    key: str = ""


Item = TypeVar("Item", Example, Sample)
Key = TypeVar("Key")
Figures = dict[str, float]
Aggregate = Callable[[Sequence[Sample]], Figures]
"""Figures of scored samples, the headline first; those whose names begin with n_ are counts."""


Read = Callable[[Path, str], Iterable[Example]]
Submit = Callable[[Sequence[Sample], str, Path], list[Path]]
"""Writes what a server takes of the samples of a split, those that were not answered among them, into a folder."""


def ask(text: str, *images: Any) -> tuple[Message, ...]:
    """A question about images, which come first."""
    return (user(*map(Image, images), text),)


def mean(samples: Sequence[Sample]) -> float:
    """The mean score, of nothing 0."""
    return sum(sample.score or 0.0 for sample in samples) / max(1, len(samples))


def mean_score(samples: Sequence[Sample]) -> Figures:
    """The mean of the scores, 0 to 1, as the only figure."""
    return {"score": mean(samples)}


def by(samples: Sequence[Sample], key: Callable[[Sample], Key]) -> dict[Key, list[Sample]]:
    """Samples by something of theirs, in the order in which it comes first."""
    groups: dict[Key, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    return groups


def means_by(*keys: str) -> Aggregate:
    """The mean score of each value of `kind` or of keys of `extra`, of a list's values each."""

    def figures(samples: Sequence[Sample]) -> Figures:
        groups: dict[str, list[Sample]] = {}
        for key in keys:
            for sample in samples:
                values = sample.kind if key == "kind" else sample.extra.get(key)
                for value in values if isinstance(values, list) else [values] if values else []:
                    groups.setdefault(value, []).append(sample)
        return {name: mean(group) for name, group in groups.items()}

    return figures


def json_file(name: str, content: Callable[[Sequence[Sample]], Any]) -> Submit:
    """A submission of one JSON file; `{split}` in its name is the split."""

    def submit(samples: Sequence[Sample], split: str, folder: Path) -> list[Path]:
        path = folder / name.format(split=split)
        make_folder(folder)
        write_text(path, json.dumps(content(samples)))
        return [path]

    return submit


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: What `--tasks` calls it, without the split.
        about: One line for `--tasks list`: what it asks, whose prompt and scorer these are.
        metric: The scorer, a name of `polymodal.metrics`.
        splits: The splits that it has, the default first.
        read: Reads a split from a folder that holds the official files, parquet of the Hugging Face dataset, or
            VLMEvalKit's TSV.
        hub: The dataset's id on the Hugging Face hub; empty where there is none.
        max_new_tokens: The longest answer.
        aggregate: Makes the figures; `mean_score` where the benchmark prints a mean.
        group: The key of `extra` whose samples belong together (an image, a question asked in circular order), since
            intervals draw whole groups; empty where each sample stands alone.
        unit: What 1.0 is printed as: 100 for percent, 1 for scores such as MME's.
        lower_is_better: Whether the metric counts errors.
        submit: Writes the files that the benchmark's server takes, and says which; None where there is no server. It
            is given a sample for every id that the server wants; those that were not asked or failed have no answer.
        needs: Media that the model must be able to take.
        blind: Whether the image-blind control runs unless told otherwise.
        captions: Whether it asks for captions; a model that captions unasked is then given the image alone.
        hub_files: The files of the hub's dataset that a split needs, as patterns; all where none are named.
        folder: The folder in a data root that it shares with another task; empty where it has one of its own name.
        details: Makes further figures, which stand under those of `aggregate` and have no interval.
        server_ids: The ids that the server wants of a split, in order, where these are not the split's.
    """

    name: str
    about: str
    metric: str
    splits: tuple[str, ...]
    read: Read
    hub: str = ""
    max_new_tokens: int = 16
    aggregate: Aggregate = mean_score
    group: str = ""
    unit: float = 100.0
    lower_is_better: bool = False
    submit: Submit | None = None
    needs: tuple[str, ...] = ("image",)
    blind: bool = False
    captions: bool = False
    hub_files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folder: str = ""
    details: Aggregate | None = None
    server_ids: Callable[[Path, str], Iterable[str]] | None = None


def for_server(samples: Sequence[Sample], examples: Sequence[Example], ids: Sequence[str] = ()) -> list[Sample]:
    """The samples in the order of ids or else of all examples, with one without an answer for what was not asked."""
    known = {e.id: Sample(e.id, e.kind, "", e.references, e.metric, e.options, e.extra, None) for e in examples}
    known |= {sample.id: sample for sample in samples}
    wanted = list(ids) or list(known)
    if lost := known.keys() - set(wanted):
        raise DataError(
            f"question {min(lost)} is none of the {len(wanted):,} that the server wants; fetch the files again"
        )
    return [known.get(name) or Sample(name, "", "", (), "", {}, {}, None) for name in wanted]


def score_samples(samples: Sequence[Sample], variant: str | None = None) -> list[Sample]:
    """Score what has references, in a variant where its metric has it. A failure scores nothing."""
    samples = in_variant(samples, variant)
    said, control = _scores(samples, "answer"), _scores(samples, "blind")
    return [replace(s, score=said.get(i), blind_score=control.get(i)) for i, s in enumerate(samples)]


def _scores(samples: Sequence[Sample], said: str) -> dict[int, float]:
    """The scores of one pass over the examples, by number; those of corpus metrics all at once."""
    found: dict[int, float] = {}
    together: dict[tuple[str, str | None], list[int]] = {}
    control = any(sample.blind is not None for sample in samples)
    for number, sample in enumerate(samples):
        # A control that failed alone is left out: as a 0 it would count for the image.
        lost = said == "blind" and (not control or (sample.blind is None and sample.answer is not None))
        if not sample.references or lost:
            continue
        if sample.metric in CORPUS_METRICS:
            together.setdefault((sample.metric, sample.options.get("variant")), []).append(number)
        else:
            found[number] = score_one(sample, getattr(sample, said))
    for (metric, variant), numbers in together.items():
        answers = [getattr(samples[number], said) for number in numbers]
        references = [samples[number].references for number in numbers]
        options = {} if variant is None else {"variant": variant}
        values = CORPUS_METRICS[metric]([answer or "" for answer in answers], references, **options)
        kept = zip(numbers, answers, values, strict=True)
        found |= {number: 0.0 if answer is None else float(value) for number, answer, value in kept}
    return found


def score_one(sample: Sample | Example, answer: str | None) -> float:
    """Score an answer; a failure is never scored as an empty answer, which some scorers accept."""
    if answer is None:
        return 1.0 if sample.metric in ERROR_RATES else 0.0
    return METRICS[sample.metric](answer, sample.references, **sample.options)


def in_variant(items: Sequence[Item], variant: str | None) -> list[Item]:
    """Have examples or samples scored as another harness does, those whose metric knows it."""
    if variant is None:
        return list(items)
    firsts = {item.metric: item for item in reversed(items) if item.references}
    errors: dict[str, ConfigError] = {}
    for metric, item in firsts.items():
        try:
            if "variant" not in signature(METRICS.get(metric) or CORPUS_METRICS[metric]).parameters:
                raise ConfigError(f"--variant {variant}: metric {metric!r} has no variants")
            _try({**item.options, "variant": variant}, item)
        except ConfigError as error:
            errors[metric] = error
    if firsts and len(errors) == len(firsts):
        raise next(iter(errors.values()))
    known = firsts.keys() - errors.keys()
    return [replace(i, options={**i.options, "variant": variant}) if i.metric in known else i for i in items]


def lacks_variant(items: Sequence[Item], variant: str | None) -> ConfigError | None:
    """Why no metric of some examples can score as another harness does; None where one can."""
    try:
        in_variant(items, variant)
    except ConfigError as error:
        return error
    return None


def check_scorers(items: Iterable[Example | Sample], where: str) -> None:
    """Score an empty answer once for each form of example, so that no run ends at its first answer."""
    tried = set()
    for item in items:
        form = (item.metric, tuple(item.options), len(item.references))
        if not item.references or form in tried:
            continue
        tried.add(form)
        try:
            _try(item.options, item)
        except DataError as error:
            raise DataError(f"{where}: question {item.id}: {error}") from None


def _try(options: Mapping[str, Any], item: Example | Sample) -> None:
    if item.metric in CORPUS_METRICS:
        if unknown := options.keys() - signature(CORPUS_METRICS[item.metric]).parameters.keys():
            raise unknown_name(f"option of metric {item.metric!r}", min(unknown), ("variant",))
        CORPUS_METRICS[item.metric]([""], [item.references], **options)
    elif item.metric in METRICS:
        score(item.metric, "", item.references, **options)
    else:
        raise unknown_name("metric", item.metric, [*METRICS, *CORPUS_METRICS])


ERROR_RATES = ("wer", "cer")
"""Metrics of which less is better; a failure is all wrong."""


def unique_ids(examples: Iterable[Example], where: str) -> Iterator[Example]:
    """Hand on examples; one that comes twice would be counted twice."""
    seen = set()
    for example in examples:
        if example.id in seen:
            raise DataError(f"{where}: question {example.id} comes twice; take one of the two out")
        seen.add(example.id)
        yield example

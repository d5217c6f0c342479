"""Scores taken again from kept answers, and two runs beside each other: what changed, and is it more than chance."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.errors import DataError, first_line
from polymodal.evaluation.results import Json, read_results, read_samples
from polymodal.evaluation.task import ERROR_RATES, Example, Sample, check_scorers, score_samples
from polymodal.metrics import CORPUS_METRICS, METRICS
from polymodal.metrics.intervals import mean_interval
from polymodal.metrics.text import markdown_table

SETTINGS = {
    "model": ("model_hash",),
    "prompt": ("template_hash",),
    "extraction": ("metric", "variant", "judge"),
    "decoding": ("decoding",),
    "preprocessing": ("preprocessing_hash",),
    "versions": ("versions",),
    "data": ("split",),
}
"""What may differ between two runs, and the entries of results.json that tell; the samples tell more."""


@dataclass(frozen=True)
class Difference:
    """Two runs of a task on the same examples."""

    task: str  # Its name
    changed: tuple[str, ...]  # Names of `SETTINGS`
    known: bool  # Whether both runs say how they were made; of two files of samples only these are compared
    n: int  # Examples that both scored
    only: tuple[int, int]  # Examples that only the first, only the second scored
    scores: tuple[float, float]  # Means over the n
    interval: tuple[float, float]  # 95%, of the second minus the first, paired by example
    p_value: float  # Of no difference: a sign test over the examples whose scores differ
    flipped: tuple[tuple[Sample, Sample], ...]  # Examples whose scores differ
    better: int  # How many of them the second has better


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare two results folders, or the samples of a task in two."""
    one, two = (path.parent if path.name == "results.json" else path for path in (first, second))
    if not any((folder / "results.json").is_file() for folder in (one, two)):
        name = (first if first.is_dir() else first.parent).name
        return [_difference(name, _settings(first), _settings(second), read_samples(first), read_samples(second))]
    a, b = read_results(one), read_results(two)
    names = [name for name in a["tasks"] if name in b["tasks"]]
    if not names:
        raise DataError(f"{first} and {second}: no task is in both ({', '.join(a['tasks'])}; {', '.join(b['tasks'])})")
    return [
        _difference(name, _of_task(a, name), _of_task(b, name), read_samples(one / name), read_samples(two / name))
        for name in names
    ]


def _settings(samples: Path) -> Json:
    """How samples were taken, as the results.json above their folder says; nothing where there is none."""
    folder = samples if samples.is_dir() else samples.parent
    results = folder.parent / "results.json"
    return _of_task(read_results(results), folder.name) if results.is_file() else {}


def _of_task(document: Json, name: str) -> Json:
    return {**document["tasks"].get(name, {}), "model_hash": document.get("model_hash")}


def _difference(name: str, a: Json, b: Json, first: Sequence[Sample], second: Sequence[Sample]) -> Difference:
    left = {sample.id: sample for sample in first if sample.score is not None}
    right = {sample.id: sample for sample in second if sample.score is not None}
    both = [(left[name], right[name]) for name in left if name in right]
    if not both:
        raise DataError(f"{name}: the two runs scored no example in common")
    scores = np.array([[one.score, two.score] for one, two in both], dtype=float)
    margin = scores[:, 1] - scores[:, 0]
    top = max(1.0, float(np.abs(margin).max()))
    ups, downs = int((margin > 0).sum()), int((margin < 0).sum())
    return Difference(
        task=name,
        changed=_changed(a, b, both, len(left) == len(right) == len(both)),
        known=bool(a and b),
        n=len(both),
        only=(len(left) - len(both), len(right) - len(both)),
        scores=(float(scores[:, 0].mean()), float(scores[:, 1].mean())),
        interval=mean_interval(margin, bounds=(-top, top)),
        p_value=sign_test(ups, downs),
        flipped=tuple(pair for pair, change in zip(both, margin, strict=True) if change),
        better=downs if both[0][0].metric in ERROR_RATES else ups,
    )


def _changed(a: Json, b: Json, both: Sequence[tuple[Sample, Sample]], same: bool) -> tuple[str, ...]:
    """Names of `SETTINGS`; prompts and metrics are compared question by question, as the runs may not ask the same."""
    found = {what for what, keys in SETTINGS.items() if any(a.get(key) != b.get(key) for key in keys)}
    if any(one.prompt != two.prompt for one, two in both):
        found.add("prompt")
    if any((one.metric, one.options) != (two.metric, two.options) for one, two in both):
        found.add("extraction")
    if not same or any(one.references != two.references for one, two in both):
        found.add("data")
    # A batch size changes nothing where answers in a batch were seen to equal those asked alone.
    alone = all(run.get("batch_size") == 1 or run.get("batch_invariant") for run in (a, b))
    if a.get("batch_size") != b.get("batch_size") and not alone:
        found.add("decoding")
    return (*(what for what in SETTINGS if what in found),)


def sign_test(ups: int, downs: int) -> float:
    """Two-sided p value of as uneven a split of ups and downs, were both as likely; for right and wrong McNemar's."""
    n, fewer = ups + downs, min(ups, downs)
    if n > 1000:  # the normal approximation, with its correction; 0.5 ** n underflows
        return math.erfc(max(0.0, (abs(ups - downs) - 1) / math.sqrt(n)) / math.sqrt(2))
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def difference_table(differences: Sequence[Difference]) -> str:
    """Differences as a Markdown table, and what was done differently."""
    head = ("task", "n", "first", "second", "difference (95%)", "p", "better", "worse")
    rows, notes = [], []
    for d in differences:
        low, high = d.interval
        change = f"{d.scores[1] - d.scores[0]:+.1%} ({low:+.1%} to {high:+.1%})"
        shown = (*(f"{score:.1%}" for score in d.scores), change, f"{d.p_value:.3f}", d.better)
        rows.append((d.task, d.n, *shown, len(d.flipped) - d.better))
        same = "run in the same way" if d.known else "nothing changed in the samples; no results.json tells the rest"
        notes.append(f"{d.task}: {'changed: ' + ', '.join(d.changed) if d.changed else same}")
        if any(d.only):
            notes.append(f"{d.task}: {d.only[0]} examples only in the first, {d.only[1]} only in the second")
    return "\n".join([markdown_table(head, rows), "", *notes])


def rescore(samples: Sequence[Sample], metric: str | None = None, variant: str | None = None) -> list[Sample]:
    """Score kept answers again, by another metric or variant."""
    if metric is not None:
        scorer = METRICS.get(metric) or CORPUS_METRICS.get(metric)
        taken = signature(scorer).parameters if scorer else {}
        options = [{key: value for key, value in s.options.items() if key in taken} for s in samples]
        samples = [replace(sample, metric=metric, options=own) for sample, own in zip(samples, options)]
    check_scorers(samples, "rescore")
    return score_samples(samples, variant)


def read_predictions(path: Path, examples: Sequence[Example], metric: str, allow_missing: bool = False) -> list[Sample]:
    """Read a file of answers to the examples of a task, in any form that benchmarks' servers take."""
    # A JSON list or lines of objects with an id and an answer, under the keys below, or one object of answers by id.
    answers = _predictions(path)
    known = {example.id for example in examples}
    if extra := [name for name in answers if name not in known]:
        raise DataError(f"{path}: {len(extra)} ids are not in the split, first {extra[0]!r}; is it of another split?")
    missing = [example.id for example in examples if example.id not in answers]
    if missing and not allow_missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        problem = f"{len(missing)} of {len(known)} questions have no answer ({shown})"
        raise DataError(f"{path}: {problem}; add them, or score the others with --allow-missing")
    return [
        Sample(e.id, e.kind, "", e.references, e.metric or metric, e.options, e.extra, answers[e.id])
        for e in examples
        if e.id in answers
    ]


_IDS = ("question_id", "questionId", "image_id", "id", "index")
_SAID = ("prediction", "response", "answer", "caption", "text")  # some files have the right `answer` beside the first


def _predictions(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        data = _json(path, text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise DataError(f"{path}: is no JSON ({first_line(error)})") from None
        data = [_line(path, number, line) for number, line in lines]
    if isinstance(data, dict) and isinstance(data.get("results"), list):
        data = data["results"]
    elif isinstance(data, dict):  # answers by id, or a file of one line
        alone = not data.keys().isdisjoint(_IDS) and not data.keys().isdisjoint(_SAID)
        data = [data] if alone else [{"id": name, "answer": answer} for name, answer in _flat(data)]
    if not isinstance(data, list):
        raise DataError(f"{path}: expected a list of answers or an object of answers by id")
    answers: dict[str, str] = {}
    for number, row in enumerate(each for one in data for each in _questions(one)):
        where = f"{path}: answer {number}"
        name = next((row[key] for key in _IDS if key in row), None) if isinstance(row, dict) else None
        said = next((row[key] for key in _SAID if key in row), None) if isinstance(row, dict) else None
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise DataError(f"{where}: needs an id ({', '.join(_IDS)})")
        if not isinstance(said, str):
            found = "none" if said is None else type(said).__name__
            raise DataError(f"{where} (id {name}): needs a text ({', '.join(_SAID)}), found {found}")
        if str(name) in answers:
            raise DataError(f"{where}: id {name} comes twice; keep one of the two")
        answers[str(name)] = said
    return answers


def _flat(data: Json) -> Iterator[tuple[str, Any]]:
    """Answers by id; several to a question, as A-OKVQA's server takes them, under id/kind."""
    for name, answer in data.items():
        parts = answer if isinstance(answer, dict) else {"": answer}
        yield from ((f"{name}/{kind}" if kind else name, said) for kind, said in parts.items())


def _questions(row: Any) -> list[Any]:
    """The answers in a row: itself, or a list of them, as Video-MME's template has it for each video."""
    rows = row.get("questions") if isinstance(row, dict) else None
    return rows if isinstance(rows, list) else [row]


def _json(path: Path, text: str) -> Any:
    """Parse JSON; of a key that comes twice Python would keep the last."""

    def once(pairs: list[tuple[str, Any]]) -> Json:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise DataError(f"{path}: id {next(k for k in keys if keys.count(k) > 1)} comes twice; keep one of the two")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply to be answers") from None


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return _json(path, line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is no JSON ({first_line(error)})") from None

"""Scores taken again from kept answers, and two runs beside each other: what changed, and is it more than chance."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.errors import DataError
from polymodal.evaluation.results import Json, read_results, read_samples
from polymodal.evaluation.task import Example, Sample, score_samples
from polymodal.metrics.intervals import mean_interval
from polymodal.metrics.text import markdown_table

SETTINGS = {
    "model": ("model_hash",),
    "prompt": ("prompt_hash", "template_hash"),
    "extraction": ("metric", "options"),
    "decoding": ("decoding", "batch_size"),
    "preprocessing": ("preprocessing_hash",),
    "data": ("split", "n", "limit"),
}
"""What may differ between two runs, and the entries of results.json that tell."""


@dataclass(frozen=True)
class Difference:
    """Two runs of a task on the same examples."""

    task: str  # Its name
    changed: tuple[str, ...]  # Names of `SETTINGS`
    n: int  # Examples that both scored
    only: tuple[int, int]  # Examples that only the first, only the second scored
    scores: tuple[float, float]  # Means over the n
    interval: tuple[float, float]  # 95%, of the second minus the first, paired by example
    p_value: float  # Of no difference: a sign test over the examples whose scores differ
    flipped: tuple[tuple[Sample, Sample], ...]  # Examples whose scores differ


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare two results folders, or two files of samples."""
    if first.is_file() or (first / "samples.jsonl").is_file():
        return [_difference(first.stem, {}, {}, read_samples(first), read_samples(second))]
    a, b = read_results(first), read_results(second)
    names = [name for name in a["tasks"] if name in b["tasks"]]
    if not names:
        raise DataError(f"{first} and {second}: no task is in both ({', '.join(a['tasks'])}; {', '.join(b['tasks'])})")
    return [
        _difference(
            name,
            {**a["tasks"][name], "model_hash": a.get("model_hash")},
            {**b["tasks"][name], "model_hash": b.get("model_hash")},
            read_samples(first / name),
            read_samples(second / name),
        )
        for name in names
    ]


def _difference(name: str, a: Json, b: Json, first: Sequence[Sample], second: Sequence[Sample]) -> Difference:
    changed = tuple(what for what, keys in SETTINGS.items() if any(a.get(key) != b.get(key) for key in keys))
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
        changed=changed,
        n=len(both),
        only=(len(left) - len(both), len(right) - len(both)),
        scores=(float(scores[:, 0].mean()), float(scores[:, 1].mean())),
        interval=mean_interval(margin, bounds=(-top, top)),
        p_value=sign_test(ups, downs),
        flipped=tuple(pair for pair, change in zip(both, margin, strict=True) if change),
    )


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
        better = sum((two.score or 0) > (one.score or 0) for one, two in d.flipped)
        shown = (*(f"{score:.1%}" for score in d.scores), change, f"{d.p_value:.3f}", better, len(d.flipped) - better)
        rows.append((d.task, d.n, *shown))
        notes.append(f"{d.task}: {'changed: ' + ', '.join(d.changed) if d.changed else 'run in the same way'}")
        if any(d.only):
            notes.append(f"{d.task}: {d.only[0]} examples only in the first, {d.only[1]} only in the second")
    return "\n".join([markdown_table(head, rows), "", *notes])


def rescore(samples: Sequence[Sample], metric: str | None = None, variant: str | None = None) -> list[Sample]:
    """Score kept answers again, by another metric or variant."""
    samples = [replace(s, metric=metric or s.metric, score=None, blind_score=None) for s in samples]
    return score_samples(samples, **({"variant": variant} if variant else {}))


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
_SAID = ("answer", "prediction", "caption", "text", "response")


def _predictions(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    try:
        data: Any = json.loads(text)
    except ValueError:
        data = [_line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if isinstance(data, dict):
        by_id = [{"id": name, "answer": answer} for name, answer in data.items()]
        data = data["results"] if isinstance(data.get("results"), list) else by_id
    if not isinstance(data, list):
        raise DataError(f"{path}: expected a list of answers or an object of answers by id")
    answers: dict[str, str] = {}
    for number, row in enumerate(data):
        where = f"{path}: answer {number}"
        name = next((row[key] for key in _IDS if key in row), None) if isinstance(row, dict) else None
        said = next((row[key] for key in _SAID if key in row), None) if isinstance(row, dict) else None
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise DataError(f"{where}: needs an id ({', '.join(_IDS)})")
        if not isinstance(said, str):
            raise DataError(f"{where} (id {name}): the answer must be a text, found {type(said).__name__}")
        if str(name) in answers:
            raise DataError(f"{where}: id {name} comes twice; keep one of the two")
        answers[str(name)] = said
    return answers


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is no JSON ({error})") from None

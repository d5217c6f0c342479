"""What a run leaves behind: `results.json` with every figure and how it was taken, `samples.jsonl`, and a table.

A results folder belongs to one model:

    results.json            model, its hash, versions, and of each task: score, 95% interval, n, prompts' hash, ...
    report.html             the same for a person, with images of right and wrong answers
    TASK/samples.jsonl      every answer as it came, before any parsing; `polymodal eval rescore` reads it
    TASK/...                what the benchmark's server takes, under the name that it wants
"""

import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.backends.base import Backend
from polymodal.errors import ConfigError, DataError
from polymodal.evaluation.runner import Run, Settings
from polymodal.evaluation.task import Sample, Task, mean_score, score_one
from polymodal.metrics import CORPUS_METRICS
from polymodal.metrics.intervals import grouped_interval, mean_interval
from polymodal.metrics.text import markdown_table, words_of
from polymodal.utils.files import make_folder, sha256_json, write_text

Json = dict[str, Any]


def summarise(task: Task, split: str, run: Run, settings: Settings, model: Backend | None = None) -> Json:
    """Every figure of a task and how it was taken, as plain data."""
    samples = [sample for sample in run.samples if sample.score is not None]
    document: Json = {
        "task": task.name,
        "split": split,
        "metric": task.metric,
        "options": dict(settings.options or {}),
        "n": len(run.samples),
        "failed": sum(sample.answer is None for sample in run.samples),
        "lower_is_better": task.lower_is_better,
        "unit": task.unit,
        "limit": settings.limit,
        "decoding": run.params.model_dump(mode="json"),
        "batch_size": run.batch_size,
        "batch_invariant": run.batch_invariant,
        "prompt_hash": sha256_json([sample.prompt for sample in run.samples]),
        **({f"{name}_hash": value for name, value in model.settings().items()} if model is not None else {}),
    }
    if not samples:
        return {**document, "score": None, "figures": {}, "kinds": []}
    figures = task.aggregate(samples) | (task.details(samples) if task.details else {})
    document |= {"score": next(iter(figures.values())), "figures": figures, "interval": _interval(task, samples)}
    by_kind = Counter(sample.kind for sample in samples)
    groups = [[s for s in samples if s.kind == kind] for kind in by_kind] if len(by_kind) > 1 else [samples]
    return {**document, "kinds": [_row(task, group) for group in groups], **_controls(task, samples)}


def _interval(task: Task, samples: Sequence[Sample]) -> tuple[float, float]:
    """Of the headline; of a plain mean without resampling the whole."""
    if task.aggregate is mean_score and not task.group:
        return _mean_interval([sample.score or 0.0 for sample in samples])
    groups = [sample.extra.get(task.group, sample.id) for sample in samples]
    return grouped_interval(samples, groups, lambda drawn: next(iter(task.aggregate(drawn).values())))  # type: ignore[arg-type]


def _mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    top = max(1.0, *scores)  # CIDEr reaches 10, an error rate any number
    return mean_interval(np.array(scores, dtype=float), bounds=(0.0, top))


def _row(task: Task, group: Sequence[Sample]) -> Json:
    """The mean of a kind."""
    scores = [sample.score or 0.0 for sample in group]
    row: Json = {
        "kind": group[0].kind,
        "metric": group[0].metric,
        "n": len(group),
        "failed": sum(sample.answer is None for sample in group),
        "score": float(np.mean(scores)),
        "interval": _mean_interval(scores),
    }
    row |= _controls(task, group)
    if task.blind:
        longest = max(len(words_of(sample.answer or "")) for sample in group)
        row["majority"] = max(_constant_score(group, answer) for answer in {s.references[0] for s in group})
        row["constant"] = max(row["majority"], _constant_score(group, constant_text(group, longest)))
    return row


def _controls(task: Task, samples: Sequence[Sample]) -> Json:
    """The image-blind control: its score, and how much of the score needs the image, paired by question."""
    if any(sample.blind_score is None for sample in samples):
        return {}
    blind = [sample.blind_score or 0.0 for sample in samples]
    margin = np.array([sample.score or 0.0 for sample in samples]) - np.array(blind)
    top = max(1.0, float(np.abs(margin).max()))
    return {
        "blind": float(np.mean(blind)),
        "margin": float(margin.mean()),
        "margin_interval": mean_interval(margin, bounds=(-top, top)),
    }


def constant_text(samples: Sequence[Sample], longest: int, tried: int = 48) -> str:
    """Words of the accepted answers, the frequent first, each kept where it raises the mean score of the text."""
    accepted = [{word for answer in sample.references for word in words_of(answer)} for sample in samples]
    counts = Counter(word for words in accepted for word in sorted(words))
    text, best = "", 0.0
    for word, _ in counts.most_common(tried):
        longer = f"{text} {word}".strip()
        score = _constant_score(samples, longer)
        if score > best and len(words_of(longer)) <= longest:
            text, best = longer, score
    return text


def _constant_score(samples: Sequence[Sample], answer: str) -> float:
    return sum(score_one(sample, answer) for sample in samples) / len(samples)


def table(documents: Sequence[Json]) -> str:
    """The scores as a Markdown table."""
    return markdown_table(*table_cells(documents), words=2)


def table_cells(documents: Sequence[Json]) -> tuple[list[str], list[list[str]]]:
    """The head and rows of the table: of each task its figures, or its kinds where it has a control."""
    rows = [row for document in documents for row in _table_rows(document)]
    blind, constant = (any(row[name] for row in rows) for name in ("blind", "majority"))
    head = ["task", "metric", "n", "score", "95%"]
    head += ["image-blind", "margin over blind (95%)"] * blind + ["majority", "constant text"] * constant
    names = ["task", "metric", "n", "score", "interval"]
    names += ["blind", "margin"] * blind + ["majority", "constant"] * constant
    return head, [[row[name] for name in names] for row in rows]


def _table_rows(document: Json) -> list[dict[str, str]]:
    unit = "points" if document["metric"] in CORPUS_METRICS else document["unit"]
    if document["score"] is None:
        return [_cells(f"{document['task']} ({document['split']})", document, unit)]
    name = f"{document['task']} {document['split']}".strip()
    rows = [_cells(name, document, unit)]
    kinds = document["kinds"]
    if document.get("blind") is not None and len(kinds) > 1:
        rows += [_cells(f"- {row['kind'] or 'other'}", row, unit) for row in kinds]
        if len({row["metric"] for row in kinds}) > 1:
            rows[0]["metric"] = "as below"
    else:
        rows += [
            _cells(f"- {key}", {"metric": "", "n": "", "score": value}, unit)
            for key, value in list(document["figures"].items())[1:]
        ]
        if len(kinds) == 1:
            alone = _cells(name, kinds[0], unit)
            rows[0] |= {key: alone[key] for key in ("majority", "constant")}
    return rows


def _cells(name: str, row: Json, unit: float | str) -> dict[str, str]:
    def shown(key: str) -> str:
        return "" if row.get(key) is None else _figure(row[key], unit)

    def between(key: str, sign: str = "") -> str:
        return " to ".join(f"{_figure(end, unit, sign)}" for end in row[key]) if key in row else ""

    margin = f"{_figure(row['margin'], unit, '+')} ({between('margin_interval', '+')})" if "margin" in row else ""
    metric = str(row.get("metric", "")).replace("_", " ")
    failed = f" ({row['failed']} failed)" if row.get("failed") else ""
    return {
        **{"task": name, "metric": metric, "n": f"{row.get('n', '')}{failed}", "score": shown("score") or "-"},
        **{"interval": between("interval"), "blind": shown("blind"), "margin": margin},
        **{"majority": shown("majority"), "constant": shown("constant")},
    }


def _figure(value: float, unit: float | str, sign: str = "") -> str:
    if isinstance(unit, str):  # points of CIDEr, which is no share of anything
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.1%}" if unit == 100 else f"{value * unit:{sign}.1f}"


def versions() -> dict[str, str]:
    """What computed the scores."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("polymodal", "torch", "transformers", "tokenizers", "pillow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_folder(folder: Path, model: Backend) -> Json:
    """What a results folder holds of the same model; raises where it holds another's."""
    path = folder / "results.json"
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: holds something else; name a new folder with --output")
        return {"model": model.name, "model_hash": model.fingerprint(), "tasks": {}, "versions": versions()}
    document = read_results(path)
    if document.get("model_hash") != model.fingerprint():
        raise ConfigError(
            f"{folder}: holds the results of another model ({document.get('model')!r}); name a new folder with --output"
        )
    return {**document, "versions": versions()}


def read_results(path: Path) -> Json:
    """Read `results.json`, or the one in a folder."""
    path = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as results ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("tasks"), dict):
        raise DataError(f"{path}: is no results.json of `polymodal eval`")
    return document


def write_results(folder: Path, document: Json) -> None:
    """Write `results.json`."""
    make_folder(folder)
    write_text(folder / "results.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write `samples.jsonl`."""
    make_folder(path.parent)
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def read_samples(path: Path) -> list[Sample]:
    """Read `samples.jsonl`."""
    path = path / "samples.jsonl" if path.is_dir() else path
    samples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            samples.append(Sample(**{**data, "references": tuple(data["references"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: line {number} is no sample of `polymodal eval` ({error})") from None
    return samples

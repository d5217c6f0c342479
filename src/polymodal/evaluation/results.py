"""What a run leaves behind: `results.json` with every figure and how it was taken, `samples.jsonl`, and a table.

A results folder belongs to one model:

    results.json            model, its hash, and of each task: score, 95% interval, n, prompts' hash, versions, ...
    report.html             the same for a person, with images of right and wrong answers
    TASK/samples.jsonl      every answer as it came, before any parsing; `polymodal eval rescore` reads it
    TASK/...                what the benchmark's server takes, under the name that it wants
"""

import json
import math
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.backends.base import Backend
from polymodal.errors import ConfigError, DataError, first_line
from polymodal.evaluation.files import read_lines
from polymodal.evaluation.runner import Run, Settings
from polymodal.evaluation.task import Figures, Sample, Task, mean_score, score_one
from polymodal.metrics import CORPUS_METRICS, METRICS
from polymodal.metrics.intervals import grouped_interval, mean_interval
from polymodal.metrics.text import markdown_table, words_of
from polymodal.utils.files import check_writable, make_folder, sha256_json, write_text

if TYPE_CHECKING:
    from polymodal.evaluation.embedder import Embedder  # loads torch

Json = dict[str, Any]

TRIED = 48
"""Answers and words, the frequent first, among which the best constant answer is looked for."""


def summarise(
    task: Task,
    split: str,
    run: Run,
    settings: Settings,
    model: "Backend | Embedder | None" = None,
    judge: Backend | None = None,
) -> Json:
    """Every figure of a task and how it was taken, as plain data."""
    samples = [sample for sample in run.samples if sample.score is not None]
    metrics = {sample.metric for sample in run.samples}
    document: Json = {
        "task": task.name,
        "split": split,
        "metric": metrics.pop() if len(metrics) == 1 else task.metric,
        "variant": settings.variant,
        "judge": judge and judge.name,
        "n": len(run.samples),
        "failed": sum(sample.answer is None for sample in run.samples),
        "lower_is_better": task.lower_is_better,
        "unit": task.unit,
        "limit": settings.limit,
        "decoding": run.params.plain,
        "batch_size": run.batch_size,
        "batch_invariant": run.batch_invariant,
        "prompt_hash": sha256_json([sample.prompt for sample in run.samples]),
        **({f"{name}_hash": value for name, value in model.settings().items()} if model is not None else {}),
        "versions": versions(),
    }
    if not samples:
        return {**document, "score": None, "figures": {}, "kinds": []}
    if settings.variant is not None and (other := [s.metric for s in samples if "variant" not in s.options]):
        document["without_variant"] = sorted(set(other))
    figures = task.aggregate(samples) | (task.details(samples) if task.details else {})
    document |= {"score": _headline(figures), "figures": figures, "interval": _interval(task, samples)}
    by_kind = Counter(sample.kind for sample in samples)
    groups = [[s for s in samples if s.kind == kind] for kind in by_kind] if len(by_kind) > 1 else [samples]
    return {**document, "kinds": [_row(task, group) for group in groups], **_controls(task, samples)}


def _interval(task: Task, samples: Sequence[Sample]) -> tuple[float, float]:
    """Of the headline; where that is the mean score, without counting all figures anew for every draw."""
    numbers = {sample.id: number for number, sample in enumerate(samples)}

    @cache
    def again(number: int, time: int) -> Sample:
        """A sample of a group that is drawn again: of a group of another name, lest the two become one."""
        sample = samples[number]
        return replace(sample, extra={**sample.extra, task.group: f"{sample.extra.get(task.group)} {time}"})

    def figure(drawn: Sequence[Sample]) -> float:
        times: Counter[str] = Counter()
        distinct = []
        for sample in drawn if task.group else ():
            times[sample.id] += 1
            time = times[sample.id]
            distinct.append(sample if time == 1 else again(numbers[sample.id], time))
        return _headline(task.aggregate(distinct or drawn))

    whole, best = figure(samples), 1.0
    if task.unit == 100 and math.isclose(whole, _headline(mean_score(samples)), rel_tol=1e-12):
        return _mean_interval(task, samples)
    if task.unit != 100:  # points: as many as for answers that are all right
        best = figure([replace(sample, answer=sample.references[0], score=1.0) for sample in samples])
    return grouped_interval(samples, _groups(task, samples), figure, bounds=(min(0.0, whole), max(best, whole)))


def _headline(figures: Figures) -> float:
    return next(iter(figures.values()))


def _groups(task: Task, samples: Sequence[Sample]) -> list[str]:
    """The group of each sample, by name."""
    return [repr(sample.extra.get(task.group, (sample.id,))) for sample in samples]


def _mean_interval(task: Task, samples: Sequence[Sample]) -> tuple[float, float]:
    """Of the mean score, of which whole groups are drawn."""
    scores = np.array([sample.score for sample in samples], dtype=float)
    bounds = (0.0, max(1.0, float(scores.max())))  # CIDEr reaches 10, an error rate any number
    names, own = np.unique(_groups(task, samples), return_inverse=True)
    if len(names) == len(scores):
        return mean_interval(scores, bounds=bounds)
    return mean_interval(np.bincount(own, weights=scores), np.bincount(own), bounds=bounds)


def _row(task: Task, group: Sequence[Sample]) -> Json:
    """The mean of a kind."""
    scores = [sample.score or 0.0 for sample in group]
    row: Json = {
        "kind": group[0].kind,
        "metric": group[0].metric,
        "n": len(group),
        "failed": sum(sample.answer is None for sample in group),
        "score": float(np.mean(scores)),
        "interval": _mean_interval(task, group),
    }
    row |= _controls(task, group)
    if task.blind and group[0].metric in METRICS and not task.lower_is_better:
        longest = max(len(words_of(sample.answer or "")) for sample in group)
        frequent = Counter(sample.references[0] for sample in group).most_common(TRIED)
        row["majority"] = max(_constant_score(group, answer) for answer, _ in frequent)
        row["constant"] = max(row["majority"], _constant_score(group, constant_text(group, longest)))
    return row


def _controls(task: Task, samples: Sequence[Sample]) -> Json:
    """The image-blind control: its score, and how much of the score needs the image, paired by question."""
    pairs = [(s.score or 0.0, s.blind_score) for s in samples if s.blind_score is not None]
    if not pairs:
        return {}
    scores, blind = np.array(pairs, dtype=float).T
    margin = scores - blind
    top = max(1.0, float(np.abs(margin).max()))
    return {
        "blind": float(np.mean(blind)),
        "blind_n": len(pairs),
        "margin": float(margin.mean()),
        "margin_interval": mean_interval(margin, bounds=(-top, top)),
    }


def constant_text(samples: Sequence[Sample], longest: int, tried: int = TRIED) -> str:
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
    head, rows = table_cells(documents)
    safe = [[" ".join(cell.replace("|", "\\|").split("\n")) for cell in row] for row in rows]
    return markdown_table(head, safe, words=2)


def table_cells(documents: Sequence[Json]) -> tuple[list[str], list[list[str]]]:
    """The head and rows of the table: of each task its figures, or its kinds where these say more."""
    rows = [row for document in documents for row in _table_rows(document)]
    blind, constant = (any(row[name] for row in rows) for name in ("blind", "majority"))
    head = ["task", "metric", "n", "score", "95%"]
    head += ["image-blind", "margin over blind (95%)"] * blind + ["majority", "constant text"] * constant
    names = ["task", "metric", "n", "score", "interval"]
    names += ["blind", "margin"] * blind + ["majority", "constant"] * constant
    return head, [[row[name] for name in names] for row in rows]


def _table_rows(document: Json) -> list[dict[str, str]]:
    unit = _unit(document)
    if document["score"] is None:
        return [_cells(f"{document['task']} ({document['split']})", document, unit)]
    name = f"{document['task']} {document['split']}".strip()
    headline = next(iter(document["figures"]))
    rows = [_cells(name, document if headline == "score" else {**document, "metric": headline}, unit)]
    kinds = document["kinds"]
    if len(kinds) > 1 and (document.get("blind") is not None or len(document["figures"]) == 1):
        rows += [_cells(f"- {row['kind'] or 'other'}", row, unit) for row in kinds]
        if len({row["metric"] for row in kinds}) > 1:
            rows[0]["metric"] = "as below"
    else:
        rows += [
            _cells(f"- {key}", {"metric": "", "n": "", "score": value}, 0 if key[:2] == "n_" else unit)
            for key, value in list(document["figures"].items())[1:]
        ]
        if len(kinds) == 1:
            alone = _cells(name, kinds[0], unit)
            rows[0] |= {key: alone[key] for key in ("majority", "constant")}
    return rows


def shown_score(document: Json, row: Json) -> str:
    """A row's score in the task's unit."""
    return _figure(row["score"], _unit(document))


def _unit(document: Json) -> float | str:
    """What 1.0 is printed as; CIDEr is points, which are no share of anything."""
    return "points" if document["metric"] in CORPUS_METRICS else document["unit"]


def _cells(name: str, row: Json, unit: float | str) -> dict[str, str]:
    def shown(key: str) -> str:
        return "" if row.get(key) is None else _figure(row[key], unit)

    def between(key: str, sign: str = "") -> str:
        return " to ".join(_figure(end, unit, sign) for end in row[key]) if key in row else ""

    margin = f"{_figure(row['margin'], unit, '+')} ({between('margin_interval', '+')})" if "margin" in row else ""
    metric = str(row.get("metric", "")).replace("_", " ")
    failed = f" ({row['failed']} failed)" if row.get("failed") else ""
    return {
        **{"task": name, "metric": metric, "n": f"{row.get('n', '')}{failed}", "score": shown("score") or "-"},
        **{"interval": between("interval"), "blind": shown("blind"), "margin": margin},
        **{"majority": shown("majority"), "constant": shown("constant")},
    }


def _figure(value: float, unit: float | str, sign: str = "") -> str:
    if isinstance(unit, str):
        return f"{100 * value:{sign}.1f}"
    if not unit:  # a count
        return f"{value:g}"
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


def check_folder(folder: Path) -> None:
    """Make sure that results can be written to a folder, which nothing but results is in."""
    check_writable(folder / "results.json", "--output: ")
    path = folder / "results.json"
    if path.is_file():
        read_results(path)
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ConfigError(f"{folder}: holds something else; name a new folder with --output")


def begin_results(folder: Path, name: str, model_hash: str) -> Json:
    """What a results folder holds of the same model; raises where it holds another's."""
    fresh: Json = {"model": name, "model_hash": model_hash, "tasks": {}, "versions": versions()}
    if not (folder / "results.json").is_file():
        write_results(folder, fresh)  # the folder is ours from now on, whenever the run ends
        return fresh
    document = read_results(folder)
    if document.get("model_hash") != model_hash and document["tasks"]:
        other = document.get("model")
        raise ConfigError(
            f"{folder}: holds the results of another model ({other!r}, not {name!r} with the weights, settings or "
            "address of now); name a new folder with --output"
        )
    return {**fresh, "tasks": document["tasks"]}


def add_task(folder: Path, document: Json, name: str, summary: Json, samples: Sequence[Sample]) -> None:
    """Write a task's samples and figures beside those of others, which another run may have added meanwhile."""
    found = begin_results(folder, document["model"], document["model_hash"])["tasks"]
    write_samples(folder / name / "samples.jsonl", samples)
    document["tasks"] = {**found, **document["tasks"], name: summary}
    write_results(folder, document)


def read_results(path: Path) -> Json:
    """Read `results.json`, or the one in a folder."""
    path = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as results ({first_line(error)})") from None
    tasks = document.get("tasks") if isinstance(document, dict) else None
    if not isinstance(tasks, dict) or not all(isinstance(t, dict) and t.keys() >= _WRITTEN for t in tasks.values()):
        raise DataError(f"{path}: is no results.json of `polymodal eval`")
    return document


_WRITTEN = {"task", "split", "metric", "n", "score", "unit", "kinds", "figures"}


def write_results(folder: Path, document: Json) -> None:
    """Write `results.json`."""
    make_folder(folder)
    write_text(folder / "results.json", as_json(document, indent=1) + "\n")


def as_json(data: Any, indent: int | None = None) -> str:
    """Data as JSON that people can read; with escapes where a text holds half of a surrogate pair."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    return json.dumps(data, indent=indent) if _SURROGATE.search(text) else text


_SURROGATE = re.compile("[\ud800-\udfff]")


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write `samples.jsonl`."""
    make_folder(path.parent)
    write_text(path, "".join(as_json(asdict(sample)) + "\n" for sample in samples))


def sample_folders(paths: Sequence[Path]) -> list[Path]:
    """Files or folders of samples; of a results folder those of all its tasks."""
    folders: list[Path] = []
    for path in paths:
        whole = (path / "results.json").is_file()
        folders += [path / name for name in read_results(path)["tasks"]] if whole else [path]
    return folders


def read_samples(path: Path) -> list[Sample]:
    """Read `samples.jsonl`."""
    path = path / "samples.jsonl" if path.is_dir() else path
    return [_sample_of(data, f"{path}: sample {number}") for number, data in enumerate(read_lines(path), 1)]


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("id", "kind", "prompt", "metric"), str), "references": list, "options": dict, "extra": dict,
    **dict.fromkeys(("answer", "blind", "error"), str | None), "score": float | int | None,
}  # fmt: skip


def _sample_of(data: Any, where: str) -> Sample:
    try:
        sample = Sample(**{**data, "references": tuple(data["references"])})
        for name, kind in _KINDS.items():
            if not isinstance(data.get(name), kind):
                raise TypeError(f"`{name}` is {data.get(name)!r:.60}")
    except (TypeError, KeyError) as error:
        raise DataError(f"{where} is no sample of `polymodal eval` ({first_line(error)})") from None
    return sample

"""`loss.png` and `report.html`: a finished run on one page, made of the files in its folder alone.

Curves, what the loss is made of, throughput and where time went, a few questions with their images and how the
answers changed, and the whole recipe.
"""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.errors import ConfigError
from polymodal.training.reporting.log import read_log
from polymodal.utils.extras import extra
from polymodal.utils.files import write_text
from polymodal.utils.html import data_url, html_page
from polymodal.utils.progress import duration

REPORT = "report.html"


def smooth(values: np.ndarray, span: int) -> np.ndarray:  # values [n] -> [n]
    """Exponential moving average with a start that is not biased to zero."""
    keep = 1 - 1 / max(1, span)
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * float(value)
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return np.array(out)


def drawn_kinds(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Which kinds, or named terms of the loss, get a curve of their own: the most frequent, none where there is one."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for kind, loss in line.get("loss_by_kind", line.get("terms", {})).items():
            points.setdefault(kind, []).append((line["samples"], loss))
    if len(points) < 2:
        return {}
    kept = {kind: found for kind, found in points.items() if len(found) >= max(3, len(lines) / 5)}
    most = sorted(kept, key=lambda kind: (-len(kept[kind]), kind))[:12]
    return {kind: kept[kind] for kind in sorted(most)}


def draw_curves(log: Path, image: Path, title: str) -> bool:
    """Draw a run's log: loss (raw, smoothed, by kind), learning rates and gradient norm against samples."""
    lines = [line for line in read_log(log) if line.get("loss") is not None]
    if len(lines) < 2:
        return False
    samples = np.array([line["samples"] for line in lines])
    loss = np.array([line["loss"] for line in lines])
    figure = _figure(figsize=(9, 6.5))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(samples, loss, color="0.8", linewidth=1, label="loss")
    upper.plot(samples, smooth(loss, max(3, len(loss) // 20)), color="black", linewidth=1.8, label="smoothed")
    for kind, points in drawn_kinds(lines).items():
        xs, ys = (np.array(axis) for axis in zip(*points, strict=True))
        upper.plot(xs, smooth(ys, max(3, len(ys) // 10)), linewidth=1, label=kind)
    upper.set_ylabel("loss per trained token (nats)" if "terms" not in lines[-1] else "loss (nats)")
    upper.set_title(title)
    upper.grid(alpha=0.3)
    upper.legend(fontsize=8, ncols=2)
    norms = np.array([line["grad_norm"] if line.get("grad_norm") is not None else np.nan for line in lines])
    lower.plot(samples, norms, color="0.45", linewidth=1)
    lower.set_ylabel("gradient norm", color="0.45")
    lower.set_xlabel("samples")
    lower.grid(alpha=0.3)
    rates = lower.twinx()
    for name in lines[-1]["learning_rate"]:
        rates.plot(samples, [line["learning_rate"].get(name, np.nan) for line in lines], linewidth=1, label=name)
    rates.set_ylabel("learning rate")
    rates.legend(fontsize=8)
    figure.savefig(image, dpi=110)
    return True


def _figure(figsize: tuple[float, float]) -> Any:
    """A figure that is drawn in memory."""
    figure = extra("matplotlib.figure", "curves need", "polymodal[train]").Figure(figsize, layout="constrained")
    extra("matplotlib.backends.backend_agg", "curves need", "polymodal[train]").FigureCanvasAgg(figure)
    return figure


def write_report(output_dir: Path) -> Path:
    """Write `report.html`."""
    lines, evals = read_log(output_dir / "log.jsonl"), read_log(output_dir / "eval.jsonl")
    recipe = _text(output_dir / "recipe.yaml")
    facts = json.loads(_text(output_dir / "env.json") or "{}")
    terms = bool(lines) and "terms" in lines[-1]
    held_out = bool(evals) and evals[-1]["data"] == "held-out"
    page = html_page(
        "training/reporting/report.html.jinja",
        name=next((line[6:] for line in recipe.splitlines() if line.startswith("name: ")), output_dir.name),
        summary=_summary(lines, evals, facts),
        curves=_curves(output_dir, lines, evals),
        tables=_loss_tables(lines, evals),
        tables_title="Terms of the loss" if terms else "Loss by kind and source",
        answers=_answers(output_dir, evals),
        answers_title="held-out" if held_out else "training data, seen while training",
        recipe=recipe,
        facts=json.dumps(facts, indent=2),
    )
    write_text(output_dir / REPORT, page)
    return output_dir / REPORT


def _summary(lines: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, str]:
    """The run in a dozen numbers; empty where no step was logged."""
    if not lines:
        return {}
    last = lines[-1]
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    rates = [line for line in lines if line["tokens_per_s"]]
    elapsed = last["elapsed_s"]
    waited = sum(line["data_wait_s"] for line in lines)
    rows = {
        "steps": f"{last['step']:,}",
        "samples": f"{last['samples']:,} ({last['epoch']:g} epochs)",
        "tokens": f"{last['real_tokens']:,}, {last['trained_tokens']:,} of them trained on",
        "loss": f"{losses[0]:.4f} at first, {losses[-1]:.4f} at the end" if losses else "-",
        "time": duration(elapsed),
        "throughput": f"{last['samples'] / elapsed:,.2f} samples/s, {last['real_tokens'] / elapsed:,.0f} tokens/s"
        if elapsed
        else "-",
        "best line": f"{max(line['tokens_per_s'] for line in rates):,.0f} tokens/s" if rates else "-",
        "padding": f"{np.mean([line['padding'] for line in lines if line['padding'] is not None] or [0]):.1%}",
        "waiting for data": f"{waited / elapsed:.1%} of the time" if elapsed else "-",
        "peak memory": f"{last['peak_memory_gib']:.2f} GiB" if last.get("peak_memory_gib") else "-",
        "steps left out": f"{last['skipped']} (gradient not finite)",
        "device": f"{facts.get('device', '?')}, {facts.get('processes', 1)} process(es), "
        f"engine {facts.get('engine', 'single')}",
    }
    scored = [entry["loss"] for entry in evals if entry.get("loss") is not None]
    if scored:
        rows["held-out loss"] = f"{scored[-1]:.4f} at the end, {min(scored):.4f} at best"
    if evals and "recall" in evals[-1]:
        recall, chance = evals[-1]["recall"], evals[-1]["chance"]
        rows |= {
            f"recall, {name.replace('_', ' ').replace('@', ' at ')}": f"{value:.1%}, by chance {chance[name]:.1%}"
            for name, value in recall.items()
        }
    return rows


def _curves(output_dir: Path, lines: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Images of the curves, as URLs by what they show."""
    found = {}
    image = output_dir / "loss.png"
    if image.is_file():
        found["loss, learning rate and gradient norm"] = data_url(image.read_bytes(), "png")
    with suppress(ConfigError):  # without matplotlib the rest is there all the same
        if len(lines) > 1:
            found["held-out loss and throughput"] = data_url(draw_rates(lines, evals), "png")
    return found


def draw_rates(lines: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> bytes:
    """Draw throughput over steps, under the held-out loss where there is one."""
    scored = [entry for entry in evals if entry.get("loss") is not None]
    figure = _figure(figsize=(9, 5 if scored else 2.6))
    axes = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    if scored:
        trained = [line for line in lines if line["loss"] is not None]
        axes[0].plot([line["step"] for line in trained], [line["loss"] for line in trained], color="0.8", label="train")
        axes[0].plot([entry["step"] for entry in scored], [entry["loss"] for entry in scored], "o-", label="held-out")
        axes[0].set_ylabel("loss (nats per token)")
        axes[0].legend(fontsize=8)
        axes[0].grid(alpha=0.3)
    steps = [line["step"] for line in lines]
    rates = axes[-1]
    rates.plot(steps, [line["tokens_per_s"] for line in lines], color="tab:green", linewidth=1)
    rates.set_ylabel("tokens/s", color="tab:green")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("step")
    rates.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _loss_tables(lines: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> list[list[tuple[str, ...]]]:
    """Loss by kind, source or named term: first and last log lines, and the last evaluation on held-out data."""
    found = []
    scored = [entry for entry in evals if entry.get("loss") is not None]
    for key, title in (
        ("loss_by_kind", "kind"),
        ("loss_by_source", "source"),
        ("terms", "part of the loss"),
        ("metrics", "measured"),
    ):
        names = sorted({name for line in lines for name in line.get(key, {})})
        if not names or names == [""]:
            continue
        table: list[tuple[str, ...]] = [(title, "first line", "last tenth", "held-out")]
        for name in names:
            values = [line[key][name] for line in lines if name in line.get(key, {})]
            held = scored[-1].get(key, {}).get(name) if scored else None
            tail = float(np.mean(values[-max(1, len(values) // 10) :]))
            held_out = "-" if held is None else f"{held:.3f}"
            table.append((name or "(not named)", f"{values[0]:.3f}", f"{tail:.3f}", held_out))
        found.append(table if scored else [row[:3] for row in table])
    return found


def _answers(output_dir: Path, evals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each shown question once, with its images and the answers of all evaluations, where they changed."""
    by_id: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line in evals:
        for entry in line.get("answers", []):
            by_id.setdefault(entry["id"], []).append((line["step"], entry))
    shown = []
    for entries in by_id.values():
        entry = entries[-1][1]
        files = [output_dir / name for name in entry.get("images", entry.get("pictures", []))]  # of earlier versions
        answers: list[tuple[int, str]] = []
        for step, given in entries:
            text = given.get("answer", f"failed: {given.get('error', '')}")
            if not answers or answers[-1][1] != text:
                answers.append((step, text))
        images = [data_url(file.read_bytes(), "jpeg") for file in files if file.is_file()]
        shown.append({"sounds": [], **entry, "images": images, "answers": answers})
    return shown


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""

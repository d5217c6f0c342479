"""`report.html`: a finished run on one page, made of the files in its folder alone; nothing is loaded from elsewhere.

Curves, what the loss is made of, throughput and where time went, a few questions with their images and how the
answers changed, and the whole recipe.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.training.reporting.log import read_log
from polymodal.utils.files import write_text
from polymodal.utils.html import html_page
from polymodal.utils.progress import duration

# ---- The loss-curve image: loss (raw and smoothed, and by kind), learning rates and gradient norm against samples


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
    """Draw a run's log."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in read_log(log) if line.get("loss") is not None]
    if len(lines) < 2:
        return False
    samples = np.array([line["samples"] for line in lines])
    loss = np.array([line["loss"] for line in lines])
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
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


REPORT = "report.html"

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
img { max-width: 100%; height: auto }
.chart { background: #fff; border-radius: 6px }
table { border-collapse: collapse; font-size: .92rem }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8883 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.shown { display: flex; gap: 1.2rem; margin: 1.2rem 0; flex-wrap: wrap }
.shown .images { flex: 0 0 12rem } .shown .images img { border: 1px solid #8884; border-radius: 4px; width: 12rem }
.shown .words { flex: 1 1 20rem; overflow-wrap: anywhere }
pre { overflow-x: auto; font-size: .85rem }
.quiet { opacity: .7; font-size: .9rem }
"""


def write_report(output_dir: Path) -> Path:
    """Write the page."""
    lines = read_log(output_dir / "log.jsonl")
    looks = read_log(output_dir / "eval.jsonl")
    recipe = _text(output_dir / "recipe.yaml")
    facts = json.loads(_text(output_dir / "env.json") or "{}")
    name = next((line[6:] for line in recipe.splitlines() if line.startswith("name: ")), output_dir.name)
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        _summary(lines, looks, facts),
        _curves(output_dir, lines, looks),
        _parts(lines, looks),
        _answers(output_dir, looks),
        f"<h2>Recipe</h2><details><summary>recipe.yaml, every default spelled out</summary><pre>{html.escape(recipe)}"
        "</pre></details>",
        f"<details><summary>versions and hardware</summary><pre>{html.escape(json.dumps(facts, indent=2))}</pre>"
        "</details>",
    ]
    path = output_dir / REPORT
    write_text(path, html_page(f"{name}: training report", _STYLE, sections))
    return path


def _summary(lines: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The run in a dozen numbers."""
    if not lines:
        return "<p>No step was logged.</p>"
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
        "steps left out": f"{last['skipped']} (gradient not finite)",
        "device": f"{facts.get('device', '?')}, {facts.get('processes', 1)} process(es), "
        f"engine {facts.get('engine', 'single')}",
    }
    scored = [look["loss"] for look in looks if look.get("loss") is not None]
    if scored:
        rows["held-out loss"] = f"{scored[-1]:.4f} at the end, {min(scored):.4f} at best"
    if looks and "recall" in looks[-1]:
        recall, chance = looks[-1]["recall"], looks[-1]["chance"]
        rows |= {
            f"recall, {name.replace('_', ' ').replace('@', ' at ')}": f"{value:.1%}, by chance {chance[name]:.1%}"
            for name, value in recall.items()
        }
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{body}</table>"


def _curves(output_dir: Path, lines: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]]) -> str:
    found = []
    image = output_dir / "loss.png"
    if image.is_file():
        found.append(_image(image.read_bytes(), "image/png", "loss, learning rate and gradient norm", "chart"))
    if len(lines) > 1:
        found.append(_image(draw_rates(lines, looks), "image/png", "held-out loss and throughput", "chart"))
    return f"<h2>Curves</h2>{''.join(f'<p>{image}</p>' for image in found)}" if found else ""


def draw_rates(lines: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]]) -> bytes:
    """Draw throughput over steps, under the held-out loss where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [look for look in looks if look.get("loss") is not None]
    figure = Figure(figsize=(9, 5 if scored else 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    if scored:
        trained = [line for line in lines if line["loss"] is not None]
        axes[0].plot([line["step"] for line in trained], [line["loss"] for line in trained], color="0.8", label="train")
        axes[0].plot([look["step"] for look in scored], [look["loss"] for look in scored], "o-", label="held-out")
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


def _parts(lines: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]]) -> str:
    """Loss by kind, source or named term: first and last log lines, and the last look at held-out data."""
    found = []
    scored = [look for look in looks if look.get("loss") is not None]
    for key, title in (
        ("loss_by_kind", "kind"),
        ("loss_by_source", "source"),
        ("terms", "part of the loss"),
        ("metrics", "measured"),
    ):
        names = sorted({name for line in lines for name in line.get(key, {})})
        if not names or names == [""]:
            continue
        rows = []
        for name in names:
            values = [line[key][name] for line in lines if name in line.get(key, {})]
            held = scored[-1].get(key, {}).get(name) if scored else None
            tail = values[-max(1, len(values) // 10) :]
            rows.append((name or "(not named)", f"{values[0]:.3f}", f"{np.mean(tail):.3f}", _number(held)))
        header = (title, "first line", "last tenth", "held-out")
        found.append(_table(header if scored else header[:3], rows if scored else [row[:3] for row in rows]))
    heading = "Terms of the loss" if lines and "terms" in lines[-1] else "Loss by kind and source"
    return f"<h2>{heading}</h2>" + "".join(found) if found else ""


def _answers(output_dir: Path, looks: Sequence[dict[str, Any]]) -> str:
    """Each shown question once, with the answers of all looks."""
    by_id: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for look in looks:
        for entry in look.get("answers", []):
            by_id.setdefault(entry["id"], []).append((look["step"], entry))
    if not by_id:
        return ""
    blocks = []
    for entries in by_id.values():
        entry = entries[-1][1]
        images = "".join(
            _image((output_dir / name).read_bytes(), "image/jpeg", "image of the question")
            for name in entry.get("images", entry.get("pictures", []))  # the second in runs of earlier versions
            if (output_dir / name).is_file()
        )
        changed: list[tuple[int, str]] = []
        for step, said in entries:
            text = said.get("answer", f"failed: {said.get('error', '')}")
            if not changed or changed[-1][1] != text:
                changed.append((step, text))
        answers = "".join(
            f"<tr><td class=number>{step}</td><td>{html.escape(text) or '<i>nothing</i>'}</td></tr>"
            for step, text in changed
        )
        blocks.append(
            f"<div class=shown><div class=images>{images}</div><div class=words>"
            f"<p><b>{html.escape(entry['question']) or '<i>no text</i>'}</b><br>expected: "
            f"{html.escape(entry['expected'])}</p>"
            f"<table><tr><th class=number>from step</th><th>answer</th></tr>{answers}</table>"
            f"<p class=quiet>{html.escape(entry['kind'] or 'record')} {html.escape(entry['id'])}</p></div></div>"
        )
    kind = "held-out" if looks[-1]["data"] == "held-out" else "training data, seen while training"
    return f"<h2>Answers ({kind})</h2>" + "".join(blocks)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if number else ''}>{html.escape(cell)}</{tag}>"
            for number, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return f"<table><tr>{row('th', header)}</tr>{body}</table>"


def _image(data: bytes, kind: str, alt: str, style: str = "") -> str:
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img{f" class={style}" if style else ""} alt="{html.escape(alt)}" src="data:{kind};base64,{encoded}">'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""

"""The loss-curve picture: loss (raw and smoothed, and by kind), learning rates and gradient norm against samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.training.reporting.log import read_log


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average with a start that is not biased to zero.

    Args:
        values: [n].
        span: About how many values count.

    Returns:
        [n].
    """
    keep = 1 - 1 / max(1, span)
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * float(value)
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return np.array(out)


def drawn_kinds(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Which kinds, or named terms of the loss, get a curve of their own: the most frequent, none where there is one.

    Args:
        lines: The log.

    Returns:
        (samples, loss) of each kind; a kind on fewer than a fifth of the lines would be a misleading straight line.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for kind, loss in line.get("loss_by_kind", line.get("terms", {})).items():
            points.setdefault(kind, []).append((line["samples"], loss))
    if len(points) < 2:
        return {}
    kept = {kind: found for kind, found in points.items() if len(found) >= max(3, len(lines) / 5)}
    most = sorted(kept, key=lambda kind: (-len(kept[kind]), kind))[:12]
    return {kind: kept[kind] for kind in sorted(most)}


def draw_curves(log: Path, picture: Path, title: str) -> bool:
    """Draw a run's log.

    Args:
        log: The JSONL file.
        picture: The PNG to write.
        title: The run's name.

    Returns:
        False where the log has too few lines to draw.
    """
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
    figure.savefig(picture, dpi=110)
    return True

"""The loss image: a curve for each frequent kind, none for a kind that is seen twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymodal.training.reporting.report import draw_curves, drawn_kinds


def log(count: int = 20) -> list[dict[str, Any]]:
    lines = []
    for step in range(count):
        kinds = {"name": 1.0, **({"ocr": 3.0} if step in (0, count - 1) else {}), **({"zh": 2.0} if step % 2 else {})}
        lines.append(
            {
                "samples": 32 * step,
                "loss": 2.0,
                "loss_by_kind": kinds,
                "grad_norm": None if step == 3 else 1.0,
                "learning_rate": {"projector": 1e-3},
            }
        )
    return lines


def test_rare_kinds_get_no_curve() -> None:
    kinds = drawn_kinds(log())
    assert sorted(kinds) == ["name", "zh"] and len(kinds["zh"]) == 10 and kinds["name"][1] == (32, 1.0)


def test_one_kind_is_the_whole_loss_and_gets_none() -> None:
    lines = [{**line, "loss_by_kind": {"caption": 1.0}} for line in log()]
    assert drawn_kinds(lines) == {}


def test_a_image_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in log()))
    assert draw_curves(file, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    file.write_text(json.dumps(log()[0]) + "\n")
    assert not draw_curves(file, tmp_path / "none.png", "a run") and not (tmp_path / "none.png").exists()

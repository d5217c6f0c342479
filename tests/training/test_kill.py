"""A run killed with SIGKILL, at any moment and in the middle of saves, ends exactly as the run never killed."""

from __future__ import annotations

import copy
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from polymodal.training import checkpoint
from polymodal.training.reporting.log import read_log

CLOCKS = {"tokens_per_s", "samples_per_s", "data_wait_s", "elapsed_s", "seconds", "peak_memory_gib"}
"""What may differ between two runs: the time."""

STAGES: dict[str, dict[str, Any]] = {
    "projector": {},
    "lora, packed": {
        "lora": {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "learning_rate": 5e-3},
        "batch": {"global_size": 8, "packing": "pack", "micro_tokens": 128},
    },
}


def write_recipe(plain: dict[str, Any], tiny: Path, folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """A run of 12 steps that saves, evaluates and logs often."""
    recipe = copy.deepcopy(plain) | copy.deepcopy(changes)
    recipe["data"]["eval"] = [{"path": str(tiny / "data.json"), "max_samples": 6}]
    recipe["run"] |= {"max_steps": 12, "save_every": 2, "eval_every": 5, "eval_generations": 1, "log_every": 1}
    recipe["run"]["feature_cache"] = str(folder / name / "features")
    recipe["output_dir"] = str(folder / name)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def moments_of(seed: int) -> list[Any]:
    """Five kills: two anywhere, one at an operation on a file, two in the middle of a save; then a run to the end."""
    draw = random.Random(seed)
    found: list[Any] = [["clock", draw.randint(1, 3), draw.uniform(0, 60)] for _ in range(2)]
    found += [["file", draw.randint(5, 60)]]
    found += [["half", checkpoint.MODEL], ["half", checkpoint.OPTIMIZER]]
    draw.shuffle(found)
    return [*found, None]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in read_log(path)]


def assert_same_end(one: Path, two: Path) -> None:
    """Losses, evaluations, weights, optimizer and the exported model are the same to the bit."""
    for name in ("log.jsonl", "eval.jsonl"):
        assert lines_of(one / name) == lines_of(two / name)
    assert len(lines_of(one / "log.jsonl")) == 12 and len(lines_of(one / "eval.jsonl")) == 3
    ends = [checkpoint.complete_checkpoints(run)[-1] for run in (one, two)]
    assert [end.name for end in ends] == ["step-0000012"] * 2
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    weights = sorted(path.relative_to(one / "final") for path in (one / "final").rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert (one / "final" / path).read_bytes() == (two / "final" / path).read_bytes()
    assert not [path.name for path in (two / "checkpoints").iterdir() if path.name.startswith(".")]
    assert (two / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("stage", STAGES)
def test_five_kills_change_nothing(
    plain: dict[str, Any],
    tiny: Path,
    tmp_path: Path,
    stage: str,
    run_jobs: Callable[..., Any],
    order_of: Callable[..., Any],
) -> None:
    whole = write_recipe(plain, tiny, tmp_path, "whole", STAGES[stage])
    killed = write_recipe(plain, tiny, tmp_path, "killed", STAGES[stage])
    jobs = [
        {"recipe": str(killed), "order": str(tmp_path / "killed.order"), "moments": [m]}
        for m in moments_of(seed=len(stage))
    ]
    jobs.append({"recipe": str(whole), "order": str(tmp_path / "whole.order"), "moments": [None]})
    results = run_jobs(jobs)
    # Every kill must have met a run in progress.
    assert [statuses for statuses, _, _ in results] == [[-signal.SIGKILL]] * 5 + [[0], [0]]
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    assert order_of(tmp_path / "whole.order.0") == order_of(tmp_path / "killed.order.0")


@pytest.mark.slow
def test_the_command_killed_from_outside(plain: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """The same through `polymodal train --resume`, killed by another process five times."""
    whole = write_recipe(plain, tiny, tmp_path, "whole", {})
    killed = write_recipe(plain, tiny, tmp_path, "killed", {})
    command = [sys.executable, "-m", "polymodal", "train"]
    subprocess.run([*command, str(whole)], check=True, timeout=300, capture_output=True)
    draw = random.Random(3)
    for _ in range(5):
        process = subprocess.Popen([*command, str(killed), "--resume"], stderr=subprocess.DEVNULL)
        log, begun = tmp_path / "killed" / "log.jsonl", time.monotonic()
        size = log.stat().st_size if log.is_file() else 0
        # The imports take long and nothing is to be learnt from killing them: wait for the first sign of a step.
        while process.poll() is None and time.monotonic() - begun < 120:
            if log.is_file() and log.stat().st_size != size:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    subprocess.run([*command, str(killed), "--resume"], check=True, timeout=300, capture_output=True)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")

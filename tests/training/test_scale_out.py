"""Two processes on the CPU (gloo): DDP and FSDP2 train what one process trains, whatever each of them sees."""

from __future__ import annotations

import copy
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polymodal.errors import CheckpointError, ConfigError
from polymodal.training import checkpoint, load_any_recipe, train
from polymodal.training.reporting.log import read_log

STEPS = 10
ALL = [{"match": "*", "train": True}]


@pytest.fixture(scope="module")
def mixed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the records have an image, half are text alone: in steps of two, every mixture of ranks comes up."""
    records = json.loads((tiny / "data.json").read_text())[:8]
    for number in range(8):
        turns = [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": f"{number}" * (number + 1)}]
        records.append({"id": f"text-{number}", "conversations": turns, "kind": "conversation"})
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def write(plain: dict[str, Any], mixed: Path, tiny: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write a recipe; returns the job that trains it."""

    def make(
        name: str, processes: int = 1, moments: list[Any] | None = None, folder: str = "", **changes: Any
    ) -> dict[str, Any]:
        recipe = copy.deepcopy(plain)
        recipe["data"] = {"mix": [{"path": str(mixed), "image_root": str(tiny)}]}
        recipe["run"] |= {"max_steps": STEPS, "save_every": 4, "eval_generations": 2, "epochs": 5, "log_every": 2}
        recipe["batch"] = {"global_size": 2, "micro_size": 1, "group_by_length": False}
        # With the usual eps, Adam takes whole steps along gradients that are nothing but rounding.
        recipe["optim"] = {"learning_rate": 5e-3, "eps": 1e-3}
        for key, value in changes.items():
            section, _, inner = key.partition("__")
            if inner:
                recipe[section][inner] = value
            else:
                recipe[section] = value
        recipe["output_dir"] = str(tmp_path / (folder or name))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return {"recipe": str(path), "order": str(tmp_path / f"{name}.order"), "moments": moments or [None] * processes}

    return make


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = {}
    for path in sorted((run / "final").rglob("*.safetensors")):
        found |= {f"{path.relative_to(run)}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_equal_runs(one: Path, two: Path) -> None:
    """Losses and weights to 1e-5, and the exported folders have the same files."""
    files = [sorted(str(p.relative_to(run)) for p in (run / "final").rglob("*")) for run in (one, two)]
    assert files[0] == files[1]
    weights = [final_weights(run) for run in (one, two)]
    assert weights[0].keys() == weights[1].keys() and weights[0]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=1e-5), name
    logs = [read_log(run / "log.jsonl") for run in (one, two)]
    assert len(logs[0]) == len(logs[1]) == STEPS // 2
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["loss_by_kind"] == pytest.approx(b["loss_by_kind"], abs=1e-5)
        assert (a["samples"], a["trained_tokens"]) == (b["samples"], b["trained_tokens"])
    answers = [json.dumps(read_log(run / "eval.jsonl")[-1]["answers"]) for run in (one, two)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("trained", ["projector", "everything"])
def test_two_processes_equal_one(
    write: Callable[..., Any], tmp_path: Path, trained: str, run_jobs: Callable[..., Any], order_of: Callable[..., Any]
) -> None:
    changes = {"train": ALL} if trained == "everything" else {}
    results = run_jobs(
        [
            write("one", **changes),
            write("ddp", 2, run__engine="ddp", **changes),
            write("fsdp2", 2, run__engine="fsdp2", **changes),
        ]
    )
    assert [statuses for statuses, _, _ in results] == [[0], [0, 0], [0, 0]], results
    orders = [order_of(tmp_path / f"ddp.order.{rank}") for rank in (0, 1)]
    seen = {tuple(order[step][0][0].startswith("text") for order in orders) for step in range(STEPS)}
    assert {(True, False), (False, True), (True, True), (False, False)} <= seen
    for engine in ("ddp", "fsdp2"):
        assert_equal_runs(tmp_path / "one", tmp_path / engine)
    shards = checkpoint.complete_checkpoints(tmp_path / "fsdp2")[-1].glob("model-*.safetensors")
    assert len(list(shards)) == 2


def test_a_run_goes_on_with_other_processes_and_workers(
    write: Callable[..., Any], tmp_path: Path, run_jobs: Callable[..., Any], order_of: Callable[..., Any]
) -> None:
    """One process, killed; two with DDP, killed; two with FSDP2, killed; one again: as if nothing had happened."""
    moved = [("one", 1, "auto", 1), ("ddp", 2, "ddp", 3), ("fsdp2", 2, "fsdp2", 2), ("again", 1, "auto", 4)]
    jobs = [write("whole", train=ALL, run__workers=1)]
    for name, processes, engine, workers in moved:
        # Each is killed in the fourth step that it takes, the last one never.
        moments = [["clock", 4, 0] if name != "again" else None] * processes
        setting = {"run__engine": engine, "run__workers": workers, "run__save_every": 1}
        jobs.append(write(name, moments=moments, folder="moved", train=ALL, **setting))
    results = run_jobs(jobs)
    assert [statuses for statuses, _, _ in results] == [[0], [-9], [-9, -9], [-9, -9], [0]], results
    assert_equal_runs(tmp_path / "whole", tmp_path / "moved")
    whole = order_of(tmp_path / "whole.order.0")
    compared: set[int] = set()
    for name, processes, _, _ in moved:
        orders = [order_of(tmp_path / f"{name}.order.{rank}") for rank in range(processes)]
        # The step in which a run was killed may lack a part; the next run takes it again.
        last = max(max(order) for order in orders)
        for step in orders[0].keys() & orders[-1].keys():
            together = sorted(id for order in orders for micro in order[step] for id in micro)
            expected = sorted(id for micro in whole[step] for id in micro)
            if step == last and name != "again" and len(together) < len(expected):
                continue
            assert together == expected
            compared.add(step)
    assert compared == set(range(STEPS))


def test_a_killed_process_ends_the_others_with_a_line(write: Callable[..., Any], run_jobs: Callable[..., Any]) -> None:
    engines = ("ddp", "fsdp2")
    jobs = [write(engine, moments=[None, ["clock", 3, 1]], run__engine=engine) for engine in engines]
    for statuses, ends, seconds in run_jobs(jobs):
        assert statuses == [1, -signal.SIGKILL]
        assert "process 0 of 2 stops, since another one ended or hangs" in ends[0]
        assert "Run the same command again" in ends[0]
        assert seconds < 60


def test_a_process_that_hangs_is_given_up(write: Callable[..., Any], run_jobs: Callable[..., Any]) -> None:
    job = write("hangs", moments=[None, ["stop", 3]], run__timeout_minutes=0.1)
    ((statuses, ends, seconds),) = run_jobs([job])
    assert statuses == [1, -signal.SIGKILL]
    assert "another one ended or hangs" in ends[0]
    assert seconds < 60


def test_deepspeed_was_removed_in_one_line(write: Callable[..., Any], tmp_path: Path) -> None:
    """In a recipe, as an override, and in a checkpoint that it wrote."""
    needle = r"run\.engine deepspeed was removed; FSDP2 does the same: set run\.engine=fsdp2"
    for setting in ({"run__engine": "deepspeed"}, {"run__deepspeed_config": "zero.json"}):
        with pytest.raises(ConfigError, match=needle) as error:
            load_any_recipe(write("zero", 2, **setting)["recipe"])
        assert "\n" not in str(error.value)
    recipe = write("two", run__deepspeed_config=None)["recipe"]
    with pytest.raises(ConfigError, match=needle):
        load_any_recipe(recipe, ["run.engine=deepspeed"])
    train(load_any_recipe(recipe, ["run.max_steps=2"]))
    newest = checkpoint.complete_checkpoints(tmp_path / "two")[-1]
    (newest / "zero").mkdir()
    with pytest.raises(CheckpointError, match="was written by DeepSpeed, which was removed"):
        train(load_any_recipe(recipe, ["run.max_steps=3"]), force=True)


@pytest.mark.slow
def test_torchrun(write: Callable[..., Any], tmp_path: Path) -> None:
    """The command of the documentation."""
    import subprocess

    job = write("torchrun", run__engine="fsdp2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "polymodal.cli", "train", job["recipe"]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("final") and done.stdout.count("final") == 1
    assert (tmp_path / "torchrun" / "final" / "polymodal.json").is_file()

"""One stage: start the systems, hold their first step against each other, then let them take turns."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.training.rows import read_rows, row_tokens, write_rows
from benchmarks.training.setting import MODES, SHAPES, Job
from benchmarks.training.speed import matmul_flops, model_flops
from benchmarks.training.turns import Worker
from polymodal.training.distributed import has_fast_bf16


class Difference(Exception):
    """The systems do not compute the same thing; timing them would compare nothing."""


def run_stage(options: argparse.Namespace, stage: int, folder: Path) -> dict[str, Any]:
    """Measure one stage in all modes.

    Args:
        options: The command line's.
        stage: 1 or 2.
        folder: For rows and logs.

    Returns:
        Everything measured, as plain data.

    Raises:
        Difference: First losses or token counts differ.
    """
    shape = SHAPES[options.shape]
    data = folder / f"rows-{stage}"
    count, scale = options.samples * options.steps, 0.2 if options.tiny else 1.0
    write_rows(data, stage, count, options.seed, options.rows, shape.image_tokens, scale)
    tokens = [row_tokens(row, stage, shape.image_tokens) for row in read_rows(data)]
    lengths, targets = [t[0] for t in tokens], [t[1] for t in tokens]
    speeds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    entries: list[dict[str, Any]] = []
    # Not all at once: a stopped process keeps its memory.
    for modes in (("matched",), ("default",), ("best", "cached")):
        wanted = [(mode, system) for mode in modes if mode in options.mode for system in options.system]
        wanted = [(mode, system) for mode, system in wanted if mode != "cached" or system == "polymodal"]
        workers: list[Worker] = []
        try:
            for mode, system in wanted:
                progress(f"stage {stage}, {mode}: {system} sets up and warms up")
                job = make_job(options, stage, system, mode, data, folder)
                workers.append(Worker(job))
                entry: dict[str, Any] = {"system": system, "mode": mode, "precision": job.precision, "turns": []}
                entries.append({**entry, "warmup": workers[-1].turn()})
                alike = [entry for entry in entries if entry["precision"] == job.precision]
                for first in (entries[0], alike[0]):
                    compare(entries[-1], first, sum(lengths), sum(targets), options)
            for number in range(options.runs if wanted else 0):
                progress(f"stage {stage}, {'/'.join(modes)}: turn {number + 1} of {options.runs}")
                for precision in {entry["precision"] for entry in entries[-len(workers) :]}:
                    speeds[precision].append(matmul_flops(options.device, precision))
                for worker, entry in zip(workers, entries[-len(workers) :], strict=True):
                    entry["turns"].append(worker.turn())
        finally:
            for worker in workers:
                worker.kill()
    return {
        "stage": stage,
        "shape": options.shape,
        "flags": {
            "best": "one sample at a time (no padding)" if options.best_micro == 1 else "grouped by length",
            "tokens": options.micro_tokens,
        },
        "lengths": lengths,
        "targets": targets,
        "matmul_flops": speeds,
        "model_flops": {mode: model_flops(shape, stage, lengths, targets, mode == "cached") for mode in MODES},
        "entries": entries,
    }


def compare(entry: dict[str, Any], first: dict[str, Any], real: int, trained: int, options: argparse.Namespace) -> None:
    """Stop where a system does not do what another one does, before anything is timed.

    Args:
        entry: The system that just warmed up.
        first: The first to warm up, of all and of those in the same precision: the HF Trainer unless it is left out.
        real: Tokens of the rows.
        trained: Trained tokens of the rows.
        options: The command line's.

    Raises:
        Difference: It does not; names what differs and by how much.
    """
    name, warmup = f"{entry['system']} ({entry['mode']})", entry["warmup"]
    for what, wanted in (("real_tokens", real), ("trained_tokens", trained)):
        if warmup[what] != wanted:
            raise Difference(f"{name} has {warmup[what]} {what.replace('_', ' ')} in its first turn, not {wanted}")
    # With several steps in a turn, another order puts other rows into the first step.
    if entry["mode"] != "matched" and options.steps > 1:
        return
    gap = abs(warmup["first_loss"] - first["warmup"]["first_loss"])
    # bf16 rounds, and each attention in its own way; what is computed is held together in float32, by mode "matched".
    tolerance = 2e-2 if "bf16" in (entry["precision"], first["precision"]) else 1e-3
    if not gap <= tolerance:
        raise Difference(
            f"the first step's loss of {name} is {warmup['first_loss']:.5f}, of {first['system']} "
            f"{first['warmup']['first_loss']:.5f}: {gap:.2g} apart, {tolerance:g} is allowed"
        )


def make_job(options: argparse.Namespace, stage: int, system: str, mode: str, data: Path, folder: Path) -> Job:
    """One worker's job."""
    return Job(
        system=system,
        mode=mode,
        stage=stage,
        shape=options.shape,
        rows=options.samples,
        micro=options.best_micro if mode == "best" else options.micro,
        micro_tokens=options.micro_tokens,
        steps=options.steps,
        runs=options.runs,
        threads=options.threads,
        device=options.device,
        precision=precision_of(options, mode, system),
        seed=options.seed,
        data=str(data),
        folder=str(folder / f"stage{stage}-{mode}-{system}"),
    )


def precision_of(options: argparse.Namespace, mode: str, system: str) -> str:
    """What a system trains in: under best flags bf16 where the machine has it, by default whatever it chooses."""
    if options.precision != "auto":
        return str(options.precision)
    fast = "bf16" if has_fast_bf16() else "fp32"
    own = {"hf": "fp32", "trl": "bf16", "polymodal": fast}
    return {"matched": "fp32", "default": own[system]}.get(mode, fast)


def progress(text: str) -> None:
    """A line for who waits; the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)

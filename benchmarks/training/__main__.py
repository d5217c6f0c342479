"""polymodal beside the Trainer of transformers and TRL's SFTTrainer, on the same model and rows: `make bench-training`.

    python -m benchmarks.training [--rows llava|even] [--stage 1|2] [--mode MODE] [--runs N] [--tiny] [--json FILE]

First a warm-up step each, after which the losses must agree (to 1e-3 in float32) and the numbers of trained tokens
exactly; then turns, interleaved A B C A B C, each over the same rows. Shown are medians and ranges over the turns, and
ratios turn by turn. See `setting.MODES` for the modes, `rows` for the data and `speed.model_flops` for the roofline.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.training.rows import KINDS
from benchmarks.training.setting import MODES, SHAPES, SYSTEMS


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    began = time.monotonic()
    pin(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    print(heading(options), flush=True)
    if "trl" in options.system and importlib.util.find_spec("trl") is None:
        options.system.remove("trl")
        print("TRL is not installed, so its lines are left out: pip install 'polymodal[bench]'")
    from benchmarks.training.stage import Difference, run_stage
    from benchmarks.training.table import draw_table

    results = []
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        try:
            for stage in options.stage:
                results.append(run_stage(options, stage, Path(folder)))
                print(draw_table(results[-1]), flush=True)
        except (Difference, RuntimeError) as error:
            print(f"bench-training: {error}", file=sys.stderr)
            return 1
    print(f"\n{time.monotonic() - began:.0f} s in all")
    if options.json is not None:
        options.json.write_text(json.dumps({"heading": heading(options), "stages": results}, indent=1) + "\n")
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2), action="append", help="one stage only")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="these systems only")
    parser.add_argument("--mode", choices=MODES, action="append", help="these modes only")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a turn")
    parser.add_argument("--runs", type=int, default=3, help="turns that are measured")
    parser.add_argument("--rows", choices=KINDS, default=KINDS[0], help="lengths as in LLaVA's mix, or even ones")
    parser.add_argument("--samples", type=int, default=16, help="of a step")
    parser.add_argument("--micro", type=int, default=8, help="samples that go through the model at once")
    parser.add_argument(
        "--best-micro", type=int, help="the same for HF and TRL under best flags (1 on a CPU, where nothing pads then)"
    )
    parser.add_argument("--micro-tokens", type=int, help="tokens of a pack (1024; 256 with --tiny)")
    parser.add_argument("--threads", type=int, default=len(cores()), help="cores used, and threads of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as the mode says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a smoke test: a tiny model, short rows")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args(argv)
    options.best_micro = options.best_micro or (1 if options.device == "cpu" else options.micro)
    if min(options.steps, options.runs, options.samples, options.micro, options.threads) < 1:
        parser.error("--steps, --runs, --samples, --micro and --threads are at least 1")
    if options.samples % options.micro or options.samples % options.best_micro:
        parser.error(f"--samples {options.samples} is no multiple of --micro {options.micro} or {options.best_micro}")
    options.micro_tokens = options.micro_tokens or (256 if options.tiny else 1024)
    options.stage = sorted(set(options.stage or (1, 2)))
    options.system = [name for name in SYSTEMS if name in (options.system or SYSTEMS)]
    options.mode = [name for name in MODES if name in (options.mode or MODES)]
    if options.mode == ["cached"] and "polymodal" not in options.system:
        parser.error("--mode cached is polymodal's alone")
    options.shape = "tiny" if options.tiny else "smollm2-135m"
    return options


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin(threads: int) -> None:
    """Keep this process, and so all workers, on the first cores; before torch is imported."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[:threads])


def heading(options: argparse.Namespace) -> str:
    """What was run, in two or three lines."""
    shape = SHAPES[options.shape]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("polymodal", "torch", "transformers")]
    if importlib.util.find_spec("trl") is not None:
        versions.append(f"trl {importlib.metadata.version('trl')}")
    device = f"{options.threads} threads on {options.threads} cores" if options.device == "cpu" else options.device
    lines = [
        f"{', '.join(versions)}; {device}",
        f"language model: {shape.layers} layers, {shape.width} wide, {shape.vocab} words; tower: CLIP, "
        f"{shape.tower_layers} layers, {shape.tower_width} wide, {shape.image_tokens} tokens of {shape.image} px; "
        "mlp2x_gelu; seeded weights",
        f"a step: {options.samples} rows ({options.rows}), at most {options.micro} at once; a turn: {options.steps} "
        f"step(s), one warms up, {options.runs} are measured",
    ]
    load = os.getloadavg()[0]
    if load > 0.7:
        lines.append(f"NOTE: the machine is busy (load {load:.1f}); the ratios hold better than the rates")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

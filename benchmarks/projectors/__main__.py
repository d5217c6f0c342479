"""Which projector for the default model, and which tower? Each is trained on the same data and steps, then asked alike.

    python -m benchmarks.projectors --data data/default --output runs/projectors [--steps 120 120] [--only qformer]

The recipes are those of the default model, shortened to so many steps of stage 1 and of stage 2; all projectors make
16 tokens of an image. What the default model takes from its tower's classifier is left out but for the words of the
warm start: class scores written into the projector (only an MLP can), and samples made of class prototypes. The last
row has the small ViT for a tower (64 tokens, an MLP; recipes/default/vit_stage*.yaml). A run that was cut off goes on.
Scores are those of `polymodal eval`, with the image-blind control. Beside them stands the loss of the held-out right
answers, with the image and with grey in its place, which tells models apart long before their answers do. The time to
the first token is measured at the end, model after model in turn, over and over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "default"
IMAGE = ROOT / "examples" / "pictures" / "cat.jpg"

WIDTH = "hidden_size: 384, num_attention_heads: 6"
PROJECTORS: dict[str, str] = {
    "linear": "{mm_projector_type: linear, norm: standardize}",
    "mlp2x_gelu": "{mm_projector_type: mlp2x_gelu, hidden_size: 1536, norm: standardize}",
    "qformer": "{mm_projector_type: qformer, norm: standardize, qformer: {num_query_tokens: 16, num_hidden_layers: 4, "
    f"intermediate_size: 1536, {WIDTH}}}}}",
    "resampler": "{mm_projector_type: resampler, norm: standardize, resampler: {num_query_tokens: 16, num_layers: 4, "
    f"{WIDTH}}}}}",
}
"""What stands under `init.model.projector` of stage 1."""

VIT = "vit_small"
"""The row of the other tower."""


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    names = options.only or [*PROJECTORS, VIT]
    for name in names:
        try:
            train(name, options)
            evaluate(name, options)
            answer_losses(name, options)
        except subprocess.CalledProcessError as error:
            print(f"projectors: {name}: {' '.join(error.cmd[:5])} failed ({error.returncode})", file=sys.stderr)
            return 1
    times = first_token_times([model_folder(name, options) for name in names], options.runs)
    rows = [row(name, options, seconds) for name, seconds in zip(names, times, strict=True)]
    print(table(rows))
    (options.output / "projectors.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projectors", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("data/default"), help="what `python -m recipes.default.dataset` made"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/projectors"))
    parser.add_argument(
        "--features", default="runs/features", help="kept features, shared with the default model's runs"
    )
    parser.add_argument("--steps", type=int, nargs=2, default=(120, 120), metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--warm-start", type=int, default=3000, metavar="N", help="steps before stage 1")
    parser.add_argument("--limit", type=int, default=60, help="questions of each kind")
    parser.add_argument("--answers", type=int, default=400, metavar="N", help="right answers whose loss is taken")
    parser.add_argument("--runs", type=int, default=9, help="first tokens timed of each model")
    parser.add_argument("--only", choices=[*PROJECTORS, VIT], action="append", help="this row only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both recipes")
    return parser.parse_args(argv)


def model_folder(name: str, options: argparse.Namespace) -> Path:
    """Where a projector's trained model lies."""
    return options.output / name / "stage2" / "final"


def train(name: str, options: argparse.Namespace) -> None:
    """Both stages of one row, or what is missing of them."""
    first, second = options.steps
    folder = options.output / name
    recipes = "vit_" if name == VIT else ""
    shared = [f"run.feature_cache={options.features}", "run.save_every=50", "prototypes=null", *options.set]
    own = [] if name == VIT else [f"init.model.projector={PROJECTORS[name]}", "warm_start.write_classes=false"]
    polymodal(
        "train",
        str(RECIPES / f"{recipes}stage1.yaml"),
        f"name={name}-stage1",
        f"data.mix.0.path={options.data / 'stage1.json'}",
        *own,
        f"warm_start.steps={options.warm_start}",
        f"run.max_steps={first}",
        f"output_dir={folder / 'stage1'}",
        *shared,
    )
    polymodal(
        "train",
        str(RECIPES / f"{recipes}stage2.yaml"),
        f"name={name}-stage2",
        f"data.mix.0.path={options.data / 'stage2.json'}",
        f"init.from={folder / 'stage1' / 'final'}",
        f"run.max_steps={second}",
        f"output_dir={folder / 'stage2'}",
        *shared,
    )


def evaluate(name: str, options: argparse.Namespace) -> None:
    """The held-out questions and photographs, unless they were asked before."""
    for questions in ("val", "heldout_photos"):
        scores = options.output / name / f"{questions}.json"
        if not scores.is_file():
            polymodal(
                "eval",
                str(model_folder(name, options)),
                "--data",
                str(options.data / f"{questions}.json"),
                "--limit",
                str(options.limit),
                "--batch-size",
                "30",
                "--json",
                str(scores),
            )


def answer_losses(name: str, options: argparse.Namespace) -> None:
    """Loss of the held-out right answers in nats a token, seeing and in grey, unless it was measured before."""
    import torch

    from polymodal.backends import load
    from polymodal.data.load import load_records
    from polymodal.evaluation.runner import in_grey
    from polymodal.processing.collate import collate

    target = options.output / name / "losses.json"
    if target.is_file():
        return
    records = load_records(options.data / "val.json")
    records = records[:: max(1, len(records) // options.answers)]
    backend: Any = load(str(model_folder(name, options)), "cpu")
    found = {}
    for way, look in (("seeing", list), ("grey", in_grey)):
        total, tokens = 0.0, 0
        for start in range(0, len(records), 16):
            samples = [backend.processor(look(record.messages)) for record in records[start : start + 16]]
            with torch.inference_mode():
                out = backend.model(**collate(samples, backend.processor.pad_id).inputs())
            total, tokens = total + float(out.loss_sum), tokens + out.num_targets
        found[way] = total / tokens
    target.write_text(json.dumps(found | {"questions": len(records)}) + "\n")


def polymodal(*arguments: str) -> None:
    """Run the command of that name; what it says goes to the terminal."""
    subprocess.run(
        [sys.executable, "-m", "polymodal", *arguments], check=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )


def first_token_times(folders: list[Path], runs: int) -> list[list[float]]:
    """Seconds from a question about an image to the first token, the models taking turns."""
    import polymodal
    from polymodal import GenerationParams, Image, user

    models = [polymodal.load(str(folder)) for folder in folders]
    times: list[list[float]] = [[] for _ in models]
    for turn in range(runs + 1):
        for model, seen in zip(models, times, strict=True):
            reply = model.generate([user(Image(str(IMAGE)), "What is this?")], GenerationParams(max_new_tokens=1))
            if turn:  # the first turn warms up
                seen.append(reply.timing.first_token_s)
    return times


def row(name: str, options: argparse.Namespace, seconds: list[float]) -> dict[str, Any]:
    """The figures of one projector."""
    from polymodal.checkpoints.model_folder import load_model

    folder = options.output / name
    kinds = [
        k
        for file in ("val", "heldout_photos")
        for k in json.loads((folder / f"{file}.json").read_text())["tasks"][file]["kinds"]
    ]
    model = load_model(model_folder(name, options)).model
    assert model.projector is not None
    losses = json.loads((folder / "losses.json").read_text())
    count = sum(k["n"] for k in kinds)
    return {
        "projector": name,
        "parameters": sum(p.numel() for p in model.projector.parameters()),
        "tokens": model.projector.output_grid.area,
        "loss": losses["seeing"],
        "loss_grey": losses["grey"],
        "first_token_s": statistics.median(seconds),
        "first_token_range": [min(seconds), max(seconds)],
        "score": sum(k["score"] * k["n"] for k in kinds) / count,
        "blind": sum(k["blind"] * k["n"] for k in kinds) / count,
        "kinds": {k["kind"] if i < len(kinds) - 1 else "photographs": k["score"] for i, k in enumerate(kinds)},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a table in Markdown."""
    kinds = list(rows[0]["kinds"])
    head = ["projector", "parameters", "tokens", "first token", "loss", "in grey", "all", "blind", *kinds]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for entry in rows:
        cells = [
            entry["projector"],
            f"{entry['parameters'] / 1e6:.1f} M",
            str(entry["tokens"]),
            f"{1000 * entry['first_token_s']:.0f} ms",
            f"{entry['loss']:.3f}",
            f"{entry['loss_grey']:.3f}",
            *(f"{100 * value:.1f}" for value in (entry["score"], entry["blind"], *entry["kinds"].values())),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

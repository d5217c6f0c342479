"""Say what a recipe or a model will need before anything is loaded: visual tokens, memory, steps, hours.

Only configurations are read; nothing is downloaded unless --fetch is given. A recipe may be planned before the stage
that it starts from has run. Examples:
  polymodal plan recipes/llava15/stage2.yaml --image 480x640 --rows 665298 --devices 8 --device a100-80gb
  polymodal plan default --image 1080x1920
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import ConfigError

if TYPE_CHECKING:
    from polymodal.media_plan import Size
    from polymodal.planning.inference_plan import ModelPlan
    from polymodal.planning.train_plan import Plan, Question

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("target", metavar="TARGET", help="a recipe or pipeline (.yaml), a model folder, or a hub id")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    parser.add_argument(
        "--image", action="append", default=[], metavar="HxW", help="an image of a sample, in pixels; again for more"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=128, metavar="N", help="other tokens of a sample (default: %(default)s)"
    )
    parser.add_argument("--answer-tokens", type=int, metavar="N", help="trained tokens of a sample (default: half)")
    parser.add_argument("--rows", type=int, metavar="N", help="records of the data set; counted in small files")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--engine", help="single, ddp, fsdp2, zero2 or zero3 (default: as the recipe says)")
    parser.add_argument("--device", metavar="NAME", help="such as a100-80gb, h100-80gb, rtx4090-24gb or cpu")
    parser.add_argument(
        "--utilization", type=float, default=0.4, metavar="U", help="share of the device's peak (default: %(default)s)"
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--samples-per-second", type=float, metavar="X", help="measured on one device; goes before it")
    speed.add_argument("--log", type=Path, metavar="FILE", help="a run's log.jsonl on one device, to take it from")
    parser.add_argument("--fetch", action="store_true", help="ask the hub for a config.json that is not here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from polymodal.modeling.language_model import quieten_transformers
    from polymodal.planning.inference_plan import plan_model
    from polymodal.planning.train_plan import plan_training

    quieten_transformers()
    if not args.target.endswith((".yaml", ".yml")):
        if args.overrides:
            raise ConfigError(f"{args.overrides[0]!r}: a model has no recipe's keys to replace")
        found = plan_model(args.target, _sizes(args.image), args.text_tokens, fetch=args.fetch)
        print(json.dumps(found.plain(), indent=2) if args.json else _model_text(found))
        return 0
    plans = []
    for recipe, start in _stages(Path(args.target), args.overrides):
        plans.append((plan_training(recipe, start, _question(args, recipe.run.engine)), recipe))
    if args.json:
        print(json.dumps([plan.plain() for plan, _ in plans] if len(plans) > 1 else plans[0][0].plain(), indent=2))
        return 0
    question = _question(args, plans[0][1].run.engine)
    print("\n\n".join(_text(plan, _question(args, recipe.run.engine)) for plan, recipe in plans))
    print("\nassumed:\n" + "\n".join(f"- {line}" for line in plans[0][0].assumptions))
    if len(plans) > 1 and all(plan.hours is not None for plan, _ in plans):
        hours = _hours(sum(plan.hours or 0.0 for plan, _ in plans))
        print(f"all stages: {hours} on {question.devices} x {args.device or 'device'}")
    return 0


def _stages(path: Path, overrides: list[str]) -> list[tuple[Any, Any]]:
    """The training stages of a recipe or pipeline file, each with what it starts from."""
    from polymodal.config import new_image_rules
    from polymodal.planning.starting_point import Start, starting_point
    from polymodal.training.recipes.load import load_recipe
    from polymodal.training.recipes.pipeline import TrainStage, is_pipeline, load_pipeline
    from polymodal.training.recipes.sft import Recipe

    if not is_pipeline(path):
        single = load_recipe(path, overrides)
        return [(single, starting_point(single, path))]
    left: dict[str, Start] = {}
    found = []
    for stage in load_pipeline(path, overrides).stages.values():
        if not isinstance(stage, TrainStage):
            continue
        recipe = stage.recipe
        if not isinstance(recipe, Recipe):
            print(f"{recipe.name}: learns from pairs, which is not planned here", file=sys.stderr)
            continue
        before = left.get(recipe.init.from_folder or "")
        if before is None:
            start = starting_point(recipe, path)
        else:
            start = Start(new_image_rules(before.config, recipe.init.image), before.trained, before.note)
        found.append((recipe, start))
        parts = {rule.match.split(".")[0] for rule in recipe.train if rule.train}
        left[str(Path(recipe.output_dir) / "final")] = Start(
            start.config, start.trained | parts, f"as {recipe.name} will leave it"
        )
    if not found:
        raise ConfigError(f"{path}: no stage of it trains a language model")
    return found


def _question(args: argparse.Namespace, engine: str) -> Question:
    """Turn the flags into a question."""
    from polymodal.planning.train_plan import Question

    several = {"auto": "ddp", "deepspeed": "zero2"}.get(engine, engine)
    for name in ("devices", "text_tokens", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
    if not 0 < args.utilization <= 1:
        raise ConfigError(f"--utilization is {args.utilization}; give a share of the peak, above 0 and up to 1")
    return Question(
        images=_sizes(args.image),
        text_tokens=args.text_tokens,
        answer_tokens=args.answer_tokens if args.answer_tokens is not None else max(1, args.text_tokens // 2),
        rows=args.rows,
        devices=args.devices,
        engine=args.engine or (several if args.devices > 1 else "single"),
        device=args.device,
        utilization=args.utilization,
        samples_per_second=args.samples_per_second if args.log is None else measured_speed(args.log),
        fetch=args.fetch,
    )


def measured_speed(path: Path) -> float:
    """The middle of a run's samples per second."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--log {path}: cannot be read ({error})") from error
    speeds = sorted(float(line["samples_per_s"]) for line in lines if line.get("samples_per_s"))
    if not speeds:
        raise ConfigError(f"--log {path}: no line has samples_per_s")
    return speeds[len(speeds) // 2]


def _sizes(texts: list[str]) -> tuple[Size, ...]:
    from polymodal.media_plan import Size

    found = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
        if match is None:
            raise ConfigError(f"--image {text!r}: write it as HEIGHTxWIDTH in pixels, such as 480x640")
        found.append(Size(int(match[1]), int(match[2])))
    return tuple(found)


def _text(plan: Plan, question: Question) -> str:
    """A training plan for a person."""
    total, trained = sum(plan.parameters.values()), sum(plan.trained.values())
    parts = ", ".join(f"{name} {_count(count)}" for name, count in plan.parameters.items())
    images = ", ".join(
        f"{size.height}x{size.width}: {tokens} tokens in {tiles} tile{'s' * (tiles != 1)}"
        for size, tokens, tiles in zip(question.images, plan.visual_tokens, plan.tiles, strict=True)
    )
    over = f"; OVER max_length {plan.max_length}: such rows are left out" if plan.tokens > plan.max_length else ""
    checkpointed = "activations are computed twice" if plan.checkpointing else "activations are kept"
    rows = [
        ("model", f"{plan.model}: {parts}"),
        ("trained", f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %), {plan.precision}"),
        ("images", images or "none (--image HxW)"),
        ("sample", f"{plan.tokens} tokens, {question.answer_tokens} of them trained{over}"),
        ("key-value cache", _cache(plan.kv_bytes_per_token, plan.tokens, "a sample")),
        ("at once", f"{plan.micro_rows} samples on {_devices(question)} ({question.engine}); {checkpointed}"),
        *[(f"  {use}", _gib(size)) for use, size in plan.memory.items() if size],
        ("memory", f"{_gib(plan.total)} on each device{_verdict(plan, question)}"),
        (
            "checkpointing",
            f"{_gib(plan.activations_kept)} of activations without, {_gib(plan.activations_checkpointed)} with it",
        ),
        ("compute", f"{plan.flops_per_sample / 1e12:.2f} TFLOP a sample, forward and backward"),
    ]
    if plan.steps is None:
        rows.append(("steps", "not known: the data files are not here; give --rows"))
    else:
        rows.append(("steps", f"{plan.steps:,} ({plan.samples:,} samples)"))
    if plan.hours is not None:
        measured = question.samples_per_second
        how = (
            f"measured: {measured:g} samples/s a device"
            if measured is not None
            else f"assumed: {question.utilization:.0%} of the peak of {question.device}"
        )
        rows.append(("time", f"{_hours(plan.hours)} on {question.devices} x {question.device or 'device'} ({how})"))
    else:
        rows.append(("time", "not known: give --device, or --samples-per-second"))
    return f"{plan.name}\n" + _lines(rows)


def _model_text(plan: ModelPlan) -> str:
    """A model's plan for a person."""
    parts = ", ".join(f"{name} {_count(count)}" for name, count in plan.parameters.items())
    rows = [("model", f"{plan.name}: {parts}"), ("weights", f"{_gib(plan.weight_bytes)} ({plan.dtype})")]
    for (height, width), tokens, tiles in zip(plan.images, plan.visual_tokens, plan.tiles, strict=True):
        rows.append((f"image {height}x{width}", f"{tokens} tokens in {tiles} tile{'s' * (tiles != 1)}"))
    rows += [
        ("prompt", f"{plan.tokens} tokens of {plan.context or 'unlimited'}{' - TOO LONG' * plan.too_long}"),
        ("key-value cache", _cache(plan.kv_bytes_per_token, plan.tokens, "for the prompt")),
    ]
    if plan.context:
        rows.append(("  at full length", _gib(plan.kv_bytes_per_token * plan.context)))
    return _lines(rows)


def _verdict(plan: Plan, question: Question) -> str:
    if plan.fits is None:
        return ""
    return f": fits {question.device}" if plan.fits else f": DOES NOT FIT {question.device}"


def _devices(question: Question) -> str:
    return "one device" if question.devices == 1 else f"each of {question.devices} devices"


def _cache(a_token: int, tokens: int, of_what: str) -> str:
    return f"{a_token / 1024:.0f} KiB a token, {_gib(a_token * tokens)} {of_what}"


def _lines(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"

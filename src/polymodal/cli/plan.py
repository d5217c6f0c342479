"""Say what a recipe or a model will need before anything is loaded: tokens of media, memory, steps, hours.

Only configurations are read; nothing is downloaded unless --fetch is given. A recipe may be planned before the stage
that it starts from has run. Examples:
  polymodal plan recipes/llava15/stage2.yaml --image 640x480 --rows 665298 --devices 8 --device a100-80gb
  polymodal plan default --image 1920x1080
  polymodal plan default video.max_frames=3600 --video 1h --fps 1
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli.common import DECIMAL, aligned, note, scaled
from polymodal.errors import ConfigError
from polymodal.media_plan import Size

if TYPE_CHECKING:
    from polymodal.planning.plan import Plan, Question, TrainingPlan
    from polymodal.planning.starting_point import Start
    from polymodal.training.recipes.sft import Recipe

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("target", metavar="TARGET", help="a recipe or pipeline (.yaml), a model folder, or a hub id")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's or the model's"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="WxH", help="an image of a sample, in pixels; again for more"
    )
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="CLIP",
        help="a video of a sample: FRAMES@WxH, a length such as 90s or 1h, or a file; again for more",
    )
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--num-frames", type=int, metavar="N", help="frames of each video (default: as the model does)")
    frames.add_argument("--fps", type=float, metavar="X", help="instead: frames of each of its seconds")
    parser.add_argument(
        "--audio", action="append", default=[], metavar="SECONDS", help="a sound of a sample, or a file; again for more"
    )
    parser.add_argument(
        "--document", action="append", default=[], metavar="PAGES@WxH", help="a document, or a file; again for more"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=128, metavar="N", help="other tokens of a sample (default: %(default)s)"
    )
    parser.add_argument("--answer-tokens", type=int, metavar="N", help="trained tokens of a sample (default: half)")
    parser.add_argument("--rows", type=int, metavar="N", help="records of the dataset; counted in small files")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--engine", help="single, ddp or fsdp2 (default: as the recipe says)")
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
    from polymodal.planning.plan import Question, plan_model, plan_training

    quieten_transformers()
    if not args.target.endswith((".yaml", ".yml")):
        more = {"text_tokens": args.text_tokens, "fetch": args.fetch, "overrides": tuple(args.overrides)}
        found = plan_model(args.target, Question(**_media(args), **more))
        print(json.dumps(found.plain(), indent=2) if args.json else _model_text(found))
        return 0
    plans = []
    for recipe, start in _stages(Path(args.target), args.overrides):
        question = _question(args, recipe.run.engine)
        plans.append((plan_training(recipe, start, question), question))
    if args.json:
        print(json.dumps([plan.plain() for plan, _ in plans] if len(plans) > 1 else plans[0][0].plain(), indent=2))
        return 0
    print("\n\n".join(_training_text(plan, question) for plan, question in plans))
    print("\nassumed:\n" + "\n".join(f"- {line}" for line in plans[0][0].assumptions))
    hours = [plan.hours for plan, _ in plans if plan.hours is not None]
    if len(hours) == len(plans) > 1:
        print(f"all stages: {_hours(sum(hours))} on {args.devices} x {args.device or 'device'}")
    return 0


def _stages(path: Path, overrides: list[str]) -> list[tuple[Recipe, Start]]:
    """The training stages of a recipe or pipeline file, each with what it starts from."""
    from polymodal.planning.starting_point import starting_point
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
            note(f"{recipe.name}: learns from pairs, which is not planned here")
            continue
        before = left.get(recipe.init.from_folder or "")
        start = starting_point(recipe, path) if before is None else before.under(recipe)
        found.append((recipe, start))
        left[str(Path(recipe.output_dir) / "final")] = start.after(recipe, recipe.name)
    if not found:
        raise ConfigError(f"{path}: no stage of it trains a language model")
    return found


def _question(args: argparse.Namespace, engine: str) -> Question:
    """Turn the flags into a question."""
    from polymodal.planning.plan import Question

    for name in ("devices", "text_tokens", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
    if not 0 < args.utilization <= 1:
        raise ConfigError(f"--utilization is {args.utilization}; give a share of the peak, above 0 and up to 1")
    several = "ddp" if engine == "auto" else engine
    return Question(
        **_media(args),
        answer_tokens=args.answer_tokens if args.answer_tokens is not None else max(1, args.text_tokens // 2),
        engine=args.engine or (several if args.devices > 1 else "single"),
        samples_per_second=args.samples_per_second if args.log is None else _measured_speed(args.log),
        **{name: getattr(args, name) for name in ("text_tokens", "rows", "devices", "device", "utilization", "fetch")},
    )


def _measured_speed(path: Path) -> float:
    """The middle of a run's samples per second."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--log {path}: cannot be read ({error})") from error
    speeds = sorted(float(line["samples_per_s"]) for line in lines if line.get("samples_per_s"))
    if not speeds:
        raise ConfigError(f"--log {path}: no line has samples_per_s")
    return speeds[len(speeds) // 2]


def _sizes(texts: list[str], flag: str = "--image") -> tuple[Size, ...]:
    matches = [re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text) for text in texts]
    if None in matches:
        wrong = texts[matches.index(None)]
        raise ConfigError(f"{flag} {wrong!r}: write a size as WIDTHxHEIGHT in pixels, such as 640x480")
    return tuple(Size(int(match[2]), int(match[1])) for match in matches if match is not None)


def _media(args: argparse.Namespace) -> dict[str, Any]:
    """The media of a sample."""
    from polymodal.planning.sample import PaperVideo

    for name in ("num_frames", "fps"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give a number above 0")
    asked = {"num_frames": args.num_frames, "fps": args.fps}
    videos: list[PaperVideo] = []
    pages: list[Size] = []
    files: list[Path] = []
    for text in args.video:
        amount, at, size = text.rpartition("@")
        if at and re.fullmatch(r"[1-9]\d*", amount):
            videos.append(PaperVideo(frames=int(amount), size=_sizes([size], "--video")[0]))
        elif (seconds := _seconds(text)) is not None:
            videos.append(PaperVideo(seconds=seconds, **asked))
        else:
            videos.append(PaperVideo(file=_file(text, "--video", "8@1280x720, a length such as 90s or 1h"), **asked))
    for text in args.document:
        amount, at, size = text.rpartition("@")
        if at and re.fullmatch(r"[1-9]\d{0,4}", amount):
            pages += int(amount) * _sizes([size], "--document")
        else:
            files.append(_file(text, "--document", "12@850x1100"))
    sounds = [
        _file(text, "--audio", "a length such as 30s or 1h") if (found := _seconds(text)) is None else found
        for text in args.audio
    ]
    images = (*_sizes(args.image), *pages)
    return {"images": images, "videos": tuple(videos), "sounds": tuple(sounds), "documents": tuple(files)}


def _seconds(text: str) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h)?", text)
    unit = {"m": 60, "min": 60, "h": 3600}.get(match[2] or "s", 1) if match is not None else 1
    return float(match[1]) * unit if match is not None and float(match[1]) else None


def _file(text: str, flag: str, instead: str) -> Path:
    if not Path(text).is_file():
        raise ConfigError(f"{flag} {text!r}: no such file; or write {instead}")
    return Path(text)


def _training_text(plan: TrainingPlan, question: Question) -> str:
    """A training plan for a person."""
    total, trained = sum(plan.parameters.values()), sum(plan.trained.values())
    over = f"; OVER max_length {plan.max_length}: such rows are left out" if plan.tokens > plan.max_length else ""
    each = "one device" if question.devices == 1 else f"each of {question.devices} devices"
    twice = "computed twice" if plan.checkpointing else "kept"
    verdict = "" if plan.fits is None else f": {'fits' if plan.fits else 'DOES NOT FIT'} {question.device}"
    steps = "not known: the data are large or not here; give --rows"
    time = "not known: give --device, or --samples-per-second"
    if plan.steps is not None:
        steps = f"{plan.steps:,} ({plan.samples:,} samples)"
    if plan.hours is not None:
        how = f"assumed: {question.utilization:.0%} of the peak of {question.device}"
        if question.samples_per_second is not None:
            how = f"measured: {question.samples_per_second:g} samples/s a device"
        time = f"{_hours(plan.hours)} on {question.devices} x {question.device or 'device'} ({how})"
    rows = [
        ("model", _parts(plan)),
        ("trained", f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %), {plan.precision}"),
        ("images", ", ".join(f"{size}: {text}" for size, text in _images(plan)) or "none (--image WxH)"),
        *_senses(plan),
        ("sample", f"{plan.tokens} tokens, {question.answer_tokens} of them trained{over}"),
        ("key-value cache", f"{_cache(plan)} a sample"),
        ("at once", f"{plan.micro_rows} samples on {each} ({question.engine}); activations are {twice}"),
        *[(f"  {use}", _gib(size)) for use, size in plan.memory.items() if size],
        ("memory", f"{_gib(plan.total)} on each device{verdict}"),
        (
            "checkpointing",
            f"{_gib(plan.activations_kept)} of activations without, {_gib(plan.activations_checkpointed)} with it",
        ),
        ("compute", f"{plan.flops_per_sample / 1e12:.2f} TFLOP a sample, forward and backward"),
        ("steps", steps),
        ("time", time),
    ]
    return f"{plan.name}\n{aligned(rows)}"


def _model_text(plan: Plan) -> str:
    """A model's plan for a person."""
    rows = [
        ("model", _parts(plan)),
        ("weights", f"{_gib(plan.weight_bytes)} ({plan.dtype})"),
        *[(f"image {size}", text) for size, text in _images(plan)],
        *_senses(plan),
        ("prompt", f"{plan.tokens} tokens of {plan.context or 'unlimited'}{_too_long(plan, plan.tokens)}"),
        ("key-value cache", f"{_cache(plan)} for the prompt"),
    ]
    if plan.context:
        rows.append(("  at full length", _gib(plan.kv_bytes_per_token * plan.context)))
    return aligned(rows)


def _parts(plan: Plan) -> str:
    counts = (f"{name} {scaled(count, DECIMAL, 3).replace(' ', '')}" for name, count in plan.parameters.items())
    return f"{plan.model}: {', '.join(counts)}"


def _images(plan: Plan) -> list[tuple[str, str]]:
    """Each image's size, and what it takes; those alike that follow each other, such as pages, in one row."""
    rows = []
    for each, alike in groupby(zip(plan.images, plan.visual_tokens, plan.tiles, strict=True)):
        (height, width), tokens, tiles = each
        many = f", {number} times" if (number := len(list(alike))) > 1 else ""
        rows.append((f"{width}x{height}", f"{tokens} tokens in {tiles} tile{'s' * (tiles != 1)}{many}"))
    return rows


def _senses(plan: Plan) -> list[tuple[str, str]]:
    """Each video and sound, and what it takes."""
    rows = []
    for number, video in enumerate(plan.videos, start=1):
        taken = f", {video.frames:,} taken ({video.limit})" if video.limit else ""
        rows.append((f"video {number}", f"{video.wanted:,} frames{taken}: {video.tokens:,} tokens"))
        if video.limit:
            tokens = plan.tokens - video.tokens + video.tokens_of_all
            cache = f"key-value cache {_gib(plan.kv_bytes_per_token * tokens)}"
            rows.append(("  if all were taken", f"{tokens:,} tokens in all, {cache}{_too_long(plan, tokens)}"))
    for number, sound in enumerate(plan.sounds, start=1):
        windows = f"{sound.windows} window{'s' * (sound.windows != 1)}"
        rows.append((f"sound {number}", f"{sound.seconds:g} s in {windows}: {sound.tokens:,} tokens"))
    return rows


def _too_long(plan: Plan, tokens: int) -> str:
    factor = plan.rope_factor(tokens)
    return "" if factor is None else f" - TOO LONG: needs llm.rope_scaling with a factor of {factor:g}, or fewer tokens"


def _cache(plan: Plan) -> str:
    return f"{plan.kv_bytes_per_token / 1024:.0f} KiB a token, {_gib(plan.kv_bytes)}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"

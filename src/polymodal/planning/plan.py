"""What a model needs to read a sample, and what a training run will need, before anything is loaded.

Counts are exact where they can be: tokens of media come from `media_plan`, parameters and their types from the
model itself on tensors without data (`modeling.meta_device`), activations and FLOPs from a step of it
(`planning.activation_trace`). What is added by rule is listed in `ASSUMPTIONS`. Time needs a throughput: measured, or a
share of a device's peak.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polymodal.config import ModelConfig, parse_config
from polymodal.data.readers.registry import detect_format
from polymodal.errors import ConfigError, unknown_name
from polymodal.media_plan import Size
from polymodal.modeling.language_model import layer_counts, positions_of
from polymodal.modeling.lora import NF4_BYTES, four_bit_modules
from polymodal.modeling.meta_device import Outline, outline
from polymodal.planning.activation_trace import Load, Trace, trace
from polymodal.planning.sample import Media, PaperVideo, SoundUse, VideoUse, plan_media
from polymodal.planning.starting_point import Start, model_config
from polymodal.training.optimizer import Group, apply_policy, cast_frozen_linears
from polymodal.training.recipes.load import apply_override
from polymodal.training.recipes.sft import Recipe
from polymodal.utils.html import notebook_view
from polymodal.utils.modules import blocks, frozen

GIB = 2**30
RESERVE = GIB
ENGINES = ("single", "ddp", "fsdp2")
DEVICES: dict[str, tuple[float, float]] = {
    "v100-32gb": (125e12, 32),
    "a100-40gb": (312e12, 40),
    "a100-80gb": (312e12, 80),
    "h100-80gb": (989e12, 80),
    "h200-141gb": (989e12, 141),
    "l40s-48gb": (362e12, 48),
    "rtx4090-24gb": (165e12, 24),
    "rtx3090-24gb": (71e12, 24),
}
"""Device -> dense half-precision matmul FLOP/s (tensor cores, float32 accumulation) and memory in GB, as its maker
states them."""
ASSUMPTIONS = (
    "AdamW: float32 gradients (4 bytes a trained parameter) and two float32 moments (8 bytes); trained weights float32",
    "ddp: a second copy of the gradients in its buckets",
    "fsdp2: two layers and everything outside of layers are gathered at once; a frozen tower is not sharded",
    "1 GiB for the CUDA context, libraries and fragments",
    "16-bit autocast; attention that keeps no scores (SDPA)",
)


@dataclass(frozen=True)
class Question:
    """What is asked of a plan."""

    images: tuple[Size, ...] = ()  # The images of one sample, and the pages of its documents
    text_tokens: int = 128  # Its other tokens, prompt and answers
    answer_tokens: int = 64  # Those of them that are trained
    rows: int | None = None  # Records of the dataset; counted where the files are small and there when None
    devices: int = 1  # How many
    engine: str = "single"  # One of `ENGINES`
    device: str | None = None  # A key of `DEVICES`, or "cpu"; None for no time and no verdict
    utilization: float = 0.4  # The share of the device's peak that is reached
    samples_per_second: float | None = None  # Measured throughput of one device; goes before `utilization`
    fetch: bool = False  # Ask the hub for a `config.json` that is not on this machine
    videos: tuple[PaperVideo, ...] = ()  # The videos of the sample
    sounds: tuple[float | Path, ...] = ()  # Its sounds: seconds, or files
    documents: tuple[Path, ...] = ()  # Documents whose pages are counted and measured
    overrides: tuple[str, ...] = ()  # Values that replace the model's own, such as "video.max_frames=4096"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model needs to read one sample or prompt; sizes in bytes."""

    name: str  # The recipe's, or the model's as it was asked for
    model: str  # Where the model's configuration was found
    parameters: dict[str, int]  # Parameters of each part
    weight_bytes: int  # All weights in memory
    dtype: str  # Of the language model
    images: tuple[tuple[int, int], ...]  # Height and width of each image
    visual_tokens: tuple[int, ...]  # Positions of each image
    tiles: tuple[int, ...]  # Tiles of each image
    tokens: int  # Positions of the sample
    context: int | None  # Positions that the language model was made for; None where it has no limit
    kv_bytes_per_token: int  # Of the key-value cache
    videos: tuple[VideoUse, ...] = ()
    sounds: tuple[SoundUse, ...] = ()
    rope_scaling: float = 1.0  # The factor of llm.rope_scaling, which `context` follows

    _repr_html_ = notebook_view

    @property
    def kv_bytes(self) -> int:
        """Of the cache that holds the sample."""
        return self.kv_bytes_per_token * self.tokens

    @property
    def too_long(self) -> bool:
        """Whether the sample does not fit the context."""
        return self.context is not None and self.tokens > self.context

    def rope_factor(self, tokens: int) -> float | None:
        """The least factor of rope scaling whose context has so many positions; None where none is needed."""
        if self.context is None or tokens <= self.context:
            return None
        return math.ceil(100 * tokens * self.rope_scaling / self.context) / 100

    def plain(self) -> dict[str, Any]:
        """The plan as plain data."""
        more = {"kv_bytes": self.kv_bytes, "too_long": self.too_long, "rope_factor": self.rope_factor(self.tokens)}
        return {**asdict(self), **more}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Plan):
    """What a training stage needs besides; FLOPs and seconds are plain numbers."""

    trained: dict[str, int]  # Trained parameters of each part
    max_length: int  # The recipe's limit of positions
    micro_rows: int  # Samples that go through the model at once on one device
    precision: str  # "bf16" or "fp32"
    checkpointing: bool  # Whether layers are computed twice to save memory
    memory: dict[str, int]  # Bytes on one device, by use
    activations_kept: int  # Bytes of activations without checkpointing
    activations_checkpointed: int  # The same with it
    flops_per_sample: float  # Forward and backward, recomputation included
    steps: int | None = None  # Optimizer steps; None where the number of records is not known
    samples: int | None = None  # Samples seen
    hours: float | None = None  # Wall time; None where no throughput is known
    fits: bool | None = None  # Whether it fits the device; None where no device was named
    assumptions: tuple[str, ...] = ASSUMPTIONS

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())

    def plain(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {**super().plain(), "total": self.total}


def plan_model(name: str, question: Question) -> Plan:
    """Plan one prompt for a finished model."""
    config = model_config(name)
    if question.overrides:
        plain = config.model_dump(mode="json")
        for override in question.overrides:
            apply_override(plain, override, ModelConfig)
        config = parse_config(ModelConfig, plain, name)
    built = outline(config, fetch=question.fetch)
    value_bytes = next(built.model.llm.parameters()).element_size()
    return _sample_plan(name, name, built, _media(built, question), question, value_bytes)


def plan_training(recipe: Recipe, start: Start, question: Question) -> TrainingPlan:
    """Plan one training stage."""
    _check(question)
    bf16 = recipe.run.precision == "bf16" or (recipe.run.precision == "auto" and question.device != "cpu")
    built = outline(start.config, fetch=question.fetch)
    model = built.model
    if recipe.batch.packing == "pack" and model.encoder_decoder:
        model.prepare_packing()  # says why it cannot
    four_bit: list[Any] = []
    lora = recipe.lora
    if lora is not None and lora.load_in_4bit:
        four_bit = [model.llm.get_submodule(name).weight for name in four_bit_modules(model.llm)]
        lora = lora.model_copy(update={"load_in_4bit": False})
    if lora is not None and any(isinstance(token, str) for token in lora.trainable_tokens):
        # Which rows they are makes no difference here, and a tokenizer need not be on this machine.
        lora = lora.model_copy(update={"trainable_tokens": tuple(range(len(lora.trainable_tokens)))})
    groups = apply_policy(model, recipe.train, lora, recipe.optim)
    if bf16 and "llm" not in start.trained | {group.name for group in groups}:
        cast_frozen_linears(model.llm, torch.bfloat16)
    saved = sum(weight.numel() * (weight.element_size() - NF4_BYTES) for weight in four_bit)

    media = _media(built, question)
    sample = _sample_plan(recipe.name, start.origin, built, media, question, 2 if bf16 else 4, round(saved))
    load = Load(
        rows=_rows_at_once(recipe, sample.tokens, question.devices),
        tokens=sample.tokens,
        targets=question.answer_tokens,
        tiles=media.tiles,
        visual_tokens=media.tokens,
        frames=tuple(video.frames for video in media.videos),
        windows=sum(sound.windows for sound in media.sounds),
        window_frames=max((sound.longest for sound in media.sounds), default=0),
        cached=recipe.run.feature_cache != "off",
        own_shapes=media.own_shapes(built.config),
    )
    trained = _count(model, trained=True)
    cost = trace(built, load, bf16=bf16)
    memory = _memory(model, groups, sample.weight_bytes, cost, question, bf16)
    room = DEVICES[question.device][1] * GIB if question.device in DEVICES else None
    checkpointing = recipe.run.checkpointing == "on"
    if recipe.run.checkpointing == "auto" and room is not None:
        checkpointing = sum(memory.values()) > room
    if checkpointing:
        memory["activations"] = cost.kept_checkpointed
    flops = cost.forward_flops + cost.backward_flops + (cost.layer_flops if checkpointing else 0)
    return TrainingPlan(
        **vars(sample),
        trained=trained,
        max_length=recipe.data.max_length,
        micro_rows=load.rows,
        precision="bf16" if bf16 else "fp32",
        checkpointing=checkpointing,
        memory=memory,
        activations_kept=cost.kept,
        activations_checkpointed=cost.kept_checkpointed,
        flops_per_sample=flops / load.rows,
        fits=None if room is None else sum(memory.values()) <= room,
        **_time(recipe, question, flops / load.rows),
    )


def _media(built: Outline, question: Question) -> Media:
    asked = (question.images, question.videos, question.sounds, question.documents)
    return plan_media(*asked, built.config, built.model.tokens_per_tile, built.model.audio_window)


def _sample_plan(
    name: str, origin: str, built: Outline, media: Media, question: Question, kv_bytes: int, saved: int = 0
) -> Plan:
    """Count tokens as the processor will plan them, weights less what 4 bits save, and a cache of such numbers."""
    model, rope = built.model, built.config.llm.rope_scaling
    llm: Any = model.llm.config.get_text_config()
    return Plan(
        name=name,
        model=origin,
        parameters=_count(model),
        weight_bytes=_bytes([*model.parameters(), *model.buffers()]) - saved,
        dtype=built.config.llm.dtype,
        images=tuple((size.height, size.width) for size, _ in media.images),
        visual_tokens=tuple(plan.num_tokens for _, plan in media.images),
        tiles=tuple(plan.num_tiles for _, plan in media.images),
        tokens=media.tokens + question.text_tokens,
        context=positions_of(llm),
        kv_bytes_per_token=kv_bytes_per_token(llm, kv_bytes),
        videos=media.videos,
        sounds=media.sounds,
        rope_scaling=1.0 if rope is None else rope.factor,
    )


def kv_bytes_per_token(config: Any, value_bytes: int) -> int:
    """What one position takes in a key-value cache, all layers together; a sliding window holds fewer positions."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Of an encoder-decoder only the decoder has a cache: what it looks at and what it said take the same.
    return int(2 * layer_counts(config)[1] * heads * width * value_bytes)


def _check(question: Question) -> None:
    if question.engine not in ENGINES:
        raise unknown_name("engine", question.engine, ENGINES)
    if question.device not in (None, "cpu", *DEVICES):
        raise unknown_name("device", str(question.device), ["cpu", *DEVICES])
    if question.devices > 1 and question.engine == "single":
        raise ConfigError(f"{question.devices} devices need an engine: one of {', '.join(ENGINES[1:])}")
    if not 0 < question.answer_tokens <= question.text_tokens:
        raise ConfigError(
            f"answer tokens ({question.answer_tokens}) are a part of the text tokens ({question.text_tokens}), and at "
            "least 1"
        )


def _rows_at_once(recipe: Recipe, length: int, devices: int) -> int:
    """Samples of a micro-batch on one device."""
    batch = recipe.batch
    most = max(1, batch.global_size // devices)
    return min(most, max(1, batch.micro_tokens // length) if batch.packing == "pack" else batch.micro_size)


def _memory(
    model: Any, groups: Sequence[Group], weights: int, cost: Trace, question: Question, bf16: bool
) -> dict[str, int]:
    """Bytes on one device, by use, without checkpointing."""
    trained = sum(p.numel() for group in groups for _, p in group.parameters)
    memory = {"weights": weights, "gradients": 4 * trained, "optimizer": 8 * trained}
    if question.engine == "ddp" and question.devices > 1:
        memory["gradient buckets"] = 4 * trained
    if question.engine == "fsdp2" and question.devices > 1:
        encoder = model.vision_encoder
        tower = list(encoder.parameters()) if encoder is not None and frozen(encoder) else []
        layers = blocks(model.llm) + (blocks(encoder) if encoder is not None and not tower else [])
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        outside = sum(p.numel() for p in model.parameters()) - sum(sizes) - sum(p.numel() for p in tower)
        memory["weights"] -= _bytes(tower)
        memory = {use: -(-size // question.devices) for use, size in memory.items()}
        memory["weights"] += _bytes(tower)
        layer = max(sizes, default=0)
        memory["gathered weights"] = (2 if bf16 else 4) * (outside + 2 * layer) + 4 * layer
    elif cost.weight_copies:
        memory["16-bit copies of weights"] = cost.weight_copies
    memory |= {"activations": cost.kept, "logits": cost.loss_bytes}
    if cost.tower_bytes:
        memory["tower at work"] = cost.tower_bytes
    memory["reserve"] = RESERVE if question.device != "cpu" else 0
    return memory


def _time(recipe: Recipe, question: Question, flops_per_sample: float) -> dict[str, Any]:
    """Steps, samples and hours, each where it is known."""
    rows = question.rows if question.rows is not None else _count_rows(recipe)
    if rows is None:
        return {}
    wanted, size = recipe.run.epochs * rows, recipe.batch.global_size
    short = recipe.batch.last_step == "short"
    steps = -(-max(1, round(wanted)) // size) if short else max(1, round(wanted / size))
    steps = min(steps, recipe.run.max_steps or steps)
    samples = min(steps * size, max(1, round(wanted))) if short else steps * size
    speed = question.samples_per_second
    if speed is None and question.device in DEVICES:
        speed = DEVICES[question.device][0] * question.utilization / flops_per_sample
    hours = None if speed is None else samples / (speed * question.devices) / 3600
    return {"steps": steps, "samples": samples, "hours": hours}


def _count_rows(recipe: Recipe) -> int | None:
    """Records of an epoch, where the data are here and small enough to look into; else None."""
    total = 0.0
    for source in recipe.data.mix:
        path = Path(source.path)
        if path.is_dir() and (detect_format(path) if source.format == "auto" else source.format) == "folder":
            count = sum(1 for _ in path.rglob("*.txt"))
        elif path.is_file() and path.suffix in (".json", ".jsonl") and path.stat().st_size <= 2**28:
            text = path.read_text(encoding="utf-8")
            lines = (line for line in text.splitlines() if line.strip())
            count = len(json.loads(text)) if path.suffix == ".json" else sum(1 for _ in lines)
        else:
            return None
        total += min(count, source.max_samples or count) * source.repeat
    return round(total)


def _count(model: nn.Module, *, trained: bool = False) -> dict[str, int]:
    """Parameters of each part of a model, or how many of them are trained."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel() * (parameter.requires_grad or not trained)
    return dict(counts)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""What a training run will need, before anything is loaded: tokens, memory of one device, steps, hours.

Counts are exact where they can be: visual tokens come from `media_plan.plan_image`, parameters and their types from the
model itself on tensors without data (`modeling.meta_device`), activations and FLOPs from a step of it
(`planning.activation_trace`). What is added by rule is listed in `ASSUMPTIONS`. Time needs a throughput: measured, or a
share of a device's peak.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polymodal.errors import ConfigError, unknown_name
from polymodal.media_plan import Size, plan_image
from polymodal.modeling.language_model import layer_counts
from polymodal.modeling.lora import NF4_BYTES, four_bit_modules
from polymodal.modeling.meta_device import Outline, outline
from polymodal.modeling.published_shapes import DEVICES
from polymodal.planning.activation_trace import Load, Trace, trace
from polymodal.planning.starting_point import Start
from polymodal.training.optimizer import Group, apply_policy, cast_frozen_linears
from polymodal.utils.modules import blocks

if TYPE_CHECKING:
    from polymodal.config import ModelConfig
    from polymodal.training.recipes.sft import Recipe

GIB = 2**30
RESERVE = GIB
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")
ASSUMPTIONS = (
    "AdamW: float32 gradients (4 bytes a trained parameter) and two float32 moments (8 bytes); trained weights float32",
    "ddp: a second copy of the gradients in its buckets",
    "fsdp2, zero3: two layers and everything outside of layers are gathered at once; fsdp2 shards no frozen tower",
    "1 GiB for the CUDA context, libraries and fragments",
    "16-bit autocast; attention that keeps no scores (SDPA)",
)


@dataclass(frozen=True)
class Question:
    """What is asked of a plan."""

    images: tuple[Size, ...] = ()  # The images of one sample
    text_tokens: int = 128  # Its other tokens, prompt and answers
    answer_tokens: int = 64  # Those of them that are trained
    rows: int | None = None  # Records of the data set; counted where the files are small and there when None
    devices: int = 1  # How many
    engine: str = "single"  # One of `ENGINES`
    device: str | None = None  # A key of `known.DEVICES`, or "cpu"; None for no time and no verdict
    utilization: float = 0.4  # The share of the device's peak that is reached
    samples_per_second: float | None = None  # Measured throughput of one device; goes before `utilization`
    fetch: bool = False  # Ask the hub for a `config.json` that is not on this machine


@dataclass(frozen=True)
class Plan:
    """What a training stage needs; bytes, FLOPs and seconds are plain numbers."""

    name: str  # The recipe's
    model: str  # Where the model's configuration was found
    parameters: dict[str, int]  # Parameters of each part
    trained: dict[str, int]  # Trained parameters of each part
    visual_tokens: tuple[int, ...]  # Positions of each image
    tiles: tuple[int, ...]  # Tiles of each image
    tokens: int  # Positions of one sample
    max_length: int  # The recipe's limit
    micro_rows: int  # Samples that go through the model at once on one device
    precision: str  # "bf16" or "fp32"
    checkpointing: bool  # Whether layers are computed twice to save memory
    memory: dict[str, int]  # Bytes on one device, by use
    activations_kept: int  # Bytes of activations without checkpointing
    activations_checkpointed: int  # The same with it
    kv_bytes_per_token: int  # Of a key-value cache
    flops_per_sample: float  # Forward and backward, recomputation included
    steps: int | None = None  # Optimizer steps; None where the number of records is not known
    samples: int | None = None  # Samples seen
    hours: float | None = None  # Wall time; None where no throughput is known
    fits: bool | None = None  # Whether it fits the device; None where no device was named
    assumptions: tuple[str, ...] = field(default=ASSUMPTIONS)

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())

    def plain(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {**asdict(self), "total": self.total}


def plan_training(recipe: Recipe, start: Start, question: Question) -> Plan:
    """Plan one training stage."""
    _check(question)
    bf16 = recipe.run.precision == "bf16" or (recipe.run.precision == "auto" and question.device != "cpu")
    built = outline(start.config, fetch=question.fetch)
    model = built.model
    if recipe.batch.packing == "pack" and model.encoder_decoder:
        model.prepare_packing()  # says why it cannot
    quantised = []
    lora = recipe.lora
    if lora is not None and lora.load_in_4bit:
        quantised = [model.llm.get_submodule(name).weight for name in four_bit_modules(model.llm)]
        lora = lora.model_copy(update={"load_in_4bit": False})
    if lora is not None and any(isinstance(token, str) for token in lora.trainable_tokens):
        # Which rows they are makes no difference here, and a tokenizer need not be on this machine.
        lora = lora.model_copy(update={"trainable_tokens": tuple(range(len(lora.trainable_tokens)))})
    groups = apply_policy(model, recipe.train, lora, recipe.optim)
    if bf16 and "llm" not in start.trained | {group.name for group in groups}:
        cast_frozen_linears(model.llm, torch.bfloat16)
    weights = _bytes([*model.parameters(), *model.buffers()])
    weights -= round(sum(w.numel() * (w.element_size() - NF4_BYTES) for w in quantised))
    parameters, trained = _counts(model)
    shares = _shares(model, groups, bf16)

    tokens_per_image, tiles = visual_tokens(start.config, built, question.images)
    length = sum(tokens_per_image) + question.text_tokens
    load = Load(
        rows=_rows_at_once(recipe, length, question.devices),
        tokens=length,
        targets=question.answer_tokens,
        tiles=sum(tiles),
        visual_tokens=sum(tokens_per_image),
        cached=recipe.run.feature_cache != "off",
    )
    cost = trace(built, load, bf16=bf16)
    memory = _memory(weights, shares, cost, question, bf16)
    checkpointing = _checkpoints(recipe, memory, cost, question)
    memory["activations"] = cost.kept_checkpointed if checkpointing else cost.kept
    flops = cost.forward_flops + cost.backward_flops + (cost.layer_flops if checkpointing else 0)
    plan = Plan(
        name=recipe.name,
        model=start.note,
        parameters=parameters,
        trained=trained,
        visual_tokens=tokens_per_image,
        tiles=tiles,
        tokens=length,
        max_length=recipe.data.max_length,
        micro_rows=load.rows,
        precision="bf16" if bf16 else "fp32",
        checkpointing=checkpointing,
        memory=memory,
        activations_kept=cost.kept,
        activations_checkpointed=cost.kept_checkpointed,
        kv_bytes_per_token=kv_bytes_per_token(model.llm.config, 2 if bf16 else 4),
        flops_per_sample=flops / load.rows,
    )
    return _with_time(plan, recipe, question)


def visual_tokens(
    config: ModelConfig, built: Outline, images: Sequence[Size]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens and tiles of each image, as the processor will plan them."""
    grid = built.model.tokens_per_tile
    if images and (config.image is None or grid is None):
        raise ConfigError("this model has no vision encoder; leave --image out")
    plans = [
        plan_image(size, config.image, grid, alone=len(images) == 1)
        for size in images
        if config.image is not None and grid is not None
    ]
    return tuple(plan.num_tokens for plan in plans), tuple(plan.num_tiles for plan in plans)


def kv_bytes_per_token(config: Any, value_bytes: int) -> int:
    """What one position takes in a key-value cache, all layers together; a sliding window holds fewer positions."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Of an encoder-decoder only the decoder has a cache: what it looks at and what it said take the same.
    return int(2 * layer_counts(config)[1] * heads * width * value_bytes)


def count_rows(recipe: Recipe) -> int | None:
    """Records of an epoch, where the data files are here and small enough to look into; else None."""
    total = 0.0
    for source in recipe.data.mix:
        path = Path(source.path)
        if not path.is_file() or path.suffix not in (".json", ".jsonl") or path.stat().st_size > 2**28:
            return None
        text = path.read_text(encoding="utf-8")
        count = (
            sum(1 for line in text.splitlines() if line.strip()) if path.suffix == ".jsonl" else len(json.loads(text))
        )
        total += min(count, source.max_samples or count) * source.repeat
    return round(total)


def _check(question: Question) -> None:
    if question.engine not in ENGINES:
        raise unknown_name("engine", question.engine, ENGINES)
    if question.device not in (None, "cpu") and question.device not in DEVICES:
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
    if batch.packing == "pack":
        return min(most, max(1, batch.micro_tokens // length))
    return min(most, batch.micro_size)


def _counts(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    parameters: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
        trained[part] = trained.get(part, 0) + parameter.numel() * parameter.requires_grad
    return parameters, trained


@dataclass(frozen=True)
class _Shares:
    """How a model's parameters fall to what is sharded and gathered together."""

    trained: int  # Trained parameters
    tower_bytes: int  # Bytes of a frozen tower
    outside: int  # Parameters outside of layers, a frozen tower aside
    layer: int  # Parameters of the largest layer


def _shares(model: Any, groups: Sequence[Group], bf16: bool) -> _Shares:
    tower = [] if model.vision_encoder is None else list(model.vision_encoder.parameters())
    frozen_tower = not any(p.requires_grad for p in tower)
    layers = blocks(model.llm) + ([] if frozen_tower else blocks(model.vision_encoder))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    left = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return _Shares(
        trained=sum(p.numel() for group in groups for _, p in group.parameters),
        tower_bytes=_bytes(tower) if frozen_tower else 0,
        outside=left - (sum(p.numel() for p in tower) if frozen_tower else 0),
        layer=max(sizes, default=0),
    )


def _memory(weights: int, shares: _Shares, cost: Trace, question: Question, bf16: bool) -> dict[str, int]:
    """Bytes on one device, by use; activations are filled in later."""
    count, engine = question.devices, question.engine
    sharded = {"single": 0, "ddp": 0, "zero2": 1, "fsdp2": 2, "zero3": 2}[engine] if count > 1 else 0
    gradients, moments = 4 * shares.trained, 8 * shares.trained
    whole = shares.tower_bytes if engine == "fsdp2" else 0
    value = 2 if bf16 else 4
    memory = {
        "weights": weights if sharded < 2 else whole + -(-(weights - whole) // count),
        "gradients": gradients if not sharded else -(-gradients // count),
        "optimizer": moments if not sharded else -(-moments // count),
    }
    if engine == "ddp" and count > 1:
        memory["gradient buckets"] = gradients
    if sharded == 2:
        memory["gathered weights"] = value * (shares.outside + 2 * shares.layer) + 4 * shares.layer
    elif cost.weight_copies:
        memory["16-bit copies of weights"] = cost.weight_copies
    memory["activations"] = cost.kept
    memory["logits"] = cost.loss_bytes
    if cost.tower_bytes:
        memory["tower at work"] = cost.tower_bytes
    memory["reserve"] = RESERVE if question.device != "cpu" else 0
    return memory


def _checkpoints(recipe: Recipe, memory: dict[str, int], cost: Trace, question: Question) -> bool:
    """Whether layers are computed twice: as the recipe says; "auto" where it would not fit otherwise."""
    if recipe.run.checkpointing != "auto":
        return recipe.run.checkpointing == "on"
    if question.device not in DEVICES:
        return False
    return sum(memory.values()) > DEVICES[question.device][1] * GIB


def _with_time(plan: Plan, recipe: Recipe, question: Question) -> Plan:
    """Add steps, hours and the verdict."""
    rows = question.rows if question.rows is not None else count_rows(recipe)
    changes: dict[str, Any] = {}
    if rows is not None:
        steps = max(1, round(recipe.run.epochs * rows / recipe.batch.global_size))
        steps = min(steps, recipe.run.max_steps or steps)
        changes |= {"steps": steps, "samples": steps * recipe.batch.global_size}
        speed = question.samples_per_second
        if speed is None and question.device in DEVICES:
            speed = DEVICES[question.device][0] * question.utilization / plan.flops_per_sample
        if speed is not None:
            changes["hours"] = changes["samples"] / (speed * question.devices) / 3600
    if question.device in DEVICES:
        changes["fits"] = plan.total <= DEVICES[question.device][1] * GIB
    return Plan(**{**{name: getattr(plan, name) for name in plan.__dataclass_fields__}, **changes})


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""One training step on tensors without data: what it would keep for the backward pass, and how much it would compute.

The model's own modules run forward and backward under `FakeTensorMode`, with hooks on what autograd keeps and torch's
counter of matmul and attention FLOPs. Nothing is a formula of ours but the output head, whose loss is taken in chunks
under a budget (`polymodal.modeling.token_loss`). Frozen layers, adapters, mixed precision and grouped heads therefore
count as they are. Not seen: memory that a kernel borrows while it runs, and the allocator's fragments.

`training.activation_checkpointing` has a formula for the same: it decides at the start of a run, where a trace would
take seconds and a second copy of the model's modules, and an estimate is enough.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polymodal.media_plan import Size
from polymodal.modeling.encoders.vision import towers_of
from polymodal.modeling.meta_device import Outline, on_no_device
from polymodal.modeling.pretrained import building
from polymodal.modeling.token_loss import GPU_BUDGET
from polymodal.utils.modules import blocks, frozen

ATTENTION = "polymodal_plan"
"""transformers' SDPA attention under a name of ours, whose causal mask is left to the kernel, as in a real run."""

LOGIT_BYTES = 12
"""Bytes a logit costs at the loss: 16-bit and float32 value, and as much again for the gradient."""


@dataclass(frozen=True)
class Load:
    """What goes through the model at once, on one device."""

    rows: int  # Samples
    tokens: int  # Positions of each, media included
    targets: int  # Trained tokens of each
    tiles: int  # Tiles of each, the frames of its videos among them
    visual_tokens: int  # Positions of each that are media
    cached: bool = False  # The towers' features come from a cache
    frames: tuple[int, ...] = ()  # Of each video of a sample
    windows: int = 0  # Of the sounds of a sample
    window_frames: int = 0  # Of the longest of them
    own_shapes: tuple[Size, ...] = ()  # Pixels of each image of a sample, where images have shapes of their own


@dataclass(frozen=True)
class Trace:
    """What a micro-batch costs."""

    kept: int  # Bytes of activations kept for the backward pass, without checkpointing
    weight_copies: int  # Bytes of 16-bit copies of float32 weights that autocast makes and the backward pass needs
    kept_checkpointed: int  # The same with every layer checkpointed, at the worst moment
    loss_bytes: int  # Bytes of logits and their gradient at the worst moment
    tower_bytes: int  # Bytes of activations of the tower at the worst moment, where it keeps none; an estimate
    forward_flops: float  # FLOPs of the forward pass
    backward_flops: float  # FLOPs of the backward pass, without recomputation
    layer_flops: float  # FLOPs of the forward pass inside the layers that checkpointing computes twice


class _Meter:
    """Counts the memory that autograd keeps, each piece once, weights aside, and what each watched layer costs."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        self.own = {id_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self.weights = {tuple(p.shape) for p in model.parameters() if p.ndim > 1 and p.dtype == torch.float32}
        self.counter = counter
        self.pieces: dict[int, Tensor] = {}  # holding on to them keeps their identities from being used again
        self.bytes = 0
        self.copies = 0
        self.layers_kept: list[int] = []
        self.layer_inputs: list[int] = []
        self.layer_flops: list[int] = []

    def pack(self, tensor: Tensor) -> Tensor:
        """A hook on what autograd saves."""
        key = id_of(tensor)
        if key not in self.own and key not in self.pieces:
            self.pieces[key] = tensor
            size = tensor.untyped_storage().nbytes()
            is_copy = tensor.dtype == torch.bfloat16 and self.weights & {tuple(tensor.shape), tuple(tensor.shape[::-1])}
            self.copies += size if is_copy else 0
            self.bytes += 0 if is_copy else size
        return tensor

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """While active, count saved memory, and what each of these layers keeps, takes in and computes."""
        before: list[tuple[int, int]] = []

        def enter(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.layer_inputs.append(hidden.numel() * hidden.element_size() if hidden.requires_grad else 0)
            before.append((self.bytes, self.counter.get_total_flops()))

        def leave(_layer: nn.Module, _args: Any, _output: Any) -> None:
            bytes_before, flops_before = before.pop()
            self.layers_kept.append(self.bytes - bytes_before)
            self.layer_flops.append(self.counter.get_total_flops() - flops_before)

        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()


def id_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return int(tensor.untyped_storage()._cdata)


def trace(outline: Outline, load: Load, *, bf16: bool) -> Trace:
    """Run one micro-batch without data."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would log what is raised here
    with building(f"language model {outline.config.llm.model_name_or_path!r}"):
        return _trace(outline, load, bf16=bf16)


def _trace(outline: Outline, load: Load, *, bf16: bool) -> Trace:
    model, llm = outline.model, outline.model.llm
    towers: list[Any] = [tower for tower in (model.vision_encoder, model.audio_encoder) if tower is not None]
    trained = [tower for tower in towers if not frozen(tower)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_no_device(model, mode)
    _leave_mask_to_kernel(llm)
    counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
    meter = _Meter(model, counter)
    layers = [*blocks(llm), *(layer for tower in trained for layer in blocks(tower))]
    with mode, counter, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), meter.watching(layers):
        hidden = _forward(outline, load)
        loss = hidden.float().sum()
        forward, kept = counter.get_total_flops(), meter.bytes
        if loss.requires_grad:
            loss.backward()
        backward = counter.get_total_flops() - forward
    output: Any = llm.get_output_embeddings()
    logits = load.rows * load.targets * int(output.weight.shape[0])
    head = 2.0 * logits * hidden.shape[-1]
    largest = max(meter.layers_kept, default=0)
    return Trace(
        kept=kept,
        weight_copies=meter.copies,
        kept_checkpointed=kept - sum(meter.layers_kept) + sum(meter.layer_inputs) + largest,
        loss_bytes=min(LOGIT_BYTES * logits, LOGIT_BYTES // 4 * GPU_BUDGET),
        tower_bytes=0 if load.cached else max((_tower_bytes(t, load, bf16) for t in towers if frozen(t)), default=0),
        forward_flops=forward + head,
        backward_flops=backward + head * (1 if frozen(output) else 2),
        layer_flops=float(sum(meter.layer_flops)),
    )


def _forward(outline: Outline, load: Load) -> Tensor:
    """The model up to its head, [R, D] at the positions that carry a label; call it inside the mode."""
    model, llm = outline.model, outline.model.llm
    embeds = llm.get_input_embeddings()(torch.zeros(load.rows, load.tokens, dtype=torch.int64))
    media: list[Tensor] = []
    tiles = load.tiles - len(load.own_shapes)
    if load.own_shapes:
        media += _images_of_own_shape(model, load)
    if model.vision_encoder is not None and model.projector is not None and tiles:
        encoder, tile = model.vision_encoder, model.vision_encoder.tile
        count = load.rows * tiles
        weight = next(encoder.parameters())
        if load.cached:
            features = torch.zeros(count, encoder.grid.area, encoder.embed_dim)
        else:
            features = model.encode_images(torch.zeros(count, 3, tile.height, tile.width, dtype=weight.dtype))
        settings = outline.config.projector.qformer
        context = None
        if model.reads_context and settings is not None:
            context = torch.zeros(count, settings.max_text_length, dtype=torch.int64)
        stills, *videos = features.unflatten(0, (load.rows, -1)).split((tiles - sum(load.frames), *load.frames), dim=1)
        if model.temporal_encoder is not None:
            weight = next(iter(model.temporal_encoder.parameters()), stills)
            videos = [model.temporal_encoder(v.to(weight.dtype), torch.zeros(v.shape[:2])) for v in videos]
        for part in (stills, *videos):
            given = None if context is None else context[: load.rows * part.shape[1]]
            media.append(model.project(part.flatten(0, 1), given).flatten(0, 1))
        if model.image_newline is not None:
            media.append(model.image_newline.expand(1, -1))
    if model.audio_encoder is not None and model.audio_projector is not None and load.windows:
        media.append(_sounds(outline, load))
    if media:
        places = torch.zeros(load.rows * load.visual_tokens, dtype=torch.int64)
        # Unpadding drops some tokens and newlines add some: as many as the plan says take part.
        media_tokens = torch.cat(media).index_select(0, places)
        flat = embeds.reshape(-1, embeds.shape[-1])
        embeds = flat.index_copy(0, places, media_tokens.to(flat.dtype)).view_as(embeds)
    positions = torch.zeros(load.rows * load.targets, dtype=torch.int64)
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        found.append(args[0].reshape(-1, args[0].shape[-1]).index_select(0, positions))
        return (found[0][:0].detach(),)

    inputs = {"inputs_embeds": embeds}
    if model.encoder_decoder:
        inputs = {
            "inputs_embeds": embeds[:, : max(1, load.tokens - load.targets)],
            "decoder_input_ids": torch.zeros(load.rows, load.targets, dtype=torch.int64),
        }
    handle = llm.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        llm(**inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def _images_of_own_shape(model: Any, load: Load) -> list[Tensor]:
    """The projected tokens of images that have each its own grid, [A, D] of one at a time in all rows."""
    encoder, cell = model.vision_encoder, model.vision_encoder.tile
    per_tile = model.tokens_per_tile
    cell = Size(cell.height // per_tile.height, cell.width // per_tile.width)  # the pixels of a token
    patches = [Size(s.height // encoder.patch.height, s.width // encoder.patch.width) for s in load.own_shapes]
    dtype = next(encoder.parameters()).dtype
    if load.cached:
        features = [torch.zeros(load.rows, grid.area, encoder.embed_dim) for grid in patches]
    else:
        shapes = [(load.rows, 3, size.height, size.width) for size in load.own_shapes]
        features = model.encode_images([torch.zeros(shape, dtype=dtype) for shape in shapes])
    grids = [Size(s.height // cell.height, s.width // cell.width) for s in load.own_shapes]
    made = [model.project(part, None, grid) for part, grid in zip(features, grids, strict=True)]
    newline = [] if model.image_newline is None else [model.image_newline.expand(1, -1)]
    return [*(part.flatten(0, 1) for part in made), *newline]


def _sounds(outline: Outline, load: Load) -> Tensor:
    """The projected tokens of all windows, [A, D]."""
    encoder: Any = outline.model.audio_encoder
    projector: Any = outline.model.audio_projector
    count, frames = load.rows * load.windows, load.window_frames
    if load.cached:
        features = torch.zeros(count, encoder.output_tokens(frames), encoder.embed_dim)
    else:
        with torch.no_grad() if frozen(encoder) else nullcontext():
            features = encoder(torch.zeros(count, encoder.mel_bins, frames))
    found: Tensor = projector(features.to(next(projector.parameters()).dtype))
    return found.flatten(0, 1)


def _tower_bytes(encoder: Any, load: Load, bf16: bool) -> int:
    """Working memory of a frozen tower: input, attention and the wide layer of one block live at once."""
    if len(towers := towers_of(encoder)) > 1:  # one after the other
        return max(_tower_bytes(tower, load, bf16) for tower in towers)
    settings: Any = getattr(getattr(encoder, "model", None), "config", None)
    if hasattr(encoder, "mel_bins"):
        width = settings.d_model * 6 + settings.encoder_ffn_dim * 2
        return int(load.rows * load.windows * load.window_frames // 2 * width * (2 if bf16 else 4))
    width = (settings.hidden_size * 6 + settings.intermediate_size * 2) if settings is not None else encoder.embed_dim
    patches = encoder.patch_grid.area + encoder.prefix if settings is not None else 112 * 112
    seen = (load.tiles - len(load.own_shapes)) * patches
    seen += sum(size.area // encoder.patch.area for size in load.own_shapes)
    return int(load.rows * seen * width * (2 if bf16 else 4))


def _leave_mask_to_kernel(llm: Any) -> None:
    """Keep transformers from making a causal mask: it does so wherever it cannot look into tensors."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *_args, **_kwargs: None)
    for config in {id(c): c for c in (llm.config, llm.config.get_text_config())}.values():
        config._attn_implementation = ATTENTION


def _cpu_attention() -> dict[Any, Any]:
    """Formulas for the CPU's attention kernel, which torch's counter does not know."""
    ops: Any = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }

"""Attention over packed samples: several samples in one row, none of which sees another.

A pack's attention is computed segment by segment: on a CPU as a loop of causal `scaled_dot_product_attention` (in
training as plain products: that kernel's backward pass takes twice as long in bf16, a sixth longer in float32), on CUDA
in half precision by `torch.nn.attention.varlen`, one kernel over all segments, which needs no other package. Work
grows with the sum of squared lengths, not with the square of the sum; the block-diagonal mask that transformers builds
by itself for packed positions costs the latter (measured on two CPU cores, packs of 2048 tokens: 2.5 times slower).

It plugs into transformers' own registries, `ALL_ATTENTION_FUNCTIONS` and `ALL_MASK_ATTENTION_FUNCTIONS`; segments
travel as a keyword argument through the model's layers, so that recomputation under activation checkpointing sees the
same ones. Without segments the installed function calls whatever the model used before. Not every model obeys the
registry, so the way is not guessed from a name: `choose_method` runs two tiny segments through the model, packed and
apart, and takes the first way whose results agree.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from polymodal.errors import ConfigError
from polymodal.utils.modules import evaluating

if TYPE_CHECKING:  # whose module takes a second to load
    from transformers import PreTrainedModel

Kernel = Callable[..., Any]

PREFIX = "polymodal_segments_"
"""Registered name of the segment attention; what the model used before is appended."""

SEGMENTS, POSITIONS, MASK = "segments", "positions", "mask"
"""Ways to keep samples apart: our attention function; positions that start anew, which transformers turns into a mask
(or FlashAttention's own segments); a 4-D mask of ours."""

SHORT, BLOCK = 1024, 128
"""Tokens up to which a segment's weights are kept for the backward pass on a CPU, and queries at a time."""

ALIKE = 1.25
"""How much longer than the shortest of them segments may be that are attended to at once."""

_PROBE = (5, 7)
"""Lengths of the segments that `choose_method` tries."""


class Segments:
    """Lengths of the samples in a row; one object for all layers."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.windows: list[int | None] = []
        self._offsets: Tensor | None = None

    def offsets(self, device: torch.device) -> Tensor:
        """Where segments begin and the last one ends, [n + 1] int32; made once for all layers."""
        if self._offsets is None or self._offsets.device != device:
            lengths = torch.tensor((0, *self.lengths), dtype=torch.int32)
            self._offsets = lengths.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
        return self._offsets


def segment_positions(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Positions that start anew in each segment, [1, T]."""
    return torch.cat([torch.arange(length) for length in lengths])[None].to(device, non_blocking=True)


def segment_mask(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """True where a token may look: at itself and before it, in its own segment; [1, 1, T, T]."""
    owner = torch.repeat_interleave(torch.tensor(tuple(lengths))).to(device)
    return (owner[:, None] == owner[None, :]).tril()[None, None]


def packed_inputs(llm: PreTrainedModel, method: str, lengths: Sequence[int], embeds: Tensor) -> dict[str, Any]:
    """Keyword arguments that make a causal LM treat a row as separate samples."""
    # embeds [1, T, D]
    if embeds.shape[:2] != (1, sum(lengths)):
        raise ConfigError(f"segments of {sum(lengths)} tokens in all do not fit a batch of {tuple(embeds.shape[:2])}")
    inputs: dict[str, Any] = {}
    if "position_ids" in inspect.signature(llm.forward).parameters:
        inputs["position_ids"] = segment_positions(lengths, embeds.device)
    if method == SEGMENTS:
        # A 4-D mask is handed on as it is: no mask is built, and ours looks at the segments only.
        inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=embeds.device)
        inputs["segments"] = Segments(lengths)
    elif method == MASK:
        allowed = segment_mask(lengths, embeds.device)
        if llm.config._attn_implementation != "sdpa":
            floor = torch.finfo(embeds.dtype).min
            allowed = torch.zeros(allowed.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(~allowed, floor)
        inputs["attention_mask"] = allowed
    return inputs


def segment_attention(
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, h, T, d]
    value: Tensor,  # [1, h, T, d]
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # [1, T, H, d]
    """Causal attention within each segment."""
    window = sliding_window if sliding_window is not None and sliding_window < max(segments.lengths) else None
    if query.is_cuda and softcap is None and dropout == 0.0 and query.dtype in (torch.float16, torch.bfloat16):
        kernel = _varlen_kernel()
        if kernel is not None:
            return _by_kernel(kernel, query, key, value, segments, scaling, window)
    groups = query.shape[1] // key.shape[1]
    # Masked kernels want as many key heads as query heads; the causal one shares them, a fifth faster on a CPU.
    shared = groups > 1 and window is None and softcap is None
    if groups > 1 and not shared:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    plain = _plain(query, window, softcap, dropout)
    parts = list(zip(*(part.split(segments.lengths, dim=2) for part in (query, key, value)), strict=True))
    pieces: list[Tensor] = [query] * len(parts)
    alike = _alike(segments.lengths) if plain else []
    for group in alike:
        sides = zip(*(parts[place] for place in group), strict=True)
        q, k, v = (pad_sequence([x[0].transpose(0, 1) for x in side]).permute(1, 2, 0, 3) for side in sides)
        attended = _by_products(q, k, v, scaling).transpose(1, 2)
        for place, row in zip(group, attended, strict=True):
            pieces[place] = row[None, : segments.lengths[place]]
    for place in set(range(len(parts))).difference(*alike):
        q, k, v = parts[place]
        mask = _band(q.shape[2], window, q.device) if window is not None and window < q.shape[2] else None
        if softcap is not None:
            piece = _capped(q, k, v, mask, scaling, dropout, softcap)
        else:
            piece = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout, enable_gqa=shared
            )
        pieces[place] = piece.transpose(1, 2)
    return torch.cat(pieces, dim=1)


def _plain(
    query: Tensor, sliding_window: int | None = None, softcap: float | None = None, dropout: float = 0.0, **_: Any
) -> bool:
    """Whether causal attention in training on a CPU is all that is asked for."""
    asked = sliding_window is not None or softcap is not None or dropout
    return query.device.type == "cpu" and torch.is_grad_enabled() and not asked


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Short segments of like length, which are attended to at once, so that all cores have work."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[place] > SHORT:
            break
        if groups and lengths[place] <= ALIKE * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _by_products(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of rows as products of matrices, each block of queries over the keys up to its end."""
    # q [B, H, T, d], k and v [B, h, T, d] -> [B, H, T, d]
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else q.dtype
    q = (q * (scaling if scaling is not None else q.shape[-1] ** -0.5)).to(dtype)
    queries = q.unflatten(1, (k.shape[1], -1)).flatten(0, 1)  # [B h, H / h, T, d]
    keys, values = k.to(dtype).flatten(0, 1).transpose(1, 2), v.to(dtype).flatten(0, 1)
    pieces = []
    with torch.autocast("cpu", enabled=False):  # it would take the softmax's result in float32
        for start in range(0, q.shape[2], BLOCK):
            block = queries[:, :, start : start + BLOCK]  # [B h, H / h, n, d]
            shape, end = block.shape[1:3], start + block.shape[2]
            later = torch.full((shape[1], end), float("-inf"), dtype=dtype).triu(start + 1).repeat(shape[0], 1)
            weights = torch.baddbmm(later, block.flatten(1, 2), keys[:, :, :end]).softmax(dim=-1)
            pieces.append((weights @ values[:, :end]).unflatten(1, shape))
    return torch.cat(pieces, dim=2).unflatten(0, (len(q), -1)).flatten(1, 2)


def choose_method(llm: PreTrainedModel) -> str:
    """Find out how this model keeps packed samples apart, and install what that needs."""
    if "flash" in str(llm.config._attn_implementation):
        return POSITIONS  # transformers hands the segments to FlashAttention itself
    with evaluating(llm), torch.no_grad():
        weight = llm.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        first, second, other = (torch.randn(1, n, weight.shape[1], generator=generator) for n in (*_PROBE, _PROBE[0]))
        row, changed = (torch.cat((part, second), dim=1).to(weight.device, weight.dtype) for part in (first, other))
        alone = torch.cat([llm(inputs_embeds=x, use_cache=False).logits for x in row.split(_PROBE, dim=1)], dim=1)
        for method in (SEGMENTS, POSITIONS, MASK):
            before = llm.config._attn_implementation
            try:
                if method == SEGMENTS:
                    install(llm)
                if _agrees(llm, method, row, changed, alone):
                    return method
            except Exception:
                # Whatever a foreign model raises on arguments it does not know, it cannot go this way.
                pass
            if llm.config._attn_implementation != before:
                llm.set_attn_implementation(before)
    raise ConfigError(
        f"batch.packing: {type(llm).__name__} cannot keep packed samples apart (its state or its positions run "
        "through the whole row); set batch.packing to none"
    )


def install(llm: PreTrainedModel) -> None:
    """Make a model use our attention for packs, and what it used before for everything else."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = llm.config._attn_implementation or "eager"
    if before.startswith(PREFIX):
        return
    # Lengths differ in every pack, and the compiler would specialise on each.
    attend_opaquely = torch.compiler.disable(_attend)

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            if attention_mask is None and query.shape[2] == key.shape[2] <= SHORT and _plain(query, **kwargs):
                attended = _by_products(query, key, value, kwargs.get("scaling"))
                return attended.transpose(1, 2).contiguous(), None
            usual: Kernel = ALL_ATTENTION_FUNCTIONS.get(before) or eager_attention(module)
            return usual(module, query, key, value, attention_mask, **kwargs)
        return attend_opaquely(query, key, value, segments, kwargs), None

    ALL_ATTENTION_FUNCTIONS.register(PREFIX + before, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + before, ALL_MASK_ATTENTION_FUNCTIONS[before])
    llm.set_attn_implementation(PREFIX + before)


def _attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: dict[str, Any]) -> Tensor:
    """Attend within segments, and note the window."""
    segments.windows.append(options.get("sliding_window"))
    taken = {name: options[name] for name in ("scaling", "dropout", "sliding_window", "softcap") if name in options}
    return segment_attention(query, key, value, segments, **taken)


def _agrees(llm: PreTrainedModel, method: str, row: Tensor, changed: Tensor, alone: Tensor) -> bool:
    """Whether packed samples give the logits they give alone, and nothing of one reaches the next."""
    inputs = packed_inputs(llm, method, _PROBE, row)
    packed = llm(inputs_embeds=row, use_cache=False, **inputs).logits
    if method == SEGMENTS and inputs["segments"].windows != _windows(llm):
        return False
    inputs = packed_inputs(llm, method, _PROBE, row)
    after = llm(inputs_embeds=changed, use_cache=False, **inputs).logits
    exact = alone.dtype is torch.float32 and not torch.is_autocast_enabled(row.device.type)
    tolerance = (1e-3 if exact else 5e-2) * float(alone.abs().max()) + 1e-7
    untouched = torch.equal(packed[:, _PROBE[0] :], after[:, _PROBE[0] :])
    return untouched and bool(((packed - alone).abs() <= tolerance).all())


def _windows(llm: PreTrainedModel) -> list[int | None] | None:
    """The sliding window of each layer, by the configuration; None where layers attend in yet another way."""
    config = llm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        used = window if getattr(config, "use_sliding_window", True) else None
        return [used] * config.num_hidden_layers
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def eager_attention(module: torch.nn.Module) -> Kernel:
    """The plain attention that transformers keeps beside each architecture."""
    function: Kernel = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return function


def _by_kernel(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """All segments in one call; it counts a window without the token itself, and takes heads after tokens."""
    at, longest = segments.offsets(q.device), max(segments.lengths)
    q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
    left = -1 if window is None else window - 1
    options = {"scale": scaling, "window_size": (left, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    attended: Tensor = kernel(q, k, v, at, at, longest, longest, **options)
    return attended[None]


def _varlen_kernel() -> Kernel | None:
    """The variable-length kernel where this torch has it, with windows and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= set(parameters) else None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """True on the last `window` tokens up to each one, [length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float, softcap: float
) -> Tensor:
    """Attention with squashed scores, which no fused kernel of torch offers."""
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    allowed = mask if mask is not None else _band(q.shape[2], q.shape[2], q.device)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v

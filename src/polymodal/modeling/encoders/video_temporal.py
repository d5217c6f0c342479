"""Temporal encoders: features of frames [N, T, P, E] to [N, T', P', E]; every kind in one table.

A vision encoder sees one frame at a time; a temporal encoder then looks along time, before the projector.
`TEMPORAL_ENCODERS` names three: "mean" takes the mean over frames, as Video-ChatGPT's spatial half (arXiv:2306.05424);
"attention" lets the frames of each patch position look at each other, the temporal half of the divided attention of
TimeSformer (arXiv:2102.05095) on top of a frozen tower, and may be told where in each frame something moves;
"spatio_temporal_pool" averages blocks of frames and patches, as PLLaVA (arXiv:2404.16994) and LLaVA-Video do.

Differences from the references: position in time is the timestamp in seconds, not the frame's number, so sampling a
video more densely does not move its events; attention ends in a layer of zeros, so that it starts as the identity (or
as the mean, where it ends with one) and never begins by damaging what the projector knows; ragged ends are averaged
over what is there, exactly, where pooling kernels drop or pad them; frames that only pad a shorter video change nothing
and come out as zeros. What comes out is known beforehand: `output_frames` and `output_grid` are for the plan.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.config import TemporalAttentionConfig, TemporalConfig
from polymodal.errors import ConfigError, PolymodalError, unknown_name
from polymodal.media_plan import Size
from polymodal.utils.modules import ModuleLike


class TemporalEncoder(ModuleLike, Protocol):
    """What a temporal encoder offers.

    Attributes:
        output_grid: Rows and columns of P', the features of one output frame.
        max_frames: The most frames that it takes.
    """

    output_grid: Size
    max_frames: int

    def output_frames(self, frames: int) -> int:
        """Count what comes out.

        Args:
            frames: T.

        Returns:
            T'.
        """
        ...

    def output_mask(self, frame_mask: Tensor) -> Tensor:
        """Tell which output frames are real.

        Args:
            frame_mask: [N, T] bool, which frames are.

        Returns:
            [N, T'] bool.
        """
        ...

    def __call__(self, features: Tensor, times: Tensor | None = None, frame_mask: Tensor | None = None) -> Tensor:
        """Encode frames: features [N, T, P, E], times [N, T] and frame_mask [N, T] to [N, T', P', E]."""
        ...


class MeanOverFrames(nn.Module):
    """The mean over a video's frames: one frame comes out."""

    def __init__(self, grid: Size, max_frames: int) -> None:
        super().__init__()
        self.grid = self.output_grid = grid
        self.max_frames = max_frames

    def output_frames(self, frames: int) -> int:
        """One, however many there are."""
        return 1

    def output_mask(self, frame_mask: Tensor) -> Tensor:
        """One frame, real where any of the video's is."""
        return frame_mask.any(dim=1, keepdim=True)

    def forward(self, features: Tensor, times: Tensor | None = None, frame_mask: Tensor | None = None) -> Tensor:
        """Take the mean; see `TemporalEncoder`."""
        _check(self, features, times, frame_mask)
        return _mean(features, frame_mask)


class SpatioTemporalPool(nn.Module):
    """The mean of each block of t x h x w frames, rows and columns; blocks at the ends may be smaller."""

    def __init__(self, grid: Size, max_frames: int, stride: tuple[int, int, int] = (2, 2, 2)) -> None:
        super().__init__()
        self.grid, self.max_frames, self.stride = grid, max_frames, stride
        self.output_grid = Size(-(-grid.height // stride[1]), -(-grid.width // stride[2]))

    def output_frames(self, frames: int) -> int:
        """A block for every t frames, the last one maybe smaller."""
        return -(-frames // self.stride[0])

    def output_mask(self, frame_mask: Tensor) -> Tensor:
        """A block is real where any of its frames is."""
        rest = -frame_mask.shape[1] % self.stride[0]
        return F.pad(frame_mask, (0, rest)).unflatten(1, (-1, self.stride[0])).any(dim=2)

    def forward(self, features: Tensor, times: Tensor | None = None, frame_mask: Tensor | None = None) -> Tensor:
        """Take the means; see `TemporalEncoder`."""
        _check(self, features, times, frame_mask)
        count, frames, _, width = features.shape
        (t, h, w), grid = self.stride, self.grid
        blocks = features if frame_mask is None else _real(features, frame_mask)
        blocks = blocks.reshape(count, frames, grid.height, grid.width, width)
        blocks = F.pad(blocks, (0, 0, 0, -grid.width % w, 0, -grid.height % h, 0, -frames % t))
        blocks = blocks.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
        sums = blocks.sum(dim=(2, 4, 6), dtype=torch.float32)
        real = torch.ones(1, frames, device=features.device) if frame_mask is None else frame_mask.float()
        there = [_per_block(side, by, features.device) for side, by in ((grid.height, h), (grid.width, w))]
        in_time = F.pad(real, (0, -frames % t)).unflatten(1, (-1, t)).sum(dim=2).clamp(min=1)
        counts = in_time[:, :, None, None] * there[0][:, None] * there[1]
        return (sums / counts[..., None]).flatten(2, 3).to(features.dtype)


class TemporalAttention(nn.Module):
    """A small pre-norm transformer along time, for each patch position by itself; it starts as the identity."""

    def __init__(self, embed_dim: int, grid: Size, max_frames: int, config: TemporalAttentionConfig) -> None:
        super().__init__()
        self.grid = self.output_grid = grid
        self.max_frames, self.pool = max_frames, config.pool
        width, heads = config.hidden_size or embed_dim, config.num_attention_heads
        if width % heads or width % 2:
            raise ConfigError(
                f"temporal.attention: a width of {width} does not go into {heads} heads and pairs of sine and cosine; "
                "set hidden_size or num_attention_heads"
            )
        self.time = TimeEmbedding(width, config.time_embedding, (config.min_period, config.max_period))
        # Towers differ in scale by orders of magnitude; behind a norm, times and features weigh the same.
        self.input = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        # Where a frame differs from the video's mean says where something moves, whatever it is that moves.
        self.motion = nn.Linear(grid.area, width) if config.motion else None
        self.layers = nn.ModuleList(TrackLayer(width, heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, embed_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def output_frames(self, frames: int) -> int:
        """As many as there are, or one where it ends with their mean."""
        return 1 if self.pool == "mean" else frames

    def output_mask(self, frame_mask: Tensor) -> Tensor:
        """As the frames, or one where it ends with their mean."""
        return frame_mask.any(dim=1, keepdim=True) if self.pool == "mean" else frame_mask

    def forward(self, features: Tensor, times: Tensor | None = None, frame_mask: Tensor | None = None) -> Tensor:
        """Let the frames of each patch position look at each other; see `TemporalEncoder`."""
        # features [N, T, P, E], times [N, T], frame_mask [N, T] -> [N, T, P, E]
        _check(self, features, times, frame_mask)
        count, frames, patches, _ = features.shape
        if times is None:
            if frames > 1:
                raise PolymodalError(f"temporal encoder: {frames} frames came without their times in seconds")
            times = torch.zeros(count, frames, device=features.device)
        if frame_mask is not None:
            # What stands in padding, be it NaN, reaches nothing.
            features = _real(features, frame_mask)
            times = times.masked_fill(~frame_mask, 0.0)
        hidden = self.input(features.to(self.output.weight.dtype))
        if self.motion is not None:
            hidden = hidden + self.motion(_difference(features, frame_mask).to(hidden.dtype))[:, :, None]
        tracks = (hidden + self.time(times)[:, :, None].to(hidden.dtype)).transpose(1, 2).flatten(0, 1)
        mask = None
        if frame_mask is not None:
            # A row of nothing but padding looks at its zeros, since a softmax over nothing is NaN.
            seen = frame_mask | ~frame_mask.any(dim=1, keepdim=True)
            mask = seen.repeat_interleave(patches, dim=0)[:, None, None]
        for layer in self.layers:
            tracks = layer(tracks, mask)
        change = self.output(self.norm(tracks)).unflatten(0, (count, patches)).transpose(1, 2)
        out = features + change.to(features.dtype)
        if self.pool == "mean":
            return _mean(out, frame_mask)
        return out if frame_mask is None else _real(out, frame_mask)


class TrackLayer(nn.Module):
    """Attention over time and a feed-forward part, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.inner_norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tracks: Tensor, mask: Tensor | None) -> Tensor:
        """Run over tracks [B, T, D]; `mask` [B, 1, 1, T] is False on frames not to look at."""
        parts = self.query_key_value(self.attention_norm(tracks)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tracks = tracks + self.attention_output(seen.transpose(1, 2).flatten(2))
        out: Tensor = tracks + self.inner(self.inner_norm(tracks))
        return out


class TimeEmbedding(nn.Module):
    """Seconds to vectors: sine and cosine of geometrically spaced periods, as they are or through a small network."""

    def __init__(self, width: int, kind: Literal["sinusoidal", "learned"], periods: tuple[float, float]) -> None:
        super().__init__()
        self.width, self.periods = width, periods
        self.layers: nn.Sequential | None = None
        if kind == "learned":
            self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """Embed times [N, T] in seconds to [N, T, D]."""
        # Made here and not kept, so that no change of the model's type reaches it: bfloat16 knows an hour to 16 s.
        shortest, longest = (math.log(period) for period in self.periods)
        rates = torch.linspace(-shortest, -longest, self.width // 2, device=times.device).exp()
        cycles = times.float()[..., None] * rates
        angles = 2 * math.pi * (cycles - cycles.floor())
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
        if self.layers is None:
            return waves
        out: Tensor = self.layers(waves.to(next(self.layers.parameters()).dtype))
        return out


TEMPORAL_ENCODERS: dict[str, Callable[[TemporalConfig, int, Size, int], TemporalEncoder]] = {
    "mean": lambda config, embed_dim, grid, most: MeanOverFrames(grid, most),
    "attention": lambda config, embed_dim, grid, most: TemporalAttention(
        embed_dim, grid, most, config.attention or TemporalAttentionConfig()
    ),
    "spatio_temporal_pool": lambda config, embed_dim, grid, most: SpatioTemporalPool(
        grid, most, config.stride or (2, 2, 2)
    ),
}
"""Name -> builder."""


def build_temporal(config: TemporalConfig, embed_dim: int, grid: Size, max_frames: int) -> TemporalEncoder:
    """Make the temporal encoder that fits a vision encoder (random weights)."""
    if config.type not in TEMPORAL_ENCODERS:
        raise unknown_name("temporal encoder", config.type, TEMPORAL_ENCODERS)
    return TEMPORAL_ENCODERS[config.type](config, embed_dim, grid, max_frames)


def look_along_time(
    encoder: TemporalEncoder | None, parts: list[Tensor], times: Sequence[Sequence[float]]
) -> list[Tensor]:
    """Run the encoder on the frames of videos, as many at once as have equally many; images, without times, stay."""
    if encoder is None:
        return parts
    parts = [*parts]
    for length in sorted({len(each) for each in times if each}):
        some = [number for number, each in enumerate(times) if len(each) == length]
        frames = torch.stack([parts[number] for number in some])
        frames = frames.to(next(iter(encoder.parameters()), frames).dtype)
        seconds = torch.tensor([times[number] for number in some], dtype=torch.float32, device=frames.device)
        for number, made in zip(some, encoder(frames, seconds), strict=True):
            parts[number] = made
    return parts


def _check(encoder: Any, features: Tensor, times: Tensor | None, frame_mask: Tensor | None) -> None:
    """Raise unless everything has the shape it should have."""
    shape = tuple(features.shape)
    if len(shape) != 4 or shape[2] != encoder.grid.area or not shape[1]:
        raise PolymodalError(
            f"temporal encoder: features [N, T, {encoder.grid.area}, E] were expected, {list(shape)} were given"
        )
    if shape[1] > encoder.max_frames:
        raise PolymodalError(f"temporal encoder: {shape[1]} frames were given, it takes {encoder.max_frames} at most")
    for name, given in (("times", times), ("frame_mask", frame_mask)):
        if given is not None and tuple(given.shape) != shape[:2]:
            raise PolymodalError(f"temporal encoder: {name} has shape {list(given.shape)}, not {list(shape[:2])}")


def _real(features: Tensor, frame_mask: Tensor) -> Tensor:
    """Put zeros into frames that only pad, whatever is there."""
    return torch.where(frame_mask[:, :, None, None], features, 0.0)


def _mean(features: Tensor, frame_mask: Tensor | None) -> Tensor:
    """The mean over real frames, [N, 1, P, E]; added up in float32."""
    if frame_mask is None:
        total = features.sum(dim=1, keepdim=True, dtype=torch.float32)
        return (total / features.shape[1]).to(features.dtype)
    total = _real(features, frame_mask).sum(dim=1, keepdim=True, dtype=torch.float32)
    return (total / frame_mask.sum(dim=1).clamp(min=1)[:, None, None, None]).to(features.dtype)


def _difference(features: Tensor, frame_mask: Tensor | None) -> Tensor:
    """How far each patch is from its mean over the video, [N, T, P], in standard deviations of a feature vector."""
    normal = F.layer_norm(features.float(), features.shape[-1:])
    return ((normal - _mean(normal, frame_mask)).pow(2).mean(dim=-1) + 1e-12).sqrt()  # of one frame, with a gradient


def _per_block(side: int, by: int, device: torch.device) -> Tensor:
    """How many rows or columns each block has: `by`, and in the last one what is left."""
    return (side - torch.arange(0, side, by, device=device)).clamp(max=by).float()

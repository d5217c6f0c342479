"""Temporal encoders against plain loops, and what padding, order and time may and may not change."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.config import TemporalAttentionConfig, TemporalConfig, parse_config
from polymodal.errors import ConfigError, PolymodalError
from polymodal.media_plan import Size
from polymodal.modeling.encoders.video_temporal import TEMPORAL_ENCODERS, TimeEmbedding, build_temporal

WIDTH, GRID = 8, Size(3, 5)
KINDS: dict[str, dict[str, Any]] = {
    "mean": {"type": "mean"},
    "attention": {"type": "attention", "attention": {"num_attention_heads": 2, "num_layers": 2}},
    "attention_mean": {
        "type": "attention",
        "attention": {"num_attention_heads": 2, "hidden_size": 4, "pool": "mean", "time_embedding": "learned"},
    },
    "motion": {"type": "attention", "attention": {"num_attention_heads": 2, "motion": True}},
    "pool": {"type": "spatio_temporal_pool"},
    "pool_time": {"type": "spatio_temporal_pool", "stride": [3, 1, 1]},
}


def build(kind: str, started: bool = True, seed: int = 0) -> Any:
    """A temporal encoder; `started` ones have left their starting point, so that attention does something."""
    torch.manual_seed(seed)
    encoder: Any = build_temporal(parse_config(TemporalConfig, KINDS[kind], "test"), WIDTH, GRID, max_frames=16)
    if started and hasattr(encoder, "output"):
        torch.nn.init.normal_(encoder.output.weight, std=0.5)
        torch.nn.init.normal_(encoder.output.bias, std=0.5)
    return encoder


def video(frames: int, count: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, frames, GRID.area, WIDTH, generator=generator)
    times = torch.rand(count, frames, generator=generator).cumsum(dim=1)
    return features, times


def test_every_kind_is_tried_here() -> None:
    assert {config["type"] for config in KINDS.values()} == set(TEMPORAL_ENCODERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 2, 5, 16])
def test_what_comes_out_is_known_beforehand(kind: str, frames: int) -> None:
    encoder = build(kind)
    features, times = video(frames)
    out = encoder(features, times)
    assert out.shape == (2, encoder.output_frames(frames), encoder.output_grid.area, WIDTH)
    assert out.dtype == features.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("real", [1, 2, 3, 4])
def test_a_padded_video_is_that_video_alone(kind: str, real: int) -> None:
    encoder = build(kind)
    features, times = video(7)
    mask = torch.tensor([[True] * 7, [True] * real + [False] * (7 - real)])
    out, kept = encoder(features, times, mask), encoder.output_mask(mask)
    assert kept.shape == out.shape[:2]
    assert kept.sum(dim=1).tolist() == [encoder.output_frames(7), encoder.output_frames(real)]
    alone = encoder(features[1:, :real], times[1:, :real])
    torch.testing.assert_close(out[1:, kept[1]], alone, atol=1e-6, rtol=1e-5)
    assert not out[~kept].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_padding_changes_nothing_at_all(kind: str) -> None:
    encoder = build(kind)
    features, times = video(6)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False, True, True, False, True, False]])
    wanted = encoder(features, times, mask)
    for rubbish in (0.0, 1e4, float("nan")):
        padding = ~mask[:, :, None, None]
        other = encoder(features.masked_fill(padding, rubbish), times.masked_fill(~mask, rubbish), mask)
        assert torch.equal(other, wanted)
    if kind == "attention":  # and before it has learnt, its real frames come out as they went in
        assert torch.equal(build(kind, started=False)(features, times, mask)[mask], features[mask])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_no_gradient_and_a_video_of_nothing_is_zeros(kind: str) -> None:
    encoder = build(kind)
    features, times = video(4)
    features.requires_grad_()
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    out = encoder(features, times, mask)
    assert torch.isfinite(out).all() and not out[1].any()
    out.square().sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert not features.grad[~mask].any() and (features.grad[mask] != 0).any(dim=-1).all()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def naive_pool(features: Tensor, mask: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Block by block, in float64, over what is there."""
    count, frames, _, width = features.shape
    grid = features.double().view(count, frames, GRID.height, GRID.width, width)
    sides = [range(0, size, by) for size, by in zip((frames, GRID.height, GRID.width), stride, strict=True)]
    out = torch.zeros(count, *(len(side) for side in sides), width, dtype=torch.float64)
    for n, t, h, w in product(range(count), *sides):
        found = [
            grid[n, i, j, k]
            for i in range(t, min(t + stride[0], frames))
            for j in range(h, min(h + stride[1], GRID.height))
            for k in range(w, min(w + stride[2], GRID.width))
            if mask[n, i]
        ]
        if found:
            out[n, t // stride[0], h // stride[1], w // stride[2]] = torch.stack(found).mean(dim=0)
    return out.flatten(2, 3)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (3, 2, 4), (5, 7, 1), (2, 3, 5)])
@pytest.mark.parametrize("frames", [1, 5, 6])
def test_pooling_is_the_naive_loop(stride: tuple[int, int, int], frames: int) -> None:
    encoder = build_temporal(TemporalConfig(type="spatio_temporal_pool", stride=stride), WIDTH, GRID, 16)
    features, _ = video(frames)
    mask = torch.ones(2, frames, dtype=torch.bool)
    torch.testing.assert_close(encoder(features).double(), naive_pool(features, mask, stride), atol=1e-6, rtol=1e-5)
    mask[1, frames // 2 :] = False
    out = encoder(features, None, mask)
    torch.testing.assert_close(out.double(), naive_pool(features, mask, stride), atol=1e-6, rtol=1e-5)


def test_mean_is_the_naive_loop() -> None:
    features, _ = video(5)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    out = build("mean")(features, None, mask)
    for row in range(2):
        kept = [features[row, frame] for frame in range(5) if mask[row, frame]]
        torch.testing.assert_close(out[row, 0], torch.stack(kept).mean(dim=0))


def test_attention_is_the_naive_loop() -> None:
    """Track by track and head by head, from the weights."""
    encoder = build("attention").double()
    features, times = (part.double() for part in video(5))
    out = encoder(features, times)
    for row, patch in product(range(2), (0, GRID.area - 1)):
        track = features[row, :, patch]
        hidden = encoder.input(track) + encoder.time(times[row : row + 1])[0]
        for layer in encoder.layers:
            query, key, value = layer.query_key_value(layer.attention_norm(hidden)).chunk(3, dim=-1)
            heads = []
            for q, k, v in zip(*(part.chunk(layer.heads, dim=-1) for part in (query, key, value)), strict=True):
                heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
            hidden = hidden + layer.attention_output(torch.cat(heads, dim=-1))
            hidden = hidden + layer.inner(layer.inner_norm(hidden))
        torch.testing.assert_close(out[row, :, patch], track + encoder.output(encoder.norm(hidden)))


def test_attention_starts_as_the_identity_or_as_the_mean() -> None:
    features, times = video(5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert torch.equal(build("attention", started=False)(features, times), features)
    padded = build("attention", started=False)(features, times, mask)
    assert torch.equal(padded[mask], features[mask])
    for given in (None, mask):
        mean = build("mean")(features, None, given)
        assert torch.equal(build("attention_mean", started=False)(features, times, given), mean)


@pytest.mark.parametrize("kind", ["attention", "attention_mean"])
def test_all_of_attention_learns_from_its_start(kind: str) -> None:
    encoder = build(kind, started=False)
    features, times = video(5)
    target = torch.randn(encoder(features, times).shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (encoder(features, times) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_order_matters_to_attention_only_through_time() -> None:
    features, times = video(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    encoder = build("attention")
    out = encoder(features, times)
    # Frames with their times may be handed over in any order ...
    torch.testing.assert_close(encoder(features[:, order], times[:, order]), out[:, order])
    # ... but other images at these times are another video.
    assert (encoder(features[:, order], times) - out[:, order]).abs().max() > 1e-2
    mean = build("mean")
    torch.testing.assert_close(mean(features[:, order]), mean(features))


def test_time_is_seconds_and_not_the_frames_number() -> None:
    encoder = build("attention")
    features, times = video(5)
    assert (encoder(features, times * 2) - encoder(features, times)).abs().max() > 1e-2
    with pytest.raises(PolymodalError, match="5 frames came without their times in seconds"):
        encoder(features)
    assert torch.equal(encoder(features[:, :1]), encoder(features[:, :1], torch.zeros(2, 1)))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_times_are_told_apart_from_a_quarter_second_to_an_hour(kind: Any) -> None:
    torch.manual_seed(0)
    embedding = TimeEmbedding(32, kind, (0.25, 4096.0))
    times = torch.tensor([[0.0, 0.1, 1.0, 10.0, 60.0, 3600.0, 3600.1]])
    vectors = embedding(times)[0]
    apart = torch.cdist(vectors, vectors) + 10 * torch.eye(len(vectors))
    assert apart.min() > 0.05
    # As exact in a model of another type, an hour into a video.
    torch.testing.assert_close(embedding.to(torch.bfloat16)(times)[0].float(), vectors, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types(kind: str, dtype: torch.dtype) -> None:
    encoder = build(kind)
    features, times = video(6)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    wanted = encoder(features, times, mask)
    mixed = encoder(features.to(dtype), times, mask)
    short = encoder.to(dtype)(features.to(dtype), times, mask)
    assert mixed.dtype == short.dtype == dtype
    for out in (mixed, short):
        torch.testing.assert_close(out.float(), wanted, atol=0.1, rtol=0.05)


def test_means_are_added_up_in_float32() -> None:
    """2048 + 1 is 2048 in float16: adding up in it, small frames would be lost."""
    frames = torch.full((1, 16, GRID.area, WIDTH), 2048.0, dtype=torch.float16)
    frames[:, 1:] = 1.0
    exact = torch.tensor((2048 + 15) / 16).half()
    everything = TemporalConfig(type="spatio_temporal_pool", stride=(16, 3, 5))
    for encoder in (build("mean"), build_temporal(everything, WIDTH, GRID, 16)):
        out = encoder(frames)
        assert torch.equal(out, exact.expand_as(out))


@pytest.mark.parametrize(
    ("shape", "times", "mask", "message"),
    [
        ((2, 3, 14, WIDTH), None, None, r"features \[N, T, 15, E\] were expected, \[2, 3, 14, 8\] were given"),
        ((2, 15, WIDTH), None, None, "were expected"),
        ((2, 17, 15, WIDTH), None, None, "17 frames were given, it takes 16 at most"),
        ((2, 3, 15, WIDTH), (2, 4), None, r"times has shape \[2, 4\], not \[2, 3\]"),
        ((2, 3, 15, WIDTH), (2, 3), (3,), r"frame_mask has shape \[3\], not \[2, 3\]"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_are_named(kind: str, shape: Any, times: Any, mask: Any, message: str) -> None:
    given = None if times is None else torch.zeros(times)
    with pytest.raises(PolymodalError, match=message):
        build(kind)(torch.zeros(shape), given, None if mask is None else torch.ones(mask, dtype=torch.bool))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown temporal encoder 'atention'; did you mean 'attention'"):
        build_temporal(TemporalConfig(type="atention"), WIDTH, GRID, 4)
    with pytest.raises(ConfigError, match="width of 8 does not go into 3 heads"):
        settings = TemporalAttentionConfig(num_attention_heads=3)
        build_temporal(TemporalConfig(type="attention", attention=settings), WIDTH, GRID, 4)
    for wrong in ({"type": "mean", "stride": [2, 2, 2]}, {"type": "spatio_temporal_pool", "stride": [0, 1, 1]}):
        with pytest.raises(ConfigError, match=r"stride|block"):
            parse_config(TemporalConfig, wrong, "recipe.yaml")
    with pytest.raises(ConfigError, match=r"min_period 2.0 is not below"):
        TemporalAttentionConfig(min_period=2.0, max_period=1.0)


def test_a_patch_knows_what_moves_elsewhere_by_the_map_of_motion() -> None:
    features, times = video(5, count=1)
    moved = features.clone()
    moved[0, 2, 7] += 3 * torch.randn(WIDTH)
    for kind in ("attention", "motion"):
        encoder = build(kind)
        change = (encoder(moved, times) - encoder(features, times))[0, :, :7].abs().max()
        assert (change > 1e-3) == (kind == "motion"), (kind, change)


def test_nothing_moves_in_one_frame_or_in_a_still_video_and_gradients_stay_finite() -> None:
    encoder = build("motion")
    for features, times in (video(1), (video(1)[0].expand(-1, 4, -1, -1), video(4)[1])):
        features = features.clone().requires_grad_()
        before = encoder(features, times)
        before.sum().backward()
        torch.nn.init.normal_(encoder.motion.weight)
        torch.testing.assert_close(encoder(features, times), before, atol=1e-4, rtol=1e-4)
        assert features.grad is not None and bool(features.grad.isfinite().all())

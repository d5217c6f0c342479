"""The Perceiver resampler and the C-Abstractor against the formulas of their papers, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.config import ProjectorConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.projectors.abstractor import Bottleneck, CAbstractor
from polymodal.modeling.projectors.resampler import Resampler, ResamplerLayer

GRID = Size(4, 6)
HALVES = (slice(2), slice(2, 4))


def build(kind: str, grid: Size = GRID, **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_projector(ProjectorConfig(mm_projector_type=kind, **{kind: settings}), 8, grid, 12)


def features(grid: Size = GRID) -> Tensor:
    return torch.randn(2, grid.area, 8, generator=torch.Generator().manual_seed(1))


def layer_norm(values: Tensor) -> Tensor:
    mean, variance = values.mean(-1, keepdim=True), values.var(-1, keepdim=True, unbiased=False)
    return (values - mean) / (variance + 1e-5).sqrt()


@torch.no_grad()
def test_a_resampler_layer_is_flamingos() -> None:
    layer = ResamplerLayer(8, heads=2, head_dim=3, ratio=4).double()
    patches, latents = torch.randn(1, 5, 8).double(), torch.randn(1, 4, 8).double()
    normed = layer_norm(latents)
    seen = torch.cat((layer_norm(patches), normed), dim=1)
    query = normed @ layer.query.weight.T
    key, value = (seen @ layer.key_value.weight.T).split(6, dim=-1)
    heads = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        weights = (query[..., part] @ key[..., part].mT / 3**0.5).softmax(dim=-1)
        heads.append(weights @ value[..., part])
    after = latents + torch.cat(heads, dim=-1) @ layer.output.weight.T
    inner = torch.nn.functional.gelu(layer_norm(after) @ layer.feed_forward[1].weight.T)
    torch.testing.assert_close(layer(patches, latents), after + inner @ layer.feed_forward[3].weight.T)


@torch.no_grad()
def test_a_resampler_gives_any_number_of_tokens_and_knows_places() -> None:
    resampler = build("resampler", num_query_tokens=5, num_layers=2, num_attention_heads=2, head_dim=4)
    assert isinstance(resampler, Resampler) and resampler.output_grid == Size(1, 5)
    tokens = resampler(features())
    assert tokens.shape == (2, 5, 12)
    # The same patches elsewhere are another image; without positions they were not.
    turned = features().flip(1)
    assert (resampler(turned) - tokens).abs().max() > 1e-4
    resampler.positions.zero_()
    torch.testing.assert_close(resampler(turned), resampler(features()), rtol=1e-4, atol=1e-5)


def test_a_resampler_of_another_width_has_one_more_layer() -> None:
    narrow, same = (build("resampler", hidden_size=width, num_layers=1) for width in (16, None))
    assert isinstance(narrow.input, torch.nn.Linear) and isinstance(same.input, torch.nn.Identity)
    assert narrow(features()).shape == same(features()).shape == (2, 64, 12)


@torch.no_grad()
def test_a_bottleneck_is_regnets() -> None:
    block = Bottleneck(8, 6).double()
    maps = torch.randn(1, 8, 3, 4).double()

    def norm(values: Tensor) -> Tensor:
        return layer_norm(values.movedim(1, -1)).movedim(-1, 1)

    def one(conv: Any, values: Tensor) -> Tensor:
        return torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], values)

    silu = torch.nn.functional.silu
    body = block.body
    inner = silu(norm(one(body[0], maps)))
    padded = torch.nn.functional.pad(inner, (1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)
    inner = silu(norm((windows * body[3].weight[None, :, 0, None, None]).sum(dim=(-1, -2))))
    gate = body[6]
    small = silu(one(gate.squeeze, inner.mean(dim=(2, 3), keepdim=True)) + gate.squeeze.bias[None, :, None, None])
    inner = inner * (one(gate.excite, small) + gate.excite.bias[None, :, None, None]).sigmoid()
    inner = norm(one(body[7], inner))
    shortcut = norm(one(block.shortcut[0], maps))
    torch.testing.assert_close(block(maps), silu(inner + shortcut))
    assert gate.squeeze.out_channels == 2  # a quarter of what comes in
    assert isinstance(Bottleneck(6, 6).shortcut, torch.nn.Identity)


@torch.no_grad()
def test_an_abstractor_keeps_places() -> None:
    abstractor = build("abstractor", num_query_tokens=4, hidden_size=16, depth=1)
    assert isinstance(abstractor, CAbstractor) and abstractor.output_grid == Size(2, 2)
    tokens = abstractor(features())
    assert tokens.shape == (2, 4, 12)
    # With nothing but the pooling in it, a token is the mean of its own patches, row by row.
    abstractor.before = abstractor.after = abstractor.readout = torch.nn.Identity()
    patches = (features() + abstractor.positions).view(2, 4, 6, 8)
    means = [patches[:, rows, columns].mean(dim=(1, 2)) for rows in HALVES for columns in (slice(3), slice(3, 6))]
    torch.testing.assert_close(abstractor(features()), torch.stack(means, dim=1))


def test_an_abstractor_ends_in_an_mlp_as_deep_as_asked() -> None:
    for depth in (1, 2, 3):
        readout = build("abstractor", num_query_tokens=4, hidden_size=16, depth=1, mlp_depth=depth).readout
        kinds = [type(layer) for layer in readout]
        assert kinds == [torch.nn.Linear, *[torch.nn.GELU, torch.nn.Linear] * (depth - 1)]


@pytest.mark.parametrize("grid", [GRID, Size(1, 50)])
def test_a_grid_smaller_than_the_square_is_named(grid: Size) -> None:
    with pytest.raises(ConfigError, match=f"25 needs 5x5 patches or more, .* {grid.height}x{grid.width} "):
        build("abstractor", grid, num_query_tokens=25)

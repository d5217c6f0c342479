"""Projectors against `transformers`' own modules, and the names that build them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from polymodal.config import ProjectorConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.projectors.mlp import average_pool, pixel_shuffle

GRID = Size(4, 6)


def build(name: str, grid: Size = GRID, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    projector = build_projector(ProjectorConfig(mm_projector_type=name, **options), 8, grid, 12)
    assert isinstance(projector, nn.Module)
    return projector


def features(grid: Size = GRID, width: int = 8) -> Tensor:
    return torch.randn(2, grid.area, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_mlp2x_equals_llavas_projector(bias: bool) -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=8, num_attention_heads=2),
        text_config=transformers.LlamaConfig(hidden_size=12, num_attention_heads=2),
        multimodal_projector_bias=bias,
    )
    theirs = LlavaMultiModalProjector(config)
    ours = build("mlp2x_gelu", bias=bias)
    ours.load_state_dict(
        {
            key.replace("linear_1", "layers.0").replace("linear_2", "layers.2"): value
            for key, value in theirs.state_dict().items()
        }
    )
    torch.testing.assert_close(ours(features()), theirs(features()), rtol=0, atol=0)
    # LLaVA's "linear" and "mlp1x_gelu" are the first layer alone.
    for name, prefix in (("linear", "linear."), ("mlp1x_gelu", "layers.0.")):
        first = build(name, bias=bias)
        first.load_state_dict({prefix + key: value for key, value in theirs.linear_1.state_dict().items()})
        torch.testing.assert_close(first(features()), theirs.linear_1(features()), rtol=0, atol=0)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_mlp_has_as_many_linear_layers_as_its_name_says(depth: int) -> None:
    layers = list(build(f"mlp{depth}x_gelu").layers)
    assert [type(layer) for layer in layers] == [nn.Linear, *[nn.GELU, nn.Linear] * (depth - 1)]
    assert layers[0].in_features == 8 and layers[-1].out_features == 12
    assert all(layer.approximate == "none" for layer in layers if isinstance(layer, nn.GELU))


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_pixel_shuffle_equals_the_connectors_of_transformers(family: str, ratio: int) -> None:
    connector, config_class = {
        "smolvlm": (SmolVLMConnector, transformers.SmolVLMConfig),
        "idefics3": (Idefics3Connector, transformers.Idefics3Config),
    }[family]
    vision, text = (
        {"hidden_size": 8, "num_attention_heads": 2},
        transformers.LlamaConfig(hidden_size=12, num_attention_heads=2),
    )
    theirs = connector(config_class(vision_config=vision, text_config=text, scale_factor=ratio))
    grid = Size(6, 6)
    ours = build(f"pixel_shuffle{ratio}", grid, bias=False)
    ours.projector.linear.weight = theirs.modality_projection.proj.weight
    assert torch.equal(pixel_shuffle(features(grid), grid, ratio), theirs.pixel_shuffle(features(grid), ratio))
    torch.testing.assert_close(ours(features(grid)), theirs(features(grid)), rtol=0, atol=0)


def test_pooling_on_an_oblong_grid_keeps_neighbours_together() -> None:
    places = torch.arange(24.0).reshape(1, 24, 1)  # patch (row, column) holds 6 * row + column
    assert pixel_shuffle(places, GRID, 2)[0].int().tolist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
        [12, 13, 18, 19],
        [14, 15, 20, 21],
        [16, 17, 22, 23],
    ]
    assert average_pool(places, GRID, 2)[0, :, 0].tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]


def test_average_pool_equals_torchs() -> None:
    maps = features().transpose(1, 2).reshape(2, 8, 4, 6)
    wanted = nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(average_pool(features(), GRID, 2), wanted)


@pytest.mark.parametrize("pool, width", [("pixel_shuffle2", 32), ("avg_pool2", 8)])
@pytest.mark.parametrize("then, layers", [("", 1), ("_linear", 1), ("_mlp2x_gelu", 2)])
def test_what_follows_pooling(pool: str, width: int, then: str, layers: int) -> None:
    projector = build(pool + then, norm="layer")
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    norms = [module for module in projector.modules() if isinstance(module, nn.LayerNorm)]
    assert len(linears) == layers
    assert linears[0].in_features == width and [norm.normalized_shape for norm in norms] == [(width,)]
    assert projector(features()).shape == (2, 6, 12)
    assert projector.output_grid == Size(2, 3)


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu", "pixel_shuffle2_mlp2x_gelu"])
def test_bias_and_norm(name: str) -> None:
    plain = build(name, bias=False)
    assert not any(key.endswith("bias") for key in plain.state_dict())
    assert not any(isinstance(module, nn.LayerNorm) for module in plain.modules())
    normed = build(name, norm="layer")
    scaled = features() * torch.tensor(100.0)
    torch.testing.assert_close(normed(features()), normed(scaled), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain(features()), plain(scaled), atol=1e-2)


@pytest.mark.parametrize("name", ["pixel_shuffle4", "avg_pool4_linear"])
def test_a_grid_that_does_not_divide_names_both(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' joins 4x4 patches.* grid of 4x6"):
        build(name)


@pytest.mark.parametrize(
    "name, close",
    [
        ("mlp2x_relu", "'mlp2x_gelu'"),
        ("liner", "'linear'"),
        ("mlp0x_gelu", "gelu"),
        ("pixel_shuffle0", "pixel_shuffle"),
        ("pixelshuffle2", "'pixel_shuffle2'"),
        ("pixel_shuffle2_qformer", "pixel_shuffle"),
        ("linear_mlp2x_gelu", "gelu"),
        ("q_former", "'qformer'"),
        ("perceiver_resampler", "'resampler'"),
        ("c_abstractor", "'abstractor'"),
    ],
)
def test_unknown_names_show_close_ones(name: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown mm_projector_type '{name}'.*{close}"):
        build(name)

"""What every vision encoder and every projector promises; a new entry of either table is covered or fails here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from polymodal.config import ProjectorConfig, VisionConfig
from polymodal.encoders.efficientnet import EfficientNetLite0, save_efficientnet_lite0
from polymodal.encoders.hf_vision import FAMILIES
from polymodal.encoders.vision import VISION_ENCODERS, build_vision_encoder
from polymodal.errors import ConfigError
from polymodal.geometry import Size
from polymodal.projectors import PROJECTORS, build_projector

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {"image_size": 28, "patch_size": 7}
TINY: dict[str, dict[str, Any]] = {
    "clip": {**WIDTHS, **SQUARE, "intermediate_size": 64},
    "siglip": {**WIDTHS, **SQUARE, "intermediate_size": 64},
    "siglip2": {**WIDTHS, "intermediate_size": 64, "num_patches": 16, "patch_size": 7},
    "dinov2": {**WIDTHS, **SQUARE, "mlp_ratio": 2},
    "dinov2_with_registers": {**WIDTHS, **SQUARE, "mlp_ratio": 2},
    "eva_clip": {**WIDTHS, **SQUARE, "intermediate_size": 64},
}
# One or more names for each pattern of the table.
NAMES = {
    "linear": ["linear"],
    "mlp<N>x_gelu": ["mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"],
    "pixel_shuffle<r>": ["pixel_shuffle1", "pixel_shuffle2", "pixel_shuffle3_linear", "pixel_shuffle2_mlp2x_gelu"],
    "avg_pool<r>": ["avg_pool1", "avg_pool2", "avg_pool3_linear", "avg_pool2_mlp2x_gelu"],
}


def save_tiny(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    if name == "efficientnet_lite0":
        save_efficientnet_lite0(EfficientNetLite0(), folder / "efficientnet_lite0.safetensors")
        return
    model_class = getattr(transformers, FAMILIES[name].model_class)
    model_class(model_class.config_class(**TINY[name])).save_pretrained(folder)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("towers")
    for name in VISION_ENCODERS:
        save_tiny(name, root / name / "vision")
    return root


@pytest.mark.parametrize("name", VISION_ENCODERS)
@torch.no_grad()
def test_vision_encoder(name: str, towers: Path) -> None:
    config = VisionConfig(vision_tower="bundled", type=name)
    for tile in (None, Size(42, 63)):
        encoder = build_vision_encoder(config, towers / name, tile=tile)
        assert isinstance(encoder, nn.Module) and not encoder.training
        assert encoder.tile == (tile or encoder.tile)
        tiles = torch.rand(3, 3, encoder.tile.height, encoder.tile.width)
        features = encoder(tiles)
        assert features.shape == (3, encoder.grid.area, encoder.embed_dim)
        assert features.isfinite().all()
        # Tiles do not see each other, and the same weights give the same numbers; features follow the picture.
        scale = features.abs().max()
        again = build_vision_encoder(config, towers / name, tile=tile)
        assert (again(tiles[1:2]) - features[1:2]).abs().max() < 1e-4 * scale
        assert (encoder(1 - tiles) - features).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_projector_plans_as_many_tokens_as_it_makes(name: str) -> None:
    chance = random.Random(name)
    built = 0
    for _ in range(60):
        grid = Size(chance.randint(1, 12), chance.randint(1, 12))
        config = ProjectorConfig(
            mm_projector_type=name, bias=chance.random() < 0.5, norm=chance.choice(["none", "layer", "standardize"])
        )
        try:
            projector = build_projector(config, 8, grid, 16)
        except ConfigError as error:
            assert f"{grid.height}x{grid.width}" in str(error)
            continue
        assert isinstance(projector, nn.Module)
        features = torch.randn(2, grid.area, 8)
        tokens = projector(features)
        assert tokens.shape == (2, projector.output_grid.area, 16)
        torch.testing.assert_close(projector(features[1:]), tokens[1:], rtol=1e-4, atol=1e-5)
        tokens.square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())
        built += 1
    assert built >= 3


def test_every_projector_is_covered() -> None:
    assert NAMES.keys() == PROJECTORS.keys()
    for pattern, names in NAMES.items():
        assert all(PROJECTORS[pattern].pattern.fullmatch(name) for name in names)


@pytest.mark.parametrize("name", VISION_ENCODERS)
@torch.no_grad()
def test_encoder_and_projector_fit(name: str, towers: Path) -> None:
    encoder = build_vision_encoder(
        VisionConfig(
            vision_tower="bundled",
            type=name,
        ),
        towers / name,
    )
    config = ProjectorConfig(mm_projector_type="pixel_shuffle2_mlp2x_gelu", norm="layer")
    projector = build_projector(config, encoder.embed_dim, encoder.grid, 24)
    tokens = projector(encoder(torch.rand(1, 3, encoder.tile.height, encoder.tile.width)))
    assert tokens.shape == (1, projector.output_grid.area, 24)
    assert projector.output_grid.area * 4 == encoder.grid.area

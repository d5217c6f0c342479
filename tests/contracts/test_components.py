"""What every encoder of images and sounds and every projector promises; a new entry is covered or fails here."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from polymodal.config import ProjectorConfig, VisionConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.encoders.audio import AUDIO_ENCODERS, build_audio_encoder
from polymodal.modeling.encoders.efficientnet import EfficientNetLite0, save_efficientnet_lite0
from polymodal.modeling.encoders.hf_vision import FAMILIES
from polymodal.modeling.encoders.vision import VISION_ENCODERS, build_vision_encoder
from polymodal.modeling.projectors import PROJECTORS, build_projector
from polymodal.modeling.projectors.summary import SummaryProjector

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
    "qformer": ["qformer"],
    "resampler": ["resampler"],
    "abstractor": ["abstractor"],
    "summary": ["summary"],
}
SMALL_QFORMER: dict[str, Any] = {
    **WIDTHS, "num_query_tokens": 5, "intermediate_size": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "vocab_size": 20, "max_position_embeddings": 16, "max_text_length": 8,
}  # fmt: skip
# Small settings of the types that have some, and what they take besides features.
SETTINGS: dict[str, dict[str, Any]] = {
    "qformer": SMALL_QFORMER,
    "resampler": {"num_query_tokens": 5, "num_layers": 2, "num_attention_heads": 2, "head_dim": 8},
    "abstractor": {"num_query_tokens": 9, "hidden_size": 12, "depth": 2},
    "summary": {"num_query_tokens": 4, "hidden_size": 12, "num_layers": 1, "num_attention_heads": 2},
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
        # Tiles do not see each other, and the same weights give the same numbers; features follow the image.
        scale = features.abs().max()
        again = build_vision_encoder(config, towers / name, tile=tile)
        assert (again(tiles[1:2]) - features[1:2]).abs().max() < 1e-4 * scale
        assert (encoder(1 - tiles) - features).abs().max() > 1e-2 * scale


AUDIO_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper": ("WhisperForConditionalGeneration", {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_layers": 1,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_source_positions": 30, "num_mel_bins": 8,
        "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("stack", [1, 2, 7])
@pytest.mark.parametrize("name", AUDIO_ENCODERS)
@torch.no_grad()
def test_audio_encoder(name: str, stack: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_class = getattr(transformers, AUDIO_TINY[name][0])
    model_class(model_class.config_class(**AUDIO_TINY[name][1])).save_pretrained(tmp_path / "whole")
    encoder = build_audio_encoder(name, tmp_path / "whole", stack=stack)
    assert isinstance(encoder, nn.Module) and not encoder.training
    frames = torch.tensor([encoder.max_frames, 1, 2, 7, 31])
    features = torch.randn(len(frames), encoder.mel_bins, encoder.max_frames)
    tokens = encoder(features, frames)
    assert tokens.shape == (len(frames), encoder.output_tokens(encoder.max_frames), encoder.embed_dim)
    # Padding is no sound: neither what stands in it nor how much there is changes anything, and it comes out as zeros.
    other = features.clone()
    for row, count in enumerate(frames.tolist()):
        other[row, :, count:] = float("nan")
    assert torch.equal(encoder(other, frames), tokens)
    for row, count in enumerate(frames.tolist()):
        alone = encoder(features[row : row + 1, :, :count])[0]
        true = encoder.output_tokens(count)
        assert len(alone) == true and not tokens[row, true:].any()
        torch.testing.assert_close(tokens[row, :true], alone, atol=1e-5, rtol=1e-4)
    # Features follow the sound, and what was saved is the same.
    assert (encoder(-features, frames) - tokens).abs().max() > 1e-2 * tokens.abs().max()
    encoder.save(tmp_path / "own")
    assert torch.equal(build_audio_encoder(name, tmp_path / "own", stack=stack)(features, frames), tokens)


def test_every_audio_encoder_is_covered() -> None:
    assert AUDIO_TINY.keys() == AUDIO_ENCODERS.keys()


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_projector_plans_as_many_tokens_as_it_makes(name: str) -> None:
    chance = random.Random(name)
    built = 0
    for _ in range(60):
        grid = Size(chance.randint(1, 12), chance.randint(1, 12))
        norms = ["none", "standardize"] if name == "qformer" else ["none", "layer", "standardize"]
        config = ProjectorConfig(
            mm_projector_type=name,
            bias=chance.random() < 0.5,
            norm=chance.choice(norms),
            **({name: SETTINGS[name]} if name in SETTINGS else {}),
        )
        try:
            projector = build_projector(config, 8, grid, 16)
        except ConfigError as error:
            assert f"{grid.height}x{grid.width}" in str(error)
            continue
        assert isinstance(projector, nn.Module)
        if isinstance(projector, SummaryProjector):  # begins as its MLP, by zeros that pass no gradient on
            nn.init.normal_(projector.output.weight)
        features = torch.randn(2, grid.area, 8)
        tokens = projector(features)
        assert tokens.shape == (2, projector.output_grid.area, 16)
        torch.testing.assert_close(projector(features[1:]), tokens[1:], rtol=1e-4, atol=1e-5)
        tokens.square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())
        built += 1
    assert built >= 3


@pytest.mark.parametrize("text_context", [False, True])
def test_a_qformer_with_and_without_context_trains_every_weight(text_context: bool) -> None:
    settings = {**SMALL_QFORMER, "text_context": text_context}
    projector: Any = build_projector(ProjectorConfig(mm_projector_type="qformer", qformer=settings), 8, Size(3, 4), 16)
    given = [torch.randn(2, 12, 8)]
    if text_context:
        given.append(torch.tensor([[1, 5, 6, 2], [1, 7, 2, -1]]))
    projector(*given).square().sum().backward()
    last = f"encoder.layer.{WIDTHS['num_hidden_layers'] - 1}"
    for name, parameter in projector.named_parameters():
        # What the last layer makes of the text goes nowhere: its gradient is zero, and not missing.
        unread = f"{last}.intermediate." in name or f"{last}.output." in name
        assert parameter.grad is not None and bool(parameter.grad.any()) != unread, name


def test_every_projector_is_covered() -> None:
    assert NAMES.keys() == PROJECTORS.keys()
    for pattern, names in NAMES.items():
        assert all(re.fullmatch(PROJECTORS[pattern][0], name) for name in names)


@pytest.mark.parametrize("name", VISION_ENCODERS)
@torch.no_grad()
def test_encoder_and_projector_fit(name: str, towers: Path) -> None:
    encoder = build_vision_encoder(VisionConfig(vision_tower="bundled", type=name), towers / name)
    config = ProjectorConfig(mm_projector_type="pixel_shuffle2_mlp2x_gelu", norm="layer")
    projector = build_projector(config, encoder.embed_dim, encoder.grid, 24)
    tokens = projector(encoder(torch.rand(1, 3, encoder.tile.height, encoder.tile.width)))
    assert tokens.shape == (1, projector.output_grid.area, 24)
    assert projector.output_grid.area * 4 == encoder.grid.area

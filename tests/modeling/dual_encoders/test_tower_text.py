"""A text tower on any image tower: kept features as pixels, a folder that scores the same, what it cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.config import ImageConfig, VisionConfig
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.dual_encoders.base import PairBatch
from polymodal.modeling.dual_encoders.config import ObjectiveConfig, TowerTextConfig
from polymodal.modeling.dual_encoders.registry import build_pair_model, load_pair_model

IMAGE = ImageConfig(
    image_aspect_ratio="squash", tile_size=(16, 16), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
)
SIGLIP = ObjectiveConfig(type="siglip")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SigLIP image tower and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**shape, image_size=16, patch_size=4)).save_pretrained(folder / "vision")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "a", "cat", "dog"])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "tokenizer"
    )
    return folder


def settings(parts: Path, **text: Any) -> TowerTextConfig:
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return TowerTextConfig(
        family="tower",
        vision=VisionConfig(vision_tower=str(parts / "vision"), type="siglip", mm_vision_select_layer=-1),
        image=IMAGE,
        text={**shape, "max_position_embeddings": 6, **text},
        projection_dim=12,
        tokenizer=str(parts / "tokenizer"),
    )


def pairs(model: Any, count: int = 5) -> PairBatch:
    ids = torch.randint(5, (count, model.text_length), generator=torch.Generator().manual_seed(1))
    pixels = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return PairBatch(ids, ids > 0, torch.arange(count), pixel_values=pixels)


@pytest.fixture
def model(parts: Path) -> Any:
    torch.manual_seed(0)
    built: Any = build_pair_model(settings(parts), SIGLIP)
    built.vision_encoder.requires_grad_(False)
    return built.eval()


def test_kept_features_give_what_pixels_give(model: Any) -> None:
    batch = pairs(model)
    assert batch.pixel_values is not None
    features = model.encode(batch.pixel_values)
    assert features.shape[1:] == model.features_shape == (16, 16) and not features.requires_grad
    kept = model.embed(replace(batch, pixel_values=None, features=features))
    seen = model.embed(batch)
    assert torch.equal(kept.image, seen.image) and torch.equal(kept.text, seen.text)
    assert torch.allclose(seen.image.norm(dim=-1), torch.ones(5)) and seen.image.shape == (5, 12)


def test_it_sees_where_things_are(model: Any) -> None:
    features = torch.randn(1, 16, 16)
    batch = pairs(model, 1)
    from dataclasses import replace

    there, back = (
        model.embed(replace(batch, pixel_values=None, features=f)).image for f in (features, features.flip(1))
    )
    assert not torch.allclose(there, back, atol=1e-4)


def test_all_but_the_tower_learns(model: Any) -> None:
    batch = pairs(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(60):
        own = model.embed(batch)
        loss = model.contrast(own, batch.image_ids, own.image, own.text, batch.image_ids, 0)["siglip"]
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            silent = {
                n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
            }
            assert silent <= {"head.attention.in_proj_bias"}
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(p.grad is None for p in model.vision_encoder.parameters())


def test_the_folder_scores_the_same(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path)
    assert not (tmp_path / "vision").exists()  # frozen: named, not copied
    again: Any = load_pair_model(str(tmp_path), IMAGE, SIGLIP)
    batch = pairs(model)
    with torch.no_grad():
        before, after = model.embed(batch), again.eval().embed(batch)
    assert torch.equal(before.image, after.image) and torch.equal(before.text, after.text)
    assert again.facts() == model.facts()
    model.vision_encoder.requires_grad_(True)
    (tmp_path / "whole").mkdir()
    model.save(tmp_path / "whole")
    moved: Any = load_pair_model(str(tmp_path / "whole"), IMAGE, SIGLIP)
    with torch.no_grad():
        assert torch.equal(moved.eval().embed(batch).image, before.image)


def test_what_it_cannot_do(parts: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="objective siglip"):
        build_pair_model(settings(parts), ObjectiveConfig(type="clip"))
    with pytest.raises(ConfigError, match="hiden_size"):
        build_pair_model(settings(parts, hiden_size=3), SIGLIP)
    with pytest.raises(ConfigError, match="5 tokens, the text tower knows 4"):
        build_pair_model(settings(parts, vocab_size=4), SIGLIP)
    with pytest.raises(ConfigError, match="one pair"):
        own = model.embed(pairs(model, 1))
        model.contrast(own, torch.tensor([0]), own.image, own.text, torch.tensor([0]), 0)
    model.save(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["text"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="'text' is missing"):
        load_pair_model(str(tmp_path), IMAGE, SIGLIP)

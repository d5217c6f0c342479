"""Tokenizers of diffusers and transformers behind our face are those libraries' own, tensor for tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.tokenizers import build_image_tokenizer, load_image_tokenizer, save_image_tokenizer
from polymodal.modeling.tokenizers.config import PretrainedTokenizerConfig
from polymodal.modeling.tokenizers.pretrained import DiffusersVQ

VQ: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "norm_num_groups": 4,
    "latent_channels": 4,
    "num_vq_embeddings": 20,
    "sample_size": 16,
}
JANUS: dict[str, Any] = {
    "embed_dim": 4, "num_embeddings": 20, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1, "num_patches": 4, "projection_dim": 8, "image_token_embed_dim": 8,
}  # fmt: skip
EMU3: dict[str, Any] = {
    "codebook_size": 20, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 64, "temporal_downsample_factor": 2,
}  # fmt: skip


def images(side: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def spread(model: Any) -> Any:
    """Random codes in the codebook's own proportions, so that more than one of them is met."""
    torch.manual_seed(0)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    return model.eval()


def vq_model(**changes: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return spread(diffusers.VQModel(**{**VQ, **changes}))


SPATIAL = {"norm_type": "spatial", "block_out_channels": [32, 32], "norm_num_groups": 32}


@pytest.mark.parametrize("changes", [{}, SPATIAL], ids=["group", "spatial"])
def test_a_vq_model_of_diffusers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = vq_model(**changes)
    model.save_pretrained(tmp_path / "published")
    tokenizer = load_image_tokenizer(tmp_path / "published")
    assert isinstance(tokenizer, DiffusersVQ)
    assert (tokenizer.codebook_size, tokenizer.image_size, tokenizer.grid.area) == (20, 16, 64)
    with torch.no_grad():
        wanted = model(2 * images(16) - 1).sample
        latents = model.encode(2 * images(16) - 1).latents
        ids = model.quantize(latents)[2][2]
        ours, found = tokenizer.reconstruct(images(16))
    assert torch.equal(tokenizer.encode(images(16)).flatten(), ids.flatten()) and len(ids.unique()) > 1
    assert torch.allclose(tokenizer.decode(tokenizer.encode(images(16))), (wanted / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert torch.allclose(ours, wanted / 2 + 0.5, atol=1e-5) and torch.equal(found.ids.flatten(), ids.flatten())
    # Beta is on the commitment, not on the codebook: diffusers' own has it the other way round.
    entries = model.quantize.embedding.weight[ids].detach()
    off = (latents.permute(0, 2, 3, 1).reshape(-1, 4) - entries).square().mean()
    assert found.loss.item() == pytest.approx(1.25 * off.item(), rel=1e-5) and tokenizer.model.quantize.legacy is False
    save_image_tokenizer(tokenizer, tmp_path / "ours")
    again = load_image_tokenizer(tmp_path / "ours")
    assert torch.equal(again.decode(found.ids.flatten(1)), tokenizer.decode(found.ids.flatten(1)))


def test_a_vq_model_that_looks_up_codes_by_itself_is_not_looked_up_twice(tmp_path: Path) -> None:
    model = vq_model(lookup_from_codebook=True)
    model.save_pretrained(tmp_path)
    ids = torch.randint(20, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.decode(ids, force_not_quantize=True, shape=(1, 8, 8, 4)).sample
    assert torch.allclose(load_image_tokenizer(tmp_path).decode(ids), (wanted / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_the_commitment_reaches_the_encoder_with_beta() -> None:
    pytest.importorskip("diffusers")
    tokenizer = build_image_tokenizer(PretrainedTokenizerConfig(type="diffusers_vq", image_size=16, model=VQ))
    spread(tokenizer.model)
    for legacy, ratio in ((False, 0.25), (True, 1.0)):
        tokenizer.model.quantize.legacy = legacy
        latents = torch.randn(1, 4, 2, 2, requires_grad=True)
        vectors, loss, _ = tokenizer.model.quantize(latents)
        (gradient,) = torch.autograd.grad(loss, latents)
        assert torch.allclose(gradient, ratio * 2 * (latents - vectors).detach() / latents.numel(), atol=1e-6)


def test_janus_alone_and_inside_of_a_whole_model(tmp_path: Path) -> None:
    from transformers.models.janus import JanusVQVAE, JanusVQVAEConfig

    torch.manual_seed(0)
    model = spread(JanusVQVAE(JanusVQVAEConfig(**JANUS)))
    model.save_pretrained(tmp_path / "alone")
    (tmp_path / "whole").mkdir()
    settings = {"model_type": "janus", "vq_config": {**JANUS, "model_type": "janus_vqgan"}}
    (tmp_path / "whole/config.json").write_text(json.dumps(settings))
    tensors = {f"model.vqmodel.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    extra = {"model.language_model.embed.weight": torch.zeros(2)}
    names = sorted(tensors)
    shards = ({name: tensors[name] for name in names[:9]}, {name: tensors[name] for name in names[9:]} | extra)
    for number, shard in enumerate(shards, 1):
        save_file(shard, tmp_path / f"whole/model-0000{number}-of-00002.safetensors")
    ids = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = model.encode(2 * images(8) - 1).image_tokens.view(2, -1)
        drawn = (model.decode(ids) / 2 + 0.5).clamp(0, 1)
    for folder in ("alone", "whole"):
        tokenizer = load_image_tokenizer(tmp_path / folder)
        assert (tokenizer.codebook_size, tokenizer.image_size, tokenizer.grid.area) == (20, 8, 16)
        assert torch.equal(tokenizer.encode(images(8)), codes) and torch.equal(tokenizer.decode(ids), drawn)
    save_image_tokenizer(tokenizer, tmp_path / "ours")
    assert torch.equal(load_image_tokenizer(tmp_path / "ours").decode(ids), drawn)


def test_emu3_of_any_size(tmp_path: Path) -> None:
    from transformers.models.emu3 import Emu3VQVAE, Emu3VQVAEConfig

    torch.manual_seed(0)
    model = spread(Emu3VQVAE(Emu3VQVAEConfig(**EMU3)))
    model.save_pretrained(tmp_path)
    assert load_image_tokenizer(tmp_path).image_size == 512  # not said in the folder
    tokenizer = load_image_tokenizer(tmp_path, image_size=8)
    assert (tokenizer.codebook_size, tokenizer.grid.area) == (20, 16)
    ids = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = model.encode(2 * images(8) - 1, torch.tensor([[8, 8], [8, 8]])).image_tokens
        drawn = (model.decode(ids.view(2, 4, 4)) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(tokenizer.encode(images(8)), torch.stack(list(codes)).flatten(1))
    assert torch.equal(tokenizer.decode(ids), drawn)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "chameleon", "vq_config": {}}, "ChameleonVQVAE of transformers has no decoder"),
        ({"model_type": "llama"}, "'llama' is no image tokenizer known here"),
        ({}, "None is no image tokenizer known here"),
        ({"model_type": "janus", "vq_config": {"num_patches": -3}}, "num_patches is -3"),
        ({"model_type": "janus", "vq_config": {"channel_multiplier": 3}}, "channel_multiplier is 3"),
        ({"model_type": "emu3", "vq_config": 3}, "vq_config is 3"),
    ],
)
def test_folders_of_something_else_are_one_line(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=match):
        load_image_tokenizer(tmp_path)


def test_weights_that_do_not_fit_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    settings = {"model_type": "janus", "vq_config": {**JANUS, "num_embeddings": 2**28, "embed_dim": 2**10}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({"vqmodel.quantize.embedding.weight": torch.zeros(20, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        load_image_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="is not a multiple of 2"):
        build_image_tokenizer(PretrainedTokenizerConfig(type="janus", image_size=9, model=JANUS))
    with pytest.raises(ConfigError, match="so it takes 8 pixels"):
        build_image_tokenizer(PretrainedTokenizerConfig(type="janus", image_size=16, model=JANUS))
    with pytest.raises(CheckpointError, match="janus tokenizer: cannot be loaded"):
        build_image_tokenizer(PretrainedTokenizerConfig(type="janus", image_size=8, model={**JANUS, "embed_dim": "x"}))

"""What every image tokenizer promises: any codes draw something, a folder keeps it, and mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polymodal.errors import CheckpointError, ConfigError, DataError
from polymodal.media_plan import Size
from polymodal.modeling.tokenizers import (
    IMAGE_TOKENIZERS,
    ImageTokenizer,
    build_image_tokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from polymodal.modeling.tokenizers.config import FSQConfig, ImageVQConfig, PatchCodebookConfig, VectorQuantizerConfig
from polymodal.modeling.tokenizers.image_vq import ImageVQ
from polymodal.modeling.tokenizers.patch_codebook import PatchCodebook
from polymodal.modeling.tokenizers.pretrained import PRETRAINED

SMALL = {"image_size": 16, "hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1, "thin_size": 8}
CONFIGS = {
    "vq": ImageVQConfig(**SMALL, patch_size=4, quantizer=VectorQuantizerConfig(codebook_size=12)),
    "l2": ImageVQConfig(**SMALL, patch_size=8, quantizer=VectorQuantizerConfig(codebook_size=12, l2_norm=True)),
    "fsq": ImageVQConfig(**SMALL, patch_size=2, quantizer=FSQConfig(levels=(3, 4))),
    "patches": PatchCodebookConfig(image_size=16, patch_size=4, codebook_size=12),
}


def images(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def made(name: str) -> ImageTokenizer:
    torch.manual_seed(0)
    tokenizer = build_image_tokenizer(CONFIGS[name])
    if isinstance(tokenizer, PatchCodebook):
        return tokenizer.fit(images())
    assert isinstance(tokenizer, ImageVQ)
    tokenizer.train().reconstruct(images())
    tokenizer.after_step()
    return tokenizer.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_any_codes_in_range_are_drawn_and_images_become_codes_in_range(name: str) -> None:
    tokenizer = made(name)
    assert tokenizer.codebook_size == 12 and tokenizer.image_size == 16
    ids = torch.randint(12, (3, tokenizer.grid.area), generator=torch.Generator().manual_seed(2))
    for given in (ids, torch.zeros_like(ids), torch.full_like(ids, 11)):
        drawn = tokenizer.decode(given)
        assert drawn.shape == (3, 3, 16, 16) and drawn.dtype == torch.float32
        assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    found = tokenizer.encode(images())
    assert found.shape == (6, tokenizer.grid.area) and found.dtype == torch.int64
    assert int(found.min()) >= 0 and int(found.max()) < 12
    # Codes stand row by row: only the last row of codes differs where only the last row of patches does.
    assert tokenizer.decode(ids[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_image_is_drawn_as_if_it_were_alone(name: str) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode(images())
    alone = torch.cat([tokenizer.encode(image[None]) for image in images()])
    assert torch.equal(ids, alone)
    assert torch.allclose(tokenizer.decode(ids)[2:3], tokenizer.decode(ids[2:3]), atol=1e-5)


@pytest.mark.parametrize("name", ["vq", "l2", "fsq"])
def test_decode_of_encode_is_what_training_draws(name: str) -> None:
    tokenizer = made(name)
    assert isinstance(tokenizer, ImageVQ)
    with torch.no_grad():
        drawn, found = tokenizer.reconstruct(images())
    assert torch.equal(found.ids.flatten(1), tokenizer.encode(images()))
    assert torch.allclose(drawn.clamp(0, 1), tokenizer.decode(tokenizer.encode(images())), atol=1e-5)


def test_every_weight_of_a_learned_tokenizer_gets_a_gradient() -> None:
    torch.manual_seed(0)
    tokenizer = ImageVQ(CONFIGS["vq"])  # type: ignore[arg-type]
    for part in tokenizer.modules():  # a block begins as nothing, and so do the gradients inside of it
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.normal_(part.weight, std=0.1)
    drawn, found = tokenizer.reconstruct(images())
    (drawn.square().mean() + found.loss).backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_keeps_a_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = made(name)
    save_image_tokenizer(tokenizer, tmp_path / "kept")
    again = load_image_tokenizer(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["config.json", "model.safetensors"]
    assert type(again) is type(tokenizer) and again.grid == tokenizer.grid
    ids = tokenizer.encode(images())
    assert torch.equal(again.encode(images()), ids) and torch.equal(again.decode(ids), tokenizer.decode(ids))


def test_half_the_bytes_in_float16(tmp_path: Path) -> None:
    tokenizer = made("vq")
    for dtype, folder in ((None, "whole"), (torch.float16, "half")):
        save_image_tokenizer(tokenizer, tmp_path / folder, dtype)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    half = load_image_tokenizer(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    ids = tokenizer.encode(images())
    assert torch.allclose(half.decode(ids), tokenizer.decode(ids), atol=0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_out_of_range_or_too_few_are_one_line(name: str) -> None:
    tokenizer = made(name)
    for value in (-1, 12):
        ids = torch.zeros(1, tokenizer.grid.area, dtype=torch.int64)
        ids[0, 1] = value
        with pytest.raises(ConfigError, match="this tokenizer has 0 to 11"):
            tokenizer.decode(ids)
    with pytest.raises(ConfigError, match=f"an image has {tokenizer.grid.area} of them"):
        tokenizer.decode(torch.zeros(2, 3, dtype=torch.int64))


def test_folders_that_cannot_be_loaded_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_image_tokenizer(tmp_path / "nowhere")
    save_image_tokenizer(made("vq"), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for changes, error, match in (
        ({"type": "image_qv"}, ConfigError, "did you mean 'image_vq'"),
        ({"hidden_size": 32}, CheckpointError, "of another shape"),
        ({"hidden_sice": 32}, ConfigError, "hidden_size"),
        ({"patch_size": 5}, ConfigError, "not a multiple of patch_size 5"),
        ({"type": "patch_codebook"}, ConfigError, "unknown key"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(error, match=match):
            load_image_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_image_tokenizer(tmp_path)


def test_k_means_is_the_same_each_time_and_takes_the_nearest_centroid() -> None:
    config = PatchCodebookConfig(image_size=16, patch_size=8, codebook_size=5)
    first, second = (PatchCodebook(config).fit(images(), seed=3) for _ in range(2))
    assert torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.codebook, PatchCodebook(config).fit(images(), seed=4).codebook)
    patch = images()[2, :, 8:, :8].flatten()  # the third of four codes
    wanted = int((first.codebook - patch).norm(dim=1).argmin())
    assert int(first.encode(images())[2, 2]) == wanted
    drawn = first.decode(first.encode(images()))[2, :, 8:, :8].flatten()
    assert torch.allclose(drawn, first.codebook[wanted])


def test_k_means_draws_what_it_has_seen_exactly_where_there_are_codes_enough() -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    flat = colours[:, :, None, None].expand(3, 3, 8, 8)
    codebook = PatchCodebook(PatchCodebookConfig(image_size=8, patch_size=4, codebook_size=3)).fit(flat)
    assert codebook.grid == Size(2, 2) and len(codebook.encode(flat).unique()) == 3
    assert torch.allclose(codebook.decode(codebook.encode(flat)), flat, atol=1e-6)
    with pytest.raises(DataError, match="4 patches for a codebook of 12"):
        PatchCodebook(PatchCodebookConfig(image_size=8, patch_size=4, codebook_size=12)).fit(flat[:1])


def test_the_table_names_every_tokenizer() -> None:
    assert set(IMAGE_TOKENIZERS) == {"image_vq", "patch_codebook", *PRETRAINED}
    with pytest.raises(ConfigError, match="kept in a folder"):
        save_image_tokenizer(torch.nn.Linear(1, 1), "nowhere")  # type: ignore[arg-type]

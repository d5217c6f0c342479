"""The folder of a model that makes images: it holds its tokenizer, and refuses another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.backends import load, load_processor
from polymodal.checkpoints.model_folder import load_model, read_document, verify_contract, write_whole
from polymodal.config import OutputConfig
from polymodal.errors import CheckpointError
from polymodal.modeling.tokenizers import save_image_tokenizer
from polymodal.modeling.tokenizers.config import PatchCodebookConfig
from polymodal.modeling.tokenizers.patch_codebook import PatchCodebook
from tests.drawers import PATCH, SIDE, codebook


@pytest.fixture
def folder(drawer_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(drawer_folder, tmp_path / "model"))


def test_what_was_saved_comes_back(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(folder)
    output = loaded.config.output
    assert isinstance(output, OutputConfig) and output.vocabulary == loaded.model.vocabulary
    assert output.image.image_tokenizer == "bundled"
    assert torch.equal(loaded.model.image_tokenizer.state_dict()["codebook"], codebook().codebook)  # type: ignore[union-attr]
    verify_contract(folder, read_document(folder))
    codes = load_processor(folder).codes
    assert codes is not None and codes.vocabulary == output.vocabulary
    # Rounded weights of the language model leave the codes as they were.
    write_whole(loaded, tmp_path / "half", dtype=torch.bfloat16)
    half = load_model(tmp_path / "half").model
    assert half.llm.dtype == torch.bfloat16
    assert torch.equal(half.image_tokenizer.state_dict()["codebook"], codebook().codebook)  # type: ignore[union-attr]
    assert len(load(tmp_path / "half", "cpu").generate("x", modalities=["image"]).images) == 1


def test_a_damaged_or_other_tokenizer_is_refused(folder: Path) -> None:
    weights = folder / "image_tokenizer" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"image_tokenizer/model\.safetensors"):
        load_model(folder)
    tensors = {name: tensor * 0.5 for name, tensor in load_file(drawn(folder, whole)).items()}
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="not the image tokenizer that the model was trained with"):
        load_model(folder)
    other = PatchCodebook(PatchCodebookConfig(codebook_size=8, image_size=SIDE, patch_size=PATCH))
    save_image_tokenizer(other, folder / "image_tokenizer")
    with pytest.raises(CheckpointError, match="this image tokenizer has 8 codes, the model was made for 4"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="this image tokenizer has 8 codes"):
        load_processor(folder)
    shutil.rmtree(folder / "image_tokenizer")
    with pytest.raises(CheckpointError, match="image_tokenizer: no folder of an image tokenizer"):
        load_model(folder)


def drawn(folder: Path, whole: bytes) -> Path:
    path = folder / "whole.safetensors"
    path.write_bytes(whole)
    return path


def test_other_ranges_than_those_it_was_trained_with_are_refused(folder: Path) -> None:
    path = folder / "polymodal.json"
    document = json.loads(path.read_text())
    document["config"]["output"]["vocabulary"]["image"]["offset"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"output\.vocabulary"):
        load_model(folder)

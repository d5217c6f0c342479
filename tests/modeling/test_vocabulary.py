"""Room for codes: how many rows, where, and the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polymodal.config import ModelConfig
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.build import build_model
from tests.conftest import write_tiny_llm
from tests.drawers import write_codebook


def config(folder: Path, llm: Path) -> ModelConfig:
    image = {"image_tokenizer": str(write_codebook(folder / "codebook"))}
    return ModelConfig.model_validate({"llm": {"model_name_or_path": str(llm)}, "output": {"image": image}})


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_grows_once_and_stays_tied(tmp_path: Path, tied: bool) -> None:
    write_tiny_llm(tmp_path / "llm", tie_word_embeddings=tied)
    before, _ = build_model(ModelConfig.model_validate({"llm": {"model_name_or_path": str(tmp_path / "llm")}}))
    model, tokenizer = build_model(config(tmp_path, tmp_path / "llm"))
    had = before.llm.get_input_embeddings().weight
    table, head = model.llm.get_input_embeddings().weight, model.llm.get_output_embeddings().weight
    assert len(table) == len(head) == 320 and (table is head) == tied
    assert torch.equal(table[: len(had)], had)
    assert torch.equal(head[: len(had)], before.llm.get_output_embeddings().weight)
    layout = model.vocabulary
    assert layout is not None and layout.text == 259 and layout.specials == {"<boi>": 259, "<eoi>": 260}
    assert (layout.image.offset, layout.size) == (261, 265)
    assert model.image_token_id == 320  # the head makes no such id, and no code is one
    assert tokenizer.convert_tokens_to_ids("<boi>") == 259 and len(tokenizer) == 261  # no name for a code
    assert 0.5 < float(table[len(had) :].detach().std() / had.detach().std()) < 2
    again, _ = build_model(config(tmp_path, tmp_path / "llm"))
    assert torch.equal(again.llm.get_input_embeddings().weight, table)


def test_spare_rows_are_used_first(tmp_path: Path) -> None:
    write_tiny_llm(tmp_path / "llm", vocab_size=270)
    model, _ = build_model(config(tmp_path, tmp_path / "llm"))
    assert len(model.llm.get_input_embeddings().weight) == 270
    assert model.vocabulary is not None and model.vocabulary.size == 265 and model.image_token_id == 270


def test_what_cannot_draw_says_so(tmp_path: Path, tiny_t5_folder: Path, tiny_llm_folder: Path) -> None:
    with pytest.raises(ConfigError, match="output: images are made by a causal language model"):
        build_model(config(tmp_path, tiny_t5_folder))
    plain = config(tmp_path, tiny_llm_folder).model_dump()
    plain["output"]["image"]["image_tokenizer"] = str(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nothing: no folder of an image tokenizer"):
        build_model(ModelConfig.model_validate(plain))
    plain["output"]["image"]["image_tokenizer"] = "bundled"
    with pytest.raises(ConfigError, match="'bundled' needs the model's folder"):
        build_model(ModelConfig.model_validate(plain))

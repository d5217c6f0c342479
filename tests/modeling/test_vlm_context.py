"""A model whose projector gives tokens without order, or reads a context: what fits together and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.checkpoints.model_folder import _hash, load_model, save_model
from polymodal.config import ModelConfig, ProjectorConfig
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.media_plan import ImagePlan, Size, plan_image
from polymodal.modeling.build import build_model, check_merge
from polymodal.modeling.vlm import MultimodalLM

QFORMER: dict[str, Any] = {
    "num_query_tokens": 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "vocab_size": 30, "max_position_embeddings": 16, "max_text_length": 8,
}  # fmt: skip
FEATURES = (torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0)),)


def config_with(base: ModelConfig, **projector: Any) -> ModelConfig:
    return base.model_copy(update={"projector": ProjectorConfig(**projector)})


@pytest.fixture
def model(tiny_model_config: ModelConfig) -> MultimodalLM:
    torch.manual_seed(0)
    return build_model(config_with(tiny_model_config, mm_projector_type="qformer", qformer=QFORMER))[0]


@pytest.fixture
def reading(model: MultimodalLM) -> MultimodalLM:
    """The same with a text path; its tokenizer is no matter here."""
    from polymodal.modeling.projectors import build_projector

    torch.manual_seed(0)
    settings = ProjectorConfig(mm_projector_type="qformer", qformer={**QFORMER, "text_context": True})
    model.projector = build_projector(settings, 24, Size(4, 4), 32)
    return model.eval()


def plans(model: MultimodalLM, config: ModelConfig, tiles: int) -> ImagePlan:
    image = config.image.model_copy(update={"image_aspect_ratio": "slice", "thumbnail": False})
    plan = plan_image(Size(28, 28 * tiles), image, model.tokens_per_tile)
    assert plan.num_tiles == tiles
    return plan


@torch.no_grad()
def test_every_tile_of_a_image_reads_the_images_context(reading: MultimodalLM, tiny_model_config: ModelConfig) -> None:
    pair, single = (plans(reading, tiny_model_config, tiles) for tiles in (2, 1))
    contexts = torch.tensor([[1, 5, 6, 2], [1, 7, 2, -1]])
    first, second = reading.project_images(FEATURES[0], [pair, single], contexts)
    alone = [reading.project(FEATURES[0][tile : tile + 1], contexts[row : row + 1])[0] for tile, row in
             ((0, 0), (1, 0), (2, 1))]  # fmt: skip
    torch.testing.assert_close(first, torch.cat(alone[:2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, alone[2], rtol=1e-5, atol=1e-5)


def test_contexts_that_do_not_fit_are_named(
    model: MultimodalLM, tiny_model_config: ModelConfig, request: pytest.FixtureRequest
) -> None:
    plan = plans(model, tiny_model_config, 1)
    with pytest.raises(PolymodalError, match="projector reads no text"):
        model.project_images(FEATURES[0][:1], [plan], torch.tensor([[1, 2]]))
    reading = request.getfixturevalue("reading")
    with pytest.raises(PolymodalError, match="reads the question"):
        reading.project_images(FEATURES[0][:1], [plan])
    with pytest.raises(PolymodalError, match="1 images and 2 contexts"):
        reading.project_images(FEATURES[0][:1], [plan], torch.tensor([[1, 2], [1, 2]]))


def test_tokens_without_order_are_not_laid_out_in_space(tiny_model_config: ModelConfig) -> None:
    image = tiny_model_config.image.model_copy(
        update={"image_aspect_ratio": "anyres", "image_grid_pinpoints": ((28, 56),), "mm_patch_merge_type": "spatial"}
    )
    spatial = tiny_model_config.model_copy(update={"image": image})
    queries = config_with(spatial, mm_projector_type="qformer", qformer=QFORMER)
    with pytest.raises(ConfigError, match="'qformer' gives 3 of them in no order; set it to flat"):
        build_model(queries)
    check_merge(spatial, Size(4, 4))
    check_merge(config_with(tiny_model_config, mm_projector_type="resampler"), Size(1, 64))
    square = {"num_query_tokens": 4, "hidden_size": 8, "depth": 1}
    built, _ = build_model(config_with(spatial, mm_projector_type="abstractor", abstractor=square))
    assert built.tokens_per_tile == Size(2, 2)


def test_a_setting_that_is_younger_than_the_folder_takes_its_default(
    model: MultimodalLM, tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    config = config_with(tiny_model_config, mm_projector_type="qformer", qformer=QFORMER)
    _, tokenizer = build_model(tiny_model_config)
    folder = tmp_path / "model"
    save_model(folder, model, config, tokenizer)
    path = folder / "polymodal.json"
    document = json.loads(path.read_text())

    contract = document["contract"]["projector"]["qformer"]

    def write() -> None:
        document["contract_hash"] = _hash(document["contract"])
        path.write_text(json.dumps(document))

    del contract["pad_token_id"], document["config"]["projector"]["qformer"]["pad_token_id"]
    write()
    loaded = load_model(folder)
    assert loaded.config.projector.qformer.pad_token_id == 0
    for name, tensor in model.projector.state_dict().items():
        assert torch.equal(loaded.model.projector.state_dict()[name], tensor)
    contract["layer_norm_eps"] = 0.5
    write()
    with pytest.raises(CheckpointError, match=r"trained with projector.qformer"):
        load_model(folder)

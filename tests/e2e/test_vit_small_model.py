"""The small pair of towers that comes with the package: stock, the same in transformers, and better than guessing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polymodal.cli import main
from polymodal.config import ModelConfig, VisionConfig
from polymodal.evaluation.embedder import Embedder, load_embedder
from polymodal.modeling.build import build_model
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.utils.files import shipped, shipped_folder

IMAGES = Path(__file__).parents[2] / "examples" / "pictures"
NAMES = {
    "apple.png": "An apple.",
    "coffee.jpg": "A cup of coffee.",
    "penguin.png": "A penguin.",
    "strawberry.png": "A strawberry.",
    "sunflower.png": "A sunflower.",
}


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder("vit_small")


def test_names_of_the_package_are_names_and_no_paths() -> None:
    assert shipped("vit_small") == shipped_folder() / "vit_small"
    assert [shipped(name) for name in ("", ".", "..", "vit_small/", "../models/default", "no_such")] == [None] * 6


def test_it_knows_some_drawings_from_others(embedder: Embedder) -> None:
    seen = embedder.images([IMAGES / name for name in NAMES])
    best = (seen @ embedder.texts(list(NAMES.values())).T).argmax(dim=1)
    assert int((best == torch.arange(len(NAMES))).sum()) >= 3


def test_transformers_opens_it_and_scores_the_same(embedder: Embedder) -> None:
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    folder = shipped_folder() / "vit_small"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "SiglipModel"
    texts = list(NAMES.values())
    shown = [Image.open(IMAGES / name).convert("RGB") for name in NAMES]
    given = processor(text=texts, images=shown, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        found = model(**given)
    ours = embedder.images(shown) @ embedder.texts(texts).T
    torch.testing.assert_close(found.image_embeds @ found.text_embeds.T, ours, rtol=0, atol=2e-3)


def test_it_is_a_tower_of_the_package() -> None:
    tower = build_vision_encoder(VisionConfig(vision_tower="vit_small", type="siglip"))
    assert (tower.grid.height, tower.grid.width, tower.embed_dim) == (8, 8, 256)


def test_beside_a_language_model_in_float32_it_computes_in_float32(tiny_model_config: ModelConfig) -> None:
    document = tiny_model_config.model_dump()
    document["vision"] = {"vision_tower": "vit_small", "type": "siglip"}
    document["image"]["tile_size"] = (224, 224)
    model, _ = build_model(ModelConfig.model_validate(document))
    assert model.vision_encoder is not None
    assert {parameter.dtype for parameter in model.vision_encoder.parameters()} == {torch.float32}


def test_it_has_a_card_and_a_history(capsys: pytest.CaptureFixture[str]) -> None:
    folder = shipped_folder() / "vit_small"
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert all(section in card for section in ("## Data", "## Scores", "## Limits", "GPL-2"))
    assert [stage["stage"] for stage in json.loads((folder / "polymodal_pair.json").read_text())["history"]] == [
        "vit-small"
    ]
    assert main(["describe", "vit_small"]) == 0
    assert "SiglipModel" in capsys.readouterr().out

"""The recipes of the small ViT, shrunk, on drawn shapes: distil and contrast, publish, then texts for both towers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from polymodal.cli import main
from polymodal.config import VisionConfig
from polymodal.evaluation.embedder import load_embedder
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.training import load_any_recipe, train
from recipes.default.dataset.pairs import build_pairs

RECIPES = Path(__file__).parents[3] / "recipes"
TEXT = (
    "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, "
    "max_position_embeddings: 24}"
)


@pytest.mark.slow
def test_the_recipes_run_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "pairs"
    build_pairs(data, size="tiny", workers=1, progress=False)
    make = runpy.run_path(str(RECIPES / "blip2" / "make_tokenizer.py"))["main"]
    make(tmp_path / "tokenizer", str(data / "train.json"))
    common = [
        f"data.mix=[{{path: {data / 'train.json'}}}]",
        f"data.eval=[{{path: {data / 'val.json'}}}]",
        f"data.index={tmp_path / 'index'}",
        f"init.model.tokenizer={tmp_path / 'tokenizer'}",
        f"init.model.text={TEXT}",
        f"run.feature_cache={tmp_path / 'features'}",
        "batch.global_size=16",
        "run.max_steps=2",
        "run.eval_every=2",
        "run.log_every=1",
        "run.precision=fp32",
    ]
    vision = "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 28}"
    out = tmp_path / "siglip"
    recipe = load_any_recipe(
        RECIPES / "vit_small" / "siglip.yaml", [*common, f"init.model.vision={vision}", f"output_dir={out}"]
    )
    final = train(recipe)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert set(first["terms"]) == {"siglip", "distill"} and 0.5 < first["terms"]["distill"] < 1.5
    score = ["eval", str(final), "--device", "cpu", "--output", str(tmp_path / "scores")]
    assert main([*score, "--task", "retrieval", "--data", str(data / "val.json")]) == 0
    assert main([*score, "--task", "zero-shot", "--data", str(data / "classes.json")]) == 0
    printed = capsys.readouterr().out
    assert "image to text @1" in printed and "| categories |" in printed

    published = tmp_path / "published"
    runpy.run_path(str(RECIPES / "vit_small" / "publish.py"))["main"](str(final), str(published))
    tower = build_vision_encoder(VisionConfig(vision_tower=str(published), type="siglip"))
    assert (tower.grid.height, tower.grid.width, tower.embed_dim) == (8, 8, 16)

    for name, own in (("efficientnet_text", []), ("vit_text", [f"init.model.vision.vision_tower={final}"])):
        target = tmp_path / name
        recipe = load_any_recipe(
            RECIPES / "vit_small" / f"{name}.yaml",
            [*common, *own, "init.model.projection_dim=16", f"output_dir={target}"],
        )
        embedder = load_embedder(train(recipe))
        assert embedder.texts(["A red circle."]).shape == (1, 16)
        lines = [json.loads(line) for line in (target / "log.jsonl").read_text().splitlines()]
        assert all(line["terms"]["siglip"] > 0 for line in lines) and len(lines) == 2
    # What the teacher said of the training images was kept once, for the stage on that tower too.
    assert len(list((tmp_path / "features").iterdir())) == 2

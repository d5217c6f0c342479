"""The drawer: its language model, its tokenizer and weights; its recipe trained tiny, sampled and judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from polymodal.modeling.tokenizers import save_image_tokenizer
from polymodal.modeling.tokenizers.config import PatchCodebookConfig
from polymodal.modeling.tokenizers.patch_codebook import PatchCodebook
from polymodal.training import load_recipe, train
from recipes.draw import language_model, sample
from recipes.draw.dataset import build_draw
from recipes.draw.judge import judge

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "draw" / "drawer.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draw") / "data"
    build_draw(folder, size="tiny", progress=False)
    return folder


def test_the_language_model_spells_anything_and_follows_its_seed(data: Path, tmp_path: Path) -> None:
    flags = ["--data", str(data / "train.json"), "--words", "320", "--hidden-size", "64", "--layers", "1"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert language_model.main([*flags, "--output", str(tmp_path / name), "--seed", seed]) == 0
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 320 and tokenizer.bos_token == "<|begin|>"
    for text in ("Draw a red circle.", "Zeichne ein Übel: 猫\n\t<|user|>"):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True).input_ids) == text
    said = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False)
    assert said == "<|begin|><|user|>x<|end|><|assistant|>"
    assert language_model.main([*flags, "--output", str(tmp_path / "a")]) == 2  # is there already
    assert language_model.main([*flags[:-3], "100", "--layers", "1", "--output", str(tmp_path / "d")]) == 2


def test_the_recipe_trains_and_its_drawings_are_judged(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((data / "train.json").read_text())
    images = [np.asarray(Image.open(data / row["image"]).convert("RGB")) for row in rows[:60]]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    codebook = PatchCodebook(PatchCodebookConfig(codebook_size=16)).fit(pixels, rounds=2)
    save_image_tokenizer(codebook, tmp_path / "codes")
    language_model.write_language_model(
        data / "train.json", tmp_path / "llm", words=320, hidden_size=64, layers=1, positions=512
    )
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["init"]["model"]["llm"]["model_name_or_path"] = str(tmp_path / "llm")
    recipe["init"]["model"]["output"]["image"]["image_tokenizer"] = str(tmp_path / "codes")
    recipe["data"]["mix"] = [{"path": str(data / "train.json")}]
    recipe |= {"batch": {"global_size": 8}, "output_dir": str(tmp_path / "run")}
    recipe["run"] |= {"max_steps": 2, "save_every": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    final = train(load_recipe(tmp_path / "recipe.yaml"))
    drawn = tmp_path / "drawn"
    flags = [str(final), str(data / "val_shapes.json"), "--output", str(drawn), "--limit", "5"]
    assert sample.main(flags) == 0 and "5 drawings" in capsys.readouterr().out
    assert sample.main(flags) == 2  # is there already
    table = judge(drawn, codebook)
    assert "| drawn | 5 |" in table and len(json.loads((drawn / "judged.json").read_text())) == 5
    assert sample.main([str(final), str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "x")]) == 2
    assert "no rows of LLaVA's form" in capsys.readouterr().err


def test_names_are_judged_by_the_nearest_true_image(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    true = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(6)]
    rows = []
    for number, pixels in enumerate(true):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": f"Draw thing {number}."}, {"from": "gpt", "value": "<image>"}]
        rows.append({"image": f"{number}.png", "name": f"thing {number}", "conversations": said})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sample, "load", lambda name: name if name == "drawer" else load_model(name, "cpu"))
    from polymodal.backends import load as load_model

    for drawn, share in ((true, "100.0%"), (true[:3] + true[:2:-1], "66.7%")):
        monkeypatch.setattr(sample, "draw_prompts", lambda model, prompts, params, drawn=drawn: drawn)
        flags = ["drawer", str(tmp_path / "rows.json"), "--output", str(tmp_path / "names"), "--force"]
        assert sample.main([*flags, "--encoder", str(tiny_model_folder)]) == 0
        assert f"{share} (" in (said_of := capsys.readouterr().out) and "chance 16.7%" in said_of

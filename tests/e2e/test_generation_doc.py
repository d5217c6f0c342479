"""docs/generation.md: its commands run, its recipe trains, its program draws; all on tiny models."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image as PILImage

import polymodal
from polymodal import load, user
from polymodal.cli import main
from polymodal.media.video import sample_frames
from polymodal.modeling.tokenizers import save_image_tokenizer
from polymodal.training import train
from polymodal.training.recipes.load import load_recipe
from tests.speech.engines import LetterTTS, Stage

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)


def commands(*verbs: str) -> list[list[str]]:
    lines = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
    return [
        shlex.split(line)[1:] for line in lines if shlex.split(line)[:1] == ["polymodal"] and line.split()[1] in verbs
    ]


def test_draw_and_animate(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Stage(monkeypatch)
    for name in ("a.png", "b.png"):
        PILImage.new("RGB", (64, 48), "red").save(name)
    small = {
        "512x512": "32x32",
        "20": "2",
        "25": "1",
        "16": "4",
        "FOLDER": str(tiny_pipeline("stable_diffusion")),
        "VIDEO_FOLDER": str(tiny_pipeline("animate_diff")),
    }
    run = commands("draw", "animate")
    assert len(run) == 5  # the first by the drawer of the package
    for words in run:
        assert main([small.get(word, word) for word in words]) == 0, words
    assert PILImage.open("drawn.png").size == (64, 64)
    assert PILImage.open("out2.png").size == (32, 32)
    assert len(sample_frames("out.mp4", 3)) == len(sample_frames("talk.webm", 3)) == 3


def test_one_call(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = load(tiny_model_folder, "cpu")
    model.experts = {"audio": LetterTTS()}
    monkeypatch.setattr("polymodal.cli.common.open_model", lambda args: model)
    monkeypatch.setattr(polymodal, "load", lambda name: model, raising=False)
    # What a random model says may have no letter in it.
    monkeypatch.setattr("polymodal.generation.streaming.decode_ids", lambda tokenizer, ids: "Red.")
    assert main([*commands("generate")[0], "--max-new-tokens", "4"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["audio-1.wav", "image-1.png"]
    program = next(block for language, block in BLOCKS if language == "python" and "reply.sounds" in block)
    found: dict[str, Any] = {"polymodal": polymodal, "user": user}
    exec(program, found)
    assert len(found["reply"].images) == len(found["reply"].sounds) == 1


def test_the_recipe_trains_and_the_commands_draw(
    tiny_model_folder: Path, drawer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer: Any = load(drawer_folder, "cpu").model.image_tokenizer  # type: ignore[attr-defined]
    save_image_tokenizer(tokenizer, Path("runs/draw/tokenizer/final"))
    PILImage.new("RGB", (16, 16), "red").save("1.png")
    (row,) = (block for language, block in BLOCKS if language == "json")
    Path("rows.json").write_text(f"[{row}]", encoding="utf-8")
    (recipe,) = (yaml.safe_load(block) for language, block in BLOCKS if language == "yaml")
    recipe["init"]["from"] = str(tiny_model_folder)
    recipe |= {"name": "draw", "output_dir": "runs/draw", "batch": {"global_size": 1}, "run": {"max_steps": 1}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(load_recipe(Path("recipe.yaml")))
    words = commands("generate")[1]
    assert main(words) == 0
    assert list(Path("out").glob("*.png"))
    model = load("runs/draw/final", "cpu")
    reply = model.generate("a red circle", modalities=("image",))  # type: ignore[call-arg]
    assert len(reply.images) == 1
    assert model.generate([user("a red circle"), reply.message, user("What is it?")]).message.role == "assistant"

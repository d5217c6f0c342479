"""`make train-default`, shortened: data -> stage 1 (warm start) -> stage 2 (senses, LoRA) -> package folder.

The recipes are the real ones; only the language model is a tiny random one, the data are the generator's "tiny" and
the runs a few steps.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import polymodal
from polymodal.cli import main
from polymodal.data.load import load_records
from polymodal.evaluation.tasks.questions import ask_records
from recipes.default.dataset.__main__ import main as build_dataset

ROOT = Path(__file__).resolve().parents[2]


def stage(number: int, *overrides: str) -> None:
    assert main(["train", str(ROOT / "recipes" / "default" / f"stage{number}.yaml"), *overrides]) == 0


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng speaks the tiny dataset, and is not installed")
def test_the_default_recipes_make_a_working_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llm_folder: Path, tiny_ears_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (("default", "default"), ("more", "default_more"), ("senses", "default_senses")):
        assert build_dataset([name, "--output", f"data/{folder}", "--size", "tiny"]) == 0
    few = ["run.max_steps=3", "run.epochs=9", "run.log_every=1", "batch.global_size=8", "prototypes.count=10"]
    stage(1, f"init.model.llm.model_name_or_path={tiny_llm_folder}", "scene_warm_start.steps=5", *few)
    warm = ["audio_warm_start.steps=5", "video_warm_start.steps=5"]
    stage(2, f"init.audio.audio_tower={tiny_ears_folder}", *warm, *few)
    for number in (1, 2):
        lines = (tmp_path / f"runs/default/stage{number}/log.jsonl").read_text().splitlines()
        assert len(lines) >= 3

    publish = [sys.executable, str(ROOT / "recipes/default/publish.py"), "runs/default/stage2/final", "published"]
    done = subprocess.run(publish, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = polymodal.load(tmp_path / "published", "cpu")
    assert model.takes == ("image", "video", "audio")
    assert [entry["stage"] for entry in model.history] == ["default-stage1", "default-stage2"]
    assert model.history[-1]["trained"] == ["audio_projector", "lora", "projector", "temporal_encoder"]
    assert (tmp_path / "published" / "adapter" / "adapter_model.safetensors").is_file()
    files = ["default/val", *(f"default_senses/val_{sense}" for sense in ("video", "speech", "sound"))]
    for file in files:
        samples = ask_records(model, load_records(tmp_path / f"data/{file}.json")[:4]).samples
        assert len(samples) == 4
        assert all(sample.error is None and sample.blind is not None for sample in samples), file

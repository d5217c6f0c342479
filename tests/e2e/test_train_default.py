"""`make train-default`, shortened: data -> stage 1 (warm start, prototypes) -> stage 2 (LoRA) -> package folder.

The recipes are the real ones; only the language model is a tiny random one, the data are the generator's "tiny" and
the runs a few steps.
"""

from __future__ import annotations

import json
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


def stage(name: str, *overrides: str) -> None:
    assert main(["train", str(ROOT / "recipes" / "default" / f"{name}.yaml"), *overrides]) == 0


def test_the_default_recipes_make_a_working_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llm_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_dataset(["default", "--output", "data/default", "--size", "tiny"]) == 0
    few = ["run.max_steps=3", "run.epochs=9", "run.log_every=1", "batch.global_size=8", "prototypes.count=10"]
    stage("stage1", f"init.model.llm.model_name_or_path={tiny_llm_folder}", "warm_start.steps=20", *few)
    stage("stage2", *few)
    for number, kinds in ((1, {"caption"}), (2, {"prototype"})):
        lines = (tmp_path / f"runs/default/stage{number}/log.jsonl").read_text().splitlines()
        seen = {kind for line in lines for kind in json.loads(line).get("loss_by_kind", {})}
        assert len(lines) >= 3 and kinds <= seen, seen

    publish = [sys.executable, str(ROOT / "recipes/default/publish.py"), "runs/default/stage2/final", "published"]
    done = subprocess.run(publish, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = polymodal.load(tmp_path / "published", "cpu")
    assert [entry["stage"] for entry in model.history] == ["default-stage1", "default-stage2"]
    assert (tmp_path / "published" / "adapter" / "adapter_model.safetensors").is_file()
    records = load_records(tmp_path / "data/default/val.json")[:6]
    samples = ask_records(model, records).samples
    assert len(samples) == 6 and not any(sample.error for sample in samples)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng speaks the tiny dataset, and is not installed")
def test_the_third_stage_gives_it_ears_and_moving_eyes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, tiny_ears_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_dataset(["senses", "--output", "data/default_senses", "--size", "tiny"]) == 0
    few = ["run.max_steps=3", "run.epochs=9", "run.log_every=1", "batch.global_size=8"]
    few += ["audio_warm_start.steps=5", "video_warm_start.steps=5"]
    stage("stage3", f"init.from={tiny_model_folder}", f"init.audio.audio_tower={tiny_ears_folder}", *few)
    model = polymodal.load(tmp_path / "runs/default/stage3/final", "cpu")
    assert model.takes == ("image", "video", "audio")
    assert model.history[-1]["trained"] == ["audio_projector", "lora", "temporal_encoder"]
    for sense in ("video", "speech", "sound"):
        samples = ask_records(model, load_records(tmp_path / f"data/default_senses/val_{sense}.json")[:4]).samples
        assert len(samples) == 4
        assert all(sample.error is None and sample.blind is not None for sample in samples), sense


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng speaks the tiny dataset, and is not installed")
def test_the_recipes_with_a_summary_make_a_working_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llm_folder: Path, tiny_ears_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (("default", "default"), ("more", "default_more"), ("senses", "default_senses")):
        assert build_dataset([name, "--output", f"data/{folder}", "--size", "tiny"]) == 0
    few = ["run.max_steps=3", "run.epochs=9", "run.log_every=1", "batch.global_size=8", "prototypes.count=10"]
    stage("summary_stage1", f"init.model.llm.model_name_or_path={tiny_llm_folder}", "scene_warm_start.steps=5", *few)
    warm = ["audio_warm_start.steps=5", "video_warm_start.steps=5"]
    stage("summary_stage2", f"init.audio.audio_tower={tiny_ears_folder}", *warm, *few)
    for number in (1, 2):
        lines = (tmp_path / f"runs/default/summary_stage{number}/log.jsonl").read_text().splitlines()
        assert len(lines) >= 3

    publish = [
        sys.executable,
        str(ROOT / "recipes/default/publish.py"),
        "runs/default/summary_stage2/final",
        "published",
    ]
    done = subprocess.run(publish, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = polymodal.load(tmp_path / "published", "cpu")
    assert model.takes == ("image", "video", "audio")
    assert [entry["stage"] for entry in model.history] == ["default-summary-stage1", "default-summary-stage2"]
    assert model.history[-1]["trained"] == ["audio_projector", "lora", "projector", "temporal_encoder"]
    assert (tmp_path / "published" / "adapter" / "adapter_model.safetensors").is_file()
    files = ["default/val", *(f"default_senses/val_{sense}" for sense in ("video", "speech", "sound"))]
    for file in files:
        samples = ask_records(model, load_records(tmp_path / f"data/{file}.json")[:4]).samples
        assert len(samples) == 4
        assert all(sample.error is None and sample.blind is not None for sample in samples), file

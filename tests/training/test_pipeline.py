"""The tiny pipeline, as it ships: run whole, run again, changed, interrupted; and what a wrong file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polymodal.checkpoints.model_folder import load_model
from polymodal.cli import main
from polymodal.errors import ConfigError
from polymodal.training.pipeline import LEDGER, _chain, flatten, run_pipeline
from polymodal.training.recipes.pipeline import TrainStage, dump_pipeline, load_pipeline

PIPELINE = Path(__file__).parents[2] / "recipes" / "tiny" / "pipeline.yaml"
STAGES = ["parts", "data", "features", "stage1", "stage2", "export", "answer"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder after its first run; tests that change it come last or put it back."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    assert main(["train", str(PIPELINE), f"output_dir={folder}"]) == 0
    return folder


def stamps(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_it_runs_from_nothing_to_an_answer_about_a_photograph(done: Path) -> None:
    answer = json.loads((done / "answer" / "answer.json").read_text())
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["usage"]["image_tokens"] == 16 and answer["image"][0].endswith("apple.png")
    ledger = json.loads((done / LEDGER).read_text())
    assert list(ledger) == STAGES and sum(entry["seconds"] for entry in ledger.values()) < 60
    for stage in ("stage1", "stage2"):
        lines = [json.loads(line) for line in (done / stage / "log.jsonl").read_text().splitlines()]
        assert all(line["loss"] > 0 for line in lines if line.get("loss") is not None) and len(lines) >= 3


def test_what_an_earlier_version_finished_counts_as_finished(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = shutil.copytree(done, tmp_path / "run")
    ledger, chain = json.loads((folder / LEDGER).read_text()), ""
    for name, entry in ledger.items():
        if "recipe" in entry["settings"] and (model := entry["settings"]["recipe"]["init"]["model"]):
            model["image"]["several_pictures"] = model["image"].pop("several_images")
            del model["template"]["text_restarts"]
        chain = entry["chain"] = _chain(chain, name, entry["settings"])
    (folder / LEDGER).write_text(json.dumps(ledger))
    assert "several_pictures" in (folder / LEDGER).read_text()
    capsys.readouterr()
    assert main(["train", str(PIPELINE), f"output_dir={folder}"]) == 0
    assert capsys.readouterr().err.count("finished before") == len(STAGES)


def test_the_cached_features_are_what_training_used(done: Path) -> None:
    summary = json.loads((done / "features" / "features.json").read_text())
    assert summary["images"] == 87 and any((done / "features" / "cache").iterdir())


def test_the_export_is_whole_plain_and_gives_the_same_logits(done: Path) -> None:
    export = load_model(done / "export")
    assert not hasattr(export.model.llm, "peft_config") and not (done / "export" / "adapter").exists()
    assert [entry["stage"] for entry in export.history] == ["tiny-stage1", "tiny-stage2", "export"]
    assert (export.config.llm.model_name_or_path, export.config.vision.vision_tower) == (
        str((done / "export" / "llm").resolve()),
        "bundled",
    )
    trained = load_model(done / "stage2" / "final")
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(export.model(ids).logits, trained.model(ids).logits, rtol=1e-4, atol=1e-4)
    before = load_model(done / "stage1" / "final").model
    assert (before(ids).logits - export.model(ids).logits).abs().max() > 1e-4


def test_a_second_run_does_nothing(done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = stamps(done)
    capfd.readouterr()
    assert main(["train", str(PIPELINE), f"output_dir={done}"]) == 0
    said = capfd.readouterr()
    assert (said.out + said.err).count("finished before") == len(STAGES)
    assert stamps(done) == before


def test_a_stage_whose_note_was_lost_goes_on_from_what_is_there(done: Path) -> None:
    ledger = json.loads((done / LEDGER).read_text())
    (done / LEDGER).write_text(json.dumps({name: ledger[name] for name in STAGES[:4]}))
    model = (done / "stage2" / "final" / "projector.safetensors").stat().st_mtime_ns
    assert main(["train", str(PIPELINE), f"output_dir={done}"]) == 0
    assert (done / "stage2" / "final" / "projector.safetensors").stat().st_mtime_ns == model
    again = json.loads((done / LEDGER).read_text())
    assert {name: entry["chain"] for name, entry in again.items()} == {n: e["chain"] for n, e in ledger.items()}


def test_other_settings_are_refused_and_named_then_forced(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(done)
    arguments = ["train", str(PIPELINE), f"output_dir={done}", "stages.stage2.optim.learning_rate=3e-5"]
    assert main(arguments) == 2
    assert "optim.learning_rate was 2e-05, is 3e-05" in capsys.readouterr().err
    assert stamps(done) == before
    run_pipeline(load_pipeline(PIPELINE, arguments[2:]), force=True)
    after = stamps(done)
    same = {name for name in before if after.get(name) == before[name]}
    assert "stage1/final/projector.safetensors" in same and "data/stage1.json" in same
    assert not any(name.startswith(("stage2/", "export/", "answer/")) for name in same)


def test_overrides_reach_stages_and_each_stage_starts_from_the_one_before(tmp_path: Path) -> None:
    overrides = [f"output_dir={tmp_path}", "stages.stage1.optim.learning_rate=5e-3", "stages.answer.max_new_tokens=3"]
    pipeline = load_pipeline(PIPELINE, overrides)
    one, two = pipeline.stages["stage1"], pipeline.stages["stage2"]
    assert isinstance(one, TrainStage) and isinstance(two, TrainStage)
    assert one.recipe.optim.learning_rate == 5e-3 and one.recipe.output_dir == str(tmp_path / "stage1")
    assert two.recipe.init.from_folder == str(tmp_path / "stage1" / "final")
    assert one.recipe.data.mix[0].path == str(tmp_path / "data" / "stage1.json")
    shown = yaml.safe_load(dump_pipeline(pipeline))
    assert list(shown["stages"]) == STAGES and shown["stages"]["answer"]["max_new_tokens"] == 3


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("stages.stage1.optim.learnin_rate=1", "'learning_rate'"),
        ("stages.stage1.optimm.learning_rate=1", "'optim'"),
        ("stages.stag1.optim.learning_rate=1", "'stage1'"),
        ("stages.answer.promt=x", "'prompt'"),
        ("stages.stage1.output_dir=x", "leave its output_dir out"),
        ("outputdir=x", "'output_dir'"),
        ("stages.stage1", "section.key=value"),
    ],
)
def test_a_wrong_override_names_the_nearest(override: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_pipeline(PIPELINE, [override])


@pytest.mark.parametrize(
    ("stages", "needle"),
    [
        ({"a": {"exprt": "b"}}, "'export'"),
        ({"a": {}}, "exactly one of"),
        ({"a": {"export": "b", "make": "c"}}, "export and make|make and export"),
        ({"a": {"export": "b"}}, "unknown stage before it 'b'"),
        ({"a": {"make": "nowhere.py"}}, "nowhere.py"),
        ({"a": {"recipe": "nowhere.yaml"}}, "nowhere.yaml"),
        ({"../up": {"build": "default"}}, "letters"),
        ({"a": {"build": "other"}}, "default"),
        ({}, "stages"),
    ],
)
def test_a_wrong_file_is_told_so(stages: dict[str, Any], needle: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "output_dir": str(tmp_path / "out"), "stages": stages}))
    with pytest.raises(ConfigError, match=needle):
        load_pipeline(path)


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text("{")
    assert main(["train", str(PIPELINE), f"output_dir={tmp_path}"]) == 2


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(PIPELINE), f"output_dir={tmp_path / 'out'}", "--dry-run"]) == 0
    assert "tiny-stage2" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_flatten() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": []}) == {"a.b.0": 1, "a.b.1.c": 2, "d": []}

"""The look at held-out data, the report and the trackers: they show the run and do not change it."""

from __future__ import annotations

import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.config import parse_config
from polymodal.errors import ConfigError, PolymodalError
from polymodal.training import checkpoint, train
from polymodal.training.process_group import World
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import numbers_of, read_log
from polymodal.training.reporting.report import write_report
from polymodal.training.run import make_trainer
from polymodal.training.sft.evaluate import choose_shown, held_out_loss, make_evaluation
from polymodal.training.sft.task import SFTTask


@pytest.fixture
def looking(plain: dict[str, Any], tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe with held-out data whose texts try to break a page."""
    records = json.loads((tiny / "data.json").read_text())[:5]
    for number, record in enumerate(records):
        record |= {"id": f"held<{number}>", "kind": "<b>bold</b>" if number % 2 else "caption"}
        record["conversations"][0]["value"] = "<image>\n<script>alert(1)</script> & colour?"
    (tmp_path / "held.json").write_text(json.dumps(records))
    plain["data"]["eval"] = [{"path": str(tmp_path / "held.json"), "image_root": str(tiny), "source": "held"}]
    plain["run"] |= {"eval_every": 2, "eval_generations": 3, "max_steps": 5}
    return plain


def test_a_run_with_evaluations_is_the_run_without(looking: dict[str, Any], tmp_path: Path) -> None:
    looking["lora"] = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3}
    train(parse_config(Recipe, looking, "recipe"))
    quiet = json.loads(json.dumps(looking)) | {"output_dir": str(tmp_path / "quiet")}
    quiet["data"].pop("eval")
    quiet["run"] |= {"eval_every": 0, "eval_generations": 0}
    train(parse_config(Recipe, quiet, "recipe"))
    ends = [checkpoint.complete_checkpoints(Path(r["output_dir"]))[-1] for r in (looking, quiet)]
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert not (tmp_path / "quiet" / "eval.jsonl").is_file() or not read_log(tmp_path / "quiet" / "eval.jsonl")


def test_the_lines_say_what_was_asked_expected_and_answered(looking: dict[str, Any]) -> None:
    final = train(parse_config(Recipe, looking, "recipe"))
    lines = read_log(final.parent / "eval.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert line["data"] == "held-out" and line["loss"] > 0
        assert set(line["loss_by_kind"]) == {"caption", "<b>bold</b>"} and set(line["loss_by_source"]) == {"held"}
        assert len(line["answers"]) == 3
        for answer in line["answers"]:
            assert answer["question"].endswith("colour?") and answer["expected"]
            assert isinstance(answer["answer"], str)
            assert all((final.parent / name).is_file() for name in answer["images"]) and answer["images"]
    assert lines[-1]["loss"] != lines[0]["loss"]


def test_the_held_out_loss_is_the_mean_over_all_tokens(looking: dict[str, Any]) -> None:
    recipe = parse_config(Recipe, looking, "recipe")
    Path(recipe.output_dir).mkdir()
    run = make_trainer(SFTTask(recipe, World()))
    assert run.task.evaluation is not None
    line = held_out_loss(run.engine, run.task.evaluation.dataset, recipe)
    total, count = 0.0, 0
    for index in range(5):
        batch = run.task.evaluation.dataset.batch([index])  # type: ignore[arg-type]  # any sequence of indices
        with torch.no_grad():
            out = run.engine.inner(**batch.inputs())
        total, count = total + float(out.loss_sum), count + out.num_targets
    assert (line["loss"], line["tokens"]) == (pytest.approx(total / count, rel=1e-5), count)
    held_out = run.task.evaluation.dataset
    shown = choose_shown(held_out, 3, seed=0)
    kinds = {held_out.prepared.records[index].kind for index in shown}
    assert len(set(shown)) == 3 and kinds == {"caption", "<b>bold</b>"}
    assert (
        choose_shown(run.task.evaluation.dataset, 99, seed=0) != ()
        and len(choose_shown(run.task.evaluation.dataset, 99, 0)) == 5
    )


def test_evaluations_without_held_out_data_are_refused(plain: dict[str, Any]) -> None:
    plain["run"]["eval_every"] = 2
    with pytest.raises(ConfigError, match=r"data\.eval"):
        train(parse_config(Recipe, plain, "recipe"))


def test_a_image_that_went_away_is_a_failed_answer(looking: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    records = json.loads((tmp_path / "held.json").read_text())
    Image.new("RGB", (20, 20)).save(tmp_path / "here.png")
    for record in records:
        record["image"] = "here.png"
    (tmp_path / "held.json").write_text(json.dumps(records))
    looking["data"]["eval"][0]["image_root"] = str(tmp_path)
    looking["run"]["feature_cache"] = "memory"
    recipe = parse_config(Recipe, looking, "recipe")
    Path(recipe.output_dir).mkdir()
    run = make_trainer(SFTTask(recipe, World()))
    (tmp_path / "here.png").unlink()
    assert run.task.evaluation is not None
    line = run.task.evaluation(run.engine, 3)
    assert line["loss"] > 0
    assert all("here.png" in answer["error"] and "answer" not in answer for answer in line["answers"])


class Page(HTMLParser):
    """Counts what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_shows_the_run_and_needs_nothing_else(looking: dict[str, Any]) -> None:
    final = train(parse_config(Recipe, looking, "recipe"))
    page = Page((final.parent / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" in page.tags
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert page.tags.count("img") == 2 + 3  # two charts, three images
    words = " ".join(page.words)
    assert "<script>alert(1)</script> & colour?" in words and "<b>bold</b>" in words
    for part in ("Curves", "Loss by kind and source", "Answers (held-out)", "Recipe", "tokens/s", "held-out loss"):
        assert part in words, part
    last = read_log(final.parent / "log.jsonl")[-1]
    assert f"{last['loss']:.4f} at the end" in words


def test_without_held_out_data_the_report_shows_training_data_as_such(plain: dict[str, Any]) -> None:
    final = train(parse_config(Recipe, plain, "recipe"))
    assert "training data, seen while training" in (final.parent / "report.html").read_text(encoding="utf-8")
    (line,) = read_log(final.parent / "eval.jsonl")
    assert line["step"] == 6 and "loss" not in line and len(line["answers"]) == 4


def test_a_report_of_an_empty_run(tmp_path: Path) -> None:
    assert "No step was logged" in write_report(tmp_path).read_text()


def test_numbers_of_a_line() -> None:
    line = {"step": 3, "loss": 1.5, "loss_by_kind": {"vqa": 2}, "answers": [{"id": "x"}], "padding": None, "ok": True}
    assert numbers_of(line, "train") == {"train/loss": 1.5, "train/loss_by_kind/vqa": 2.0}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line(
    plain: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if re.match(rf"({name}|torch\.utils\.tensorboard)(\.|$)", m)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    plain["run"]["trackers"] = [name]
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        train(parse_config(Recipe, plain, "recipe"))


def test_an_unknown_tracker_names_the_known_ones(plain: dict[str, Any]) -> None:
    plain["run"]["trackers"] = ["wandbb"]
    with pytest.raises(PolymodalError, match="wandb"):
        train(parse_config(Recipe, plain, "recipe"))


def test_wandb_gets_every_line_under_the_same_run(looking: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class FakeRun:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls.append((step, numbers))

        def finish(self) -> None:
            calls.append("finished")

    starts: list[dict[str, Any]] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: (starts.append(kwargs), FakeRun())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    looking["run"]["trackers"] = ["wandb"]
    final = train(parse_config(Recipe, looking, "recipe"))
    steps = [call[0] for call in calls if call != "finished" and "train/loss" in call[1]]
    assert steps == [1, 2, 3, 4, 5] and calls[-1] == "finished"
    assert [call[0] for call in calls if call != "finished" and "eval/loss" in call[1]] == [2, 4, 5]
    (final / "polymodal.json").unlink()
    train(parse_config(Recipe, looking, "recipe"))
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["resume"] == "allow"


def test_tensorboard_writes_events(looking: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    looking["run"]["trackers"] = ["tensorboard"]
    final = train(parse_config(Recipe, looking, "recipe"))
    assert list((final.parent / "tensorboard").glob("events.*"))


def test_trackers_get_answers_and_images_and_the_terminal_a_line(
    looking: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: list[tuple[str, str, int]] = []
    images: list[tuple[str, Any, str]] = []
    tables: list[Any] = []

    class FakeWriter:
        def __init__(self, *_: object, **__: object) -> None: ...
        def add_scalar(self, *_: object) -> None: ...
        def add_text(self, tag: str, text: str, step: int) -> None:
            texts.append((tag, text, step))

        def add_image(self, tag: str, array: Any, step: int, dataformats: str) -> None:
            images.append((tag, array.shape, dataformats))

        def close(self) -> None: ...

    board, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    board.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    run = types.SimpleNamespace(log=lambda numbers, step: tables.append((step, numbers)), finish=lambda: None)
    wandb.init = lambda **_: run  # type: ignore[attr-defined]
    wandb.Image = lambda path: Path(path)  # type: ignore[attr-defined]
    wandb.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    looking["run"]["trackers"] = ["tensorboard", "wandb"]
    final = train(parse_config(Recipe, looking, "recipe"))
    lines = read_log(final.parent / "eval.jsonl")
    assert [(tag, step) for tag, _, step in texts] == [(f"answers/{n}", step) for step in (2, 4, 5) for n in range(3)]
    assert "**expected**: " + lines[0]["answers"][0]["expected"] in texts[0][1]
    assert len(images) == 9 and all(shape[2] == 3 and kind == "HWC" for _, shape, kind in images)
    shown = [(step, numbers["eval/answers"]) for step, numbers in tables if "eval/answers" in numbers]
    assert [step for step, _ in shown] == [2, 4, 5] and all(row["image"].is_file() for row in shown[0][1])
    assert shown[-1][1][0]["answer"] == lines[-1]["answers"][0]["answer"]
    said = capsys.readouterr().err
    assert f"step 4: held-out loss {lines[1]['loss']:.4f} over" in said and "was answered" in said


def test_a_tracker_that_shows_nothing_does_not_stop_the_run(
    looking: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = types.ModuleType("wandb")  # without tables
    wandb.init = lambda **_: types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    looking["run"] |= {"trackers": ["wandb"], "max_steps": 1, "eval_every": 1}
    assert train(parse_config(Recipe, looking, "recipe")).is_dir()
    assert "a tracker shows no answers" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [None, "1 / 0"])
def test_a_run_without_matplotlib_ends_whole(
    looking: dict[str, Any],
    fault: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    if fault is None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    else:
        (tmp_path / "broken/matplotlib").mkdir(parents=True)
        (tmp_path / "broken/matplotlib/__init__.py").write_text(fault)
        monkeypatch.syspath_prepend(tmp_path / "broken")
    looking["run"]["max_steps"] = 2
    final = train(parse_config(Recipe, looking, "recipe"))
    said = capsys.readouterr().err
    what = "is not installed" if fault is None else "is installed but cannot be imported"
    assert f"no curves: curves need matplotlib, which {what}" in said
    assert (final / "polymodal.json").is_file() and not (final.parent / "loss.png").exists()
    assert "held-out loss" in (final.parent / "report.html").read_text()


def test_no_evaluation_at_all(plain: dict[str, Any]) -> None:
    plain["run"]["eval_generations"] = 0
    recipe = parse_config(Recipe, plain, "recipe")
    Path(recipe.output_dir).mkdir()
    task = make_trainer(SFTTask(recipe, World())).task
    assert make_evaluation(recipe, task.model, task.dataset, Path(recipe.output_dir)) is None

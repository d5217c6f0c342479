"""Runs on rows with images, videos, sounds, documents and text: cache, packing, resume, processes, new senses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage

from polymodal.backends import load_processor
from polymodal.checkpoints.model_folder import load_model
from polymodal.cli import main
from polymodal.config import AudioConfig, VideoConfig
from polymodal.data.index import INFO
from polymodal.errors import CheckpointError, ConfigError, DataError, PolymodalError
from polymodal.media_plan import AudioPlan, VideoPlan
from polymodal.messages import Document, Video
from polymodal.modeling import ctranslate2
from polymodal.training import train
from polymodal.training.optimizer import apply_policy
from polymodal.training.process_group import World
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.run import make_trainer
from polymodal.training.sft.audio_warm_start import collapse, transcripts
from polymodal.training.sft.prepare_data import recipe_processor
from polymodal.training.sft.task import SFTTask, load_inputs, say_changed_rules
from tests.media.makers import clip, many_pages, tone
from tests.training.test_text_context import QFORMER

TEMPORAL = {"type": "attention", "attention": {"hidden_size": 8, "num_attention_heads": 2}}
STEPS = 5
ALL = [{"match": "*", "train": True}]
NEW = [{"match": f"{part}.*", "train": True} for part in ("projector", "temporal_encoder", "audio_projector")]


@pytest.fixture(scope="session")
def rows(tiny: Path) -> Path:
    """Beside the images of `tiny`: videos, sounds, a document, and rows about all of these."""
    for number in range(4):
        clip(tiny / f"{number}.mp4", frames=4 + number, side=32)
        tone(tiny / f"{number}.wav", 0.2 + 0.3 * number, pitch=220 * (number + 1))
    (tiny / "a.pdf").write_bytes(many_pages(3))
    media: list[tuple[dict[str, Any], str]] = [({"image": f"{number}.png"}, "<image>") for number in range(4)]
    media += [({"video": f"{number}.mp4"}, "<video>") for number in range(3)]
    media += [({"videos": [{"path": "3.mp4", "num_frames": 2, "start": 0.25}]}, "<video>")]
    media += [({"audio": f"{number}.wav", "transcript": f"word {number}"}, "<audio>") for number in range(4)]
    media += [({"audio": "0.wav", "image": "5.png", "video": "1.mp4"}, "<audio><image><video>")]
    media += [({"document": {"path": "a.pdf", "pages": "1-2"}}, "<document>"), ({}, ""), ({}, "")]
    records = []
    for number, (given, marks) in enumerate(media):
        turns = [
            {"from": "human", "value": f"{marks}What {number}?"},
            {"from": "gpt", "value": "ab" * (number % 3 + 1)},
        ]
        records.append({"id": str(number), "kind": marks or "text", **given, "conversations": turns})
    path = tiny / "rows.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def senses(plain: dict[str, Any], rows: Path, tiny_ears_folder: Path) -> dict[str, Any]:
    """A recipe on these rows, as plain data."""
    plain["init"]["model"] |= {
        "video": {"num_frames": 3, "temporal": TEMPORAL},
        "audio": {"audio_tower": str(tiny_ears_folder), "stack": 2, "projector": {"mm_projector_type": "linear"}},
    }
    plain["data"] = {"mix": [{"path": str(rows)}]}
    plain["train"] = NEW
    plain["optim"] = {"learning_rate": 5e-3, "eps": 1e-3}
    plain["run"] |= {"max_steps": STEPS, "feature_cache": "off", "feature_dtype": "float32", "eval_generations": 0}
    return plain


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder / "final").model.state_dict())


def assert_equal(one: Path, two: Path, atol: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(two), abs=atol)
    before, after = weights(one), weights(two)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], rtol=0, atol=atol), name


@pytest.mark.usefixtures("private_cache")
def test_a_model_whose_ears_are_not_here_is_not_trained(
    senses: dict[str, Any], recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctranslate2, "packaged_parts", lambda name: None)
    senses["init"]["model"]["audio"]["audio_tower"] = "whisper_base"
    with pytest.raises(CheckpointError, match="would lose its ears: whisper_base is not on this machine"):
        SFTTask(recipe_of(senses), World())


def test_changed_rules_of_a_later_stage_are_said(
    senses: dict[str, Any], recipe_of: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    senses["init"] = {"from": "before", "video": {"num_frames": 6}, "audio": {"audio_tower": "x", "max_seconds": 9}}
    recipe = recipe_of(senses)
    say_changed_rules(recipe, "before", "video", VideoConfig(num_frames=4))
    say_changed_rules(recipe, "before", "audio", AudioConfig(audio_tower="x", max_seconds=9))
    said = capsys.readouterr().err
    assert "other video rules than before was trained with: num_frames was 4, is 6" in said and "audio" not in said


def test_cache_and_packing_change_nothing(
    senses: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    ways = {"off": ("off", "none"), "memory": ("memory", "none"), "packed": ("off", "pack"), "both": ("memory", "pack")}
    for name, (cache, packing) in ways.items():
        changes = {"run__feature_cache": cache, "batch__packing": packing, "output_dir": str(tmp_path / name)}
        train(recipe_of(senses, **changes))
    started = load_inputs(recipe_of(senses)).model.state_dict()
    for name, tensor in weights(tmp_path / "off").items():  # every part learnt, and nothing else
        part = name.split(".")[0]
        moved = not torch.equal(tensor, started[name])
        assert moved == (part in ("projector", "temporal_encoder", "audio_projector")) or tensor.ndim == 1, name
    for name in ("memory", "packed", "both"):
        assert_equal(tmp_path / "off", tmp_path / name)


@pytest.mark.parametrize("cache", ["off", "folder"])
def test_a_killed_run_goes_on_exactly(
    senses: dict[str, Any],
    recipe_of: Callable[..., Recipe],
    train_until: Callable[..., None],
    tmp_path: Path,
    cache: str,
) -> None:
    for name in ("whole", "parts"):
        changes = {"output_dir": str(tmp_path / name), "train": ALL if cache == "off" else NEW}
        kept = "off" if cache == "off" else str(tmp_path / f"cache-{name}")
        recipe = recipe_of(senses, run__feature_cache=kept, run__save_every=2, **changes)
        if name == "parts":
            train_until(recipe, 3)
        train(recipe)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_prep_makes_the_index_that_training_opens(
    senses: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    senses["data"]["index"] = str(tmp_path / "index")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(senses))
    assert main(["data", "prep", str(path)]) == 0
    assert "16 records" in capsys.readouterr().out
    (made,) = [folder for folder in (tmp_path / "index").iterdir() if (folder / INFO).is_file()]
    before = (made / INFO).stat().st_mtime_ns
    recipe = recipe_of(senses)
    Path(recipe.output_dir).mkdir(exist_ok=True)
    task = make_trainer(SFTTask(recipe, World())).task
    assert isinstance(task, SFTTask)
    assert [folder for folder in (tmp_path / "index").iterdir() if (folder / INFO).is_file()] == [made]
    assert (made / INFO).stat().st_mtime_ns == before
    prepared, processor = task.dataset.prepared, recipe_processor(recipe)
    for record, sample in zip(prepared.records, prepared.samples, strict=True):
        again = processor(record.messages, id=record.id, pixels=False)
        assert (again.plans, again.slots, again.media_keys) == (sample.plans, sample.slots, sample.media_keys)
        assert torch.equal(again.input_ids, sample.input_ids)
    media = [part for record in prepared.records for message in record.messages for part in message.media]
    assert [part for part in media if isinstance(part, Video)][3] == Video(
        Path(senses["data"]["mix"][0]["path"]).parent / "3.mp4", num_frames=2, start=0.25
    )
    assert [part.pages for part in media if isinstance(part, Document)] == ["1-2"]
    kinds = [type(plan).__name__ for sample in prepared.samples for plan in sample.plans]
    assert [kinds.count(name) for name in ("ImagePlan", "VideoPlan", "AudioPlan")] == [7, 5, 5]


@pytest.mark.parametrize("trained", ["new", "everything"])
def test_one_process_with_sounds_and_one_with_images_train_as_one(
    senses: dict[str, Any], rows: Path, tmp_path: Path, trained: str, run_jobs: Callable[..., Any], order_of: Any
) -> None:
    records = {record["id"]: record for record in json.loads(rows.read_text())}
    chosen = [records[name] for name in ("0", "1", "4", "5", "8", "9", "14", "15")]
    path = rows.parent / "ranks.json"
    path.write_text(json.dumps([{**record, "id": f"{record['kind']}-{record['id']}"} for record in chosen]))
    jobs = []
    for name, processes in (("one", 1), ("ddp", 2), ("fsdp2", 2)):
        recipe = json.loads(json.dumps(senses))
        recipe["data"]["mix"][0]["path"] = str(path)
        recipe["train"] = NEW if trained == "new" else ALL
        recipe["batch"] = {"global_size": 2, "micro_size": 1, "group_by_length": False}
        recipe["run"] |= {"max_steps": 8, "log_every": 1, "save_every": 100}
        recipe["run"] |= {"engine": name} if processes > 1 else {}
        recipe["output_dir"] = str(tmp_path / name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        jobs.append({"recipe": str(file), "order": str(tmp_path / f"{name}.order"), "moments": [None] * processes})
    results = run_jobs(jobs)
    assert [statuses for statuses, _, _ in results] == [[0], [0, 0], [0, 0]], results
    orders = [order_of(tmp_path / f"ddp.order.{rank}") for rank in (0, 1)]
    seen = {frozenset(order[step][0][0].split("-")[0] for order in orders) for step in range(8)}
    assert {frozenset({"<audio>", "<image>"}), frozenset({"<audio>", "<video>"})} <= seen, seen
    for engine in ("ddp", "fsdp2"):
        assert_equal(tmp_path / "one", tmp_path / engine)


def test_a_model_is_given_eyes_for_videos_and_ears(
    plain: dict[str, Any], senses: dict[str, Any], rows: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    video, audio = (json.loads(json.dumps(senses["init"]["model"].pop(name))) for name in ("video", "audio"))
    images = str(rows.parent / "data.json")
    first = train(
        recipe_of(
            plain, data__mix=[{"path": images}], train=NEW[:1], run__max_steps=1, output_dir=str(tmp_path / "first")
        )
    )
    begin = {"from": str(first)}
    with pytest.raises(PolymodalError, match="was not made for videos"):
        train(recipe_of(senses, init=begin, train=NEW[:1]))
    second = train(recipe_of(senses, init=begin | {"video": video, "audio": audio}, run__max_steps=2))
    loaded = load_model(second)
    assert loaded.config.video is not None and loaded.config.audio is not None
    assert loaded.history[-1]["trained"] == ["audio_projector", "projector", "temporal_encoder"]
    assert load_processor(second).window is not None
    for changes, problem in (
        ({"video": video | {"temporal": {"type": "mean"}}}, "init.video: the model has temporal .*, the recipe asks"),
        ({"audio": audio | {"stack": 4}}, "init.audio: the model has stack 2, the recipe asks for 4"),
        ({"audio": audio | {"projector": {"mm_projector_type": "mlp2x_gelu"}}}, "init.audio: the model has projector"),
        ({"audio": audio | {"audio_tower": "elsewhere"}}, "init.audio: the model has audio_tower .*asks for elsewhere"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_inputs(recipe_of(senses, init={"from": str(second)} | changes))
    fewer = load_inputs(recipe_of(senses, init={"from": str(second), "video": video | {"num_frames": 2}}))
    assert fewer.config.video is not None and fewer.config.video.num_frames == 2
    kept = fewer.model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.model.state_dict().items())
    prep = recipe_processor(recipe_of(senses, init=begin | {"video": video, "audio": audio}))
    assert prep.window is not None and prep.config.video is not None


def test_rules_name_the_new_parts(senses: dict[str, Any], recipe_of: Callable[..., Recipe]) -> None:
    model = load_inputs(recipe_of(senses)).model
    for part in ("temporal_encoder", "audio_projector", "audio_encoder"):
        recipe = recipe_of(senses, train=[{"match": f"{part}.*", "train": True}])
        groups = apply_policy(model, recipe.train, None, recipe.optim)
        names = [name for group in groups for name, _ in group.parameters]
        assert names == [name for name, _ in getattr(model, part).named_parameters(prefix=part)]
    for wrong in ("temporal.*", "audio.*", "audio_encoders.*"):
        recipe = recipe_of(senses, train=[{"match": wrong, "train": True}])
        with pytest.raises(ConfigError, match=wrong.replace(".", r"\.").replace("*", r"\*")):
            apply_policy(model, recipe.train, None, recipe.optim)


@pytest.mark.parametrize(("medium", "cache"), [("video", "off"), ("audio", "memory"), ("document", "memory")])
def test_a_broken_medium_stops_or_is_left_out(
    senses: dict[str, Any], rows: Path, recipe_of: Callable[..., Recipe], tmp_path: Path, medium: str, cache: str
) -> None:
    records = json.loads(rows.read_text())
    bad = {"id": "bad", medium: f"bad.{medium}", "kind": "bad"}
    name = {"video": "bad.mp4", "audio": "bad.wav", "document": "bad.pdf"}[medium]
    bad[medium] = name
    (rows.parent / name).write_bytes(b"RIFF no, nothing of the kind" * 20)
    turns = [{"from": "human", "value": f"<{medium}>What?"}, {"from": "gpt", "value": "A"}]
    path = rows.parent / f"broken-{medium}.json"
    path.write_text(json.dumps([*records[:5], {**bad, "conversations": turns}]))
    senses["data"] = {"mix": [{"path": str(path)}], "index": str(tmp_path / "index")}
    recipe = recipe_of(senses, run__max_steps=1, run__feature_cache=cache)
    with pytest.raises(DataError, match=rf"record bad: .*{name}"):
        train(recipe)
    train(recipe_of(senses, run__max_steps=1, run__feature_cache=cache, data__on_error="skip"))
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert line["id"] == "bad" and name in line["error"]


def test_a_medium_that_breaks_while_training(
    senses: dict[str, Any], rows: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    for name in ("0.mp4", "0.wav"):
        (tmp_path / name).write_bytes((rows.parent / name).read_bytes())
    records = [record for record in json.loads(rows.read_text()) if record["id"] in ("4", "8", "14")]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    senses["data"] = {"mix": [{"path": str(tmp_path / "rows.json")}], "index": str(tmp_path / "index")}
    for error in ("stop", "skip"):
        recipe = recipe_of(senses, data__on_error=error)
        Path(recipe.output_dir).mkdir(exist_ok=True)
        task = make_trainer(SFTTask(recipe, World())).task
        assert isinstance(task, SFTTask)
        for name, record in (("0.mp4", "4"), ("0.wav", "8")):
            kept = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(kept[: len(kept) // 8])
            index = [record.id for record in task.dataset.prepared.records].index(record)
            if error == "stop":
                with pytest.raises(PolymodalError, match=rf"record {record}: .*{name}"):
                    task.dataset.named_batch(np.array([index]))
            else:
                assert task.dataset.named_batch(np.array([index])).lost > 0
            (tmp_path / name).write_bytes(kept)


def test_a_question_beside_each_medium_and_none_beside_a_sound(
    senses: dict[str, Any], rows: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    from polymodal.modeling.dual_encoders.blip2_stage1_folder import train_wordpiece

    train_wordpiece(["What 0?", "What 1?"], 80, 1).save_pretrained(tmp_path / "words")
    senses["init"]["model"]["projector"] = {
        "mm_projector_type": "qformer",
        "qformer": {**QFORMER, "tokenizer": str(tmp_path / "words")},
    }
    for name, cache in (("off", "off"), ("memory", "memory")):
        train(recipe_of(senses, run__feature_cache=cache, run__max_steps=3, output_dir=str(tmp_path / name)))
    assert_equal(tmp_path / "off", tmp_path / "memory")
    recipe = recipe_of(senses, output_dir=str(tmp_path / "off"))
    task = make_trainer(SFTTask(recipe, World())).task
    assert isinstance(task, SFTTask)
    for record, sample in zip(task.dataset.prepared.records, task.dataset.prepared.samples, strict=True):
        again = task.dataset.processor(record.messages, pixels=False)
        assert len(sample.contexts) == len(sample.plans) == len(again.contexts)
        assert all(torch.equal(*pair) for pair in zip(sample.contexts, again.contexts, strict=True))
        for plan, context in zip(sample.plans, sample.contexts, strict=True):
            assert len(context) > 1, plan


def test_collapse() -> None:
    assert collapse([0, 3, 3, 0, 3, 5, 5, 0]) == [3, 3, 5]
    assert collapse([4, 4, 4]) == [4] and collapse([0, 0]) == [] and collapse([]) == []


def test_transcripts_are_those_of_rows_with_one_sound(
    senses: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of(senses, run__feature_cache="memory")
    Path(recipe.output_dir).mkdir()
    task = make_trainer(SFTTask(recipe, World())).task
    assert isinstance(task, SFTTask) and task.dataset.sounds is not None
    said = transcripts(task.dataset)
    assert sorted(said.values()) == [f"word {number}" for number in range(4)]
    heard = [
        key
        for sample in task.dataset.prepared.samples
        for key, plan in zip(sample.media_keys, sample.plans, strict=True)
        if isinstance(plan, AudioPlan)
    ]
    assert set(said) <= set(heard) == set(task.dataset.sounds.where)
    assert not any(isinstance(plan, VideoPlan) for plan in task.dataset.prepared.samples[8].plans)


def test_the_warm_start_learns_to_spell(
    senses: dict[str, Any], rows: Path, recipe_of: Callable[..., Recipe], tmp_path: Path, capfd: Any
) -> None:
    records = [record for record in json.loads(rows.read_text()) if record["id"] in ("9", "10", "11")]
    path = rows.parent / "said.json"
    path.write_text(json.dumps([{**record, "transcript": "a word"} for record in records]))
    senses["data"] = {"mix": [{"path": str(path)}]}
    shares = []
    for steps in (3, 150):
        warm = {"steps": steps, "batch_size": 3, "learning_rate": 2e-2, "weight_decay": 0.0}
        changes = {"audio_warm_start": warm, "run__feature_cache": "memory", "run__max_steps": 1}
        capfd.readouterr()
        train(recipe_of(senses, output_dir=str(tmp_path / str(steps)), **changes))
        said = capfd.readouterr()
        shares.append(float((said.out + said.err).rpartition("% of the tokens of held-out")[0].rpartition(" ")[2]))
    assert shares[0] < 50 and shares[1] > 90, shares
    with pytest.raises(ConfigError, match=r"set run\.feature_cache"):
        train(recipe_of(senses, audio_warm_start={"steps": 3}, output_dir=str(tmp_path / "none")))
    path.write_text(json.dumps([{**record, "transcript": ""} for record in records]))
    with pytest.raises(ConfigError, match='no record says under "transcript"'):
        changes = {"audio_warm_start": {"steps": 3}, "run__feature_cache": "memory"}
        train(recipe_of(senses, output_dir=str(tmp_path / "none"), **changes))


def test_the_warm_start_of_the_temporal_encoder_learns_to_say_what_happens(
    senses: dict[str, Any], tiny: Path, recipe_of: Callable[..., Recipe], tmp_path: Path, capfd: Any
) -> None:
    frames = [PILImage.new("RGB", (32, 32), (grey, 0, 0)) for grey in (40, 110, 180, 250)]
    warm = {"steps": 120, "batch_size": 8, "learning_rate": 2e-2, "weight_decay": 0.0, "tokens": 99}
    changes: dict[str, Any] = {"video_warm_start": warm, "run__feature_cache": "memory", "run__max_steps": 1}
    path = tiny / "described.json"
    senses["data"] = {"mix": [{"path": str(path)}]}
    shares = []
    for differ in (True, False):
        records = []
        for number in range(40):  # every 20th is held out
            said = ("aa", "bb")[number // 20 % 2]
            first, *others = frames if said == "aa" or not differ else frames[::-1]
            file = tiny / f"{differ}{number}.gif"
            first.save(file, save_all=True, append_images=others, duration=200)
            turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": said}]
            records.append({"id": str(number), "kind": "caption", "video": file.name, "conversations": turns})
        path.write_text(json.dumps(records))
        capfd.readouterr()
        train(recipe_of(senses, output_dir=str(tmp_path / str(differ)), **changes))
        told = capfd.readouterr()
        shares.append(float((told.out + told.err).rpartition("% of the words of held-out")[0].rpartition(" ")[2]))
    assert shares[0] == 100 > shares[1], shares
    # One that the stage itself leaves alone learns all the same.
    ears = [{"match": "audio_projector.*", "train": True}]
    frozen = train(recipe_of(senses, output_dir=str(tmp_path / "frozen"), **changes, train=ears))
    weights = load_model(frozen).model.temporal_encoder.state_dict()  # type: ignore[union-attr]
    assert weights and any(bool(w.any()) for name, w in weights.items() if "out" in name), sorted(weights)
    with pytest.raises(ConfigError, match=r"set run\.feature_cache"):
        train(recipe_of(senses, video_warm_start={"steps": 3}, output_dir=str(tmp_path / "none")))
    path.write_text(json.dumps([{**record, "kind": "name"} for record in records]))
    with pytest.raises(ConfigError, match="no turn of kind 'caption' says what happens"):
        train(recipe_of(senses, output_dir=str(tmp_path / "none"), **changes))


def test_the_page_of_answers_shows_strips_pages_and_names_of_sounds(
    senses: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    train(recipe_of(senses, run__max_steps=1, run__eval_generations=16))
    answers = read_log(tmp_path / "run" / "eval.jsonl")[-1]["answers"]
    shown = {answer["kind"]: answer for answer in answers}
    assert not [answer for answer in answers if "error" in answer] and len(answers) == 16
    with PILImage.open(tmp_path / "run" / shown["<video>"]["images"][0]) as strip:
        assert strip.width == 4 * strip.height
    assert shown["<audio>"]["images"] == [] and shown["<audio>"]["sounds"][0].endswith(".wav")
    assert len(shown["<document>"]["images"]) == 1
    assert len(shown["<audio><image><video>"]["images"]) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "sound: 0.wav" in page and page.count("data:image/jpeg") >= 11

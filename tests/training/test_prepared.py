"""Data from files (memory maps) and data in memory come to the same `Prepared`; training opens what prep made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from polymodal.backends import load_processor
from polymodal.backends.local import processor_of
from polymodal.cli import main
from polymodal.data.check.check import check_files
from polymodal.data.load import load_records
from polymodal.errors import CheckpointError, ConfigError, DataError
from polymodal.messages import Image, user
from polymodal.processing.processor import Processor
from polymodal.training import train
from polymodal.training.recipes.load import load_recipe
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.sft.dataset import Prepared, prepare
from polymodal.training.sft.prepare_data import recipe_processor
from polymodal.training.sft.task import load_inputs
from polymodal.training.steps import Order
from polymodal.training.task import read_mix
from polymodal.utils.threads import quiet
from tests.processing.tool_templates import QWEN3


def write(plain: dict[str, Any], folder: Path, **data: Any) -> Path:
    plain["data"] |= data
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def same(one: Prepared, other: Prepared) -> None:
    assert one.fingerprint == other.fingerprint
    assert one.sources == other.sources and one.left_out == other.left_out
    assert np.array_equal(one.lengths, other.lengths) and np.array_equal(one.targets, other.targets)
    assert one.lengths.dtype == other.lengths.dtype == np.int64
    assert list(one.records) == list(other.records)
    for a, b in zip(one.samples, other.samples, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
        assert (a.slots, a.plans, a.media_keys, a.id) == (b.slots, b.plans, b.media_keys, b.id)
    assert Order(one.sources, 3).take(0, 70).tolist() == Order(other.sources, 3).take(0, 70).tolist()


def from_files(recipe: Recipe, processor: Processor, folder: Path) -> Prepared:
    return prepare(read_mix(recipe.data, 0), processor, recipe.data, quiet, 2, folder / "skipped.jsonl")


def in_memory(recipe: Recipe, processor: Processor, folder: Path) -> Prepared:
    mix = [(load_records(Path(source.path), source=source.source), source.repeat) for source in recipe.data.mix]
    return prepare(mix, processor, recipe.data, quiet, 2, folder / "skipped_in_memory.jsonl")


def test_files_and_memory_come_to_the_same(tiny: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    path = str(tiny / "data.json")
    mix = [{"path": path, "repeat": 2.0}, {"path": path, "repeat": 0.5, "source": "again"}]
    recipe = load_recipe(write(plain, tmp_path, mix=mix, max_length=62))
    processor = recipe_processor(recipe)
    found, expected = from_files(recipe, processor, tmp_path), in_memory(recipe, processor, tmp_path)
    same(found, expected)
    assert list(found.left_out) == ["longer than max_length 62"]
    assert {record.source for record in found.records} == {"data", "again"}
    # The same index serves another limit.
    loose = load_recipe(write(plain, tmp_path, max_length=500))
    same(from_files(loose, processor, tmp_path), in_memory(loose, processor, tmp_path))


@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_rows_beyond_the_model_s_positions_are_left_out_and_checked(
    kind: str, tiny: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(tiny / "llm", llm)
    settings: Any = LlamaConfig.from_pretrained(llm)
    if kind == "learned":
        ids = {name: getattr(settings, name) for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")}
        settings = GPT2Config(n_positions=62, n_embd=32, n_layer=2, n_head=4, **ids)
        GPT2LMHeadModel(settings).save_pretrained(llm)
    else:
        settings.max_position_embeddings = 62
        settings.save_pretrained(llm)
    plain["init"]["model"]["llm"]["model_name_or_path"] = str(llm)
    plain["run"]["eval_generations"] = 0
    recipe = load_recipe(write(plain, tmp_path))
    processor = recipe_processor(recipe)
    found = from_files(recipe, processor, tmp_path)
    same(found, in_memory(recipe, processor, tmp_path))
    assert found.left_out == {"longer than the language model's 62 positions": 5} and found.lengths.max() <= 62
    summary = check_files([tiny / "data.json"], processor, tmp_path)
    assert [line["code"] for line in summary.dropped] == ["too-long"] * 5
    assert all(line["reason"].endswith(" tokens, the model has 62 positions") for line in summary.dropped)
    train(recipe)
    assert load_processor(tmp_path / "run" / "final").positions == 62


@pytest.mark.parametrize(("question", "answer"), [("Colour?", "red"), ("描述这张图片中的内容", "一个红色的方块。")])
def test_a_conversation_of_roles_and_contents_trains_as_llava_s_form_does(
    question: str, answer: str, tiny: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    llava = {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}
    other = {"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}
    found = []
    for name, turns in (("llava", llava), ("roles", other)):
        rows = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(8)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        changed = {**plain, "output_dir": str(tmp_path / name)}
        mix = [{"path": str(path), "image_root": str(tiny), "source": "x"}]
        recipe = load_recipe(write(changed, tmp_path, mix=mix))
        found.append(from_files(recipe, recipe_processor(recipe), tmp_path))
        train(recipe)
    same(*found)
    losses = [[line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("llava", "roles")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_weights_share_out_the_epoch(tiny: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    path = str(tiny / "data.json")
    mix = [{"path": path, "weight": 3}, {"path": path, "weight": 1, "max_samples": 5}]
    recipe = load_recipe(write(plain, tmp_path, mix=mix))
    prepared = from_files(recipe, recipe_processor(recipe), tmp_path)
    order = Order(prepared.sources, 0)
    assert [len(indices) for indices, _ in prepared.sources] == [25, 5]
    counts = np.bincount(order.take(0, order.epoch_size), minlength=30)
    assert (counts[:25].sum(), counts[25:].sum()) == (23, 7)  # 22.5 and 7.5: the earlier source has the rest


def test_skipped_rows_are_listed_and_nothing_left_is_an_error(
    tiny: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    rows = json.loads((tiny / "data.json").read_text())
    lines = [json.dumps(row) for row in rows[:4]]
    (tiny / "few.jsonl").write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    recipe = load_recipe(write(plain, tmp_path, mix=[{"path": str(tiny / "few.jsonl")}], on_error="skip"))
    processor = recipe_processor(recipe)
    prepared = from_files(recipe, processor, tmp_path)
    assert len(prepared.samples) == 3 and prepared.left_out == {"unreadable": 1}
    assert "line 2" in json.loads((tmp_path / "skipped.jsonl").read_text())["error"]
    strict = load_recipe(write(plain, tmp_path, on_error="stop"))
    with pytest.raises(DataError, match="line 2"):
        from_files(strict, processor, tmp_path)
    short = load_recipe(write(plain, tmp_path, on_error="skip", max_length=3))
    with pytest.raises(DataError, match="no record is left to train on: 1 unreadable, 3 longer than max_length 3"):
        from_files(short, processor, tmp_path)


def test_new_image_rules_hold_for_prep_too(plain: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(write(plain, tmp_path))
    final = train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"max_steps": 1})}))
    image = {**plain["init"]["model"]["image"], "image_aspect_ratio": "slice"}
    plain["init"] = {"from": str(final), "image": image}
    again = load_recipe(write(plain, tmp_path))
    whole = load_inputs(again)
    trained = processor_of(whole.model, whole.tokenizer, whole.config)
    question = [user(Image(str(Path(recipe.data.mix[0].path).parent / "0.png")), "Colour?")]
    prepared, expected = recipe_processor(again)(question), trained(question)
    assert prepared.plans == expected.plans and prepared.plans[0].num_tiles > 1
    assert prepared.media_keys == expected.media_keys
    plain["init"]["image"]["image_std"] = [0.1, 0.2, 0.3]
    with pytest.raises(ConfigError, match=r"init\.image: the model takes image_std .* asks for \(0\.1"):
        load_inputs(load_recipe(write(plain, tmp_path)))


def test_training_opens_what_prep_made(
    tiny: Path,
    plain: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write(plain, tmp_path, index=str(tmp_path / "shared"), template="vicuna")
    plain["run"] |= {"feature_cache": "memory", "max_steps": 2}
    recipe.write_text(yaml.safe_dump(plain))
    assert main(["data", "prep", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "training: 25 records" in said and str(tmp_path / "shared") in said
    built = [path.name for path in (tmp_path / "shared").glob("data-*")]

    def refuse(*_: Any, **options: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("polymodal.data.index.build", refuse)
    train(load_recipe(recipe))
    assert [path.name for path in (tmp_path / "shared").glob("data-*")] == built
    assert not (tmp_path / "run" / "index").exists()


def test_prep_of_a_pipeline_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pipeline.yaml").write_text("name: all\noutput_dir: out\nstages: [{recipe: a.yaml}]\n")
    assert main(["data", "prep", str(tmp_path / "pipeline.yaml")]) == 2
    assert "is a pipeline" in capsys.readouterr().err


def test_a_later_stage_on_another_tower_is_refused_and_other_image_rules_are_said(
    tiny: Path, plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / "tower", tmp_path / "tower")
    plain["init"]["model"]["vision"]["vision_tower"] = str(tmp_path / "tower")
    recipe = load_recipe(write(plain, tmp_path), ["run.max_steps=1", "run.eval_generations=0"])
    final = train(recipe)
    rules = plain["init"]["model"]["image"]
    plain["init"] = {"from": str(final), "image": {**rules, "image_mean": [0.1, 0.5, 0.5]}}
    with pytest.raises(ConfigError, match=r"the model takes image_mean .*, the recipe asks for"):
        load_inputs(load_recipe(write(plain, tmp_path)))
    plain["init"] = {"from": str(final), "image": {**rules, "background": [1, 2, 3]}}
    second = load_recipe(write(plain, tmp_path))
    load_inputs(second)
    assert "background was (255, 255, 255), is (1, 2, 3)" in capsys.readouterr().err
    plain["init"] = {"from": str(final)}
    load_inputs(load_recipe(write(plain, tmp_path)))
    assert "image rules" not in capsys.readouterr().err
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.weight"))
    save_file(
        {**weights, name: weights[name] + torch.tensor(1e-3)},
        tmp_path / "tower" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="another vision tower"):
        load_inputs(second)


def test_a_row_with_reasoning_and_a_call_is_prepared_and_trained(plain: dict[str, Any], tmp_path: Path) -> None:
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "RESULT 3"},
        {"role": "assistant", "content": "Three.", "reasoning_content": "Cold."},
    ]
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    plain["init"]["model"]["template"] = {"chat_template": QWEN3}
    plain["train"] = [{"match": "llm.*", "train": True}]
    plain["batch"] = {"global_size": 1, "micro_size": 1}
    plain["run"] |= {"max_steps": 8, "epochs": 8}
    recipe_file = write(plain, tmp_path, mix=[{"path": str(tmp_path / "rows.jsonl")}])
    assert main(["data", "prep", str(recipe_file)]) == 0
    recipe = load_recipe(str(recipe_file))
    assert isinstance(recipe, Recipe)
    processor = recipe_processor(recipe)
    prepared = from_files(recipe, processor, tmp_path)
    same(prepared, in_memory(recipe, processor, tmp_path))
    assert prepared.records[0].messages[1].tool_calls[0]["function"] == function
    sample = prepared.samples[0]
    said = processor.tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert "Look." in said and '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in said and "Cold." in said
    assert "RESULT" not in said and "Weather?" not in said
    train(recipe)
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert len(losses) == 8 and losses[-1] < losses[0] - 1

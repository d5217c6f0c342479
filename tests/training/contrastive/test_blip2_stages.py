"""BLIP-2 by recipes: stage 1 in micro-batches and processes, its weights in stage 2, and in the tuning after that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polymodal.checkpoints.model_folder import load_model
from polymodal.config import ModelConfig, parse_config
from polymodal.errors import ConfigError
from polymodal.modeling.build import build_model
from polymodal.modeling.dual_encoders.blip2_stage1 import Blip2Stage1
from polymodal.modeling.dual_encoders.blip2_stage1_folder import load_blip2, train_wordpiece
from polymodal.modeling.dual_encoders.config import ObjectiveConfig
from polymodal.modeling.projectors.qformer_files import load_qformer
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training import train
from polymodal.training.contrastive.task import ContrastiveTask
from polymodal.training.optimizer import set_modes
from polymodal.training.process_group import World
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.run import make_trainer
from polymodal.training.sft.task import load_inputs

Make = Callable[..., PairRecipe]
QFORMER = {
    "num_query_tokens": 3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
RULES = [{"match": "*", "train": True}, {"match": "vision_encoder.*", "train": False}]


@pytest.fixture
def stage1(pair_plain: dict[str, Any], drawn: Path, tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """A tiny stage 1 as plain data."""
    captions = [caption for record in json.loads((drawn / "data.json").read_text()) for caption in record["captions"]]
    train_wordpiece(captions).save_pretrained(tmp_path / "wordpiece")
    model = {
        "family": "blip2",
        "vision": {"vision_tower": str(tiny / "tower"), "type": "clip", "mm_vision_select_layer": -1},
        "image": pair_plain["init"]["model"]["image"],
        "qformer": QFORMER,
        "tokenizer": str(tmp_path / "wordpiece"),
        "projection_dim": 8,
    }
    return {
        **pair_plain,
        "name": "tiny-stage1",
        "objective": {"type": "blip2"},
        "init": {"model": model},
        "train": RULES,
    }


def take(recipe: PairRecipe, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    run = make_trainer(ContrastiveTask(recipe, World()))
    set_modes(run.engine.inner)
    batches = run.batches()
    losses = [run.step(batches) for _ in range(steps)]
    batches.close()
    return losses, {name: p.detach().clone() for name, p in run.engine.inner.named_parameters()}


def without_dropout(plain: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(plain))
    changed["init"]["model"]["qformer"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return changed


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_micro_batches_are_the_whole_batch(stage1: dict[str, Any], pair_recipe: Make, cache: str) -> None:
    # Adam would make much of the last bits of gradients that are all but zero.
    changes: dict[str, Any] = {"run__feature_cache": cache, "run__feature_dtype": "float32", "optim__eps": 1e-3}
    plain = without_dropout(stage1)
    whole, parts = (take(pair_recipe(plain, **changes, batch__micro_size=size)) for size in (8, 3))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for name, value in whole[1].items():
        assert torch.allclose(parts[1][name], value, atol=1e-5), name


def test_two_processes_take_the_steps_of_one(
    stage1: dict[str, Any], pair_recipe: Make, tmp_path: Path, run_jobs: Any
) -> None:
    jobs = []
    for size in (1, 2):
        changes: dict[str, Any] = {
            "run__max_steps": 4,
            "batch__micro_size": 2,
            "output_dir": str(tmp_path / f"of{size}"),
        }
        recipe = pair_recipe(without_dropout(stage1), **changes)
        path = tmp_path / f"of{size}.yaml"
        path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json(by_alias=True, exclude_none=True))))
        jobs.append({"recipe": str(path), "order": str(tmp_path / f"order{size}"), "moments": [None] * size})
    results = run_jobs(jobs)
    assert [statuses for statuses, _, _ in results] == [[0], [0, 0]], results
    logs = [read_log(tmp_path / f"of{size}" / "log.jsonl") for size in (1, 2)]
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        assert two["terms"] == pytest.approx(one["terms"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


@pytest.mark.slow
def test_every_loss_falls_and_images_find_their_captions(stage1: dict[str, Any], pair_recipe: Make) -> None:
    """On drawn squares, four colours in four corners, seen as patches: random layers would blur them."""
    plain = without_dropout(stage1)
    plain["data"]["eval"] = plain["data"]["mix"]
    plain["init"]["model"] |= {"norm": "standardize"}
    plain["init"]["model"]["vision"] |= {"mm_vision_select_layer": 0}
    plain["init"]["model"]["qformer"] |= {"initializer_range": 0.2}
    changes = {"run__max_steps": 300, "run__epochs": 1000, "batch__global_size": 16, "optim__learning_rate": 1e-2}
    recipe = pair_recipe(plain, **changes)
    final = train(recipe)
    lines = read_log(Path(recipe.output_dir) / "log.jsonl")
    assert lines[0]["terms"].keys() == {"itc", "itm", "itg"}
    for name, part in (("itc", 0.5), ("itm", 0.8), ("itg", 0.5)):
        first, last = (sum(line["terms"][name] for line in some) / 5 for some in (lines[:5], lines[-5:]))
        assert last < part * first, name
    assert lines[-1]["metrics"]["itm_accuracy"] > 0.8 and lines[-1]["metrics"]["itc_accuracy"] > 0.5
    look = read_log(Path(recipe.output_dir) / "eval.jsonl")[-1]
    assert look["recall"]["image_to_text@1"] >= 5 * look["chance"]["image_to_text@1"]
    model = load_blip2(str(final), None, ObjectiveConfig(type="blip2"))
    assert isinstance(model, Blip2Stage1) and not (final / "vision").exists()
    assert float(model.qformer.state_dict()["norm.mean"].abs().max()) > 0  # measured before the first step, and kept
    again = ContrastiveTask(pair_recipe(plain, init={"from": str(final)}), World())
    assert [entry["stage"] for entry in again.history] == ["tiny-stage1"]
    assert again.model.image == model.image


def projector_weights(model: MultimodalLM) -> dict[str, torch.Tensor]:
    assert model.projector is not None
    return model.projector.state_dict()


def write_other_tower(folder: Path, tower: Path) -> Path:
    """The same tower with other weights."""
    from transformers import CLIPVisionModel

    model: Any = CLIPVisionModel.from_pretrained(tower)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(folder)
    return folder


def write_opt(folder: Path, llm: Path) -> Path:
    """A tiny random OPT with the tokenizer of another tiny model."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(llm)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        word_embed_proj_dim=24,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("llm", ["llama", "opt"])
def test_weights_go_from_stage_1_to_stage_2_to_tuning(
    stage1: dict[str, Any], pair_recipe: Make, plain: dict[str, Any], tiny: Path, tmp_path: Path, llm: str
) -> None:
    final1 = train(pair_recipe(stage1, output_dir=str(tmp_path / "stage1"), run__max_steps=2))
    learnt = load_blip2(str(final1), None, ObjectiveConfig(type="blip2")).qformer.state_dict()
    kept = load_qformer(final1, text=False).state_dict()
    assert 0 < len(kept) < len(learnt) and all(torch.equal(kept[name], learnt[name]) for name in kept)

    folder = tiny / "llm" if llm == "llama" else write_opt(tmp_path / "opt", tiny / "llm")
    data = {"mix": stage1["data"]["mix"]}
    second = json.loads(json.dumps(plain)) | {
        "name": "tiny-stage2",
        "output_dir": str(tmp_path / "stage2"),
        "data": data,
    }
    second["init"]["model"] |= {
        "vision": stage1["init"]["model"]["vision"],
        "image": stage1["init"]["model"]["image"],
        "projector": {"mm_projector_type": "qformer", "qformer": QFORMER, "pretrained": str(final1)},
        "llm": {"model_name_or_path": str(folder)},
        "template": {"chat_template": "plain"},
    }
    second["run"]["max_steps"] = 2
    # At no rate to speak of: what stage 2 begins with is what stage 1 left.
    still = parse_config(Recipe, json.loads(json.dumps(second)), "still")
    still = still.model_copy(update={"optim": still.optim.model_copy(update={"learning_rate": 1e-30})})
    found = projector_weights(load_model(train(still)).model)
    assert all(torch.equal(found[f"qformer.{name}"], tensor) for name, tensor in kept.items())
    assert {name.partition(".")[0] for name in found} == {"qformer", "language_projection"}
    assert not any(name.startswith("qformer.embeddings.") for name in found)

    other = json.loads(json.dumps(second))
    other["init"]["model"]["vision"]["vision_tower"] = str(write_other_tower(tmp_path / "tower", tiny / "tower"))
    with pytest.raises(ConfigError, match="learnt behind another vision tower"):
        load_inputs(parse_config(Recipe, other, "other"))

    moved = parse_config(Recipe, {**second, "output_dir": str(tmp_path / "moved")}, "moved")
    final2 = train(moved)
    after = load_model(final2)
    weights = projector_weights(after.model)
    assert not torch.equal(weights["qformer.query_tokens"], kept["query_tokens"])
    assert after.config.projector.pretrained is None and after.config.template.chat_template == "plain"
    log = read_log(Path(moved.output_dir) / "log.jsonl")
    assert log[0]["loss"] > 0 and log[0]["grad_norm"] > 0
    # The prompt is masked: a caption's bytes and its end token are all that is trained.
    records = json.loads(Path(data["mix"][0]["path"]).read_text())
    sizes = [len(record["conversations"][1]["value"].encode()) + 1 for record in records]
    assert min(sizes) <= log[0]["trained_tokens"] / log[0]["samples"] <= max(sizes)

    third = {
        "name": "tiny-tuning",
        "init": {"from": str(final2), "template": {"chat_template": "chatml"}},
        "data": {"mix": [{"path": str(tiny / "data.json")}]},
        "train": [{"match": "projector.*", "train": True}],
        "optim": {"learning_rate": 1e-30},
        "batch": {"global_size": 8, "micro_size": 4},
        "run": second["run"],
        "output_dir": str(tmp_path / "tuning"),
    }
    tuned = load_model(train(parse_config(Recipe, third, "third")))
    assert all(torch.equal(projector_weights(tuned.model)[name], tensor) for name, tensor in weights.items())
    assert [entry["stage"] for entry in tuned.history] == ["tiny-stage2", "tiny-tuning"]
    assert tuned.config.template.chat_template == "chatml"


def test_stage_2_goes_on_behind_the_tower_and_the_pixels_of_stage_1(
    stage1: dict[str, Any], pair_recipe: Make, tiny: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    final = train(pair_recipe(stage1, output_dir=str(tmp_path / "stage1"), run__max_steps=1))
    model: dict[str, Any] = json.loads(json.dumps(stage1["init"]["model"]))
    second = {
        "vision": model["vision"],
        "image": model["image"],
        "projector": {"mm_projector_type": "qformer", "qformer": QFORMER, "pretrained": str(final)},
        "llm": {"model_name_or_path": str(tiny / "llm")},
    }
    build_model(parse_config(ModelConfig, second, "as it was"))
    tower = Path(shutil.copytree(model["vision"]["vision_tower"], tmp_path / "tower"))
    vision = {**model["vision"], "vision_tower": str(tower)}
    build_model(parse_config(ModelConfig, {**second, "vision": vision}, "the same tower elsewhere"))
    tensors = load_file(tower / "model.safetensors")
    other = {name: tensor.flip(0) if "layers.0." in name else tensor for name, tensor in tensors.items()}
    save_file({name: t.contiguous() for name, t in other.items()}, tower / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="learnt behind another vision tower than"):
        build_model(parse_config(ModelConfig, {**second, "vision": vision}, "another tower"))
    with pytest.raises(ConfigError, match=r"learnt with vision\.mm_vision_select_layer = -?\d+, the recipe has -3"):
        vision = {**model["vision"], "mm_vision_select_layer": -3}
        build_model(parse_config(ModelConfig, {**second, "vision": vision}, "another layer"))
    with pytest.raises(ConfigError, match=r"learnt with image\.image_mean = .* the recipe has \[0\.1, 0\.2, 0\.3\]"):
        image = {**model["image"], "image_mean": [0.1, 0.2, 0.3]}
        build_model(parse_config(ModelConfig, {**second, "image": image}, "other pixels"))
    layout = "squash" if model["image"].get("image_aspect_ratio") != "squash" else "pad"
    with pytest.warns(UserWarning, match=f"learnt with image.image_aspect_ratio = .*the recipe has '{layout}'"):
        image = {**model["image"], "image_aspect_ratio": layout}
        build_model(parse_config(ModelConfig, {**second, "image": image}, "another layout"))

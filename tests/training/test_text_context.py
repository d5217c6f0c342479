"""A Q-Former that reads the question, from a recipe to a folder that answers: cache, packing, processes, contract."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from polymodal.backends import load, load_processor
from polymodal.checkpoints.model_folder import load_model
from polymodal.data.index import Reading, open_index
from polymodal.errors import CheckpointError, ConfigError
from polymodal.media_plan import Size
from polymodal.messages import Image, user
from polymodal.modeling.build import build_model
from polymodal.modeling.dual_encoders.blip2_stage1_folder import train_wordpiece
from polymodal.modeling.projectors.qformer import QFormerProjector
from polymodal.planning.plan import Question, plan_training
from polymodal.planning.starting_point import starting_point
from polymodal.processing.collate import collate
from polymodal.processing.processor import context_reader
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.run import train

QFORMER = {
    "num_query_tokens": 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "vocab_size": 80, "max_position_embeddings": 16, "max_text_length": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2, "text_context": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    train_wordpiece(["What colour is it?", "How large is it?", "Sure?", "Colour?"], 80, 1).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(plain: dict[str, Any], words: Path) -> dict[str, Any]:
    plain["init"]["model"]["projector"] = {
        "mm_projector_type": "qformer", "qformer": {**QFORMER, "tokenizer": str(words)},
    }  # fmt: skip
    plain["optim"] = {"learning_rate": 5e-3, "eps": 1e-3}
    plain["run"]["feature_cache"] = "off"
    return plain


def losses(folder: str) -> list[float]:
    return [line["loss"] for line in read_log(Path(folder) / "log.jsonl")]


def test_cache_and_packing_change_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for name, cache, packing in (("off", "off", "none"), ("memory", "memory", "none"), ("packed", "memory", "pack")):
        recipe["run"] |= {"feature_cache": cache, "feature_dtype": "float32"}
        recipe["batch"] |= {"packing": packing}
        recipe["output_dir"] = str(tmp_path / name)
        final = train(Recipe.model_validate(recipe))
        found[name] = losses(recipe["output_dir"]), load_file(final / "projector.safetensors")
    for name in ("memory", "packed"):
        assert found[name][0] == pytest.approx(found["off"][0], abs=1e-5)
        for key, tensor in found["off"][1].items():
            assert torch.allclose(tensor, found[name][1][key], atol=1e-5), key


@pytest.fixture
def trained(recipe: dict[str, Any]) -> Path:
    recipe["run"] |= {"max_steps": 2}
    return train(Recipe.model_validate(recipe))


def test_the_folder_carries_the_tokenizer_and_answers_with_it(
    trained: Path, recipe: dict[str, Any], tiny: Path, tmp_path: Path, words: Path
) -> None:
    document = json.loads((trained / "polymodal.json").read_text())
    stored = document["config"]["projector"]
    assert stored["qformer"]["tokenizer"] is None and stored["pretrained"] is None
    assert len(document["contract"]["context_tokenizer"]) == 64
    moved = Path(shutil.copytree(trained, tmp_path / "moved"))
    backend = load(moved, "cpu")
    asked = [[user(Image(tiny / "0.png"), text)] for text in ("Colour?", "What colour is it?")]
    samples = [backend.processor(messages, add_generation_prompt=True) for messages in asked]
    assert [len(sample.contexts) for sample in samples] == [1, 1]
    assert not torch.equal(samples[0].contexts[0], samples[1].contexts[0])
    batch = collate(samples, 0)
    features = backend.model.encode_images(batch.pixel_values)
    first, second = backend.model.project_images(features, batch.plans, batch.context_ids)
    assert torch.equal(features[0], features[1]) and (first - second).abs().max() > 1e-3
    # Generation goes the same way, and the processor alone gives the same context.
    assert isinstance(backend.ask("Colour?", tiny / "0.png"), str)
    assert torch.equal(load_processor(moved)(asked[1]).contexts[0], samples[1].contexts[0])


def test_an_index_keeps_contexts(trained: Path, tiny: Path, tmp_path: Path) -> None:
    hello = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    two = [{"role": "user", "content": "<image><image>Sure?"}, {"role": "assistant", "content": "No."}]
    rows = [hello, *json.loads((tiny / "data.json").read_text())[:3], {"images": ["0.png", "1.png"], "messages": two}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    reading, processor = Reading(tmp_path / "rows.json", image_root=tiny), load_processor(trained)
    for _ in range(2):  # built, then opened
        index = open_index(tmp_path / "index", reading, processor)
        assert [len(index.sample(row).contexts) for row in range(len(index))] == [0, 1, 1, 1, 2]
        for row in range(len(index)):
            expected = processor(index.record(row).messages, pixels=False)
            assert [c.tolist() for c in index.sample(row).contexts] == [c.tolist() for c in expected.contexts]
    # A tokenizer that cuts elsewhere makes another index.
    settings = processor.config.projector.qformer.model_copy(update={"max_text_length": 3})
    projector = processor.config.projector.model_copy(update={"qformer": settings})
    processor.context = context_reader(
        processor.config.model_copy(update={"projector": projector}), processor.context_tokenizer
    )
    shorter = open_index(tmp_path / "index", reading, processor)
    assert shorter.folder != index.folder and len(shorter.sample(1).contexts[0]) == 3


def test_another_tokenizer_is_refused(trained: Path) -> None:
    other = train_wordpiece(["something else altogether"], 80, 1)
    shutil.rmtree(trained / "qformer_tokenizer")
    with pytest.raises(CheckpointError, match="qformer_tokenizer is missing"):
        load_model(trained)
    other.save_pretrained(trained / "qformer_tokenizer")
    with pytest.raises(CheckpointError, match="trained with context_tokenizer = "):
        load_model(trained)


def test_a_tokenizer_is_asked_for_and_must_fit(recipe: dict[str, Any]) -> None:
    settings = recipe["init"]["model"]["projector"]["qformer"]
    settings["vocab_size"] = 10
    with pytest.raises(ConfigError, match=r"has \d+ tokens, projector.qformer.vocab_size is 10"):
        build_model(Recipe.model_validate(recipe).init.model)
    settings |= {"vocab_size": 80, "tokenizer": None}
    with pytest.raises(ConfigError, match="text_context needs projector"):
        build_model(Recipe.model_validate(recipe).init.model)


def test_a_plan_counts_the_text_path(recipe: dict[str, Any]) -> None:
    def trained_parameters() -> int:
        parsed = Recipe.model_validate(recipe)
        question = Question(images=(Size(28, 28),), text_tokens=9, answer_tokens=3)
        return plan_training(parsed, starting_point(parsed), question).trained["projector"]

    with_text = trained_parameters()
    recipe["init"]["model"]["projector"]["qformer"] |= {"text_context": False, "tokenizer": None}
    text = 80 * 16 + 16 * 16 + 2 * (16 * 24 + 24 + 24 * 16 + 16 + 2 * 16)
    assert with_text - trained_parameters() == text


def test_two_processes_equal_one(
    recipe: dict[str, Any], tiny: Path, tmp_path: Path, run_jobs: Callable[..., Any]
) -> None:
    records = json.loads((tiny / "data.json").read_text())[:6]
    for number in range(6):
        turns = [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": f"{number}"}]
        records.append({"id": f"text-{number}", "conversations": turns})
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    recipe["data"] = {"mix": [{"path": str(tmp_path / "mixed.json"), "image_root": str(tiny)}]}
    recipe["batch"] = {"global_size": 2, "micro_size": 1, "group_by_length": False}
    jobs = []
    for name, processes in (("auto", 1), ("ddp", 2), ("fsdp2", 2)):
        recipe["run"] |= {"engine": name}
        recipe["output_dir"] = str(tmp_path / name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        jobs.append({"recipe": str(path), "order": str(tmp_path / f"{name}.order"), "moments": [None] * processes})
    results = run_jobs(jobs)
    assert [statuses for statuses, _, _ in results] == [[0], [0, 0], [0, 0]], results
    one = load_file(tmp_path / "auto" / "final" / "projector.safetensors")
    for name in ("ddp", "fsdp2"):
        two = load_file(tmp_path / name / "final" / "projector.safetensors")
        assert all(torch.allclose(tensor, two[key], atol=1e-5) for key, tensor in one.items())
        assert np.allclose(losses(str(tmp_path / "auto")), losses(str(tmp_path / name)), atol=1e-5)


def test_pretrained_is_where_a_model_starts_and_not_what_it_needs(
    recipe: dict[str, Any], words: Path, tmp_path: Path
) -> None:
    from polymodal.modeling.projectors.qformer import QFormer
    from polymodal.modeling.projectors.qformer_files import write_qformer

    projector = recipe["init"]["model"]["projector"]
    config = Recipe.model_validate(recipe).init.model
    stage1 = Path(shutil.copytree(words, tmp_path / "stage1"))
    torch.manual_seed(5)
    first = QFormer(24, config.projector.qformer, text=True)
    write_qformer(stage1, first)
    # The tokenizer of the text path is stage 1's, without being named again.
    projector |= {"pretrained": str(stage1)}
    del projector["qformer"]["tokenizer"]
    model, _ = build_model(Recipe.model_validate(recipe).init.model)
    assert isinstance(model.projector, QFormerProjector) and model.context_tokenizer is not None
    state = model.projector.qformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    recipe["run"] |= {"max_steps": 1}
    final = train(Recipe.model_validate(recipe))
    shutil.rmtree(stage1)
    assert load_model(final).config.projector.pretrained is None

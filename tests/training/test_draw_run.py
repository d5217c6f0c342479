"""A little language model learns to draw through the one trainer: nine prompts, in seconds; rows, dropout, new rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from polymodal.backends import load
from polymodal.backends.base import MediaEnd, MediaProgress, MediaStart, TextDelta
from polymodal.backends.local import LocalBackend
from polymodal.data.index import Index
from polymodal.errors import CheckpointError, ConfigError, DataError, PolymodalError
from polymodal.generation.params import GenerationParams, ImageParams
from polymodal.messages import Image, Message, user
from polymodal.processing.collate import Sample
from polymodal.training import load_recipe, train
from polymodal.training.sft.conditions import without_condition, without_conditions
from polymodal.training.sft.prepare_data import prepare_recipe, recipe_processor
from polymodal.training.sft.task import load_inputs
from tests.drawers import CODES, PROMPTS, drawer_recipe, picture

GREEDY = GenerationParams(modalities=("image",), image=ImageParams(temperature=0.0, guidance=1.0))


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**drawer_recipe(folder), **changes}))
    return path


def right(model: LocalBackend, params: GenerationParams) -> int:
    made = model.generate_replies(PROMPTS, params)
    images = [answer.media[0].source for answer in made if isinstance(answer, Message)]
    return sum(i.tobytes() == picture(p).tobytes() for i, p in zip(images, PROMPTS, strict=True))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    """The model that the small form of docs/generation.md trains."""
    folder = tmp_path_factory.mktemp("draw")
    final = train(load_recipe(write(folder)))
    backend = load(final, "cpu")
    assert isinstance(backend, LocalBackend)
    return backend


def test_every_prompt_is_drawn_and_every_image_told(drawer: LocalBackend) -> None:
    assert drawer.makes == ("text", "image")
    assert right(drawer, GREEDY) == len(PROMPTS)
    guided = GREEDY.model_copy(update={"image": ImageParams(temperature=0.0, guidance=1.5)})
    assert right(drawer, guided) >= len(PROMPTS) - 1
    told = drawer.generate_batch([[user(Image(picture(p)), "What?")] for p in PROMPTS], GenerationParams())
    assert told == PROMPTS


def test_a_reply_s_parts_are_message_parts_and_go_into_the_next_turn(drawer: LocalBackend) -> None:
    reply = drawer.generate(PROMPTS[4], GREEDY)
    (image,) = reply.images
    assert reply.finish_reason == "stop" and reply.text == "" and image.tobytes() == picture(PROMPTS[4]).tobytes()
    talk = [user(PROMPTS[4]), reply.message, user("What?")]
    ids = drawer.processor(talk, add_generation_prompt=True).input_ids.tolist()
    codes = drawer.processor.codes
    assert codes is not None and ids.count(codes.begin) == 1
    assert isinstance(drawer.generate(talk).text, str)
    with pytest.raises(ConfigError, match="modalities"):
        drawer.generate("x", modalities=("image", "smell"))
    with pytest.raises(ConfigError, match="each is named once"):
        drawer.generate("x", modalities=("image", "image"))


def test_events_come_in_order_with_previews(drawer: LocalBackend) -> None:
    *events, reply = drawer.stream(PROMPTS[2], GREEDY.model_copy(update={"modalities": ("text", "image")}))
    events = [event for event in events if not isinstance(event, TextDelta)]
    kinds = [type(event) for event in events]
    assert (kinds[0], kinds[-1]) == (MediaStart, MediaEnd) and set(kinds[1:-1]) == {MediaProgress}
    progress = [event for event in events if isinstance(event, MediaProgress)]
    fractions = [event.fraction for event in progress]
    assert fractions == sorted(fractions) and 0 < fractions[0] < fractions[-1] < 1
    assert progress[0].preview().size == picture(PROMPTS[2]).size
    end = events[-1]
    assert isinstance(end, MediaEnd) and end.part in reply.message.parts  # type: ignore[union-attr]


def test_unequal_prompts_draw_together_what_they_draw_alone(drawer: LocalBackend) -> None:
    prompts = [*PROMPTS[:3], "Hello, and now draw something that nobody has seen yet", "<boi>"]
    for image in (ImageParams(temperature=0.0, guidance=2.0), ImageParams(temperature=1.5, guidance=2.0)):
        params = GenerationParams(modalities=("image",), image=image, seed=7)
        together = drawer.generate_replies(prompts, params)
        alone = [drawer.generate(prompt, params).message for prompt in prompts]
        drawn = [[p.source.tobytes() for p in m.media] for m in (*together, *alone)]  # type: ignore[union-attr]
        assert drawn[: len(prompts)] == drawn[len(prompts) :]


def test_a_prompt_that_leaves_no_room_fails_alone(drawer: LocalBackend) -> None:
    around = len(drawer.processor([user("x")], add_generation_prompt=True).input_ids) - 1
    long = "x" * (drawer.context_length - around - CODES - 1)  # one position short of a block
    found = drawer.generate_replies([PROMPTS[0], long], GREEDY.model_copy(update={"max_new_tokens": 1}))
    assert isinstance(found[0], Message) and "an image takes 11 positions" in str(found[1])
    with pytest.raises(PolymodalError, match="shorten the conversation"):
        drawer.generate(long, GREEDY.model_copy(update={"max_new_tokens": 1}))


def test_models_that_write_refuse_to_draw(tiny_model_folder: Path) -> None:
    with pytest.raises(PolymodalError, match="makes text, and no image: for images a model needs an image tokenizer"):
        list(load(tiny_model_folder, "cpu").stream("x", GenerationParams(modalities=("text", "image"))))


def test_the_index_holds_the_codes_and_knows_the_tokenizer(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    prepare_recipe(recipe)
    (folder,) = [path for path in (tmp_path / "run" / "index").iterdir() if path.is_dir()]
    index, processor = Index(folder), recipe_processor(recipe)
    assert processor.codes is not None
    for row in range(len(index)):
        made = processor(index.record(row).messages)
        assert index.sample(row).input_ids.tolist() == made.input_ids.tolist()
    about = json.loads((folder / "index.json").read_text())["about"]
    assert about["codes"] == processor.codes.identity
    processor.codes.tokenizer.state_dict()["codebook"].mul_(0.5)
    del processor.codes.identity
    assert about["codes"] != processor.codes.identity


def test_a_drawing_row_for_a_model_that_writes_names_the_row(tmp_path: Path) -> None:
    plain = drawer_recipe(tmp_path)
    del plain["init"]["model"]["output"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(DataError, match=r"record draw-0: an image in the assistant's turn, .*init.output"):
        train(load_recipe(tmp_path / "recipe.yaml"))


def test_rows_without_their_condition_are_what_guidance_reads() -> None:
    ids, mask = [5, 6, 7, 30, 41, 42, 31, 2, 9], [False] * 3 + [True] * 5 + [False]
    row = Sample(torch.tensor(ids), torch.tensor(mask))
    bare = without_condition(row, begin=30, start=0)
    assert bare.input_ids.tolist() == [0, 30, 41, 42, 31, 2] and bare.loss_mask.tolist() == [False] + [True] * 5
    assert int(bare.loss_mask[1:].sum()) == int(row.loss_mask[1:].sum())  # as many targets as were planned
    edit = Sample(torch.tensor([30, 41, 42, 31, 7, *ids[3:]]), torch.tensor([False] * 5 + mask[3:]))
    told = Sample(torch.tensor([30, 41, 42, 31, 7, 8]), torch.tensor([False] * 5 + [True]))
    late = Sample(torch.tensor([5, 8, 30, 41, 42, 31, 2]), torch.tensor([False] + [True] * 6))
    for other in (edit, told, late):
        assert without_condition(other, begin=30, start=0) is other
    indices = np.arange(2000)
    some = without_conditions(indices, 0.1, seed=3, step=5)
    assert 150 < int((some < 0).sum()) < 250 and np.array_equal(np.where(some < 0, ~some, some), indices)
    assert np.array_equal(some, without_conditions(indices, 0.1, 3, 5))
    assert not np.array_equal(some, without_conditions(indices, 0.1, 3, 6))
    assert without_conditions(indices, 0.0, 3, 5) is indices


def test_new_rows_first_then_rows_and_lora(tmp_path: Path) -> None:
    lora = {"match": "llm.model.layers.*.q_proj", "lora_r": 2, "trainable_tokens": ["image"], "learning_rate": 1e-2}
    short = {"epochs": 2, "eval_generations": 0, "precision": "fp32", "save_every": 0}
    first = train(load_recipe(write(tmp_path, train=[], lora={**lora, "only_tokens": True}, run=short)))
    plain = drawer_recipe(tmp_path)
    start, rows = load_inputs(load_recipe(write(tmp_path))).model, load(first, "cpu")
    assert isinstance(rows, LocalBackend) and start.vocabulary is not None
    new = start.vocabulary.new_ids
    tables = [model.llm.get_input_embeddings().weight.detach() for model in (start, rows.model)]
    table = rows.model.llm.get_input_embeddings()(torch.tensor(new)).detach()
    assert torch.equal(tables[0][: new[0]], tables[1][: new[0]]) and not torch.equal(table, tables[0][new])
    weights = {n: p for n, p in rows.model.llm.named_parameters() if "lora_B" in n}
    assert weights and all(not bool(p.any()) for p in weights.values())  # the adapter was there, and nothing
    assert not (first / "llm").exists()  # the new rows are in the adapter, the table is built again
    changes = {"init": {"from": str(first)}, "lora": lora, "train": [], "run": short, "name": "then"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**plain, **changes, "output_dir": str(tmp_path / "two")}))
    second = load(train(load_recipe(tmp_path / "two.yaml")), "cpu")
    assert isinstance(second, LocalBackend)
    assert any(bool(p.any()) for n, p in second.model.llm.named_parameters() if "lora_B" in n)
    assert len(second.generate(PROMPTS[0], GREEDY).images) == 1


def test_a_model_that_sees_learns_to_draw_too(tiny_model_folder: Path, tmp_path: Path) -> None:
    plain = drawer_recipe(tmp_path)
    output = plain["init"].pop("model")["output"]
    plain |= {"init": {"from": str(tiny_model_folder), "output": output}, "run": {"epochs": 1, "eval_generations": 0}}
    plain["train"] = [{"match": "{projector,llm}.*", "train": True}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    backend = load(train(load_recipe(tmp_path / "recipe.yaml")), "cpu")
    assert isinstance(backend, LocalBackend) and backend.takes == ("image",)
    asked = backend.processor([user(Image(picture(PROMPTS[0])), "What?")], add_generation_prompt=True)
    assert len(asked.plans) == 1 and int((asked.input_ids == backend.model.image_token_id).sum()) == 16
    assert len(backend.generate([user(Image(picture(PROMPTS[0])), "Again")], GREEDY).images) == 1
    # By a setting, questions are read as codes.
    config = backend.config.model_dump()
    config["output"]["image"]["questions"] = "codes"
    as_codes = backend.processor.with_config(type(backend.config).model_validate(config))
    seen = as_codes([user(Image(picture(PROMPTS[0])), "What?")])
    assert not seen.plans and int((seen.input_ids >= backend.model.vocabulary.image.offset).sum()) == CODES  # type: ignore[union-attr]


def test_another_tokenizer_is_refused_by_name(drawer_folder: Path, tmp_path: Path) -> None:
    plain = drawer_recipe(tmp_path)
    output = plain["init"].pop("model")["output"]
    plain["init"] = {"from": str(drawer_folder), "output": output}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError, match=r"init\.output\.image: the model has its image tokenizer already"):
        load_inputs(load_recipe(tmp_path / "recipe.yaml"))
    with pytest.raises(CheckpointError, match="no folder of an image tokenizer"):
        output["image"]["image_tokenizer"] = str(tmp_path / "none")
        plain["init"] = {"model": {"llm": {"model_name_or_path": str(tmp_path / "llm")}, "output": output}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
        load_inputs(load_recipe(tmp_path / "recipe.yaml"))

"""Training with a tiny T5 as the language model: stages, counts, resume, adapters, memory, plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from polymodal.checkpoints.model_folder import load_model, save_model
from polymodal.config import LLMConfig, LoraRecipe, ModelConfig, parse_config
from polymodal.data.readers.conversations import Record
from polymodal.errors import ConfigError
from polymodal.messages import assistant, user
from polymodal.modeling.build import build_model
from polymodal.modeling.lora import fold_in, is_adapter
from polymodal.modeling.meta_device import outline
from polymodal.planning.activation_trace import Load, id_of, trace
from polymodal.planning.plan import Question, kv_bytes_per_token, plan_training
from polymodal.planning.starting_point import starting_point
from polymodal.processing.collate import collate
from polymodal.processing.processor import Processor
from polymodal.training import checkpoint, train
from polymodal.training.activation_checkpointing import activation_bytes, checkpoint_layers
from polymodal.training.optimizer import apply_policy, cast_frozen_linears, set_modes
from polymodal.training.process_group import World
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import LossByKind, read_log
from polymodal.training.run import make_trainer
from polymodal.training.sft.dataset import kinds_of_targets
from polymodal.training.sft.prepare_data import prepare_recipe, recipe_processor
from polymodal.training.sft.task import SFTTask
from polymodal.training.trainer import Trainer
from polymodal.utils.modules import blocks

Make = Callable[..., Recipe]
Until = Callable[[Recipe, int], None]
EVERY_LINEAR = "llm.*.{k,o,q,v,wi,wo}"


@pytest.fixture
def t5(plain: dict[str, Any], tiny_t5_folder: Path) -> dict[str, Any]:
    """The projector-only recipe with a T5 as its language model."""
    plain["init"]["model"]["llm"]["model_name_or_path"] = str(tiny_t5_folder)
    plain["run"]["eval_generations"] = 2
    return plain


def config_of(plain: dict[str, Any]) -> ModelConfig:
    config = parse_config(Recipe, plain, "recipe").init.model
    assert config is not None
    return config


def start(recipe: Recipe) -> Trainer:
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    return make_trainer(SFTTask(recipe, World()))


WHOLE = [{"match": "{projector,llm}.*", "train": True}]


@pytest.mark.parametrize("rules", ["projector", "whole"])
def test_a_stage_learns_resumes_and_loads(
    rules: str, t5: dict[str, Any], tmp_path: Path, recipe_of: Make, train_until: Until
) -> None:
    changes: dict[str, Any] = {"train": WHOLE} if rules == "whole" else {}
    changes["run__max_steps"] = 10
    whole = recipe_of(t5, **changes, output_dir=str(tmp_path / "whole"))
    final = train(whole)
    lines = read_log(tmp_path / "whole" / "log.jsonl")
    # A projector can hardly steer a frozen language model of random weights.
    assert lines[-1]["loss"] < {"projector": 0.95, "whole": 0.7}[rules] * lines[0]["loss"]

    # Stopped in the seventh step and gone on with: the same to the last bit, dropout of the whole T5 included.
    parts = recipe_of(t5, **changes, output_dir=str(tmp_path / "parts"))
    train_until(parts, 7)
    assert train(parts) == tmp_path / "parts" / "final"
    ends = [checkpoint.complete_checkpoints(tmp_path / name)[-1] for name in ("whole", "parts")]
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    again = read_log(tmp_path / "parts" / "log.jsonl")
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in lines]

    # The model that was left is the one of the last checkpoint, and the report holds its answers.
    loaded = load_model(final)
    assert (final / "llm").is_dir() == (rules == "whole")
    named = dict(loaded.model.named_parameters())
    for name, tensor in load_file(ends[0] / checkpoint.MODEL).items():
        torch.testing.assert_close(named[name].data, tensor, msg=name)
    (shown,) = [json.loads(line) for line in (tmp_path / "whole" / "eval.jsonl").read_text().splitlines()]
    assert len(shown["answers"]) == 2 and all("answer" in answer for answer in shown["answers"])


def test_what_is_counted_is_what_is_scored(t5: dict[str, Any], recipe_of: Make) -> None:
    """Prepared counts decide the denominator of a step; records of two turns train their last answer."""
    run = start(recipe_of(t5))
    prepared = run.task.dataset.prepared
    several = 0
    for index, (record, sample) in enumerate(zip(prepared.records, prepared.samples, strict=True)):
        batch = run.task.dataset.batch(torch.tensor([index]).numpy())
        out = run.engine.inner(**batch.inputs())
        assert out.num_targets == prepared.targets[index] == int(sample.loss_mask.sum())
        last = run.task.dataset.processor.tokenizer.decode(sample.input_ids[sample.loss_mask])
        assert last == record.messages[-1].text + "<|im_end|>"
        several += sum(message.role == "assistant" for message in record.messages) > 1
    assert several >= 2


def test_gradients_do_not_depend_on_micro_batches(t5: dict[str, Any], recipe_of: Make) -> None:
    found = []
    for micro in (1, 8):
        run = start(recipe_of(t5, batch__micro_size=micro, output_dir=t5["output_dir"] + str(micro)))
        tokens = int(run.task.dataset.prepared.targets[run.task.steps.indices(0)].sum())
        batches = run.batches()
        set_modes(run.engine.inner)
        for _ in run.task.plan(0).micro:
            run.task.forward_backward(run.engine, next(batches), 1 / tokens, True, False, LossByKind())
        found.append([p.grad.clone() for _, p in run.engine.groups[0].parameters if p.grad is not None])
        batches.close()
    assert len(found[0]) == 4
    for one, eight in zip(*found, strict=True):
        torch.testing.assert_close(one, eight, atol=1e-6, rtol=1e-4)


def test_kinds_are_the_last_turns(t5: dict[str, Any]) -> None:
    model, tokenizer = build_model(config_of(t5))
    messages = (user("a"), assistant("bc"), user("d"), assistant("e"))
    record = Record("r", messages, "vqa", "s", extra={"kinds": ["caption", "ocr"]})
    for last_only, kinds in ((True, ["ocr"] * 2), (False, ["caption"] * 3 + ["ocr"] * 2)):
        config = config_of(t5)
        processor = Processor(config, tokenizer, model.tokens_per_tile, model.image_token_id, last_only)
        assert kinds_of_targets(record, processor(messages), last_only) == kinds


def test_data_prep_and_training_share_one_index(t5: dict[str, Any], tiny_llm_folder: Path, recipe_of: Make) -> None:
    recipe = recipe_of(t5)
    assert recipe_processor(recipe).last_answer_only
    said = prepare_recipe(recipe)
    run = start(recipe)
    assert f"{int(run.task.dataset.prepared.targets.sum()):,} of them trained" in said
    folder = Path(recipe.output_dir) / "index"
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
    # A causal model of the same tokenizer trains every answer, from an index of its own.
    causal = recipe_of(t5)
    plain = json.loads(causal.model_dump_json())
    plain["init"]["model"]["llm"]["model_name_or_path"] = str(tiny_llm_folder)
    other = start(parse_config(Recipe, plain, "recipe"))
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2
    assert other.task.dataset.prepared.targets.sum() > run.task.dataset.prepared.targets.sum()


def test_packing_is_refused_in_one_line(t5: dict[str, Any], recipe_of: Make) -> None:
    recipe = recipe_of(t5, batch__packing="pack")
    for refused in (lambda: train(recipe), lambda: plan_training(recipe, starting_point(recipe), Question())):
        with pytest.raises(ConfigError, match=r"batch\.packing: .* is an encoder-decoder.* set batch\.packing to none"):
            refused()


def test_lora_names_the_layers_there_are(t5: dict[str, Any], tmp_path: Path, recipe_of: Make) -> None:
    config = config_of(t5)
    model, tokenizer = build_model(config)
    optim = recipe_of(t5).optim
    with pytest.raises(ConfigError) as refused:
        apply_policy(model, [], LoraRecipe(), optim)
    assert f"lora.match={EVERY_LINEAR!r}" in str(refused.value) and "T5ForConditionalGeneration" in str(refused.value)
    with pytest.raises(ConfigError, match=r"lora\.trainable_tokens: .*encoder-decoder"):
        apply_policy(model, [], LoraRecipe(match=EVERY_LINEAR, trainable_tokens=(5,)), optim)
    groups = apply_policy(model, [], LoraRecipe(match=EVERY_LINEAR, lora_r=4, lora_alpha=8), optim)
    names = [name for group in groups for name, _ in group.parameters]
    # q, k, v and o of each attention, wi and wo of each feed-forward part; two matrices each.
    assert len(names) == 2 * (2 * (4 + 2) + 3 * (8 + 2)) and all(is_adapter(name) for name in names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in groups:
            for _, parameter in group.parameters:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    ids = torch.arange(3, 30)[None]
    labels = torch.where(ids > 20, ids, -100)
    wanted = model.eval()(ids, labels=labels).losses
    save_model(tmp_path / "saved", model, config, tokenizer)
    assert json.loads((tmp_path / "saved/adapter/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    torch.testing.assert_close(load_model(tmp_path / "saved").model(ids, labels=labels).losses, wanted)
    fold_in(model.llm)
    torch.testing.assert_close(model(ids, labels=labels).losses, wanted, atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_nothing_but_memory(t5: dict[str, Any]) -> None:
    config = config_of(t5)
    results = []
    for saving in (False, True):
        model, _ = build_model(config)
        model.requires_grad_(True).train()
        layers = blocks(model.llm)
        assert [type(layer).__name__ for layer in layers] == ["T5Block"] * 5
        if saving:
            checkpoint_layers(layers)
        torch.manual_seed(3)
        ids = torch.arange(3, 43).view(2, 20)
        out = model(ids, labels=torch.where(ids % 20 > 12, ids, -100))
        out.loss_sum.backward()
        results.append((out.losses, {name: p.grad for name, p in model.llm.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_casting_frozen_layers_changes_nothing_under_autocast(tiny_t5_folder: Path, t5: dict[str, Any]) -> None:
    ids = torch.arange(3, 30)[None]
    labels = torch.where(ids > 20, ids, -100)
    losses = []
    for cast in (False, True):
        model, _ = build_model(config_of(t5))
        model.requires_grad_(False)
        if cast:
            cast_frozen_linears(model.llm, torch.bfloat16)
            assert model.llm.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.bfloat16
            assert model.llm.lm_head.weight.dtype is model.llm.shared.weight.dtype is torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(ids, labels=labels).losses)
    assert torch.equal(*losses) and torch.isfinite(losses[0]).all()
    # As transformers does on loading: T5's wo overflows in float16 and not in bfloat16.
    cast_frozen_linears(model.llm, torch.float16)
    fresh = build_model(config_of(t5))[0].llm.requires_grad_(False)
    cast_frozen_linears(fresh, torch.float16)
    feed_forward = fresh.decoder.block[0].layer[2].DenseReluDense
    assert feed_forward.wo.weight.dtype is torch.float32 and feed_forward.wi.weight.dtype is torch.float16


def test_an_outline_has_the_published_parameters(tmp_path: Path) -> None:
    """FlanT5 small and T5 small; only the former has a head of its own."""
    small = {"d_model": 512, "d_kv": 64, "vocab_size": 32128, "model_type": "t5", "decoder_start_token_id": 0}
    flan = {"d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6, "tie_word_embeddings": False}
    for name, changes, published in (
        ("flan", {**flan, "feed_forward_proj": "gated-gelu"}, 76_961_152),
        ("t5", {"d_ff": 2048, "num_layers": 6, "num_heads": 8}, 60_506_624),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**small, **changes}))
        built = outline(ModelConfig(llm=LLMConfig(model_name_or_path=str(tmp_path / name))))
        assert sum(p.numel() for p in built.model.parameters()) == published


def test_a_plan_sees_both_halves(t5: dict[str, Any], recipe_of: Make) -> None:
    recipe = recipe_of(t5, train=WHOLE)
    config = recipe.init.model
    assert config is not None
    model, tokenizer = build_model(config)
    empty = outline(config)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in empty.model.named_parameters()
    }
    # Heads times width, keys and values, three layers of the decoder; the encoder has no cache.
    assert kv_bytes_per_token(model.llm.config, 4) == 2 * 3 * 4 * 8 * 4
    apply_policy(model, recipe.train, None, recipe.optim)
    apply_policy(empty.model, recipe.train, None, recipe.optim)
    model.requires_grad_(True)
    source, answer = 60, 20
    processor = Processor(config, tokenizer, model.tokens_per_tile, model.image_token_id, last_answer_only=True)
    ids = torch.arange(source + answer)[None] % 250
    batch = collate([processor([user("x"), assistant("y")])], 0)
    assert batch.plans == ()
    own = {id_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id_of(tensor) not in own:
            kept[id_of(tensor)] = tensor
        return tensor

    labels = torch.full_like(ids, -100)
    labels[:, source:] = ids[:, source:]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(ids, labels=labels)
    logits = 2 * out.num_targets * out.logits.shape[1] * 4  # the loss is counted by rule
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    planned = trace(empty, Load(rows=1, tokens=source + answer, targets=answer, tiles=0, visual_tokens=0), bf16=False)
    assert planned.kept == pytest.approx(measured - logits, rel=0.15)
    assert activation_bytes(model.llm.config, source + answer) == pytest.approx(measured, rel=0.6)
    whole = plan_training(recipe, starting_point(recipe), Question(device="cpu", text_tokens=40, answer_tokens=8))
    assert whole.parameters["llm"] == sum(p.numel() for p in model.llm.parameters())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(
    t5: dict[str, Any], tmp_path: Path, run_jobs: Callable[[list[dict[str, Any]]], list[Any]]
) -> None:
    """Images and text in turn, every weight trained; tied tables are one parameter however they are sharded."""
    folder = tmp_path / "t5"
    shutil.copytree(t5["init"]["model"]["llm"]["model_name_or_path"], folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dropout_rate": 0.0}))
    t5["init"]["model"]["llm"]["model_name_or_path"] = str(folder)
    t5["train"] = WHOLE
    t5["optim"] = {"learning_rate": 5e-3, "eps": 1e-3}
    t5["batch"] = {"global_size": 4, "micro_size": 2}
    t5["run"] |= {"max_steps": 4, "save_every": 0}
    jobs = []
    for name, processes, engine in (("one", 1, "auto"), ("ddp", 2, "ddp"), ("fsdp2", 2, "fsdp2")):
        t5["run"]["engine"], t5["output_dir"] = engine, str(tmp_path / name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(t5))
        jobs.append({"recipe": str(path), "order": str(tmp_path / f"{name}.order"), "moments": [None] * processes})
    run_jobs(jobs)
    wanted = {path.name: load_file(path) for path in (tmp_path / "one" / "final").rglob("*.safetensors")}
    assert wanted.keys() == {"projector.safetensors", "model.safetensors"}
    for name in ("ddp", "fsdp2"):
        for file, tensors in wanted.items():
            (path,) = (tmp_path / name / "final").rglob(file)
            found = load_file(path)
            assert found.keys() == tensors.keys()
            for key, tensor in tensors.items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=f"{name}: {key}")

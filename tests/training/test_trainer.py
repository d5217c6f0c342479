from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.checkpoints.model_folder import load_model
from polymodal.errors import CheckpointError, ConfigError, DataError, MediaError, PolymodalError
from polymodal.training import checkpoint, train
from polymodal.training.optimizer import set_modes
from polymodal.training.process_group import World
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import append_log, finite, read_log
from polymodal.training.run import make_trainer
from polymodal.training.sft.dataset import SFTDataset
from polymodal.training.sft.task import SFTTask, load_inputs
from polymodal.training.steps import Order
from polymodal.training.trainer import Trainer

Make = Callable[..., Recipe]
Until = Callable[[Recipe, int], None]
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "learning_rate": 5e-3}


def start(recipe: Recipe) -> Trainer:
    """Everything that `train` sets up, without taking a step."""
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    return make_trainer(SFTTask(recipe, World()))


def gradients(run: Trainer) -> dict[str, torch.Tensor]:
    """The gradient that the optimizer is given in the first step, and no step taken."""
    set_modes(run.engine.inner)
    for members in run.task.plan(0).micro:
        assert len(members) <= run.recipe.batch.micro_size
    seen: dict[str, torch.Tensor] = {}
    parameters = [pair for group in run.engine.groups for pair in group.parameters]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.engine.optimizer, "step", lambda: seen.update({n: p.grad.clone() for n, p in parameters}))
        run.step(run.batches())
    return seen


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint.complete_checkpoints(run_dir)[-1] / checkpoint.MODEL)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_log(run_dir / "log.jsonl")]


@pytest.mark.parametrize("group", [True, False])
def test_accumulation_equals_the_large_batch(plain: dict[str, Any], group: bool, recipe_of: Make) -> None:
    plain["optim"]["clip"] = 0
    run = start(recipe_of(plain, batch__micro_size=8))
    whole = gradients(run)
    parts = gradients(start(recipe_of(plain, batch__micro_size=1, batch__group_by_length=group)))
    assert whole.keys() == parts.keys() and whole
    # The mean over all tokens, though records have different numbers of them: not a mean of the records' means.
    indices = run.task.steps.indices(0)
    assert len(set(run.task.dataset.prepared.targets[indices])) > 1
    out = run.engine.inner(**run.task.dataset.batch(indices).inputs())
    (out.loss_sum / len(out.losses)).backward()
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-6), name
        assert torch.allclose(whole[name], run.engine.inner.get_parameter(name).grad, atol=1e-6), name


def test_the_loss_is_the_mean_over_tokens_not_over_batches(plain: dict[str, Any], recipe_of: Make) -> None:
    """Against transformers' own loss over the same samples one by one."""
    run = start(recipe_of(plain, batch__micro_size=1))
    total, count = 0.0, 0
    for index in run.task.steps.indices(0):
        batch = run.task.dataset.batch(np.array([index]))
        embeds = run.engine.inner.embed(
            batch.input_ids, batch.plans, batch.sample_of_image, batch.pixel_values, batch.features
        )
        targets = int((batch.labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(run.engine.inner.llm(inputs_embeds=embeds, labels=batch.labels).loss) * targets
        count += targets
    set_modes(run.engine.inner)
    assert run.step(run.batches()) == pytest.approx(total / count, rel=1e-5)


def test_only_what_the_rules_name_changes_and_it_learns(plain: dict[str, Any], recipe_of: Make) -> None:
    recipe = recipe_of(plain, run__max_steps=60, run__epochs=100, run__save_every=0, run__log_every=4)
    before = load_inputs(recipe).model.state_dict()
    final = train(recipe)
    after = load_model(final).model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("projector.") for name in changed)
    curve = losses(Path(recipe.output_dir))
    assert curve[-1] < 0.85 * curve[0]
    assert (Path(recipe.output_dir) / "loss.png").stat().st_size > 5000
    assert set(json.loads((final / "polymodal.json").read_text())["history"][0]["trained"]) == {"projector"}


def test_projector_and_lora_overfit(plain: dict[str, Any], recipe_of: Make) -> None:
    recipe = recipe_of(plain, lora={**LORA, "lora_dropout": 0.0}, run__max_steps=40, run__epochs=100, run__save_every=0)
    final = train(recipe)
    curve = losses(Path(recipe.output_dir))
    assert curve[-1] < 0.5 * curve[0]
    assert (final / "adapter" / "adapter_model.safetensors").is_file()
    # The saved folder is the model that was trained: the same loss on the same batch.
    run = start(recipe_of(plain, output_dir=str(Path(recipe.output_dir).parent / "other")))
    batch = run.task.dataset.batch(np.arange(6))
    again = load_model(final).model
    with torch.no_grad():
        arguments = (batch.input_ids, batch.attention_mask, batch.labels, batch.plans, batch.sample_of_image)
        loss = again(*arguments, batch.pixel_values)
        start_loss = run.engine.inner(*arguments, batch.pixel_values)
    assert float(loss.loss_sum) < 0.6 * float(start_loss.loss_sum)


def test_lora_alone_learns_and_is_all_that_changes(plain: dict[str, Any], recipe_of: Make) -> None:
    changes = {"run__max_steps": 40, "run__epochs": 100, "run__save_every": 0, "optim__learning_rate": 1e-2}
    recipe = recipe_of(plain, train=[], lora={"lora_r": 4, "lora_alpha": 8}, **changes)
    before = load_inputs(recipe).model.state_dict()
    final = train(recipe)
    curve = losses(Path(recipe.output_dir))
    assert np.mean(curve[-4:]) < 0.8 * np.mean(curve[:4])
    assert json.loads((final / "polymodal.json").read_text())["history"][0]["trained"] == ["lora"]
    # Every adapter moved from where it began, with which it does nothing; the weights under it and all others did not.
    trained = weights(Path(recipe.output_dir))
    assert trained and all(".lora_" in name for name in trained)
    assert all(bool(tensor.any()) for name, tensor in trained.items() if ".lora_B." in name)
    after = load_model(final).model.state_dict()
    kept = {name.replace(".base_layer.", "."): tensor for name, tensor in after.items() if ".lora_" not in name}
    changed = {name for name in before if not torch.equal(before[name], kept[name])}
    assert all(name.startswith("llm.") and name.endswith("_proj.weight") for name in changed)


def test_every_step_drops_other_units_and_a_resumed_one_the_same(
    plain: dict[str, Any], tmp_path: Path, recipe_of: Make, train_until: Until
) -> None:
    rows = [{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "hello"}]}]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    changes = {
        "data__mix": [{"path": str(tmp_path / "one.json")}],
        "batch__global_size": 1,
        "optim__learning_rate": 1e-30,  # the weights stay, so that only what is dropped differs from step to step
        "train": [],
        "run__max_steps": 4,
        "run__eval_generations": 0,
    }
    norms = []
    for dropout in (0.5, 0.0):
        lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": dropout}
        recipe = recipe_of(plain, lora=lora, **changes, output_dir=str(tmp_path / str(dropout)))
        if dropout:
            train_until(recipe, 3)
        train(recipe)
        norms.append([line["grad_norm"] for line in read_log(Path(recipe.output_dir) / "log.jsonl")])
    assert len(set(norms[0])) == 4 and len(set(norms[1])) == 1
    through = recipe_of(
        plain, lora={"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.5}, **changes, output_dir=str(tmp_path / "through")
    )
    train(through)
    assert [line["grad_norm"] for line in read_log(tmp_path / "through" / "log.jsonl")] == norms[0]


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_the_gradient_is_clipped_to_its_norm(plain: dict[str, Any], clip: float, recipe_of: Make) -> None:
    run = start(recipe_of(plain, optim__clip=clip))
    norms = []
    inner = run.engine.step
    run.engine.step = lambda *args: norms.append(inner(*args)) or norms[-1]  # type: ignore[func-returns-value,method-assign]
    given = torch.cat([gradient.flatten() for gradient in gradients(run).values()]).norm()
    assert norms[0] > 0.05
    assert float(given) == pytest.approx(clip if clip == 0.05 else norms[0], rel=1e-4)


STAGES: dict[str, dict[str, Any]] = {"projector": {}, "lora": {"lora": LORA}, "bf16": {"run__precision": "bf16"}}


def test_measured_buffers_come_back_after_a_resume(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recipe_of: Make
) -> None:
    """A projector's fixed mean is measured before the first step, by the warm start, and only then."""
    from polymodal.training.sft import task

    plain["init"]["model"]["projector"]["norm"] = "standardize"
    recipe = recipe_of(plain, warm_start={"steps": 3}, run__feature_cache="memory")

    def measure(model: Any, *_rest: Any) -> None:
        model.projector.norm.mean.fill_(0.25)

    monkeypatch.setattr(task, "warm_start", measure)
    final = train(recipe)
    (final / "polymodal.json").unlink()
    monkeypatch.delattr(task, "warm_start")
    train(recipe)
    assert load_model(final).model.state_dict()["projector.norm.mean"].eq(0.25).all()


def test_bf16_keeps_what_is_trained_in_float32_and_learns_the_same(plain: dict[str, Any], recipe_of: Make) -> None:
    exact = recipe_of(plain, lora=LORA)
    train(exact)
    half = recipe_of(plain, lora=LORA, run__precision="bf16", output_dir=plain["output_dir"] + "-bf16")
    train(half)
    one, two = losses(Path(exact.output_dir)), losses(Path(half.output_dir))
    assert one != two and np.allclose(one, two, rtol=0.03)
    assert {tensor.dtype for tensor in weights(Path(half.output_dir)).values()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_exactly(
    plain: dict[str, Any], tmp_path: Path, stage: str, recipe_of: Make, train_until: Until
) -> None:
    changes = {**STAGES[stage], "run__log_every": 2}
    through = recipe_of(plain, output_dir=str(tmp_path / "through"), **changes)
    train(through)
    killed = recipe_of(plain, output_dir=str(tmp_path / "killed"), **changes)
    train_until(killed, 5)
    assert not (tmp_path / "killed" / "final").exists()
    train(killed)
    assert losses(tmp_path / "killed") == losses(tmp_path / "through")
    one, two = weights(tmp_path / "through"), weights(tmp_path / "killed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(plain: dict[str, Any], recipe_of: Make) -> None:
    recipe = recipe_of(plain)
    final = train(recipe)
    stamp = (final / "polymodal.json").stat().st_mtime_ns
    assert train(recipe) == final
    assert (final / "polymodal.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"optim\.learning_rate 0\.01 -> 0\.0001\. Choose another"):
        train(recipe_of(plain, optim__learning_rate=1e-4))
    train(recipe_of(plain, optim__learning_rate=1e-4, run__resume="never"))
    assert (final / "polymodal.json").stat().st_mtime_ns != stamp


def test_other_data_under_a_checkpoint_is_refused(
    plain: dict[str, Any], tiny: Path, tmp_path: Path, recipe_of: Make
) -> None:
    records = json.loads((tiny / "data.json").read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    mix = [{"path": str(data), "image_root": str(tiny)}]
    recipe = recipe_of(plain, data__mix=mix)
    final = train(recipe)
    records[0]["conversations"][1]["value"] = "something else"
    data.write_text(json.dumps(records))
    (final / "polymodal.json").unlink()
    with pytest.raises(DataError, match="the data changed"):
        train(recipe)


@pytest.mark.parametrize("harm", ["no marker", "short file"])
def test_half_a_checkpoint_is_passed_over(plain: dict[str, Any], harm: str, recipe_of: Make) -> None:
    recipe = recipe_of(plain)
    train(recipe)
    folder = Path(recipe.output_dir)
    newest = checkpoint.complete_checkpoints(folder)[-1]
    if harm == "no marker":
        (newest / checkpoint.COMPLETE).unlink()
    else:
        data = (newest / checkpoint.OPTIMIZER).read_bytes()
        (newest / checkpoint.OPTIMIZER).write_bytes(data[:-10])
    (folder / "checkpoints" / ".step-0000009.abc.tmp").mkdir()
    left = checkpoint.complete_checkpoints(folder)
    assert newest not in left and len(left) == 1
    train(recipe)
    assert checkpoint.complete_checkpoints(folder)[-1] == newest
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_signal_saves_and_exits_with_its_code(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recipe_of: Make
) -> None:
    import os
    import signal

    recipe = recipe_of(plain, run__save_every=0)
    step = Trainer.step

    def signalled(run: Trainer, *rest: Any) -> float:
        loss = step(run, *rest)
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "step", signalled)
    with pytest.raises(SystemExit) as stopped:
        train(recipe)
    assert stopped.value.code == 143
    folder = checkpoint.complete_checkpoints(Path(recipe.output_dir))[-1]
    assert checkpoint.read_state(folder)["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def spoil(run: Trainer, times: int) -> None:
    """Make the next `times` forward passes return NaN."""
    inner, left = run.engine.inner.forward, [times]

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if left[0] > 0:
            left[0] -= 1
            return replace(out, loss_sum=out.loss_sum * float("nan"))
        return out

    run.engine.inner.forward = forward  # type: ignore[method-assign]


def test_a_nan_step_is_left_out_and_five_end_the_run(plain: dict[str, Any], recipe_of: Make) -> None:
    run = start(recipe_of(plain, batch__micro_size=8, run__max_steps=20))
    set_modes(run.engine.inner)
    before = [p.detach().clone() for p in run.engine.trained]
    spoil(run, times=1)
    batches = run.batches()
    run.step(batches)
    assert (run.state.skipped, run.state.step) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, run.engine.trained, strict=True))
    run.step(batches)
    assert run.state.skipped_in_row == 0
    assert all(bool(torch.isfinite(p).all()) for p in run.engine.trained)
    spoil(run, times=100)
    with pytest.raises(PolymodalError, match="5 steps in a row"):
        for _ in range(5):
            run.step(batches)


def test_time_can_bound_a_run(plain: dict[str, Any], recipe_of: Make) -> None:
    recipe = recipe_of(plain, run__max_steps=100_000, run__epochs=1e6, run__max_minutes=0.02, run__save_every=0)
    train(recipe)
    lines = read_log(Path(recipe.output_dir) / "log.jsonl")
    assert 1.0 <= lines[-1]["elapsed_s"] < 10
    assert 0.1 < lines[0]["peak_memory_gib"] <= lines[-1]["peak_memory_gib"] < 64  # of the process, and never less
    assert lines[-1]["learning_rate"]["projector"] < 0.05 * max(line["learning_rate"]["projector"] for line in lines)


def test_kinds_are_logged_and_add_up(plain: dict[str, Any], tiny: Path, tmp_path: Path, recipe_of: Make) -> None:
    records = json.loads((tiny / "data.json").read_text())
    for number, record in enumerate(records):
        record["kind"] = "odd" if number % 2 else "even"
    data = tmp_path / "kinds.json"
    data.write_text(json.dumps(records))
    recipe = recipe_of(plain, data__mix=[{"path": str(data), "image_root": str(tiny)}], run__save_every=0)
    train(recipe)
    for line in read_log(Path(recipe.output_dir) / "log.jsonl"):
        kinds = line["loss_by_kind"]
        assert set(kinds) == {"odd", "even"}
        assert min(kinds.values()) <= line["loss"] + 1e-5 and line["loss"] - 1e-5 <= max(kinds.values())


def test_a_full_disk_is_one_line(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recipe_of: Make) -> None:
    import safetensors.torch

    def full(*_args: Any, **_kwargs: Any) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises((CheckpointError, PolymodalError), match="No space left"):
        train(recipe_of(plain))


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"train": [{"match": "connector.*", "train": True}]}, "'connector.*'"),
        ({"train": []}, "nothing is trained"),
        ({"lora": {"match": "llm.model.layers.*.w_pack"}}, "w_pack"),
        ({"lora": {}, "train": [{"match": "llm.*", "train": True}]}, "do not go together"),
        ({"run__feature_cache": "memory", "train": [{"match": "*", "train": True}]}, "set it to off"),
        ({"data__mix": [{"path": "nowhere.json"}]}, "nowhere.json"),
        ({"data__max_length": 3}, "no record is left"),
    ],
)
def test_mistakes_are_one_line(plain: dict[str, Any], changes: dict[str, Any], needle: str, recipe_of: Make) -> None:
    with pytest.raises(PolymodalError, match=needle.replace("*", r"\*")) as error:
        train(recipe_of(plain, **changes))
    assert "\n" not in str(error.value)


def test_unreadable_records_stop_or_are_listed(
    plain: dict[str, Any], tiny: Path, tmp_path: Path, recipe_of: Make
) -> None:
    records = json.loads((tiny / "data.json").read_text())
    (tmp_path / "empty.png").write_bytes(b"")
    for record in records:
        if "image" in record:
            record["image"] = str(tiny / record["image"])
    records[3]["image"] = str(tmp_path / "empty.png")
    data = tmp_path / "broken.json"
    data.write_text(json.dumps(records))
    mix = [{"path": str(data), "image_root": "/"}]
    with pytest.raises(PolymodalError, match="record 3"):
        train(recipe_of(plain, data__mix=mix))
    train(recipe_of(plain, data__mix=mix, data__on_error="skip", run__max_steps=1))
    skipped = (Path(plain["output_dir"]) / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in skipped] == ["3"]


def name_a_nan(run: Trainer, wanted: int) -> str:
    """Make the first target of one sample of the step's NaN; returns its record."""
    index = int(run.task.steps.indices(0)[wanted])
    record = run.task.dataset.prepared.records[index].id
    inner = run.task.forward_backward

    def forward_backward(engine: Any, named: Any, *rest: Any) -> Any:
        kept = engine.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            out = kept(*args, **kwargs)
            if f"record {record}" not in named.records:
                return out
            losses = out.losses.clone()
            losses[named.records.index(f"record {record}")] = float("nan")
            return replace(out, losses=losses, loss_sum=out.loss_sum * float("nan"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "forward", forward)
            return inner(engine, named, *rest)

    run.task.forward_backward = forward_backward
    return str(record)


def test_a_nan_step_names_its_record_and_leaves_the_log_valid(
    plain: dict[str, Any], recipe_of: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(recipe_of(plain, batch__micro_size=4, run__max_steps=20, run__log_every=2))
    set_modes(run.engine.inner)
    record = name_a_nan(run, 5)
    batches = run.batches()
    run.step(batches)
    assert f"step 1: the loss is not finite (of record {record}), step left out" in capsys.readouterr().err
    run.task.forward_backward = type(run.task).forward_backward.__get__(run.task)
    loss = run.step(batches)
    (line,) = (
        json.loads(text, parse_constant=pytest.fail) for text in (run.output_dir / "log.jsonl").read_text().splitlines()
    )
    # Both tables, too, are of the step that counts.
    assert line["loss"] == pytest.approx(loss) and line["loss_by_source"] == pytest.approx({"data": loss})
    assert all(math.isfinite(value) for value in line["loss_by_kind"].values())


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    line = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": 2}}
    append_log(tmp_path / "log.jsonl", finite(line))
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": 2}}


def own_images(plain: dict[str, Any], tiny: Path, folder: Path) -> None:
    """Give a recipe copies of the images that a test may break."""
    import shutil

    shutil.copytree(tiny, folder, ignore=lambda *_: ["llm", "tower", "index"])
    plain["data"]["mix"] = [{"path": str(folder / "data.json")}]


@pytest.mark.parametrize("cache", ["off", "memory"])
@pytest.mark.parametrize("packing", ["none", "pack"])
def test_an_image_that_breaks_after_tokenising_is_left_out_exactly(
    plain: dict[str, Any],
    tiny: Path,
    tmp_path: Path,
    cache: str,
    packing: str,
    recipe_of: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step's gradient is that of the records that are left, whatever the micro-batches."""
    own_images(plain, tiny, tmp_path / "own")
    # One record a micro-batch, so that one of them has no target at all.
    size = {"batch__micro_size": 1, "batch__micro_tokens": 2, "batch__packing": packing, "batch__global_size": 4}
    changes = {**size, "run__feature_cache": cache, "data__on_error": "skip", "optim__clip": 0, "run__max_steps": 2}
    recipe = recipe_of(plain, **changes)
    broken: list[int] = []
    fill = SFTDataset.fill_store

    def break_first(dataset: SFTDataset, *rest: Any) -> Any:
        order = Order(dataset.prepared.sources, 0).take(0, 4)
        broken.append(next(int(i) for i in order if dataset.prepared.samples[i].plans))
        (tmp_path / "own" / f"{dataset.prepared.records[broken[0]].id}.png").write_bytes(b"cut")
        return fill(dataset, *rest)

    monkeypatch.setattr(SFTDataset, "fill_store", break_first)
    run = start(recipe)
    index, record = broken[0], run.task.dataset.prepared.records[broken[0]]
    set_modes(run.engine.inner)
    seen: list[dict[str, torch.Tensor]] = []
    run.engine.optimizer.step = lambda: seen.append(  # type: ignore[method-assign]
        {name: p.grad.clone() for group in run.engine.groups for name, p in group.parameters if p.grad is not None}
    )
    loss = run.step(run.batches())
    left = [int(i) for i in run.task.steps.indices(0) if int(i) != index]
    out = run.engine.inner(**run.task.dataset.batch(np.array(left)).inputs())
    assert run.state.trained_tokens == int(run.task.dataset.prepared.targets[left].sum())
    assert loss == pytest.approx(float(out.loss_sum.detach()) / run.state.trained_tokens, rel=1e-5)
    run.engine.inner.zero_grad()
    (out.loss_sum / run.state.trained_tokens).backward()
    for name, gradient in seen[0].items():
        assert torch.allclose(gradient, run.engine.inner.get_parameter(name).grad, atol=1e-6), name
    (line,) = (json.loads(text) for text in (Path(recipe.output_dir) / "skipped.jsonl").read_text().splitlines())
    assert line["id"] == record.id and f"record {record.id}: " in line["error"] and ".png" in line["error"]


def test_a_run_that_stops_at_a_broken_image_names_it_and_goes_on_once_it_is_mended(
    plain: dict[str, Any], tiny: Path, tmp_path: Path, recipe_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_images(plain, tiny, tmp_path / "own")
    recipe = recipe_of(plain, run__max_steps=6, run__save_every=0, run__workers=1)
    record = next(
        record.id
        for i in start(recipe).task.steps.indices(5)
        if (record := start(recipe).task.dataset.prepared.records[i]).messages[0].media
    )
    image = tmp_path / "own" / f"{record}.png"
    whole = image.read_bytes()
    step = Trainer.step

    def breaking(run: Trainer, *rest: Any) -> float:
        if run.state.step == 1:
            image.write_bytes(b"")
        return step(run, *rest)

    monkeypatch.setattr(Trainer, "step", breaking)
    with pytest.raises(MediaError, match=rf"record {record}: .*{record}\.png.*saved after step \d.*same command"):
        train(recipe)
    monkeypatch.undo()
    saved = checkpoint.complete_checkpoints(Path(recipe.output_dir))[-1]
    assert checkpoint.read_state(saved)["step"] >= 1
    image.write_bytes(whole)
    train(recipe)
    through = recipe_of(plain, run__max_steps=6, run__save_every=0, output_dir=str(tmp_path / "through"))
    train(through)
    assert losses(Path(recipe.output_dir)) == losses(Path(through.output_dir))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (8, "3 whole steps of 8 take 24 samples, 1 fewer than 1 epochs of 25: each is seen 0.96 times on average"),
        (64, "1 whole steps of 64 take 64 samples, 39 more than 1 epochs of 25: each is seen 2.56 times on average"),
        (5, ""),
    ],
)
def test_rounded_epochs_are_said_and_a_short_last_step_makes_them_exact(
    plain: dict[str, Any], size: int, said: str, recipe_of: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"batch__global_size": size, "run__epochs": 1, "run__max_steps": None}
    start(recipe_of(plain, **changes))
    words = capsys.readouterr().err
    assert f"{said}; batch.last_step=short" in words if said else "whole steps" not in words
    recipe = recipe_of(plain, **changes, batch__last_step="short", run__save_every=0, run__eval_generations=0)
    train(recipe)
    assert "whole steps" not in capsys.readouterr().err
    last = read_log(Path(recipe.output_dir) / "log.jsonl")[-1]
    assert (last["samples"], last["epoch"]) == (25, 1.0)


def test_the_model_is_exported_where_no_report_can_be_made(
    plain: dict[str, Any], recipe_of: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from polymodal.training import run

    changes = {"run__max_steps": 2, "run__save_every": 0, "run__eval_generations": 0}
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "matplotlib", None)
        assert load_model(train(recipe_of(plain, **changes))).history
    assert "tiny: no curves: " in capsys.readouterr().err

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "draw_curves", full)
    assert load_model(train(recipe_of(plain, **changes, output_dir=plain["output_dir"] + "-2"))).history
    assert "tiny: no curves: [Errno 28] No space left on device" in capsys.readouterr().err

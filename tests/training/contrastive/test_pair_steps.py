"""A step is one contrast whatever shares it: micro-batches, processes, kept tiles, a kill in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.errors import PolymodalError
from polymodal.modeling.dual_encoders.base import METRIC
from polymodal.training import checkpoint, distributed, train
from polymodal.training.contrastive import images
from polymodal.training.contrastive.task import ContrastiveTask
from polymodal.training.optimizer import set_modes
from polymodal.training.process_group import World
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.recipes.load import dump_recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.run import make_trainer
from polymodal.training.trainer import Trainer

Make = Callable[..., PairRecipe]
CUTS = {"type": "crop_flip", "scale": [0.5, 1.0], "flip": 0.5}
CALM = {"optim__eps": 1e-4}
"""A key's bias has no gradient but rounding, which Adam with a small epsilon would make steps of."""
CLIP = {"objective": {"type": "clip"}, "init__model__family": "clip"}


def start(recipe: PairRecipe) -> Trainer:
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    run = make_trainer(ContrastiveTask(recipe, World()))
    set_modes(run.engine.inner)
    return run


def take(recipe: PairRecipe, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = start(recipe)
    batches = run.batches()
    losses = [run.step(batches) for _ in range(steps)]
    batches.close()
    return losses, {name: p.detach().clone() for name, p in run.engine.inner.named_parameters()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = checkpoint.complete_checkpoints(folder)[-1]
    return {**load_file(newest / checkpoint.MODEL), **load_file(newest / checkpoint.OPTIMIZER)}


@pytest.mark.parametrize("objective", [{}, {"objective__chunk": 3}, CLIP])
@pytest.mark.parametrize("micro", [2, 3])
def test_micro_batches_are_the_whole_batch(
    pair_plain: dict[str, Any], pair_recipe: Make, objective: dict[str, Any], micro: int
) -> None:
    """Also where the micro-batches differ in size, and where a step holds an image twice."""
    mix = [{**pair_plain["data"]["mix"][0], "repeat": 2.0}]
    changes = {**objective, **CALM, "data__mix": mix, "augment": CUTS}
    whole = take(pair_recipe(pair_plain, **changes))
    parts = take(pair_recipe(pair_plain, **changes, batch__micro_size=micro))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for name, value in whole[1].items():
        assert torch.allclose(parts[1][name], value, atol=1e-5), name


@pytest.mark.parametrize("micro", [None, 3])
def test_equal_captions_of_different_images_are_no_negatives(
    pair_plain: dict[str, Any], pair_recipe: Make, drawn: Path, tmp_path: Path, micro: int | None
) -> None:
    """SigLIP begins at 10 cos - 10: a pair costs from 0 to 20, a negative nothing. 64 pairs cost more than any 8."""
    records = json.loads((drawn / "data.json").read_text())
    for record in records:
        record["image"], record["captions"] = str(drawn / record["image"]), ["red top left"]
    (tmp_path / "same.json").write_text(json.dumps(records))
    mix = [{"path": str(tmp_path / "same.json"), "image_root": str(drawn)}]
    losses, _ = take(pair_recipe(pair_plain, data__mix=mix, batch__micro_size=micro), 1)
    assert losses[0] > 40


def test_a_frozen_tower_may_be_kept(pair_plain: dict[str, Any], pair_recipe: Make, tmp_path: Path) -> None:
    """Kept in float32 its output gives the same steps, and it runs once for each image in the whole run."""
    changes: dict[str, Any] = {
        **CLIP,
        "train": [{"match": "*", "train": True}, {"match": "vision_model.*", "train": False}],
        "run__feature_dtype": "float32",
    }
    live = take(pair_recipe(pair_plain, **changes))
    kept_recipe = pair_recipe(pair_plain, **changes, run__feature_cache=str(tmp_path / "kept"))
    kept = take(kept_recipe)
    assert kept[0] == pytest.approx(live[0], rel=1e-6)
    run = start(kept_recipe)
    assert len(run.task.dataset.store.where) == 16
    run.engine.inner.vision_model = None  # type: ignore[assignment]  # not needed any more
    batch = next(run.batches())
    assert batch.pixel_values is None and batch.features is not None
    assert torch.isfinite(run.engine.inner.embed(batch).image).all()  # type: ignore[operator]


def test_kept_tiles_change_nothing(
    pair_plain: dict[str, Any], pair_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for augment in (CUTS, {"type": "none"}, {**CUTS, "scale": [1.0, 1.0]}):
        plain = take(pair_recipe(pair_plain, augment=augment))
        cached = pair_recipe(pair_plain, augment=augment, data__tile_cache=str(tmp_path / "tiles"))
        assert take(cached)[0] == plain[0]

        def refuse(*_args: Any, **_kwargs: Any) -> Any:
            raise AssertionError("an image was decoded again")

        with monkeypatch.context() as patch:
            patch.setattr(images, "open_image", refuse)
            assert take(cached)[0] == plain[0]


def test_terms_are_logged_by_name_and_metrics_apart(pair_plain: dict[str, Any], pair_recipe: Make) -> None:
    """Named terms add up to the loss; metrics are means and stay out of it."""
    run = start(pair_recipe(pair_plain, batch__micro_size=2))
    model: Any = run.engine.inner
    inner = model.extra

    def extra(batch: Any, embedded: Any, everyone: Any) -> dict[str, torch.Tensor]:
        pull = embedded.image.square().sum() / len(everyone.image_ids)
        assert len(everyone.image_ids) == 8 and torch.equal(
            everyone.image_ids[everyone.offset : everyone.offset + len(batch)], batch.image_ids
        )
        return {**inner(batch, embedded, everyone), "pull": 2 * pull, f"{METRIC}seven": torch.tensor(7.0)}

    model.extra = extra
    loss = run.step(run.batches())
    line = read_log(run.output_dir / "log.jsonl")[0]
    assert line["terms"].keys() == {"siglip", "pull"}
    assert line["terms"]["pull"] == pytest.approx(2.0, rel=1e-5)
    assert sum(line["terms"].values()) == pytest.approx(line["loss"]) == pytest.approx(loss)
    assert line["metrics"]["seven"] == pytest.approx(7.0)
    assert (line["samples"], line["trained_tokens"]) == (8, 8)
    task: Any = run.task
    assert line["real_tokens"] == sum(len(task.dataset.prepared.text(number)) for number in task.contrast_plan(0).texts)


def test_the_temperature_is_bounded(pair_plain: dict[str, Any], pair_recipe: Make) -> None:
    run = start(pair_recipe(pair_plain, **CLIP, optim__learning_rate=3.0, optim__warmup=0))
    model: Any = run.engine.inner
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    batches = run.batches()
    top = 0.0
    for _ in range(4):
        run.step(batches)
        top = max(top, float(model.logit_scale.detach()))
    assert top <= np.log(100) + 1e-6


@pytest.mark.parametrize("cache", ["off", "folder"])
def test_a_killed_run_goes_on_exactly(
    pair_plain: dict[str, Any],
    pair_recipe: Make,
    tmp_path: Path,
    train_until: Callable[[PairRecipe, int], None],
    cache: str,
) -> None:
    """Weights, optimizer and log, with images cut at random, dropout, and a step that spans two epochs."""
    changes: dict[str, Any] = {
        **CLIP,
        "augment": CUTS,
        "batch": {"global_size": 6, "micro_size": 4},
        "run__max_steps": 7,
        "run__save_every": 2,
        "run__log_every": 2,
        "init__model__text__attention_dropout": 0.2,
        "text__templates": ["an image of {}", "{}"],
    }
    if cache == "folder":
        changes["data__tile_cache"] = str(tmp_path / "tiles")
    through = pair_recipe(pair_plain, **changes, output_dir=str(tmp_path / "through"))
    train(through)
    killed = pair_recipe(pair_plain, **changes, output_dir=str(tmp_path / "killed"))
    train_until(killed, 5)
    assert not (tmp_path / "killed" / "final").exists()
    final = train(killed)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("through", "killed")]
    for name in ("loss", "terms", "metrics", "grad_norm", "samples", "real_tokens"):
        assert [line[name] for line in logs[0]] == [line[name] for line in logs[1]], name
    one, two = stored(tmp_path / "through"), stored(tmp_path / "killed")
    assert one.keys() == two.keys() and "logit_scale" in one
    assert all(torch.equal(one[name], two[name]) for name in one)
    stamp = (final / "polymodal_pair.json").stat().st_mtime_ns
    assert train(killed) == final and (final / "polymodal_pair.json").stat().st_mtime_ns == stamp


def test_a_changed_recipe_goes_on_only_by_force(pair_plain: dict[str, Any], pair_recipe: Make) -> None:
    train(pair_recipe(pair_plain, run__max_steps=2))
    changed = pair_recipe(pair_plain, run__max_steps=3, objective__chunk=4, batch__micro_size=2)
    with pytest.raises(PolymodalError, match=r"objective\.chunk \(none\) -> 4; run\.max_steps 2 -> 3"):
        train(changed)
    train(changed, force=True)
    assert [line["step"] for line in read_log(Path(changed.output_dir) / "log.jsonl")] == [1, 2, 3]


def test_a_step_that_is_not_finite_is_left_out(
    pair_plain: dict[str, Any], pair_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(pair_recipe(pair_plain))
    model: Any = run.engine.inner
    before = [p.detach().clone() for p in run.engine.trained]
    inner = model.contrast
    with monkeypatch.context() as patch:
        patch.setattr(
            model, "contrast", lambda *a: {k: v * (v if k.startswith(METRIC) else np.nan) for k, v in inner(*a).items()}
        )
        run.step(run.batches())
    assert (run.state.skipped, run.state.step) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, run.engine.trained, strict=True))


def test_two_processes_take_the_steps_of_one(
    pair_plain: dict[str, Any], pair_recipe: Make, tmp_path: Path, run_jobs: Any
) -> None:
    changes: dict[str, Any] = {
        **CALM,
        "augment": CUTS,
        "run__max_steps": 4,
        "batch__micro_size": 3,
        "run__eval_every": 4,
        "data__eval": pair_plain["data"]["mix"],
    }
    jobs = []
    for case, kind in {"siglip": {}, "clip": CLIP}.items():
        for size in (1, 2):
            recipe = pair_recipe(pair_plain, **changes, **kind, output_dir=str(tmp_path / f"{case}{size}"))
            path = tmp_path / f"{case}{size}.yaml"
            path.write_text(dump_recipe(recipe))
            jobs.append({"recipe": str(path), "order": f"{path}.order", "moments": [None] * size})
    results = run_jobs(jobs)
    assert [statuses for statuses, _, _ in results] == [[0], [0, 0]] * 2, results
    for case in ("siglip", "clip"):
        folders = [tmp_path / f"{case}{size}" for size in (1, 2)]
        for one, two in zip(*(read_log(folder / "log.jsonl") for folder in folders), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
            assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
            assert two["samples"] == one["samples"]
        evals = [read_log(folder / "eval.jsonl")[-1] for folder in folders]
        assert evals[0]["recall"] == evals[1]["recall"]
        assert evals[0]["loss"] == pytest.approx(evals[1]["loss"], rel=1e-4)
        alone, shared = stored(folders[0]), stored(folders[1])
        assert alone.keys() == shared.keys()
        for name in alone:
            assert torch.allclose(alone[name], shared[name], atol=1e-5), name


def test_gradients_are_summed_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes over the wire, with a second process that holds the same gradients: each sum is doubled, once."""
    sent: list[int] = []

    def double(tensor: torch.Tensor, op: Any = None) -> None:
        if tensor.dtype is not torch.uint8:
            sent.append(tensor.numel())
            tensor.mul_(2)

    monkeypatch.setattr(distributed.dist, "all_reduce", double)
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 40)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (4, 8, 3, 5)]
    for number, parameter in enumerate(parameters):
        if number != 2:
            parameter.grad = torch.full_like(parameter, number + 1.0)
    distributed.sum_gradients(parameters)
    assert parameters[2].grad is None and sent == [12, 5]
    assert [float(p.grad[0]) for p in parameters if p.grad is not None] == [2.0, 4.0, 8.0]


def test_an_engine_that_shards_is_refused(pair_plain: dict[str, Any], pair_recipe: Make) -> None:
    with pytest.raises(PolymodalError, match=r"run\.engine 'fsdp2': a pair stage .* leave run\.engine at auto"):
        pair_recipe(pair_plain, run__engine="fsdp2")

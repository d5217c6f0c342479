"""Going on from a checkpoint: what may change, what is refused, and a disk that is full."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.errors import CheckpointError, ConfigError, DataError, PolymodalError
from polymodal.training import checkpoint, train
from polymodal.training.checkpoint import differences, identity
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log

Make = Callable[..., Recipe]
Until = Callable[[Recipe, int], None]


def test_every_difference_is_named_old_and_new(plain: dict[str, Any], recipe_of: Make) -> None:
    before = identity(recipe_of(plain))
    changed = recipe_of(
        plain, optim__learning_rate=1e-4, batch__global_size=4, lora={"lora_r": 4}, data__max_length=99, run__workers=7
    )
    found = differences(before, changed)
    assert "optim.learning_rate 0.01 -> 0.0001" in found
    assert "batch.global_size 8 -> 4" in found
    assert "data.max_length 2048 -> 99" in found
    assert any(line.startswith("lora") for line in found)
    assert not any("workers" in line for line in found)
    assert differences(before, recipe_of(plain)) == []


def test_keys_that_are_new_since_the_run_began_count_as_their_defaults(plain: dict[str, Any], recipe_of: Make) -> None:
    before = identity(recipe_of(plain))
    del before["batch"]["packing"]
    assert differences(before, recipe_of(plain)) == []
    assert differences(before, recipe_of(plain, batch__packing="pack")) == ['batch.packing "none" -> "pack"']


@pytest.mark.parametrize(
    "change",
    [
        {"run__workers": 5},
        {"run__engine": "fsdp2"},
        {"run__log_every": 3},
        {"batch__micro_size": 2},
        {"run__eval_generations": 0},
        {"output_dir": "elsewhere"},
    ],
)
def test_what_does_not_decide_the_result_may_change(
    plain: dict[str, Any], change: dict[str, Any], recipe_of: Make
) -> None:
    assert differences(identity(recipe_of(plain)), recipe_of(plain, **change)) == []


def test_a_changed_recipe_goes_on_only_by_force(plain: dict[str, Any], recipe_of: Make, train_until: Until) -> None:
    train_until(recipe_of(plain), 4)
    changed = recipe_of(plain, optim__weight_decay=0.5, optim__clip=0.1)
    with pytest.raises(ConfigError, match="--force") as refused:
        train(changed)
    assert "optim.clip 1.0 -> 0.1; optim.weight_decay 0.0 -> 0.5" in str(refused.value)
    assert "\n" not in str(refused.value)
    train(changed, force=True)
    lines = read_log(Path(plain["output_dir"]) / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_takes_more_steps_by_force(plain: dict[str, Any], recipe_of: Make) -> None:
    train(recipe_of(plain, run__max_steps=3))
    longer = recipe_of(plain, run__max_steps=5)
    with pytest.raises(ConfigError, match=r"run\.max_steps 3 -> 5"):
        train(longer)
    train(longer, force=True)
    assert [line["step"] for line in read_log(Path(plain["output_dir"]) / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_changed_data_go_on_only_by_force(plain: dict[str, Any], tiny: Path, tmp_path: Path, recipe_of: Make) -> None:
    records = json.loads((tiny / "data.json").read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    recipe = recipe_of(plain, data__mix=[{"path": str(data), "image_root": str(tiny)}], run__max_steps=3)
    final = train(recipe)
    records[0]["conversations"][1]["value"] = "something else"
    data.write_text(json.dumps(records))
    (final / "polymodal.json").unlink()
    with pytest.raises(DataError, match="--force"):
        train(recipe)
    assert train(recipe, force=True) == final


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recipe_of: Make
) -> None:
    """The kernel itself refuses to write past a size, as it does on a full disk, in the middle of the second save."""
    recipe = recipe_of(plain, train=[{"match": "*", "train": True}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, saves = checkpoint.save_checkpoint, [0]

    def save_on_a_full_disk(*args: Any) -> Path:
        saves[0] += 1
        if saves[0] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    folder = Path(plain["output_dir"])
    with monkeypatch.context() as patch:
        patch.setattr("polymodal.training.distributed.save_checkpoint", save_on_a_full_disk)
        with pytest.raises(PolymodalError, match="cannot be written") as error:
            train(recipe)
    assert "\n" not in str(error.value) and "is the disk full?" in str(error.value)
    (left,) = checkpoint.complete_checkpoints(folder)
    assert left.name == "step-0000002"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-0000002"]
    train(recipe)
    whole = recipe_of(plain, train=[{"match": "*", "train": True}], output_dir=str(folder.parent / "whole"))
    train(whole)
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        ends = [checkpoint.complete_checkpoints(f)[-1] / name for f in (folder, folder.parent / "whole")]
        assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_log_that_cannot_be_written_is_one_line(plain: dict[str, Any]) -> None:
    folder = Path(plain["output_dir"])
    folder.mkdir()
    os.symlink("/dev/full", folder / "log.jsonl")
    from polymodal.training.reporting.log import append_log

    with pytest.raises(PolymodalError, match="No space left"):
        append_log(folder / "log.jsonl", {"step": 1})


def test_a_checkpoint_about_to_be_replaced_comes_back(plain: dict[str, Any], recipe_of: Make) -> None:
    """A kill between the two renames of a replacement."""
    train(recipe_of(plain, run__max_steps=2))
    folder = Path(plain["output_dir"])
    newest = checkpoint.complete_checkpoints(folder)[-1]
    newest.rename(newest.with_name(f".{newest.name}.0a1b2c3d.old"))
    assert checkpoint.complete_checkpoints(folder) == []
    checkpoint.remove_leftovers(folder)
    assert checkpoint.complete_checkpoints(folder) == [newest]


def test_a_damaged_checkpoint_names_itself(plain: dict[str, Any], recipe_of: Make) -> None:
    recipe = recipe_of(plain, run__max_steps=2)
    final = train(recipe)
    (final / "polymodal.json").unlink()
    path = checkpoint.complete_checkpoints(Path(recipe.output_dir))[-1] / checkpoint.MODEL
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        train(recipe)


def test_rows_of_several_files_are_read_as_one_tensor(tmp_path: Path) -> None:
    """A sharded checkpoint, read by one process and by three."""
    from safetensors.torch import save_file

    whole = torch.arange(35.0).view(7, 5)
    for rank, (start, stop) in enumerate(((0, 4), (4, 7))):
        path = tmp_path / f"model-{rank + 1:04d}-of-0002.safetensors"
        tensors = {"w": whole[start:stop].contiguous()} | ({"n": torch.tensor(3.0)} if rank == 0 else {})
        save_file(tensors, path, metadata={"rows": json.dumps({"w": [start, 7]})})
    places = checkpoint._places(tmp_path, checkpoint.MODEL)
    assert places["w"].shape == (7, 5) and places["n"].shape == ()
    assert torch.equal(places["w"].read(0, (7, 5)), whole)
    assert torch.equal(places["w"].read(3, (3, 5)), whole[3:6])
    assert places["w"].read(7, (0, 5)).shape == (0, 5)
    assert places["n"].read(0, ()) == 3.0

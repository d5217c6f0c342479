"""Crash-safe training state: what is trained, the optimizer, and one integer position.

A checkpoint is a folder written beside its final name, fsync'ed, marked `COMPLETE` and renamed; a kill at any moment
leaves only a hidden temporary folder, which the next run removes. (The Hugging Face Trainer writes in place, and a
killed save is picked up on resume.) Tensors are safetensors, the rest is JSON; pickle is never read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polymodal.errors import CheckpointError
from polymodal.files import atomic_folder
from polymodal.training.policy import Group

COMPLETE = "COMPLETE"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return output_dir / "checkpoints" / f"step-{step:07d}"


def trained_tensors(model: torch.nn.Module, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of a model.

    Args:
        model: The model.
        groups: Its trained parameters.

    Returns:
        The trained parameters, and the buffers of every part that has some: a projector's fixed mean and scale, say,
        are measured before the first step and are not in the weights that the run started from.
    """
    found: dict[str, torch.Tensor] = {name: p for group in groups for name, p in group.parameters}
    parts = {name.split(".")[0] for name in found}
    stored = model.state_dict().keys()
    found |= {name: b for name, b in model.named_buffers() if name in stored and name.split(".")[0] in parts}
    return found


def save_checkpoint(
    output_dir: Path,
    state: dict[str, Any],
    model: torch.nn.Module,
    groups: Sequence[Group],
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write a checkpoint and remove the oldest ones.

    Args:
        output_dir: The run's folder.
        state: Plain data with at least `step`.
        model: The model.
        groups: The trained parameters.
        optimizer: Made from these groups.
        keep: Checkpoints kept.

    Returns:
        The checkpoint's folder.

    Raises:
        PolymodalError: It cannot be written.
    """
    from safetensors.torch import save_file

    target = checkpoint_folder(output_dir, int(state["step"]))
    tensors = {name: t.detach().cpu().contiguous() for name, t in trained_tensors(model, groups).items()}
    moments = {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for group in groups
        for name, parameter in group.parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    with atomic_folder(target, replace=True) as work:
        try:
            save_file(tensors, work / MODEL)
            save_file(moments, work / OPTIMIZER)
        except Exception as error:  # safetensors hides the operating system's error in its own type
            raise CheckpointError(f"{target}: cannot be written ({error}); is the disk full?") from error
        (work / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        (work / COMPLETE).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    for old in complete_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first; a folder that a crash or a copy left half is not among them."""
    folder = output_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in sorted(folder.iterdir()) if re.fullmatch(r"step-\d+", path.name) and _whole(path)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def remove_leftovers(output_dir: Path) -> None:
    """Delete temporary folders of saves that were killed."""
    folder = output_dir / "checkpoints"
    for path in folder.glob(".step-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain data of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def restore(folder: Path, model: torch.nn.Module, groups: Sequence[Group], optimizer: torch.optim.Optimizer) -> None:
    """Load parameters and optimizer state, in place.

    Args:
        folder: A complete checkpoint.
        model: The model.
        groups: The trained parameters of the same recipe.
        optimizer: Made from these groups.

    Raises:
        CheckpointError: The checkpoint holds other parameters, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: damaged ({error}); remove it to go on from the one before") from error
    own = trained_tensors(model, groups)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} parameters do not fit the recipe, such as {wrong[0]}; "
            "choose another output_dir or set run.resume=never"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    for name, parameter in ((name, parameter) for group in groups for name, parameter in group.parameters):
        prefix = f"{name}:"
        found = {key.removeprefix(prefix): value for key, value in moments.items() if key.startswith(prefix)}
        if found:
            # AdamW keeps its step count on the CPU unless it is fused.
            fused = bool(optimizer.param_groups[0].get("fused"))
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" or fused else value for key, value in found.items()
            }


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False

"""Crash-safe training state: what is trained, the optimizer, and one integer position.

A checkpoint is a folder written beside its final name, fsync'ed, marked `COMPLETE` and renamed; a kill at any moment
leaves only hidden temporary folders, which the next run removes. (The Hugging Face Trainer writes in place, and a
killed save is picked up on resume.) Tensors are safetensors, the rest is JSON; pickle is never read, which is why
sharded runs do not go through `torch.distributed.checkpoint` (its `.metadata` is one).

A sharded run writes one pair of files a process, each with the rows that it holds and where they start. Any number of
processes, sharded or not, reads them back: each takes the rows it needs.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polymodal.config import parse_config
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.training.optimizer import Group
from polymodal.training.process_group import World
from polymodal.training.recipes.sections import RecipeBase
from polymodal.utils.files import atomic_folder
from polymodal.utils.progress import log

COMPLETE = "COMPLETE"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass
class State:
    """Where a run is; plain numbers, stored in each checkpoint."""

    step: int = 0  # Optimizer steps done
    samples: int = 0  # Samples seen
    trained_tokens: int = 0  # Tokens with a label seen
    real_tokens: int = 0  # Tokens seen, padding not counted
    elapsed_s: float = 0.0  # Time in the loop, by the first process's clock
    skipped: int = 0  # Steps left out because of a gradient that was not finite
    skipped_in_row: int = 0  # The same, since the last good step
    pending_loss: float = 0.0  # Sum of losses since the last log line
    pending_tokens: int = 0  # Trained tokens since the last log line
    finished: bool = False  # The run is over


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return output_dir / "checkpoints" / f"step-{step:07d}"


def trained_tensors(model: torch.nn.Module, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of a model."""
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
    world: World | None = None,
) -> Path:
    """Write a checkpoint and remove the oldest ones; every process calls it."""
    world = world or World()
    target = checkpoint_folder(output_dir, int(state["step"]))
    tensors = {MODEL: trained_tensors(model, groups), OPTIMIZER: _moments(groups, optimizer)}
    sharded = any(is_sharded(tensor) for tensor in tensors[MODEL].values())
    if sharded:
        # All write at the same time; everything is on disk when this block ends.
        with world.together(), atomic_folder(_rank_folder(target, world.rank), replace=True) as work:
            _write(work, tensors, target, world)
    with world.together():
        if not world.is_main:
            return target
        with atomic_folder(target, replace=True) as work:
            if sharded:
                for rank in range(world.size):
                    for path in _rank_folder(target, rank).iterdir():
                        path.rename(work / path.name)
                    _rank_folder(target, rank).rmdir()
            else:
                _write(work, tensors, target, World())
            (work / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            # Last comes the marker, with the size of every file.
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
    """Delete temporary folders of saves that were killed; a checkpoint that was about to be replaced comes back."""
    folder = output_dir / "checkpoints"
    for path in sorted(folder.glob(".step-*")) if folder.is_dir() else ():
        target = folder / path.name.split(".")[1]
        if path.suffix == ".old" and _whole(path) and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain data of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def restore(folder: Path, model: torch.nn.Module, groups: Sequence[Group], optimizer: torch.optim.Optimizer) -> None:
    """Load parameters and optimizer state, in place; every process calls it, sharded or not."""
    from safetensors import SafetensorError

    if (folder / "zero").is_dir():
        raise CheckpointError(
            f"{folder} was written by DeepSpeed, which was removed; export it with the version that wrote it, or start "
            "anew with run.resume=never and run.engine=fsdp2"
        )
    own = trained_tensors(model, groups)
    try:
        stored, moments = _places(folder, MODEL), _places(folder, OPTIMIZER)
        wrong = sorted(own.keys() ^ stored.keys())
        wrong += sorted(name for name in own.keys() & stored.keys() if tuple(own[name].shape) != stored[name].shape)
        if wrong:
            raise CheckpointError(
                f"{folder}: {len(wrong)} parameters do not fit the recipe, such as {wrong[0]}; "
                "choose another output_dir or set run.resume=never"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                local(tensor).copy_(stored[name].read_like(tensor))
        by_name: dict[str, dict[str, Stored]] = {}
        for key, place in moments.items():
            name, _, moment = key.rpartition(":")
            by_name.setdefault(name, {})[moment] = place
        for name, parameter in ((name, parameter) for group in groups for name, parameter in group.parameters):
            if name in by_name:
                optimizer.state[parameter] = {
                    moment: _moment_like(parameter, moment, place, bool(optimizer.param_groups[0].get("fused")))
                    for moment, place in by_name[name].items()
                }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: damaged ({error}); remove it to go on from the one before") from error


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds some rows."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds; writing to it changes the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def first_row(tensor: torch.Tensor) -> int:
    """Where this process's rows start; 0 for a tensor that is not sharded."""
    if not is_sharded(tensor):
        return 0
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    each = -(-tensor.shape[0] // mesh.size())  # FSDP2 shards rows as torch.chunk does
    return min(each * mesh.get_local_rank(), tensor.shape[0])


class Stored:
    """Where a tensor's rows lie in a checkpoint's files."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.pieces: list[tuple[Path, str, int, int]] = []

    def read_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Read the rows that this process holds of `tensor`."""
        return self.read(first_row(tensor), local(tensor).shape)

    def read(self, start: int, shape: Sequence[int]) -> torch.Tensor:
        """Read rows."""
        from safetensors import safe_open

        parts = []
        stop = start + (shape[0] if shape else 1)
        for path, name, first, count in sorted(self.pieces, key=lambda piece: piece[2]):
            low, high = max(start, first), min(stop, first + count)
            if low >= high:
                continue
            with safe_open(path, framework="pt") as file:
                if not shape:
                    return file.get_tensor(name)
                parts.append(file.get_slice(name)[low - first : high - first])
        return torch.cat(parts) if parts else torch.empty(tuple(shape))


def _places(folder: Path, kind: str) -> dict[str, Stored]:
    """Index the files of one kind."""
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    stem = kind.removesuffix(".safetensors")
    paths = sorted(folder.glob(f"{stem}*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: {kind} is missing; remove the folder to go on from the one before")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            rows: dict[str, list[int]] = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118  # not a dict
                shape = tuple(file.get_slice(name).get_shape())
                start, total = rows.get(name, (0, shape[0] if shape else 1))
                place = found.setdefault(name, Stored((total, *shape[1:]) if shape else ()))
                place.pieces.append((path, name, start, shape[0] if shape else 1))
    return found


def _moments(groups: Sequence[Group], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value
        for group in groups
        for name, parameter in group.parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _moment_like(parameter: torch.Tensor, moment: str, place: Stored, fused: bool) -> torch.Tensor:
    """Read one moment, sharded and placed as its parameter is."""
    if not place.shape:
        # AdamW keeps its step count on the CPU unless it is fused.
        value = place.read(0, ())
        return value.to(parameter.device) if fused or moment != "step" else value
    value = place.read_like(parameter).to(parameter.device)
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    return DTensor.from_local(
        value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _rank_folder(target: Path, rank: int) -> Path:
    return target.with_name(f".{target.name}.rank-{rank}")


def _write(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], target: Path, world: World) -> None:
    """Write this process's rows: everything where nothing is sharded."""
    from safetensors.torch import save_file

    for kind, named in tensors.items():
        name = kind
        if world.size > 1:
            name = kind.replace(".", f"-{world.rank + 1:04d}-of-{world.size:04d}.")
        mine = {
            key: tensor
            for key, tensor in named.items()
            if (local(tensor).numel() if is_sharded(tensor) else world.is_main)
        }
        rows = {key: [first_row(tensor), tensor.shape[0]] for key, tensor in mine.items() if is_sharded(tensor)}
        plain = {key: local(tensor).detach().cpu().contiguous() for key, tensor in mine.items()}
        try:
            save_file(plain, folder / name, metadata={"rows": json.dumps(rows)} if rows else None)
        except Exception as error:  # safetensors hides the operating system's error in its own type
            raise CheckpointError(
                f"{target}: cannot be written ({first_line(error)}); is the disk full? Earlier checkpoints are whole: "
                "make room and run the same command again"
            ) from error


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


FREE = frozenset(
    {"output_dir", "data.eval", "data.index", "data.tile_cache", "batch.micro_size", "batch.micro_tokens"}
    | {f"run.{key}" for key in ("log_every", "save_every", "keep", "resume", "threads", "workers", "feature_cache")}
    | {f"run.{key}" for key in ("eval_every", "eval_generations", "trackers", "engine")}
    | {f"tokenizer.{key}" for key in ("min_usage", "baseline", "shown", "save_dtype")}
    | {f"run.{key}" for key in ("timeout_minutes", "checkpointing", "compile")}
)
"""Keys that may change between a run and its resumption: they change speed, memory, reports, and rounding at most."""

SHOWN = 6
"""Differences that an error lists."""


def identity(recipe: RecipeBase) -> dict[str, Any]:
    """What of a recipe decides the result, as plain nested data."""
    plain: dict[str, Any] = json.loads(recipe.model_dump_json(by_alias=True))
    for key in FREE:
        section, _, inner = key.partition(".")
        if inner:
            plain.get(section, {}).pop(inner, None)
        else:
            plain.pop(section, None)
    return plain


def in_todays_keys(before: dict[str, Any], recipe: RecipeBase) -> dict[str, Any]:
    """A stored identity of an earlier version: keys renamed, younger ones at their defaults; as it is where unknown."""
    with suppress(ConfigError), warnings.catch_warnings(action="ignore", category=FutureWarning):
        return identity(parse_config(type(recipe), {**before, "output_dir": recipe.output_dir}, "checkpoint"))
    return before


def differences(before: dict[str, Any], recipe: RecipeBase) -> list[str]:
    """Compare a stored identity with a recipe."""
    before = in_todays_keys(before, recipe)
    old, new = flatten(before, whole_lists=True), flatten(identity(recipe), whole_lists=True)
    return [
        f"{key} {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def find_checkpoint(recipe: RecipeBase, world: World, force: bool = False) -> Path | None:
    """Find the checkpoint to go on from; clears the folder for a new start."""
    output_dir = Path(recipe.output_dir)
    if world.is_main:
        remove_leftovers(output_dir)
        if recipe.run.resume == "never":
            shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    world.barrier()
    found = complete_checkpoints(output_dir)
    if not found:
        return None
    changed = differences(read_state(found[-1])["recipe"], recipe)
    if changed and force:
        if world.is_main:
            log(f"{recipe.name}: going on under a changed recipe: {'; '.join(changed)}")
    elif changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            f"{output_dir} holds a run of another recipe: {'; '.join(changed[:SHOWN])}{more}. Choose another "
            "output_dir, go on all the same with --force, or start anew there with run.resume=never"
        )
    return found[-1]


def flatten(value: Any, prefix: str = "", whole_lists: bool = False) -> dict[str, Any]:
    """Nested plain data as dotted keys, for comparing settings key by key; lists of plain values may stay whole."""
    if isinstance(value, dict) and value:
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and (any(isinstance(i, dict | list) for i in value) if whole_lists else value):
        pairs = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in pairs:
        found |= flatten(item, f"{prefix}.{key}" if prefix else key, whole_lists)
    return found


def _short(value: Any) -> str:
    text = "(none)" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

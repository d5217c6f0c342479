"""Going on from a checkpoint: which one, and whether the recipe is still the one it was made under.

What decides a run's result is compared key by key, and every difference is shown, old -> new; with a difference a run
goes on only by force. What only changes speed, memory or what is reported may differ freely.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from polymodal.config import parse_config
from polymodal.errors import ConfigError
from polymodal.training import checkpoint
from polymodal.training.process_group import World
from polymodal.training.recipes.load import AnyRecipe
from polymodal.utils.progress import say

FREE = frozenset(
    {"output_dir", "data.eval", "data.index", "data.tile_cache", "batch.micro_size", "batch.micro_tokens"}
    | {f"run.{key}" for key in ("log_every", "save_every", "keep", "resume", "threads", "workers", "feature_cache")}
    | {f"run.{key}" for key in ("eval_every", "eval_generations", "trackers", "engine", "deepspeed_config")}
    | {f"run.{key}" for key in ("timeout_minutes", "checkpointing", "compile")}
)
"""Keys that may change between a run and its resumption: they change rounding at most."""

SHOWN = 6
"""Differences that an error lists."""


def identity(recipe: AnyRecipe) -> dict[str, Any]:
    """What of a recipe decides the result, as plain nested data."""
    plain: dict[str, Any] = json.loads(recipe.model_dump_json(by_alias=True))
    for key in FREE:
        section, _, inner = key.partition(".")
        if inner:
            plain[section].pop(inner, None)
        else:
            plain.pop(section, None)
    return plain


def differences(before: dict[str, Any], recipe: AnyRecipe) -> list[str]:
    """Compare a stored identity with a recipe.

    Args:
        before: What `identity` gave when the run began. Keys that did not exist then count as their defaults.
        recipe: The recipe of now.

    Returns:
        One "key old -> new" for each key that differs.
    """
    with suppress(ConfigError):  # made by a version with other keys: the difference shows which
        before = identity(parse_config(type(recipe), {**before, "output_dir": recipe.output_dir}, "checkpoint"))
    old, new = _flat(before), _flat(identity(recipe))
    return [
        f"{key} {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def find_checkpoint(recipe: AnyRecipe, world: World, force: bool = False) -> Path | None:
    """Find the checkpoint to go on from; clears the folder for a new start.

    Args:
        recipe: The stage.
        world: The processes; the first one cleans up.
        force: Go on although the recipe differs.

    Returns:
        The newest complete checkpoint; None to start from the beginning.

    Raises:
        ConfigError: The checkpoint belongs to another recipe, and `force` is off.
    """
    output_dir = Path(recipe.output_dir)
    if world.is_main:
        checkpoint.remove_leftovers(output_dir)
        if recipe.run.resume == "never":
            shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    world.barrier()
    found = checkpoint.complete_checkpoints(output_dir)
    if not found:
        return None
    changed = differences(checkpoint.read_state(found[-1])["recipe"], recipe)
    if changed and force:
        if world.is_main:
            say(f"{recipe.name}: going on under a changed recipe: {'; '.join(changed)}")
    elif changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            f"{output_dir} holds a run of another recipe: {'; '.join(changed[:SHOWN])}{more}. Choose another "
            "output_dir, go on all the same with --force, or start anew there with run.resume=never"
        )
    return found[-1]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted keys."""
    if isinstance(value, dict) and value:
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        pairs = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in pairs:
        found |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return found


def _short(value: Any) -> str:
    text = "(none)" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

"""Every model that learns from pairs, by family: fresh from a recipe, or from a folder.

A family is a row in `PAIR_MODELS`; one that can go on from a folder also has a row in `PAIR_FOLDERS`, under the
`model_type` of the folder's `config.json`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from polymodal.config import ImageConfig
from polymodal.errors import ConfigError, unknown_name
from polymodal.modeling.dual_encoders import blip2_stage1, lit
from polymodal.modeling.dual_encoders.base import PairModel
from polymodal.modeling.dual_encoders.blip2_stage1_folder import build_blip2, load_blip2
from polymodal.modeling.dual_encoders.clip_siglip import build_dual_encoder, load_dual_encoder
from polymodal.modeling.dual_encoders.config import ObjectiveConfig
from polymodal.modeling.language_model import quieten_transformers
from polymodal.modeling.pretrained import config_json
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import check_folder

METADATA_NAME = "polymodal_pair.json"
"""What is ours in a folder that is otherwise stock: history, image rules, objective, temperature, scores."""

PAIR_MODELS: dict[str, Callable[[Any, ObjectiveConfig], PairModel]] = {
    "clip": build_dual_encoder,
    "siglip": build_dual_encoder,
    "pair": build_dual_encoder,
    "blip2": build_blip2,
    "tower": lit.build_tower_text,
}
"""Family to builder: settings of `init.model` and the objective to a model with fresh weights."""

PAIR_FOLDERS: dict[str, Callable[[str, ImageConfig, ObjectiveConfig], PairModel]] = {
    "clip": load_dual_encoder,
    "siglip": load_dual_encoder,
    "vision-text-dual-encoder": load_dual_encoder,
    "blip": load_dual_encoder,
    blip2_stage1.MODEL_TYPE: load_blip2,
    lit.MODEL_TYPE: lit.load_tower_text,
}
"""`model_type` to loader: folder or hub id, image rules and objective to a model with the folder's weights."""


def build_pair_model(settings: Any, objective: ObjectiveConfig) -> PairModel:
    """Build a model with fresh weights, from torch's random state.

    Args:
        settings: `init.model` of a recipe.
        objective: The loss.

    Returns:
        The model, on the CPU.

    Raises:
        ConfigError: A setting is wrong, or the objective is not one of this family's.
    """
    if settings.family not in PAIR_MODELS:
        raise unknown_name("pair model family", settings.family, PAIR_MODELS)
    quieten_transformers()
    return PAIR_MODELS[settings.family](settings, objective)


def load_pair_model(source: str, image: ImageConfig, objective: ObjectiveConfig) -> PairModel:
    """Load a model from a folder or the hub.

    Args:
        source: A folder, or a hub id.
        image: Its image rules.
        objective: The loss.

    Returns:
        The model, on the CPU, in float32.

    Raises:
        CheckpointError: There is no such model, its folder is unsafe to open, or its weights are incomplete.
        ConfigError: It is of no family that learns from pairs.
    """
    quieten_transformers()
    if Path(source).is_dir():
        check_folder(Path(source))
    return PAIR_FOLDERS[folder_type(source)](source, image, objective)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read what a pair stage wrote beside its model."""
    path = folder / METADATA_NAME
    return read_json(path) if path.is_file() else {}


def folder_type(source: str) -> str:
    """The `model_type` of a folder or hub id, checked to be one of `PAIR_FOLDERS`."""
    found = config_json(source, f"{source}: cannot be opened as a model").get("model_type")
    if found not in PAIR_FOLDERS:
        raise ConfigError(
            f"{source}: model_type {found!r} does not learn from pairs; known are {', '.join(sorted(PAIR_FOLDERS))}"
        )
    return str(found)

"""Training from Python: a recipe file with some values changed, or a model in memory in one of the usual stages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import read_history
from polymodal.config import parse_config
from polymodal.errors import ConfigError, unknown_name
from polymodal.training import load_any_recipe
from polymodal.training import train as run
from polymodal.training.recipes.load import apply_override
from polymodal.training.recipes.sft import Recipe

Stage = Literal["align", "tune"]

SHORT = {
    "output_dir": "output_dir", "name": "name", "image_root": "data.mix.0.image_root", "max_length": "data.max_length",
    "learning_rate": "optim.learning_rate", "weight_decay": "optim.weight_decay", "warmup": "optim.warmup",
    "epochs": "run.epochs", "max_steps": "run.max_steps", "precision": "run.precision", "seed": "run.seed",
    "eval_every": "run.eval_every", "save_every": "run.save_every", "log_every": "run.log_every",
    "batch_size": "batch.global_size", "micro_size": "batch.micro_size", "packing": "batch.packing",
    "lora_r": "lora.lora_r", "lora_alpha": "lora.lora_alpha", "lora_dropout": "lora.lora_dropout",
}  # fmt: skip
"""Names of values as Python has them, and their places in a recipe."""

STAGES: Mapping[str, Mapping[str, Any]] = {
    # LLaVA-1.5's (arXiv:2310.03744): the projector alone, then everything but the tower, or LoRA.
    "align": {"train": [{"match": "projector.*", "train": True}], "optim": {"learning_rate": 1e-3}},
    "tune": {
        "train": [{"match": "projector.*", "train": True}, {"match": "llm.*", "train": True}],
        "optim": {"learning_rate": 2e-5},
    },
    "lora": {
        "train": [{"match": "projector.*", "train": True, "learning_rate": 2e-5}],
        "lora": {"lora_r": 128, "lora_alpha": 256, "lora_dropout": 0.05, "learning_rate": 2e-4},
        "optim": {"learning_rate": 2e-5},
    },
}
"""What each stage trains, and at which rate."""


def train(
    target: str | Path | LocalBackend,
    data: str | Path | Sequence[str | Path] | None = None,
    stage: Stage | None = None,
    **values: Any,
) -> Any:
    """Train: a recipe, or a model that is in memory.

    Args:
        target: A recipe file; or a model, as `compose` and `load` give it.
        data: With a model: a data file, or several.
        stage: With a model: "align" trains the projector alone, on captions; "tune" projector and language model on
            conversations, by adapters where `lora_r` is given.
        **values: Values of the recipe: `output_dir`, `epochs`, `learning_rate`, `batch_size`, `lora_r`, ..., and any
            other by its path with two underscores, such as `optim__betas=[0.9, 0.95]`.

    Returns:
        Of a recipe the folder of the trained model. Of a model the model itself, trained; its folder is `final/` in
        `output_dir` (runs/NAME where nothing is said).

    Raises:
        ConfigError: A value is unknown or wrong, or `data` and `stage` are missing.
        DataError: The data cannot be used.
    """
    places = {}
    for name, value in values.items():
        place = SHORT.get(name, name.replace("__", "."))
        if name not in SHORT and "." not in place:
            raise unknown_name("value", name, SHORT)
        places[place] = value
    overrides = [f"{place}={json.dumps(value, default=str)}" for place, value in places.items()]
    if isinstance(target, str | Path):
        if data is not None or stage is not None:
            raise ConfigError(f"{target}: a recipe says its data and what it trains; leave data and stage out")
        return run(load_any_recipe(target, overrides))
    if not isinstance(target, LocalBackend):
        raise ConfigError(f"train takes a recipe file or a model of `compose` or `load`, not {type(target).__name__}")
    if data is None or stage not in ("align", "tune"):
        raise ConfigError("a model is trained on `data`, in a `stage`: 'align' or 'tune'")
    recipe = _recipe(target, [data] if isinstance(data, str | Path) else data, stage, overrides, places)
    from polymodal.training.sft.task import StageInputs

    before = [(weight, weight.data) for weight in target.model.parameters()]
    final: Path = run(recipe, StageInputs(target.model, target.tokenizer, target.config, list(target.history)))
    for weight, was in before:  # what was frozen may have been kept in half precision meanwhile
        if not weight.requires_grad and weight.dtype != was.dtype:
            weight.data = was
    target.model.eval()
    target.forget()
    target.history = tuple(read_history(final))
    return target


def _recipe(
    model: LocalBackend, data: Sequence[str | Path], stage: Stage, overrides: list[str], places: Mapping[str, Any]
) -> Recipe:
    """The recipe of a stage of a model in memory."""
    lora = stage == "tune" and any(place.startswith("lora.") for place in places)
    if model.config.vision is None and stage == "align":
        raise ConfigError("stage 'align' trains the projector, and this model has none; take 'tune'")
    plain: dict[str, Any] = json.loads(json.dumps(STAGES["lora" if lora else stage]))
    if model.config.vision is None:
        plain["train"] = [rule for rule in plain["train"] if rule["match"] != "projector.*"]
    if model.model.image_newline is not None:
        plain["train"].append({"match": "image_newline", "train": True})
    plain |= {
        "name": f"{model.name}-{stage}",
        "init": {"model": model.config.model_dump(mode="json")},
        "data": {"mix": [{"path": str(path)} for path in data], **({"template": "plain"} if stage == "align" else {})},
        "output_dir": f"runs/{model.name}-{stage}",
    }
    for override in overrides:
        apply_override(plain, override, Recipe)
    return parse_config(Recipe, plain, "train")

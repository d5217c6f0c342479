"""A model without its weights: the same modules from the same configuration, on tensors that hold no data.

Everything is built on torch's meta device, so a 13B model takes a second and no memory, while names, shapes, types,
rules and adapters are the real ones, not a formula's. Only configurations are read; nothing is fetched unless
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from polymodal.config import LLMConfig, ModelConfig, VisionConfig
from polymodal.encoders.efficientnet import EfficientNetEncoder, EfficientNetLite0
from polymodal.encoders.hf_vision import FAMILIES, HFVisionEncoder
from polymodal.errors import CheckpointError, ConfigError, PolymodalError, first_line, unknown_name
from polymodal.geometry import Size
from polymodal.llm import DEFAULT_LLM, model_class
from polymodal.model import MultimodalLM
from polymodal.projectors import build_projector
from polymodal.training.known import KNOWN_SHAPES, SMOLLM2
from polymodal.training.parts import new_picture_rules
from polymodal.training.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Outline:
    """A model on tensors without data.

    Attributes:
        model: The model, on the meta device.
        config: Its configuration.
    """

    model: MultimodalLM
    config: ModelConfig


@dataclass(frozen=True)
class Start:
    """What a recipe starts from.

    Attributes:
        config: The model's configuration.
        trained: Parts that earlier stages trained, such as "llm".
        note: Where the configuration was found, for a person.
    """

    config: ModelConfig
    trained: frozenset[str]
    note: str


def outline(config: ModelConfig, *, fetch: bool = False) -> Outline:
    """Build a model without weights.

    Args:
        config: The configuration; "bundled" parts must have been resolved to folders.
        fetch: Ask the hub for a `config.json` that is not on this machine.

    Returns:
        The outline.

    Raises:
        PolymodalError: A part's shape is not known here, or parts do not fit.
    """
    settings = llm_settings(config.llm, fetch=fetch)
    vision = None if config.vision is None else _tower_settings(config.vision, fetch=fetch)
    with torch.device("meta"):
        try:
            llm = model_class(bool(settings.is_encoder_decoder)).from_config(
                settings, dtype=getattr(torch, config.llm.dtype), attn_implementation="sdpa"
            )
        except ValueError as error:
            raise ConfigError(f"language model {config.llm.model_name_or_path!r}: {first_line(error)}") from error
        if getattr(settings, "scale_decoder_outputs", True) is False:
            # T5 1.1 has a head of its own; transformers makes it tied and parts it when it reads the weights.
            head = llm.get_output_embeddings()
            head.weight = nn.Parameter(torch.empty_like(head.weight))
        width, rows = llm.get_input_embeddings().weight.shape[1], llm.get_input_embeddings().weight.shape[0]
        encoder: Any = None
        projector: Any = None
        if config.vision is not None:
            encoder = _tower(config.vision, vision, Size(*config.image.tile_size) if config.image else None)
            projector = build_projector(config.projector, encoder.embed_dim, encoder.grid, width)
            projector.to(torch.device("meta"), getattr(torch, config.llm.dtype))
        newline = config.image is not None and config.image.mm_patch_merge_type == "spatial_unpad"
        model = MultimodalLM(llm, rows, encoder, projector, image_newline=newline)
    return Outline(model.eval(), config)


def on_no_device(model: nn.Module, mode: FakeTensorMode) -> None:
    """Move a model from the meta device, where a policy can be applied, to tensors that can be computed with.

    Args:
        model: On the meta device; its parameters and buffers are replaced, ties kept.
        mode: What makes tensors hold no data.
    """
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return moved[id(tensor)]

    with mode:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        store[name] = move(tensor)  # type: ignore[assignment]


def starting_point(recipe: Recipe, path: Path | None = None) -> Start:
    """Find out what a recipe starts from, also where the stage before it has not run yet.

    Args:
        recipe: The recipe.
        path: Its file; recipes beside it are searched for the stage that will leave the missing folder.

    Returns:
        Configuration and what earlier stages trained.

    Raises:
        CheckpointError: The folder is missing, and no recipe beside this one will make it.
    """
    from polymodal.checkpoints.folder import CONFIG_NAME, read_config, read_history

    if recipe.init.model is not None:
        return Start(recipe.init.model, frozenset(), "as the recipe composes it")
    assert recipe.init.from_folder is not None
    folder, image = Path(recipe.init.from_folder), recipe.init.image
    if (folder / CONFIG_NAME).is_file():
        trained = {name for entry in read_history(folder) for name in entry.get("trained", ())}
        config = new_picture_rules(resolve_bundled(read_config(folder), folder), image)
        return Start(config, frozenset(trained), f"as in {folder}")
    for other in sorted(path.parent.glob("*.yaml")) if path is not None else ():
        try:
            before = load_recipe(other)
        except ConfigError:
            continue  # a pipeline file, or another's recipe with a mistake: not what is looked for
        if Path(before.output_dir) / "final" == folder and other != path:
            start = starting_point(before, other)
            parts = {rule.match.split(".")[0] for rule in before.train if rule.train}
            config = new_picture_rules(start.config, image)
            return Start(config, start.trained | parts, f"as {other} will leave it")
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: a published model; plan it as a folder of ours (`polymodal convert {folder} DST`)"
        )
    raise CheckpointError(
        f"{folder}: no such model folder, and no recipe beside this one makes it; run the stage before it, or plan that"
    )


def resolve_bundled(config: ModelConfig, folder: Path) -> ModelConfig:
    """Name the folders of parts that lie in a model's own folder."""
    if config.vision is not None and config.vision.vision_tower == "bundled":
        tower = config.vision.model_copy(update={"vision_tower": str(folder / "vision")})
        return config.model_copy(update={"vision": tower})
    return config


def llm_settings(config: LLMConfig, *, fetch: bool = False) -> Any:
    """Read a language model's configuration, as transformers has it.

    Args:
        config: Which one.
        fetch: Ask the hub where it is not on this machine.

    Returns:
        A `PreTrainedConfig`.

    Raises:
        PolymodalError: Its shape is not known here.
    """
    from transformers import AutoConfig

    name = SMOLLM2 if config.model_name_or_path == DEFAULT_LLM else config.model_name_or_path
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        settings = _settings(name, config.revision, fetch)
        return AutoConfig.for_model(**settings)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"language model {name!r}: no readable configuration: {first_line(error)}") from error


def _tower_settings(vision: VisionConfig, *, fetch: bool) -> dict[str, Any]:
    """Read a vision tower's configuration; of a whole model, its vision part."""
    if vision.type == "efficientnet_lite0":
        return {}
    if vision.type not in FAMILIES:
        raise unknown_name("vision encoder type", vision.type, [*FAMILIES, "efficientnet_lite0"])
    settings = _settings(vision.vision_tower, vision.revision, fetch)
    found, known = settings.get("model_type"), FAMILIES[vision.type].model_types
    if found not in known:
        raise ConfigError(
            f"vision_tower {vision.vision_tower!r} has model_type {found!r} but vision.type is {vision.type!r}"
        )
    if "vision_config" in settings:
        settings = settings["vision_config"]
    return {key: value for key, value in settings.items() if key != "model_type"}


def _tower(vision: VisionConfig, settings: dict[str, Any] | None, tile: Size | None) -> Any:
    """Build a vision tower; call it inside the mode."""
    import transformers

    if vision.type == "efficientnet_lite0":
        options: dict[str, Any] = {"stages": vision.stages, "pool": vision.pool, "detail": vision.detail}
        network = EfficientNetLite0().requires_grad_(False)
        return EfficientNetEncoder(network, **{key: value for key, value in options.items() if value is not None})
    model_class = getattr(transformers, FAMILIES[vision.type].model_class)
    tower = model_class(model_class.config_class(**(settings or {})))
    return HFVisionEncoder(tower, vision.mm_vision_select_layer, vision.mm_vision_select_feature, tile)


def _settings(name: str, revision: str | None, fetch: bool) -> dict[str, Any]:
    """A `config.json` as plain data: from a folder, the hub's cache, the table of known shapes, or the hub."""
    from transformers import PreTrainedConfig

    path = Path(name).expanduser()
    if path.is_dir():
        return dict(PreTrainedConfig.get_config_dict(str(path))[0])
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise PolymodalError(f"{name}: no such folder; a plan reads its config.json")
    try:
        found = PreTrainedConfig.get_config_dict(name, revision=revision, local_files_only=not fetch)[0]
    except (OSError, ValueError) as error:
        if name in KNOWN_SHAPES and not fetch:
            return dict(KNOWN_SHAPES[name])
        if fetch:
            raise CheckpointError(f"{name}: its config.json cannot be had: {first_line(error)}") from error
        raise CheckpointError(
            f"{name}: its shape is not known on this machine; --fetch asks the hub for its config.json (a few kB), or "
            "name a local folder"
        ) from error
    return dict(found)

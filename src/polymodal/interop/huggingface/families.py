"""What the `config.json` of a published vision-language model says, in our terms; what all families share.

A setting that our parts cannot express is refused and named, since a model that computes nearly the same is worse than
none.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polymodal.config import ProjectorConfig, VisionConfig
from polymodal.errors import CheckpointError
from polymodal.modeling.encoders.hf_vision import FAMILIES

CONFIG_NAME = "config.json"


class NotExpressibleError(CheckpointError):
    """A whole and undamaged folder that our parts cannot compute exactly; transformers itself may open it."""


@dataclass(frozen=True)
class Pieces:
    """A published model, taken apart.

    Attributes:
        model_type: As in its `config.json`; a key of `names.RULES`.
        vision: Which tower, and what of it is used; the tower itself is "bundled".
        projector: The projector.
        vision_settings: The tower's configuration, of the class in transformers that `HFVisionEncoder` wraps.
        text_settings: The language model's configuration.
        image_token_id: The placeholder's id; None where the folder does not say.
        newline: It has the learned token that ends a row of an AnyRes canvas.
        pinpoints: The AnyRes canvases that the model counts with, (height, width); none for the other families.
        vision_aspect_ratio: LLaVA-OneVision's "anyres_max_N"; None for the others.
        prompt: "chat" for a chat template, "plain" for BLIP-2's: the picture, then the text as it is.
    """

    model_type: str
    vision: VisionConfig
    projector: ProjectorConfig
    vision_settings: Any
    text_settings: Any
    image_token_id: int | None
    newline: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()
    vision_aspect_ratio: str | None = None
    prompt: Literal["chat", "plain"] = "chat"


def read_settings(folder: Path) -> Any:
    """Read `config.json` as transformers does, with its defaults for what the file leaves out.

    Args:
        folder: The published folder.

    Returns:
        The configuration object of transformers.

    Raises:
        CheckpointError: It cannot be read.
        NotExpressibleError: The weights are quantised.
    """
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {' '.join(str(error).split())[:300]}") from error
    if getattr(settings, "quantization_config", None):
        raise NotExpressibleError(f"{folder}: its weights are quantised; open the folder that they were quantised from")
    return settings


def tower_family(where: str, settings: Any) -> str:
    """Find which of our vision encoders a tower is.

    Args:
        where: The file, for the error.
        settings: The tower's configuration, of transformers.

    Returns:
        A key of `modeling.encoders.hf_vision.FAMILIES`.

    Raises:
        NotExpressibleError: None of them.
    """
    for name, family in FAMILIES.items():
        if settings.model_type in family.model_types:
            return name
    raise NotExpressibleError(
        f"{where}: vision_config.model_type {settings.model_type!r} is no tower that is known here "
        f"({', '.join(FAMILIES)})"
    )


def must_be(where: str, key: str, value: object, *allowed: object) -> None:
    """Refuse a setting that our parts cannot express.

    Args:
        where: The file, for the error.
        key: The setting.
        value: What the file says.
        *allowed: What can be expressed.

    Raises:
        NotExpressibleError: It is none of them.
    """
    if value not in allowed:
        raise NotExpressibleError(
            f"{where}: {key} is {value!r}, which cannot be expressed here; it must be "
            f"{' or '.join(repr(choice) for choice in allowed)}"
        )


def llava_pieces(settings: Any, where: str, **more: Any) -> Pieces:
    """Take a LLaVA apart: a tower, two linear layers with GELU between them, a causal language model.

    Args:
        settings: The configuration of transformers.
        where: The file, for errors.
        **more: Further fields of `Pieces`.

    Returns:
        The pieces.

    Raises:
        NotExpressibleError: A setting cannot be expressed.
    """
    must_be(where, "projector_hidden_act", settings.projector_hidden_act, "gelu")
    family = tower_family(where, settings.vision_config)
    layer = settings.vision_feature_layer
    # Tied or not is the whole model's to say; the part for text may disagree.
    text = deepcopy(settings.text_config)
    text.tie_word_embeddings = bool(settings.tie_word_embeddings)
    return Pieces(
        model_type=settings.model_type,
        vision=VisionConfig(
            vision_tower="bundled",
            type=family,
            mm_vision_select_layer=layer if isinstance(layer, int) else tuple(layer),
            mm_vision_select_feature=_selected(settings, family, where),
        ),
        projector=ProjectorConfig(
            mm_projector_type="mlp2x_gelu", bias=bool(getattr(settings, "multimodal_projector_bias", True))
        ),
        vision_settings=settings.vision_config,
        text_settings=text,
        image_token_id=settings.image_token_id,
        **more,
    )


def _selected(settings: Any, family: str, where: str) -> Literal["patch", "cls_patch"]:
    """What "default" (all positions but the first) and "full" (all of them) come to on a tower."""
    strategy = settings.vision_feature_select_strategy
    must_be(where, "vision_feature_select_strategy", strategy, "default", "full")
    must_be(where, "vision_config.num_register_tokens", getattr(settings.vision_config, "num_register_tokens", 0), 0)
    if not FAMILIES[family].class_token and strategy == "default":
        raise NotExpressibleError(
            f"{where}: vision_feature_select_strategy 'default' drops the first position, which is a patch and no "
            f"class token in {family}; that cannot be expressed here"
        )
    return "cls_patch" if strategy == "full" and FAMILIES[family].class_token else "patch"

"""A model without its weights: the same modules from the same configuration, on tensors that hold no data.

Everything is built on torch's meta device, so a 13B model takes a second and no memory, while names, shapes, types,
rules and adapters are the real ones, not a formula's. Only configurations are read; nothing is fetched unless
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from polymodal.config import ModelConfig, VisionConfig
from polymodal.errors import ConfigError, first_line, unknown_name
from polymodal.media_plan import Size
from polymodal.modeling.encoders.efficientnet import EfficientNetEncoder, EfficientNetLite0
from polymodal.modeling.encoders.hf_vision import FAMILIES, HFVisionEncoder
from polymodal.modeling.language_model import model_class
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.published_shapes import _settings, llm_settings
from polymodal.modeling.vlm import MultimodalLM


@dataclass(frozen=True)
class Outline:
    """A model on tensors without data."""

    model: MultimodalLM  # The model, on the meta device
    config: ModelConfig  # Its configuration


def outline(config: ModelConfig, *, fetch: bool = False) -> Outline:
    """Build a model without weights."""
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
    """Move a model from the meta device, where a policy can be applied, to tensors that can be computed with."""
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

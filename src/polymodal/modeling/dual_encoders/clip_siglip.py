"""Two encoders side by side, contrasted: CLIP, SigLIP, or any pair, as the stock classes of `transformers`.

CLIP (Radford et al. 2021, arXiv:2103.00020), SigLIP (Zhai et al. 2023, arXiv:2303.15343), and LiT-like pairs of any
two encoders (Zhai et al. 2022, arXiv:2111.07991; `VisionTextDualEncoderModel`). The networks are those of
`transformers`, and so is the folder that is written: model, tokenizer and image processor load there and score the
same. What is added is what they lack for training: a loss that sees all processes' pairs and knows pairs of one
image, SigLIP's initial temperature and bias (a fresh `SiglipModel` has zeros there), and a bound on the temperature.

Parameters carry the stock names: `vision_model.*`, `text_model.*`, `visual_projection.*`, `text_projection.*`,
`logit_scale`, `logit_bias`. SigLIP's loss on a model without a bias adds one here; the stock folder has no place for
it, and no ranking depends on it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.config import ImageConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.base import METRIC, Embedded, Everyone, PairBatch, as_floats
from polymodal.modeling.dual_encoders.config import ObjectiveConfig
from polymodal.modeling.dual_encoders.losses import (
    at_least_float32,
    both_directions,
    clamp_logit_scale,
    products,
    siglip_loss,
)
from polymodal.utils.modules import frozen

LOGIT_SCALE_SIGLIP = math.log(10)
LOGIT_BIAS_SIGLIP = -10.0
LOGIT_SCALE_CLIP = math.log(1 / 0.07)


class DualEncoder(nn.Module):
    """A `PairModel` over a stock model."""

    needs_features = False
    vision_model: Any
    text_model: Any
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter

    def __init__(self, model: Any, tokenizer: Any, image: ImageConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        if objective.type not in ("clip", "siglip"):
            raise ConfigError(f"objective {objective.type!r} is none for two encoders; use clip or siglip")
        self._stock = (model,)  # in a tuple, so that names below start with the encoders' own
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in list(model.named_parameters(recurse=False)):
            self.register_parameter(name, parameter)
        if objective.type == "siglip" and not hasattr(self, "logit_bias"):
            self.logit_bias = nn.Parameter(torch.tensor(LOGIT_BIAS_SIGLIP))
            with torch.no_grad():
                self.logit_scale.fill_(LOGIT_SCALE_SIGLIP)
        self.tokenizer, self.image, self.objective = tokenizer, image, objective
        self.family: str = model.config.model_type
        settings = model.config
        side = settings.vision_config.image_size
        side = (side, side) if isinstance(side, int) else tuple(side)
        if tuple(image.tile_size) != side:
            raise ConfigError(
                f"image.tile_size {image.tile_size[0]}x{image.tile_size[1]}: the vision encoder takes "
                f"{side[0]}x{side[1]} (height x width); make them agree"
            )
        patch = settings.vision_config.patch_size
        self.patch_grid = Size(side[0] // patch, side[1] // patch)
        self.max_text: int = tokenizer.model_max_length
        # SigLIP is trained and used with padding that its text encoder reads.
        self.text_length = self.max_text if self.family == "siglip" else None
        self.features_shape = (1, int(settings.vision_config.hidden_size))
        self.distiller: nn.Module | None = None

    @property
    def tower(self) -> nn.Module:
        """The vision encoder, without a projection."""
        tower: nn.Module = self.vision_model
        return tower

    @property
    def patch_width(self) -> int:
        """Width of the vision encoder's patches, for a distiller."""
        return self.features_shape[1]

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The vision encoder's pooled output, [B, 1, E]."""
        return self._see(pixel_values)[0][:, None]

    def embed(self, batch: PairBatch) -> Embedded:
        """Encode both sides; equal to the `image_embeds` and `text_embeds` of `transformers`."""
        carry: dict[str, Tensor] = {}
        if batch.features is not None:
            pooled = batch.features[:, 0].to(self.logit_scale.dtype)
        else:
            assert batch.pixel_values is not None
            pooled, patches = self._see(batch.pixel_values)
            if self.distiller is not None and batch.teacher is not None:
                carry["patches"] = patches
        mask = {} if self.text_length is not None else {"attention_mask": batch.attention_mask.long()}
        read = getattr(self.text_model(input_ids=batch.input_ids, **mask), "pooler_output", None)
        if read is None:
            raise ConfigError(f"the text encoder {type(self.text_model).__name__} gives no pooled output")
        return Embedded(
            _unit(self._project("visual_projection", pooled)), _unit(self._project("text_projection", read)), carry
        )

    def contrast(
        self, own: Embedded, own_ids: Tensor, all_image: Tensor, all_text: Tensor, all_ids: Tensor, offset: int
    ) -> dict[str, Tensor]:
        """The loss of this process's pairs against everyone's; see `PairModel.contrast`."""
        objective = self.objective
        if len(all_ids) < 2:
            raise ConfigError("a step of one pair has nothing to contrast it with; raise batch.global_size")
        found = {f"{METRIC}{name}": own.text.new_tensor(value) for name, value in self.facts().items()}
        if objective.type == "siglip":
            found["siglip"] = siglip_loss(
                own.image,
                own.text,
                self.logit_scale,
                self.logit_bias,
                all_text,
                offset,
                objective.chunk,
                own_ids,
                all_ids,
            )
            return found
        scale = at_least_float32(self.logit_scale).exp()
        to_text, to_image = scale * products(own.image, all_text), scale * products(own.text, all_image)
        smoothing = objective.label_smoothing or 0.0
        found["clip"] = both_directions(to_text, to_image, own_ids, all_ids, offset, smoothing)
        return found

    def extra(self, batch: PairBatch, embedded: Embedded, everyone: Everyone) -> dict[str, Tensor]:
        """The distance to the teacher, where there is one."""
        if self.distiller is None or batch.teacher is None or self.objective.distill is None:
            return {}
        distance = self.distiller(batch, embedded.carry["patches"])
        share = len(batch) / len(everyone.image_ids)
        return {"distill": distance * share * self.objective.distill.weight}

    def attend_plainly(self) -> None:
        """Attend by plain matrix products instead of torch's fused attention; the same to rounding."""
        (model,) = self._stock
        model.set_attn_implementation("eager")

    def checkpoint_layers(self) -> None:
        """Keep only each layer's input while training, and compute the rest again in the backward pass."""
        self._stock[0].gradient_checkpointing_enable({"use_reentrant": False})

    def after_step(self) -> None:
        """Bound the temperature: logits of at most 100 times the cosine."""
        clamp_logit_scale(self.logit_scale)

    def facts(self) -> dict[str, Any]:
        """The scale that cosines are multiplied with, and SigLIP's bias."""
        found = {"logit_scale": float(self.logit_scale.detach().exp())}
        if hasattr(self, "logit_bias"):
            found["logit_bias"] = float(self.logit_bias.detach())
        return found

    def save(self, folder: Path) -> None:
        """Write a stock folder: weights, config, tokenizer, image processor."""
        from polymodal.modeling.dual_encoders.clip_siglip_hf import save_processor

        self._stock[0].save_pretrained(folder)
        save_processor(folder, self.family, self.tokenizer, self.image)

    def _see(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled output [B, E] and patches [B, P, E] of images."""
        pixels = as_floats(pixel_values, self.image)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen(self.vision_model)):
            seen = self.vision_model(pixel_values=pixels)
        if getattr(seen, "pooler_output", None) is None:
            raise ConfigError(f"the vision encoder {type(self.vision_model).__name__} gives no pooled output")
        return seen.pooler_output, seen.last_hidden_state[:, -self.patch_grid.area :]

    def _project(self, name: str, pooled: Tensor) -> Tensor:
        layer = getattr(self, name, None)
        return pooled if layer is None else layer(pooled)


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.float()
    return vectors / vectors.norm(p=2, dim=-1, keepdim=True)

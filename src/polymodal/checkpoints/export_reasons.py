"""Which stock class of transformers a model of ours fits, and every reason why it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polymodal.checkpoints.hf import CLASSES
from polymodal.config import ImageConfig, ModelConfig
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.export_class import BLIP, plain_state
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder

if TYPE_CHECKING:
    from polymodal.modeling.vlm import MultimodalLM

LLAVA_TOWERS = ("clip", "siglip")
"""Towers of the LLaVA classes that both transformers and vLLM open."""

BLIP_TOWER = "eva_clip"
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def stock_family(config: ModelConfig) -> str:
    """Find the family of stock classes that is nearest to a model.

    Args:
        config: The model's configuration.

    Returns:
        A key of `hf.CLASSES`; `reasons_against` says whether it fits.
    """
    qformer, image = config.projector.qformer, config.image
    if qformer is not None:
        return "instructblip" if qformer.text_context else "blip-2"
    if image is None or image.image_aspect_ratio != "anyres":
        return "llava"
    return "llava_next" if image.anyres_max is None else "llava_onevision"


def reasons_against(model: MultimodalLM, config: ModelConfig, family: str) -> list[str]:
    """List everything that the stock class cannot express.

    Args:
        model: The model.
        config: Its configuration.
        family: What `stock_family` found.

    Returns:
        One line a reason, each with what to do; none where the class computes the same.
    """
    if config.vision is None or config.image is None:
        return ["the model has no vision encoder: export its language model with transformers' own save_pretrained"]
    found = [*_against_tower(model, config, family), *_against_image(config.image, family)]
    found += _against_projector(model, config, family)
    return found + _against_llm(model, family)


def refuse(family: str, reasons: list[str]) -> None:
    """Raise where there are reasons.

    Args:
        family: A key of `hf.CLASSES`.
        reasons: What cannot be expressed.

    Raises:
        CheckpointError: There are some; lists them all.
    """
    if reasons:
        listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        raise CheckpointError(f"this model cannot be written as a {CLASSES[family]}: {listed}")


def _against_tower(model: MultimodalLM, config: ModelConfig, family: str) -> list[str]:
    vision, encoder = config.vision, model.vision_encoder
    assert vision is not None
    towers = (BLIP_TOWER,) if family in BLIP else LLAVA_TOWERS
    if not isinstance(encoder, HFVisionEncoder) or vision.type not in towers:
        return [f"vision.type {vision.type!r} has no place there: train with {' or '.join(map(repr, towers))}"]
    found = []
    native = encoder.model.config.image_size  # type: ignore[union-attr]
    if encoder.interpolate:
        found.append(
            f"image.tile_size {config.image.tile_size if config.image else None} is not the tower's own "
            f"{native}x{native}, and the class does not interpolate: train with the tower's size"
        )
    if vision.mm_vision_select_feature == "cls":
        found.append("mm_vision_select_feature 'cls' keeps only the class token: use 'patch' or 'cls_patch'")
    if family in BLIP:
        last = len(encoder.model.encoder.layers)  # type: ignore[union-attr,arg-type]
        if encoder.select_layers != (last,) or vision.mm_vision_select_feature != "cls_patch":
            found.append("the Q-Former there reads the last layer with the class token: select -1 and 'cls_patch'")
    return found


def _against_image(image: ImageConfig, family: str) -> list[str]:
    found = []
    how, (height, width) = image.image_aspect_ratio, image.tile_size
    if how == "slice":
        return ["image_aspect_ratio 'slice' has no place there: train with 'anyres', or with one tile"]
    if height != width:
        found.append(f"image.tile_size {height}x{width} is not square, as the class needs it")
    mean_colour = tuple(min(max(int(value * 255), 0), 255) for value in image.image_mean)
    pads = how == "pad" or (how == "anyres" and image.several_pictures == "pad")
    if pads and image.pad_color not in (None, mean_colour):
        found.append(f"image.pad_color {image.pad_color} cannot be said there: only the mean colour {mean_colour} can")
    if family in BLIP and how != "squash":
        found.append(f"image_aspect_ratio {how!r}: BLIP-2's processor squashes pictures to one tile")
    if how != "anyres":
        return found
    if image.mm_patch_merge_type != "spatial_unpad":
        found.append(f"mm_patch_merge_type {image.mm_patch_merge_type!r}: AnyRes there is always 'spatial_unpad'")
    if image.overview_aspect_ratio != "squash":
        found.append(f"overview_aspect_ratio {image.overview_aspect_ratio!r}: the overview there is squashed")
    wanted = "alike" if family == "llava_next" else "pad"
    if image.several_pictures != wanted:
        found.append(
            f"several_pictures {image.several_pictures!r}: LLaVA-NeXT (no anyres_max) cuts them alike, LLaVA-OneVision "
            "(anyres_max) pads them"
        )
    return found


def _against_projector(model: MultimodalLM, config: ModelConfig, family: str) -> list[str]:
    projector = config.projector
    if family in BLIP:
        assert projector.qformer is not None
        found = []
        if projector.norm != "none":
            found.append(f"projector.norm {projector.norm!r} before the Q-Former's own norm has no place there")
        eps = getattr(getattr(getattr(model.vision_encoder, "model", None), "config", None), "layer_norm_eps", None)
        if eps is not None and eps != projector.qformer.vision_norm_eps:
            found.append(f"qformer.vision_norm_eps {projector.qformer.vision_norm_eps} must be the tower's {eps} there")
        return found
    found = []
    if projector.mm_projector_type != "mlp2x_gelu":
        found.append(
            f"mm_projector_type {projector.mm_projector_type!r}: the class has two linear layers with GELU between "
            "them: train with 'mlp2x_gelu'"
        )
    if projector.norm == "layer":
        found.append("projector.norm 'layer' has no place there: train with 'none' or 'standardize'")
    width = model.llm.get_input_embeddings().weight.shape[1]
    if projector.hidden_size not in (None, width):
        found.append(
            f"projector.hidden_size {projector.hidden_size}: the class is as wide as the language model between its "
            f"layers ({width}): leave it out"
        )
    return found


def _against_llm(model: MultimodalLM, family: str) -> list[str]:
    llm: Any = model.llm
    config, found = llm.config, []
    if config.get_text_config() is not config:
        found.append(f"the language model {type(llm).__name__} is itself made of parts: use one for text alone")
    if any(not tensor.is_floating_point() for tensor in llm.parameters()):
        found.append("the language model's weights are quantised: open it without quantisation")
    if family in BLIP:
        return found
    if config.is_encoder_decoder:
        found.append("an encoder-decoder language model has no place there: only BLIP-2 takes one")
        return found
    names = plain_state(llm)
    strange = next((name for name in names if not name.startswith("model.") and name != "lm_head.weight"), None)
    if strange is not None:
        found.append(f"the language model's {strange} has no place there: only 'model.…' and 'lm_head.weight' have")
    scaled = next((name for name in _AFTER_HEAD if getattr(config, name, None) not in (None, 1, 1.0)), None)
    if scaled is not None:
        found.append(f"the language model changes its logits after the head ({scaled}), which the class leaves out")
    return found

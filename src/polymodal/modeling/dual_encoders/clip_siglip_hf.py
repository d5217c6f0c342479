"""Stock two-encoder models of `transformers`: made fresh, loaded, and written with all that scoring needs.

A fresh model follows its tokenizer and its image rules, so that no number is typed twice: vocabulary, special tokens
and image size. A folder is written with tokenizer and image processor; `AutoModel` and `AutoProcessor` then see the
same tokens and the same pixels as training did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from polymodal.config import RESAMPLE_FILTERS, ImageConfig
from polymodal.errors import CheckpointError, ConfigError, first_line, unknown_name
from polymodal.modeling.dual_encoders.clip_siglip import (
    LOGIT_BIAS_SIGLIP,
    LOGIT_SCALE_CLIP,
    LOGIT_SCALE_SIGLIP,
    DualEncoder,
)
from polymodal.modeling.dual_encoders.config import ObjectiveConfig, PairModelConfig

CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "vision-text-dual-encoder": "VisionTextDualEncoderModel"}
PROCESSORS = {
    "clip": "CLIPProcessor",
    "siglip": "SiglipProcessor",
    "vision-text-dual-encoder": "VisionTextDualEncoderProcessor",
}
_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Text encoders whose positions begin behind the padding's, so that they have fewer than they say."""


def build_dual_encoder(settings: PairModelConfig, objective: ObjectiveConfig) -> DualEncoder:
    """Build two encoders from a recipe."""
    tokenizer = load_text_tokenizer(settings.tokenizer, settings.pad_token)
    height, width = settings.image.tile_size
    if height != width:
        raise ConfigError(f"image.tile_size {height}x{width}: the vision encoder takes square tiles")
    if settings.family == "pair":
        model = _build_pair(settings, tokenizer)
    else:
        model = _build_stock(settings, tokenizer)
    siglip = objective.type == "siglip"
    with torch.no_grad():
        model.logit_scale.fill_(LOGIT_SCALE_SIGLIP if siglip else LOGIT_SCALE_CLIP)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(LOGIT_BIAS_SIGLIP)
    ready(tokenizer, model)
    return DualEncoder(model, tokenizer, settings.image, objective)


def load_dual_encoder(source: str, image: ImageConfig, objective: ObjectiveConfig) -> DualEncoder:
    """Load two encoders."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(source)
    model = _open(getattr(transformers, CLASSES[settings.model_type]), source)
    tokenizer = load_text_tokenizer(source, None)
    ready(tokenizer, model)
    return DualEncoder(model, tokenizer, image, objective)


def load_text_tokenizer(source: str, pad_token: str | None) -> Any:
    """Load a tokenizer that can pad."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"tokenizer {source}: cannot be opened ({first_line(error)})") from error
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ConfigError(f"tokenizer {source}: pad_token {pad_token!r} is no token of it")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"tokenizer {source}: has no pad token; name one of its tokens as init.model.pad_token")
    return tokenizer


def ready(tokenizer: Any, model: Any) -> None:
    """Make a tokenizer write texts as the model reads them, and check that it does."""
    # CLIP reads a text off its end token, so every text must have one; a tokenizer that adds none is made to. SigLIP
    # reads its padding and takes no mask.
    text = model.config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder knows {text.vocab_size}")
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        raise ConfigError(f"text encoder {text.model_type!r}: has no fixed positions; use one like bert or roberta")
    if text.model_type in _COUNT_FROM_PADDING:
        positions -= text.pad_token_id + 1
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if model.config.model_type == "siglip":
        tokenizer.model_input_names = ["input_ids"]
        tokenizer.init_kwargs["model_input_names"] = ["input_ids"]  # what is written to the folder
    if model.config.model_type != "clip":
        return
    # Folders made before transformers 4.31 say 2 and are read off the highest id.
    end = max(tokenizer.get_vocab().values()) if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer("a")["input_ids"][-1:] != [end]:
        if tokenizer.eos_token_id != end or not tokenizer.is_fast:
            raise ConfigError(
                f"CLIP reads a text off its end token {end}, which this tokenizer does not put there; use the "
                "model's own tokenizer"
            )
        _append_end(tokenizer)


def save_processor(folder: Path, family: str, tokenizer: Any, image: ImageConfig) -> None:
    """Write tokenizer and image processor beside a stock model."""
    import transformers

    images = image_processor(family, image)
    # Both spellings: one file for all parts is read by transformers 5, the other by what came before.
    getattr(transformers, PROCESSORS[family])(images, tokenizer).save_pretrained(folder)
    images.save_pretrained(folder)


def image_processor(family: str, image: ImageConfig) -> Any:
    """The stock image processor that does what image rules say."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    crops = image.image_aspect_ratio == "crop"
    if image.image_aspect_ratio not in ("squash", "crop"):
        raise ConfigError(f"image_aspect_ratio {image.image_aspect_ratio!r}: no stock image processor does this")
    tile = {"height": image.tile_size[0], "width": image.tile_size[1]}
    stock = CLIPImageProcessorPil if family == "clip" or (family != "siglip" and crops) else SiglipImageProcessorPil
    return stock(
        do_resize=True,
        size={"shortest_edge": image.resize_short_side or min(image.tile_size)} if crops else tile,
        do_center_crop=crops,
        **({"crop_size": tile} if crops else {}),
        resample=RESAMPLE_FILTERS[image.resample],
        do_rescale=True,
        do_normalize=True,
        image_mean=list(image.image_mean),
        image_std=list(image.image_std),
        do_convert_rgb=True,
    )


def _build_stock(settings: PairModelConfig, tokenizer: Any) -> Any:
    """A fresh CLIP or SigLIP."""
    import transformers

    name = {"clip": "CLIP", "siglip": "Siglip"}[settings.family]
    vision = _keys(getattr(transformers, f"{name}VisionConfig"), settings.vision, "init.model.vision")
    text = _keys(getattr(transformers, f"{name}TextConfig"), settings.text, "init.model.text")
    vision = {**vision, "image_size": settings.image.tile_size[0]}
    text = {"vocab_size": len(tokenizer), **text, **_special(tokenizer)}
    whole = getattr(transformers, f"{name}Config")
    if settings.family == "clip":
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {settings.tokenizer}: has no end token, off which CLIP reads a text")
        if tokenizer.eos_token_id == 2:
            raise ConfigError(
                f"tokenizer {settings.tokenizer}: its end token has the id 2, which transformers' CLIP takes for the "
                "mark of an old folder; use family siglip or pair"
            )
        config = whole(vision_config=vision, text_config=text, projection_dim=settings.projection_dim)
        return transformers.CLIPModel(config)
    width = transformers.SiglipVisionConfig(**vision).hidden_size
    config = whole(vision_config=vision, text_config={**text, "projection_size": width})
    return transformers.SiglipModel(config)


def _build_pair(settings: PairModelConfig, tokenizer: Any) -> Any:
    """Any two encoders, fresh or with their weights, and fresh projections."""
    import transformers

    size = {"image_size": settings.image.tile_size[0]}
    vision = _encoder(settings.vision, "init.model.vision", size)
    text = _encoder(settings.text, "init.model.text", {"vocab_size": len(tokenizer), **_special(tokenizer)})
    made = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=settings.projection_dim
    )
    return transformers.VisionTextDualEncoderModel(config=made, vision_model=vision, text_model=text)


def _encoder(given: dict[str, Any] | str, where: str, follows: dict[str, Any]) -> Any:
    """One encoder of a pair: from a folder or hub id, or fresh from keys."""
    import transformers

    if isinstance(given, str):
        try:
            settings = transformers.AutoConfig.from_pretrained(given)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{where} {given!r}: cannot be opened ({first_line(error)})") from error
        cls = transformers.AutoModel
        if settings.model_type in ("clip", "clip_vision_model"):
            cls = transformers.CLIPVisionModel
        return _open(cls, given)
    if "model_type" not in given:
        raise ConfigError(f"{where}: name the encoder's model_type, such as dinov2 or bert, or a folder of one")
    kind = given["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise unknown_name("model_type", kind, list(transformers.CONFIG_MAPPING.keys()))
    cls = transformers.CONFIG_MAPPING[kind]
    keys = _keys(cls, {key: value for key, value in given.items() if key != "model_type"}, where)
    own = cls().to_dict()
    config = cls(**{key: value for key, value in follows.items() if key in own} | keys)
    if kind == "clip_vision_model":
        return transformers.CLIPVisionModel(config)
    return transformers.AutoModel.from_config(config)


def _open(cls: Any, source: str) -> Any:
    """Load weights, safetensors only, and make sure that none was left at random values."""
    try:
        model, report = cls.from_pretrained(source, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: cannot be loaded ({first_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{source}: lacks {len(missing)} tensors, such as {missing[0]}")
    return model


def _keys(cls: Any, given: Any, where: str) -> dict[str, Any]:
    """Keys of a stock config, each checked to be known: `transformers` keeps what it does not know in silence."""
    known = cls().to_dict()
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_name('key', key, known)}")
    return dict(given)


def _special(tokenizer: Any) -> dict[str, int | None]:
    """Ids of special tokens, for a text encoder's config."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _append_end(tokenizer: Any) -> None:
    """Let a fast tokenizer end every text with its end token, here and in the folder that is saved."""
    from tokenizers.processors import TemplateProcessing

    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", pair=f"$A {end[0]} $B {end[0]}", special_tokens=[end]
    )

"""Two encoders side by side, contrasted: CLIP, SigLIP, or any pair, as the stock classes of `transformers`.

CLIP (Radford et al. 2021, arXiv:2103.00020), SigLIP (Zhai et al. 2023, arXiv:2303.15343), and LiT-like pairs of any
two encoders (Zhai et al. 2022, arXiv:2111.07991; `VisionTextDualEncoderModel`). The networks are those of
`transformers`, and so is the folder that is written: `AutoModel` and `AutoProcessor` see the same tokens and the same
pixels as training did, and score the same. What is added is what they lack for training: a loss that sees all
processes' pairs and knows pairs of one image, SigLIP's initial temperature and bias (a fresh `SiglipModel` has zeros
there), and a bound on the temperature. A fresh model follows its tokenizer and its image rules, so that no number is
typed twice: vocabulary, special tokens and image size.

Parameters carry the stock names: `vision_model.*`, `text_model.*`, `visual_projection.*`, `text_projection.*`,
`logit_scale`, `logit_bias`. SigLIP's loss on a model without a bias adds one here; the stock folder has no place for
it, and no ranking depends on it.
"""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from polymodal.config import RESAMPLE_FILTERS, ImageConfig
from polymodal.errors import ConfigError, unknown_name
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.base import METRIC, Embedded, Everyone, PairBatch, PairModel
from polymodal.modeling.dual_encoders.config import ObjectiveConfig, PairModelConfig
from polymodal.modeling.dual_encoders.losses import clamp_logit_scale, clip_loss, siglip_loss, unit
from polymodal.modeling.encoders.vision import OWN_LAYERS
from polymodal.modeling.language_model import open_tokenizer
from polymodal.modeling.pretrained import load_checked, look_over, read_settings
from polymodal.utils.modules import frozen

LOGIT_SCALE_SIGLIP = math.log(10)
LOGIT_BIAS_SIGLIP = -10.0
LOGIT_SCALE_CLIP = math.log(1 / 0.07)
CLASSES = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
    "blip": "BlipForImageTextRetrieval",
}
PROCESSORS = {
    "clip": "CLIPProcessor",
    "siglip": "SiglipProcessor",
    "vision-text-dual-encoder": "VisionTextDualEncoderProcessor",
    "blip": "BlipProcessor",
}
_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Text encoders whose positions begin behind the padding's, so that they have fewer than they say."""


class ScaledPairModel(PairModel):
    """A `PairModel` with CLIP's or SigLIP's loss: cosines times a learned scale."""

    objective: ObjectiveConfig
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter  # SigLIP's

    def contrast(
        self, own: Embedded, own_ids: Tensor, all_image: Tensor, all_text: Tensor, all_ids: Tensor, offset: int
    ) -> dict[str, Tensor]:
        """The loss of this process's pairs against everyone's; see `PairModel.contrast`."""
        if len(all_ids) < 2:
            raise ConfigError("a step of one pair has nothing to contrast it with; raise batch.global_size")
        found = {f"{METRIC}{name}": own.text.new_tensor(value) for name, value in self.facts().items()}
        if self.objective.type == "siglip":
            scale, bias, chunk = self.logit_scale, self.logit_bias, self.objective.chunk
            found["siglip"] = siglip_loss(own.image, own.text, scale, bias, all_text, offset, chunk, own_ids, all_ids)
        else:
            smoothing = self.objective.label_smoothing or 0.0
            found["clip"] = clip_loss(
                own.image, own.text, self.logit_scale, all_image, all_text, offset, own_ids, all_ids, smoothing
            )
        return found

    def after_step(self) -> None:
        """Bound the temperature: logits of at most 100 times the cosine."""
        clamp_logit_scale(self.logit_scale)

    def facts(self) -> dict[str, Any]:
        """The scale that cosines are multiplied with, and SigLIP's bias."""
        found = {"logit_scale": float(self.logit_scale.detach().exp())}
        if hasattr(self, "logit_bias"):
            found["logit_bias"] = float(self.logit_bias.detach())
        return found


class DualEncoder(ScaledPairModel):
    """A `PairModel` over a stock model."""

    vision_model: Any
    text_model: Any
    projections = ("visual_projection", "text_projection")

    def __init__(self, model: Any, tokenizer: Any, image: ImageConfig, objective: ObjectiveConfig) -> None:
        super().__init__(tokenizer, image)
        if objective.type not in ("clip", "siglip"):
            raise ConfigError(f"objective {objective.type!r} is none for two encoders; use clip or siglip")
        self._stock = (model,)  # in a tuple, so that names below start with the encoders' own
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in list(model.named_parameters(recurse=False)):
            self.register_parameter(name, parameter)
        if not hasattr(self, "logit_scale"):  # BLIP's folder has no place for it either
            self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_CLIP))
        if objective.type == "siglip" and not hasattr(self, "logit_bias"):
            self.logit_bias = nn.Parameter(torch.tensor(LOGIT_BIAS_SIGLIP))
            with torch.no_grad():
                self.logit_scale.fill_(LOGIT_SCALE_SIGLIP)
        self.objective = objective
        self.family: str = model.config.model_type
        vision = model.config.vision_config
        side = (vision.image_size,) * 2 if isinstance(vision.image_size, int) else tuple(vision.image_size)
        if tuple(image.tile_size) != side:
            raise ConfigError(
                f"image.tile_size {image.tile_size[0]}x{image.tile_size[1]}: the vision encoder takes "
                f"{side[0]}x{side[1]} (height x width); make them agree"
            )
        self.patch_grid = Size(side[0] // vision.patch_size, side[1] // vision.patch_size)
        self.max_text = tokenizer.model_max_length
        # SigLIP is trained and used with padding that its text encoder reads.
        self.text_length = self.max_text if self.family == "siglip" else None
        self.features_shape = (1, int(vision.hidden_size))

    @property
    def tower(self) -> nn.Module:
        """The vision encoder, without a projection."""
        tower: nn.Module = self.vision_model
        return tower

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
        sides = zip(self.projections, (pooled, self._read(batch)), strict=True)
        image, text = (unit(self._project(name, side)) for name, side in sides)
        return Embedded(image, text, carry)

    def extra(self, batch: PairBatch, embedded: Embedded, everyone: Everyone) -> dict[str, Tensor]:
        """The distance to the teacher, where there is one."""
        if self.distiller is None or batch.teacher is None or self.objective.distill is None:
            return {}
        distance = self.distiller(batch, embedded.carry["patches"])
        share = len(batch) / len(everyone.image_ids)
        return {"distill": distance * share * self.objective.distill.weight}

    def attend_plainly(self) -> None:
        """Attend by plain matrix products instead of torch's fused attention; the same to rounding."""
        self._stock[0].set_attn_implementation("eager")

    def checkpoint_layers(self) -> None:
        """Keep only each layer's input while training, and compute the rest again in the backward pass."""
        self._stock[0].gradient_checkpointing_enable({"use_reentrant": False})

    def save(self, folder: Path) -> None:
        """Write a stock folder: weights, config, tokenizer, image processor."""
        self._stock[0].save_pretrained(folder)
        save_processor(folder, self.family, self.tokenizer, self.image)

    def _see(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled output [B, E] and patches [B, P, E] of images."""
        pixels = self.pixel_norm(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen(self.vision_model)):
            seen = self.vision_model(pixel_values=pixels)
        if getattr(seen, "pooler_output", None) is None:
            raise ConfigError(f"the vision encoder {type(self.vision_model).__name__} gives no pooled output")
        return seen.pooler_output, seen.last_hidden_state[:, -self.patch_grid.area :]

    def _read(self, batch: PairBatch) -> Tensor:
        """Pooled output [B, E] of texts."""
        mask = {} if self.text_length is not None else {"attention_mask": batch.attention_mask.long()}
        read = getattr(self.text_model(input_ids=batch.input_ids, **mask), "pooler_output", None)
        if read is None:
            raise ConfigError(f"the text encoder {type(self.text_model).__name__} gives no pooled output")
        pooled: Tensor = read
        return pooled

    def _project(self, name: str, pooled: Tensor) -> Tensor:
        layer = getattr(self, name, None)
        return pooled if layer is None else layer(pooled)


class BlipRetrieval(DualEncoder):
    """BLIP's class for retrieval (Li et al. 2022, arXiv:2201.12086): its contrast; the matching head stays as it is."""

    text_encoder: Any
    projections = ("vision_proj", "text_proj")

    def _see(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        # The stock class reads the first position of both encoders, not a pooled output.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen(self.vision_model)):
            seen = self.vision_model(pixel_values=self.pixel_norm(pixel_values)).last_hidden_state
        return seen[:, 0], seen[:, 1:]

    def _read(self, batch: PairBatch) -> Tensor:
        mask = batch.attention_mask.long()
        read: Tensor = self.text_encoder(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state[:, 0]
        return read


def build_dual_encoder(settings: PairModelConfig, objective: ObjectiveConfig) -> DualEncoder:
    """Build two encoders from a recipe."""
    tokenizer = load_text_tokenizer(settings.tokenizer, settings.pad_token)
    height, width = settings.image.tile_size
    if height != width:
        raise ConfigError(f"image.tile_size {height}x{width}: the vision encoder takes square tiles")
    model = (_build_pair if settings.family == "pair" else _build_stock)(settings, tokenizer)
    siglip = objective.type == "siglip"
    with torch.no_grad():
        model.logit_scale.fill_(LOGIT_SCALE_SIGLIP if siglip else LOGIT_SCALE_CLIP)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(LOGIT_BIAS_SIGLIP)
    ready(tokenizer, model)
    return DualEncoder(model, tokenizer, settings.image, objective)


def load_dual_encoder(source: str, image: ImageConfig, objective: ObjectiveConfig) -> DualEncoder:
    """Load two encoders."""
    settings = read_settings(source, source)
    stock = CLASSES[settings.model_type]
    named = (settings.architectures or [stock])[0]
    if settings.model_type == "blip" and named != stock:
        raise ConfigError(f"{source}: a {named} scores no pairs of image and text; of BLIP's classes {stock} does")
    model = _open(getattr(transformers, stock), source)
    tokenizer = load_text_tokenizer(source, None)
    ready(tokenizer, model)
    return (BlipRetrieval if settings.model_type == "blip" else DualEncoder)(model, tokenizer, image, objective)


def load_text_tokenizer(source: str, pad_token: str | None) -> Any:
    """Load a tokenizer that can pad."""
    tokenizer: Any = open_tokenizer(source, f"tokenizer {source}: cannot be opened")
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
    images = image_processor(family, image)
    # Both spellings: one file for all parts is read by transformers 5, the other by what came before.
    getattr(transformers, PROCESSORS[family])(images, tokenizer).save_pretrained(folder)
    images.save_pretrained(folder)


def image_processor(family: str, image: ImageConfig) -> Any:
    """The stock image processor that does what image rules say."""
    crops = image.image_aspect_ratio == "crop"
    if image.image_aspect_ratio not in ("squash", "crop"):
        raise ConfigError(f"image_aspect_ratio {image.image_aspect_ratio!r}: no stock image processor does this")
    tile = {"height": image.tile_size[0], "width": image.tile_size[1]}
    clips = family == "clip" or (family != "siglip" and crops)
    return (transformers.CLIPImageProcessorPil if clips else transformers.SiglipImageProcessorPil)(
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
    name = {"clip": "CLIP", "siglip": "Siglip"}[settings.family]
    vision = stock_keys(getattr(transformers, f"{name}VisionConfig"), settings.vision, "init.model.vision")
    text = stock_keys(getattr(transformers, f"{name}TextConfig"), settings.text, "init.model.text")
    vision = {**vision, "image_size": settings.image.tile_size[0]}
    text = {"vocab_size": len(tokenizer), **text, **special_ids(tokenizer)}
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
    size = {"image_size": settings.image.tile_size[0]}
    vision = _encoder(settings.vision, "init.model.vision", size)
    text = _encoder(settings.text, "init.model.text", {"vocab_size": len(tokenizer), **special_ids(tokenizer)})
    made = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=settings.projection_dim
    )
    return transformers.VisionTextDualEncoderModel(config=made, vision_model=vision, text_model=text)


def _encoder(given: dict[str, Any] | str, where: str, follows: dict[str, Any]) -> Any:
    """One encoder of a pair: from a folder or hub id, or fresh from keys."""
    if isinstance(given, str):
        settings = read_settings(given, f"{where} {given!r}")
        of_clip = settings.model_type in ("clip", "clip_vision_model")
        return _open(transformers.CLIPVisionModel if of_clip else transformers.AutoModel, given, OWN_LAYERS)
    if "model_type" not in given:
        raise ConfigError(f"{where}: name the encoder's model_type, such as dinov2 or bert, or a folder of one")
    kind = given["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise unknown_name("model_type", kind, list(transformers.CONFIG_MAPPING.keys()))
    cls = transformers.CONFIG_MAPPING[kind]
    keys = stock_keys(cls, {key: value for key, value in given.items() if key != "model_type"}, where)
    own = cls().to_dict()
    config = cls(**{key: value for key, value in follows.items() if key in own} | keys)
    if kind == "clip_vision_model":
        return transformers.CLIPVisionModel(config)
    return transformers.AutoModel.from_config(config)


def _open(cls: Any, source: str, no_more: str = "") -> Any:
    """Load weights, safetensors only, and make sure that none was left at random values."""
    most = look_over(source, source)
    return load_checked(cls, source, source, most, no_more=no_more, dtype=torch.float32, use_safetensors=True)


def stock_keys(cls: Any, given: Any, where: str) -> dict[str, Any]:
    """Keys of a stock config, each checked to be known: `transformers` keeps what it does not know in silence."""
    keys = cls().to_dict()
    for key in given:
        if key not in keys:
            raise ConfigError(f"{where}: {unknown_name('key', key, keys)}")
    return dict(given)


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Ids of special tokens, for a text encoder's config."""
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _append_end(tokenizer: Any) -> None:
    """Let a fast tokenizer end every text with its end token, here and in the folder that is saved."""
    from tokenizers.processors import TemplateProcessing

    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", pair=f"$A {end[0]} $B {end[0]}", special_tokens=[end]
    )

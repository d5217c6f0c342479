"""Strict, frozen configuration of a model. A value is typed once; what can be derived is a property.

Unknown keys are errors that name the nearest key. Names follow the field's habits (LLaVA's `vision_tower`,
`mm_projector_type`, `mm_vision_select_layer`, `image_aspect_ratio`, ...).
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from polymodal.errors import ConfigError, unknown_name
from polymodal.geometry import PatchMerge


class Strict(BaseModel):
    """A frozen model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class VisionConfig(Strict):
    """Which vision encoder, and what of it is used.

    Attributes:
        vision_tower: A folder, a hub id, or "bundled" for weights that lie in the model's own folder.
        type: The encoder family; a key of `encoders.vision.VISION_ENCODERS`.
        revision: The pinned revision of a hub id.
        mm_vision_select_layer: Which hidden state is used (-1 the last, -2 the one before, as LLaVA counts); several
            are concatenated along the channels.
        mm_vision_select_feature: "patch" drops the class token, "cls_patch" keeps it, "cls" keeps only it.
        pool: Average-pool the patch grid to this many rows and columns inside the encoder (convolutional towers).
        stages: Which stages of a convolutional tower are concatenated.
        detail: Cells a side that the shallow stages keep inside each token, laid along the channels (convolutional
            towers); 1 where None.
    """

    vision_tower: str
    type: str
    revision: str | None = None
    mm_vision_select_layer: int | tuple[int, ...] = -2
    mm_vision_select_feature: Literal["patch", "cls_patch", "cls"] = "patch"
    pool: int | None = None
    stages: tuple[str, ...] | None = None
    detail: int | None = None


class ImageConfig(Strict):
    """How a picture becomes tiles; travels with the weights, since it is part of what was trained.

    Attributes:
        image_aspect_ratio: "squash" resizes to the tile regardless of shape; "pad" pads to a square first; "crop"
            resizes the short side and crops the centre; "slice" cuts tiles and adds a thumbnail; "anyres" fits the
            picture to the best of `image_grid_pinpoints` and adds a global view.
        tile_size: The encoder's input, (height, width) in pixels.
        resize_short_side: For "crop": the short side before cropping; the tile's short side when None.
        image_grid_pinpoints: For "anyres": the canvases allowed, (height, width) in pixels.
        anyres_max: For "anyres": LLaVA-OneVision's anyres_max_N; grids with more tokens than N tiles are shrunk.
        mm_patch_merge_type: For "anyres": see `geometry.ImagePlan.merge`.
        max_tiles: For "slice": the most tiles besides the thumbnail.
        thumbnail: For "slice": add the whole picture as a last tile when it was cut.
        overview_aspect_ratio: How the overview or thumbnail tile is made: squashed, or padded to a square.
        image_mean: Per channel, after rescaling to 0..1.
        image_std: Per channel, after rescaling to 0..1.
        resample: Pillow's filter.
        background: What shows through transparent pixels and fills padding of "slice", RGB 0..255.
        pad_color: What "pad" puts beside the picture; None takes the mean colour, as LLaVA does.
        max_pixels: Pictures with more pixels are refused before they are decoded.
    """

    image_aspect_ratio: Literal["squash", "pad", "crop", "slice", "anyres"] = "pad"
    tile_size: tuple[int, int]
    resize_short_side: int | None = None
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    anyres_max: int | None = None
    mm_patch_merge_type: PatchMerge = "flat"
    max_tiles: int = 6
    thumbnail: bool = True
    overview_aspect_ratio: Literal["squash", "pad", "crop"] = "squash"
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    pad_color: tuple[int, int, int] | None = None
    max_pixels: int = 64_000_000


class ProjectorConfig(Strict):
    """Which projector takes encoder features to the language model's width.

    Attributes:
        mm_projector_type: "linear", "mlp2x_gelu" (any number), "pixel_shuffle<r>[_mlp2x_gelu]", "avg_pool<r>[_...]";
            see `projectors.build_projector`.
        bias: Whether linear layers have a bias.
        norm: What comes before the first layer: "layer" a LayerNorm, "standardize" a fixed mean and deviation per
            channel, measured on the first data.
        hidden_size: Width between the layers of an MLP; the language model's where None.
    """

    mm_projector_type: str = "mlp2x_gelu"
    bias: bool = True
    norm: Literal["none", "layer", "standardize"] = "none"
    hidden_size: int | None = None


class LLMConfig(Strict):
    """Which language model.

    Attributes:
        model_name_or_path: A folder, a hub id, a .gguf file, or "smollm2" for the default that `polymodal` finds.
        revision: The pinned revision of a hub id.
        dtype: Of the weights in memory.
        device_map: Passed to transformers; None keeps the model on one device.
        attn_implementation: Passed to transformers.
    """

    model_name_or_path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device_map: str | None = None
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


class TemplateConfig(Strict):
    """How a conversation becomes one string of tokens.

    Attributes:
        chat_template: A preset of `processing.template.PRESETS` ("chatml", "llama2", "llama3", "mistral", "vicuna",
            "plain"), "tokenizer" for the tokenizer's own, or jinja text.
        default_system: The system message where a conversation has none; None means no system turn.
        image_newline_text: Text after a picture, as LLaVA's "<image>\\n"; empty for none.
    """

    chat_template: str = "tokenizer"
    default_system: str | None = None
    image_newline_text: str = ""


class ModelConfig(Strict):
    """A whole multimodal LLM. Written to `polymodal.json`, read back, and compared on load.

    Attributes:
        vision: The vision encoder; None for a text-only model.
        image: The picture preprocessing; needed where `vision` is.
        projector: The vision projector.
        llm: The language model.
        template: The chat template.
        image_token_id: The placeholder's id. None: the tokenizer's own "<image>" where it has one, else the first id
            past the language model's vocabulary, which the head cannot produce.
    """

    vision: VisionConfig | None = None
    image: ImageConfig | None = None
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    llm: LLMConfig
    template: TemplateConfig = Field(default_factory=TemplateConfig)
    image_token_id: int | None = None

    @field_validator("image")
    @classmethod
    def _image_needs_vision(cls, value: ImageConfig | None, info: Any) -> ImageConfig | None:
        if (value is None) != (info.data.get("vision") is None):
            raise ValueError("`vision` and `image` come together: give both or neither")
        return value


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse_config(cls: type[ConfigT], data: Any, where: str) -> ConfigT:
    """Validate plain data into a config, with one-line errors.

    Args:
        cls: The config class.
        data: Plain data, as read from YAML or JSON.
        where: The file or flag that the data came from, for the error.

    Returns:
        The frozen config.

    Raises:
        ConfigError: A key is unknown or a value is wrong; names the key, what was given and the closest key.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, found {type(data).__name__}")
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _fields_at(cls, first["loc"][:-1])
            raise ConfigError(f"{where}: {unknown_name('key', path.split('.')[-1], known)} (at {path})") from None
        given = "" if first["type"] == "missing" else f" (given {first['input']!r})"
        raise ConfigError(f"{where}: {path or 'config'}: {first['msg']}{given}") from None


def _fields_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields at a location inside a nested config class."""
    current: Any = cls
    for key in loc:
        if isinstance(key, int):
            continue
        field = current.model_fields.get(key)
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        inner = [
            a
            for c in candidates
            for a in getattr(c, "__args__", ())
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if nested or inner:
            current = (nested + inner)[0]
    return list(current.model_fields)

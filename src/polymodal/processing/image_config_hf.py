"""Read a Hugging Face `preprocessor_config.json` as an `ImageConfig`.

Strict: a setting that cannot be expressed, or is not known, is refused and named. Preprocessing that is nearly right
costs accuracy in silence.
"""

from collections.abc import Mapping
from typing import Any, Literal

from polymodal.config import RESAMPLE_FILTERS, ImageConfig, Resample, parse_config
from polymodal.errors import ConfigError, first_line, unknown_name

Family = Literal["one_tile", "llava", "llava_next", "onevision"]

FAMILIES: dict[str, Family] = {
    "BitImageProcessor": "one_tile",  # DINOv2
    "BlipImageProcessor": "one_tile",
    "CLIPImageProcessor": "one_tile",
    "SiglipImageProcessor": "one_tile",
    "ViTImageProcessor": "one_tile",
    "LlavaImageProcessor": "llava",
    "LlavaNextImageProcessor": "llava_next",
    "LlavaOnevisionImageProcessor": "onevision",
}
"""Processor class, without "Fast" or "Pil", to the way it is read."""

# The classes that crop the centre, and cut the size to its short side, unless the file says otherwise.
_CROP_BY_DEFAULT = {"BitImageProcessor", "CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor"}
_FILTERS: dict[Any, Resample] = {number: name for name, number in RESAMPLE_FILTERS.items()}
_MUST_BE_TRUE = ("do_resize", "do_rescale", "do_convert_rgb")
_READ = """
    aspect_ratio_setting crop_size do_center_crop do_normalize do_pad feature_extractor_type image_grid_pinpoints
    image_mean image_processor_type image_std resample rescale_factor size
"""
# Changes no pixel.
_IRRELEVANT = """
    _processor_class _valid_processor_keys auto_map data_format default_to_square device disable_grouping
    input_data_format model_input_names processor_class return_tensors transformers_version
"""
_KNOWN = {*_MUST_BE_TRUE, *_READ.split(), *_IRRELEVANT.split()}


def image_config_from_hf(preprocessor: Mapping[str, Any], *, vision_aspect_ratio: str | None = None) -> ImageConfig:
    """Read CLIP's, SigLIP's, DINOv2's, LLaVA's, LLaVA-NeXT's or LLaVA-OneVision's preprocessing."""
    try:
        return _read(preprocessor, vision_aspect_ratio)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the preprocessor config holds a value of another kind ({first_line(error)})") from None


def _read(preprocessor: Mapping[str, Any], vision_aspect_ratio: str | None) -> ImageConfig:
    if isinstance(nested := preprocessor.get("image_processor"), Mapping):
        preprocessor = nested
    given = {key: value for key, value in preprocessor.items() if value is not None}
    name = _class_name(given)
    family = FAMILIES.get(name)
    if family is None:
        raise unknown_name("image processor", name, FAMILIES)
    for key, value in given.items():
        if key not in _KNOWN:
            raise _refuse(name, key, value, "is not understood")
        if key in _MUST_BE_TRUE and value is not True:
            raise _refuse(name, key, value, "cannot be expressed; it must be true")
    if not abs(given.get("rescale_factor", 1 / 255) * 255 - 1) <= 1e-6:
        raise _refuse(name, "rescale_factor", given["rescale_factor"], "cannot be expressed; it must be 1/255")
    if family != "onevision" and vision_aspect_ratio is not None:
        raise ConfigError(f"{name}: vision_aspect_ratio is {vision_aspect_ratio!r}, only LLaVA-OneVision has one")
    found = {
        **_layout(given, name, family, vision_aspect_ratio),
        "image_mean": _channels(given, name, "image_mean", 0.0),
        "image_std": _channels(given, name, "image_std", 1.0),
        "resample": _resample(given, name),
    }
    return parse_config(ImageConfig, found, name)


def _layout(given: dict[str, Any], name: str, family: Family, vision_aspect_ratio: str | None) -> dict[str, Any]:
    """Find tile size and the way an image is fitted to it."""
    crops = given.get("do_center_crop", name in _CROP_BY_DEFAULT)
    size = _size(given, name, "size", short_side=name in _CROP_BY_DEFAULT)
    crop = _size(given, name, "crop_size", short_side=False) if crops else None
    if family in ("llava_next", "onevision"):
        pinpoints = given.get("image_grid_pinpoints")
        if not pinpoints:
            raise ConfigError(f"{name}: image_grid_pinpoints is missing")
        if given.get("aspect_ratio_setting", "anyres") != "anyres":
            raise _refuse(name, "aspect_ratio_setting", given["aspect_ratio_setting"], "cannot be expressed")
        return {
            "image_aspect_ratio": "anyres",
            "tile_size": _fixed_tile(name, size, crop),
            "image_grid_pinpoints": tuple((int(height), int(width)) for height, width in pinpoints),
            "mm_patch_merge_type": "spatial_unpad",
            "anyres_max": _anyres_max(name, vision_aspect_ratio) if family == "onevision" else None,
            "several_images": "pad" if family == "onevision" else "alike",
        }
    for key in ("image_grid_pinpoints", "aspect_ratio_setting"):
        if key in given:
            raise _refuse(name, key, given[key], "is not understood")
    if given.get("do_pad"):
        if family != "llava":
            raise _refuse(name, "do_pad", True, "cannot be expressed")
        return {"image_aspect_ratio": "pad", "tile_size": _fixed_tile(name, size, crop)}
    if isinstance(size, int):
        if crop is None or isinstance(crop, int):
            raise ConfigError(f"{name}: size gives a short side of {size} and nothing is cropped; tiles need one size")
        short = None if size == min(crop) else size
        return {"image_aspect_ratio": "crop", "tile_size": crop, "resize_short_side": short}
    if crop is not None and crop != size:
        raise _refuse(name, "crop_size", crop, f"cannot be expressed after a resize to {size}")
    return {"image_aspect_ratio": "squash", "tile_size": size}


def _fixed_tile(name: str, size: int | tuple[int, int], crop: int | tuple[int, int] | None) -> tuple[int, int]:
    """Check that resizing and cropping name the same square tile, where a square comes in."""
    tile = (size, size) if isinstance(size, int) else size
    if crop is not None and crop != tile:
        raise _refuse(name, "crop_size", crop, f"cannot be expressed after a resize to {tile}")
    if tile[0] != tile[1]:
        raise _refuse(name, "size", tile, "cannot be expressed; the tile must be square")
    return tile


def _size(given: dict[str, Any], name: str, key: str, *, short_side: bool) -> int | tuple[int, int]:
    """Read a size: an int for a short side, (height, width) for a fixed one."""
    value = given.get(key)
    if value is None:
        raise ConfigError(f"{name}: {key} is missing")
    if isinstance(value, int):  # as written before transformers 4.2x
        return value if short_side else (value, value)
    sides = {side: length for side, length in value.items() if length is not None} if isinstance(value, Mapping) else {}
    if set(sides) == {"shortest_edge"}:
        return int(sides["shortest_edge"])
    if set(sides) == {"height", "width"}:
        return int(sides["height"]), int(sides["width"])
    raise _refuse(name, key, value, "cannot be expressed")


def _channels(given: dict[str, Any], name: str, key: str, unset: float) -> tuple[float, float, float]:
    """Read a mean or deviation; `unset` where nothing is normalised."""
    if given.get("do_normalize", True) is False:
        return unset, unset, unset
    match given.get(key):
        case [red, green, blue]:
            return float(red), float(green), float(blue)
        case value:
            raise _refuse(name, key, value, "must be three numbers")


def _resample(given: dict[str, Any], name: str) -> Resample:
    """Read Pillow's number of a filter; all the families default to bicubic but ViT."""
    number = given.get("resample", 2 if name == "ViTImageProcessor" else 3)
    if number not in _FILTERS:
        raise _refuse(name, "resample", number, "cannot be expressed; 1 lanczos, 2 bilinear, 3 bicubic are known")
    return _FILTERS[number]


def _anyres_max(name: str, ratio: str | None) -> int:
    """Read N of "anyres_max_N"."""
    number = (ratio or "anyres_max_9").removeprefix("anyres_max_")
    if not number.isdecimal() or int(number) < 1:
        raise _refuse(name, "vision_aspect_ratio", ratio, "must be anyres_max_N")
    return int(number)


def _class_name(given: dict[str, Any]) -> str:
    """Find the processor's class, whatever its spelling through the years."""
    name = given.get("image_processor_type") or given.get("feature_extractor_type")
    if not isinstance(name, str):
        raise ConfigError("the preprocessor config names no image_processor_type")
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name.endswith("FeatureExtractor"):
        name = name.removesuffix("FeatureExtractor") + "ImageProcessor"
    return name


def _refuse(name: str, key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"{name}: {key} ({value!r}) {why}")

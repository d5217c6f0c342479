"""The video processors of transformers where torchvision is not installed.

They are classes for torchvision, of which they need a handful of functions: resize, pad, crop, normalise. Each is a few
lines of torch, as torchvision itself computes them on tensors, so where torchvision is missing these take its place: in
the modules of transformers that would have imported it, and nowhere else. Decoding is never theirs (`media.video`).
"""

import enum
import importlib
import sys
import threading
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from PIL.Image import Resampling
from torch import Tensor
from torch.nn import functional
from transformers.video_processing_utils import VideoProcessorMixin

from polymodal.safety.config_json import read_json

_LOCK = threading.Lock()


class InterpolationMode(enum.Enum):
    """How pixels between pixels are made; by torchvision's names."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


_BY_PILLOW: dict[Any, InterpolationMode] = {
    Resampling[m.name]: m for m in InterpolationMode if m.name in Resampling.__members__
}
_BY_PILLOW[Resampling.NEAREST] = InterpolationMode.NEAREST_EXACT


def resize(
    image: Tensor,  # [..., 3, H, W]
    size: Sequence[int],
    interpolation: InterpolationMode | int = InterpolationMode.BILINEAR,  # or Pillow's number
    antialias: bool = True,
    **_: Any,
) -> Tensor:
    """Scale to a height and width; bytes stay bytes."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    mode: Any = _BY_PILLOW.get(interpolation, interpolation)
    smooth = mode in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    flat = image.reshape(-1, *image.shape[-3:])
    exact = image.is_floating_point() or (image.dtype == torch.uint8 and image.device.type == "cpu")
    scaled = functional.interpolate(
        flat if exact else flat.float(),
        list(size),
        mode=mode.value,
        align_corners=False if smooth else None,
        antialias=antialias and smooth,
    )
    if not exact:
        scaled = scaled.clamp(0, 255).round().to(image.dtype)
    return scaled.reshape(*image.shape[:-2], *size)


def pad(image: Tensor, padding: Sequence[int], fill: float = 0, padding_mode: str = "constant") -> Tensor:
    """Add pixels at the left, top, right and bottom."""
    left, top, right, bottom = padding
    given = {"value": fill} if padding_mode == "constant" else {}
    return functional.pad(image, (left, right, top, bottom), padding_mode, **given)


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Cut a piece out."""
    return image[..., top : top + height, left : left + width]


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    """Take the mean of each channel away and divide by its deviation."""
    mean, std = (torch.as_tensor(v, dtype=image.dtype, device=image.device).view(-1, 1, 1) for v in (mean, std))
    return (image.sub_(mean) if inplace else image - mean).div_(std)


def grayscale_to_rgb(image: Tensor) -> Tensor:
    """Three channels of one."""
    return image if image.shape[-3] != 1 else image.expand(*image.shape[:-3], 3, *image.shape[-2:])


def to_dtype(image: Tensor, dtype: torch.dtype, scale: bool = False) -> Tensor:
    """Another type; with `scale` bytes become numbers from 0 to 1, and the other way round."""
    if not scale or image.is_floating_point() == dtype.is_floating_point:
        return image.to(dtype)
    return image.to(dtype) / 255 if dtype.is_floating_point else (image * 255.999).to(dtype)


def _stand_ins() -> dict[str, ModuleType]:
    """Modules with these functions, by the names of torchvision's."""
    names = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")
    made = {f"torchvision{name}": ModuleType(f"torchvision{name}") for name in names}
    for name, module in made.items():
        vars(module).update({f.__name__: f for f in (resize, pad, crop, normalize, grayscale_to_rgb, to_dtype)})
        module.InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, module)
    return made


@cache
def _class(name: str) -> Any:
    """The class of that name, from the module that defines it; None where there is none."""
    for path in sorted(Path(transformers.__path__[0], "models").glob("*/video_processing_*.py")):
        if f"\nclass {name}(" in path.read_text(encoding="utf-8"):
            return getattr(_imported(f"transformers.models.{path.parent.name}.{path.stem}"), name)
    return None


def _imported(name: str) -> ModuleType:
    """Import a module of transformers, with the functions above where it asks for torchvision's."""
    if find_spec("torchvision") is not None:
        return importlib.import_module(name)
    with _LOCK:
        stand_ins = _stand_ins()
        tv = stand_ins["torchvision.transforms.v2.functional"]
        asked = {f: getattr(transformers.utils, f) for f in ("is_torchvision_available", "is_torchvision_v2_available")}
        sys.modules.update(stand_ins)
        vars(transformers.utils).update(dict.fromkeys(asked, lambda: True))
        try:
            module = importlib.import_module(name)
        finally:
            vars(transformers.utils).update(asked)
            for key in stand_ins:
                del sys.modules[key]
        family = [each for key, each in sys.modules.items() if key.startswith(f"{module.__package__}.")]
        for each in (*family, *map(importlib.import_module, _SHARED)):
            vars(each).setdefault("tvF", tv)
            if getattr(each, "pil_torch_interpolation_mapping", 0) is None:
                each.pil_torch_interpolation_mapping = _BY_PILLOW  # type: ignore[attr-defined]
        return module


_SHARED = ("transformers.image_processing_backends", "transformers.video_processing_utils")


def open_video_processor(folder: Path) -> Any:
    """Open a folder's video processor; None where transformers has no class for it that works here."""
    settings, _ = VideoProcessorMixin.get_video_processor_dict(str(folder), local_files_only=True)
    images = str(settings.get("image_processor_type")).removesuffix("Pil").removesuffix("Fast")
    model_type = str(read_json(folder / "config.json").get("model_type")).replace("-", "_")
    own = f"transformers.models.{model_type}.video_processing_{model_type}"
    try:
        kind = _class(str(settings.get("video_processor_type"))) or _class(images.replace("Image", "Video"))
        if kind is None and model_type.isidentifier() and find_spec(own) is not None:
            module = _imported(own)
            kind = getattr(module, module.__all__[0])
    except ImportError:  # it wants more of torchvision, or another package
        return None
    return kind if kind is None else kind.from_dict(settings)

"""Folders of the original LLaVA repository (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT): what their `config.json` says.

There a LLaVA is a language model with a projector inside it: the `config.json` is the language model's with `mm_*`
keys, and the weights are the language model's with `model.mm_projector.*` among them. The tower is another repository,
named by `mm_vision_tower`. Three kinds of folder are left by its training:

    whole       all weights, in shards, mostly as pickles (`pytorch_model-*.bin`)
    projector   stage 1: `config.json` and `mm_projector.bin`
    lora        peft's adapter and `non_lora_trainables.bin`, which holds the projector

Pickles are read only where that is allowed by name, and then as tensors only. `llava_weights` reads the tensors;
`interop.llava.load` adds images and prompts, which such a folder does not describe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from polymodal.config import PatchMerge, ProjectorConfig
from polymodal.errors import CheckpointError, first_line
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import FolderReport, check_folder

Known = TypeVar("Known")
Kind: TypeAlias = Literal["whole", "projector", "lora"]

LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_qwen": "qwen2",
    "llava_gemma": "gemma",
}
"""`model_type` there -> of the language model in transformers."""

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
EXTRA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
ADAPTER_CONFIG = "adapter_config.json"

_NOT_THE_LANGUAGE_MODELS = re.compile(
    r"mm_|tune_|freeze_|unfreeze_|use_mm|image_|tokenizer_|s2|add_|vision_tower|model_type|architectures|"
    r"transformers_version|_name_or_path|auto_map|torch_dtype|dtype|pos_skipping_range|delay_load"
)
_MERGES: dict[str, PatchMerge] = {"flat": "flat", "spatial": "spatial", "spatial_unpad": "spatial_unpad"}
_FEATURES: dict[str, Literal["patch", "cls_patch"]] = {"patch": "patch", "cls_patch": "cls_patch"}
_REFUSED = {
    "mm_use_im_start_end": "tokens around each image",
    "s2": "a tower at several scales",
    "mm_resampler_type": "a resampler behind the tower",
    "mm_use_4_vision_tokens": "another order of tokens",
}
"""Settings that change what is computed and that our parts do not have."""


@dataclass(frozen=True)
class Repo:
    """A folder of the LLaVA repository, in our terms; its weights are not read yet."""

    report: FolderReport  # The folder, looked over
    kind: Kind  # Which of the three
    text_settings: Any  # The language model's configuration, of transformers
    tower: str  # The tower's hub id or path
    select_layer: int  # Which hidden state of it; of a tower that is not CLIP the repository always takes -2
    select_feature: Literal["patch", "cls_patch"]  # "patch", or "cls_patch" to keep the class token
    projector: ProjectorConfig  # The projector
    aspect_ratio: Literal["crop", "pad", "anyres"]  # How an image is laid out: "crop", "pad" or "anyres"
    anyres_max: int | None  # N of "anyres_max_N"; None for the others
    pinpoints: tuple[tuple[int, int], ...]  # Of "anyres": (height, width), in pixels or (`in_tiles`) in tiles
    in_tiles: bool  # Whether `pinpoints` count tiles
    merge: PatchMerge  # How the tiles of "anyres" are laid out

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.report.folder


def is_llava_repo(folder: Path) -> bool:
    """Whether a folder is one of the LLaVA repository's."""
    if not (folder / "config.json").is_file():
        return False
    document = read_json(folder / "config.json")
    return document.get("model_type") in LANGUAGE_MODELS and "mm_vision_tower" in document


def read_repo(folder: Path, *, allow_pickle: bool = False) -> Repo:
    """Look a folder over and read its configuration."""
    if not is_llava_repo(folder):
        raise CheckpointError(f"{folder}: not a folder of the LLaVA repository (config.json names no mm_vision_tower)")
    kind = _kind_of(folder)
    report = check_folder(folder, allow_pickle=True)
    if not allow_pickle and (pickle := _needed_pickle(report, kind)):
        raise CheckpointError(
            f"{folder / pickle}: weights in a pickle, which can run code when it is opened; if you trust where it is "
            "from, `polymodal convert` it with --allow-pickle: tensors are read from it and nothing else"
        )
    where, document = folder / "config.json", read_json(folder / "config.json")
    for key, what in _REFUSED.items():
        if document.get(key):
            raise CheckpointError(f"{where}: {key} is {document[key]!r}: {what} cannot be expressed here")
    ratio, anyres_max = _aspect_ratio(document, where)
    pinpoints, in_tiles = _pinpoints(document, where) if ratio == "anyres" else ((), False)
    merge = _one_of(document, "mm_patch_merge_type", "flat", _MERGES, where) if ratio == "anyres" else "flat"
    feature = _one_of(document, "mm_vision_select_feature", "patch", _FEATURES, where)
    layer = document.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(f"{where}: mm_vision_select_layer is {layer!r}; a whole number is expected")
    kind_of_projector = document.get("mm_projector_type", "linear")
    if not re.fullmatch(r"linear|mlp[1-9]x_gelu", str(kind_of_projector)):
        raise CheckpointError(f"{where}: mm_projector_type is {kind_of_projector!r}, which cannot be expressed here")
    return Repo(
        report=report,
        kind=kind,
        text_settings=_text_settings(document, where),
        tower=str(document["mm_vision_tower"]),
        select_layer=layer,
        select_feature=feature,
        projector=ProjectorConfig(mm_projector_type=kind_of_projector),
        aspect_ratio=ratio,
        anyres_max=anyres_max,
        pinpoints=pinpoints,
        in_tiles=in_tiles,
        merge=merge,
    )


def named_base(folder: Path) -> str | None:
    """The language model that a LoRA or projector folder says it was trained on."""
    for name, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if (folder / name).is_file() and (found := read_json(folder / name).get(key)):
            return str(found)
    return None


def _kind_of(folder: Path) -> Kind:
    if (folder / ADAPTER_CONFIG).is_file():
        return "lora"
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return "whole"
    if any((folder / name).is_file() for name in PROJECTOR_FILES):
        return "projector"
    raise CheckpointError(f"{folder}: no weights: neither a model, nor mm_projector.bin, nor an adapter")


def _needed_pickle(report: FolderReport, kind: Kind) -> str | None:
    """A pickle that would have to be opened."""
    folder = report.folder

    def only_pickled(names: tuple[str, ...]) -> str | None:
        found = [name for name in names if (folder / name).is_file()]
        return found[0] if found and not any(name.endswith(".safetensors") for name in found) else None

    if kind == "projector":
        return only_pickled(PROJECTOR_FILES)
    if kind == "lora":
        adapters = ("adapter_model.safetensors", "adapter_model.bin")
        return only_pickled(adapters) or only_pickled(EXTRA_FILES)
    return next(iter(sorted(report.pickles)), None) if not report.headers else None


def _text_settings(document: dict[str, Any], where: Path) -> Any:
    """The language model's own configuration."""
    from transformers import AutoConfig

    values = {key: value for key, value in document.items() if not _NOT_THE_LANGUAGE_MODELS.match(key)}
    if values.get("rope_scaling") is None:
        values.pop("rope_scaling", None)
    try:
        return AutoConfig.for_model(LANGUAGE_MODELS[document["model_type"]], **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: no configuration of a language model ({first_line(error)})") from None


def _one_of(document: dict[str, Any], key: str, default: str, known: Mapping[str, Known], where: Path) -> Known:
    """A setting that must be one of those known here."""
    given = document.get(key) or default
    if given not in known:
        raise CheckpointError(f"{where}: {key} is {given!r}, which cannot be expressed here ({', '.join(known)})")
    return known[given]


def _aspect_ratio(document: dict[str, Any], where: Path) -> tuple[Literal["crop", "pad", "anyres"], int | None]:
    """`image_aspect_ratio`; left out, the tower's own processor resizes and crops."""
    given = document.get("image_aspect_ratio")
    if given in (None, "square"):
        return "crop", None
    if given == "pad":
        return "pad", None
    if given == "anyres":
        return "anyres", None
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(given))
    if match is None:
        raise CheckpointError(f"{where}: image_aspect_ratio is {given!r}, which cannot be expressed here")
    return "anyres", int(match[1])


def _pinpoints(document: dict[str, Any], where: Path) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The canvases, which are (width, height) there; a text such as "(1x1),...,(6x6)" counts tiles."""
    given = document.get("image_grid_pinpoints")
    if isinstance(given, str):
        corners = [(int(a), int(b)) for a, b in re.findall(r"\((\d{1,2})x(\d{1,2})\)", given)]
        if corners:
            (a, b), (c, d) = corners[0], corners[-1]
            tiles = [(width, height) for width in range(a, c + 1) for height in range(b, d + 1)]
            return tuple((height, width) for width, height in tiles), True
        try:
            given = json.loads(given.replace("(", "[").replace(")", "]"))
        except ValueError:
            given = None
    pairs = given if isinstance(given, list) else []
    if not pairs or not all(isinstance(p, list) and len(p) == 2 and all(isinstance(n, int) for n in p) for p in pairs):
        raise CheckpointError(f"{where}: image_grid_pinpoints must be pairs of whole numbers, such as [[336, 672]]")
    return tuple((height, width) for width, height in pairs), False

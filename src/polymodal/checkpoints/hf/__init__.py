"""Published vision-language models in the layout of transformers, read exactly: one module a family.

`READERS` says which families these are. A reader turns `config.json` into `Pieces`; `weights` builds the model from
them and fills it; `names` has the one table of tensor names. What the folder says about pictures and prompts is read
in `interop.huggingface.load`, which joins the two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from polymodal.checkpoints.hf import blip2, instructblip, llava, llava_next, onevision
from polymodal.errors import CheckpointError, unknown_name
from polymodal.interop.huggingface.families import CONFIG_NAME, Pieces, read_settings
from polymodal.safety.config_json import read_json

READERS: dict[str, Callable[[Any, str], Pieces]] = {
    "llava": llava.read,
    "llava_next": llava_next.read,
    "llava_onevision": onevision.read,
    "blip-2": blip2.read,
    "instructblip": instructblip.read,
}
"""`model_type` -> reader."""

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
}
"""`model_type` -> the class of transformers that such a folder holds."""


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a published model of a family that is read here.

    Args:
        folder: Any folder.

    Returns:
        Whether its `config.json` names such a model.
    """
    if not (folder / CONFIG_NAME).is_file():
        return False
    document = read_json(folder / CONFIG_NAME)
    kind = document.get("model_type")
    architectures = document.get("architectures") or []
    return isinstance(kind, str) and kind in READERS and (not architectures or CLASSES[kind] in architectures)


def read_pieces(folder: Path) -> Pieces:
    """Read what a published folder's `config.json` says.

    Args:
        folder: A folder of one of the families.

    Returns:
        The model in our terms.

    Raises:
        CheckpointError: The file is missing or damaged, or asks for what cannot be expressed.
        ConfigError: The model is of another family.
    """
    where = folder / CONFIG_NAME
    document = read_json(where)
    kind = str(document.get("model_type"))
    if kind not in READERS:
        raise unknown_name("model_type", kind, READERS)
    architectures = document.get("architectures") or []
    if architectures and CLASSES[kind] not in architectures:
        raise CheckpointError(f"{where}: holds a {', '.join(map(str, architectures))}; {CLASSES[kind]} is needed")
    return READERS[kind](read_settings(folder), str(where))

"""Q-Former weights from and to files: what stage 1 leaves, and the names that transformers gives them.

A stage-1 folder holds `qformer.safetensors`, under the names of `QFormer`, and `config.json` with its settings; what
else lies there (heads, a tokenizer) belongs to whoever wrote it. Only safetensors are read. Nothing is loaded in part:
tensors that are missing, left over or of another shape are listed in the error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.config import QFormerConfig, parse_config
from polymodal.errors import CheckpointError
from polymodal.modeling.projectors.qformer import QFormer
from polymodal.projectors.norm import NormKind
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import MAX_INDEX
from polymodal.utils.files import atomic_folder, write_text
from polymodal.utils.safetensors_io import check_finite, compare_tensors, read_tensors, write_tensors

WEIGHTS_NAME = "qformer.safetensors"
CONFIG_NAME = "config.json"
FORMAT = "polymodal-qformer-1"
TEXT_PARTS = (r"embeddings\.", r"transformer\.encoder\.layer\.\d+\.(intermediate|output)\.")
"""What a Q-Former without a text path lacks."""


def save_qformer(folder: Path, qformer: QFormer, *, replace: bool = False) -> None:
    """Write a Q-Former into a folder of its own.

    Args:
        folder: Where to; appears whole or not at all.
        qformer: With or without its text path.
        replace: Overwrite a folder that is there.
    """
    with atomic_folder(folder, replace=replace) as work:
        write_qformer(work, qformer)


def write_qformer(folder: Path, qformer: QFormer) -> None:
    """Write a Q-Former's two files into a folder that is there, such as one that is being written.

    Args:
        folder: The folder.
        qformer: With or without its text path.

    Raises:
        CheckpointError: A weight is not finite.
    """
    write_tensors(folder / WEIGHTS_NAME, qformer.state_dict())
    document = {
        "format": FORMAT,
        "embed_dim": qformer.embed_dim,
        "text": qformer.embeddings is not None,
        "norm": qformer.norm_kind,
        "qformer": qformer.config.model_dump(mode="json"),
    }
    write_text(folder / CONFIG_NAME, json.dumps(document, indent=2) + "\n")


def load_qformer(folder: Path, *, text: bool | None = None) -> QFormer:
    """Build the Q-Former that a folder holds.

    Args:
        folder: What `save_qformer` wrote.
        text: With its text path (True) or without it (False); as saved when None.

    Returns:
        The Q-Former, in eval mode.

    Raises:
        CheckpointError: The folder is incomplete or damaged, or has no text path.
    """
    document = _read_document(folder)
    settings = parse_config(QFormerConfig, document["qformer"], str(folder / CONFIG_NAME))
    norm: NormKind = document["norm"]
    qformer = QFormer(document["embed_dim"], settings, text=document["text"] if text is None else text, norm=norm)
    load_stage1(qformer, folder)
    return qformer.eval()


def load_stage1(qformer: QFormer, folder: Path) -> None:
    """Load what stage 1 left into a Q-Former; text parts are dropped where it has none.

    Args:
        qformer: Changed in place.
        folder: What `save_qformer` wrote.

    Raises:
        CheckpointError: The folder is damaged, or its tensors do not fit; lists them.
    """
    tensors = read_tensors(folder / WEIGHTS_NAME)
    load_exactly(qformer, tensors if qformer.embeddings is not None else without_text(tensors), str(folder))


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the projector out of the weights of a BLIP-2 of transformers.

    Args:
        state: The state of `Blip2ForConditionalGeneration`, `Blip2ForImageTextRetrieval` or
            `InstructBlipForConditionalGeneration`, or their tensors as a checkpoint names them.

    Returns:
        Tensors as `QFormerProjector` names them ("qformer.", "language_projection."). The tower, the language model
        and the heads of retrieval ("vision_projection.", "text_projection.", "itm_head.") are left out.

    Raises:
        CheckpointError: There is no Q-Former in it.
    """
    prefixes = (
        (r"query_tokens$", "qformer.query_tokens"),
        (r"vision_model\.post_layernorm\.", "qformer.ln_vision."),
        (r"embeddings\.(?=word|position)", "qformer.embeddings."),
        (r"qformer\.embeddings\.layernorm\.", "qformer.transformer.layernorm."),  # InstructBLIP's place for it
        (r"qformer\.embeddings\.", "qformer.embeddings."),
        (r"qformer\.", "qformer.transformer."),
        (r"language_projection\.", "language_projection."),
    )
    found = {}
    for full, tensor in state.items():
        name = full.removeprefix("model.")
        if name.endswith("position_ids"):
            continue
        for pattern, ours in prefixes:
            if re.match(pattern, name):
                found[re.sub(f"^{pattern}", ours, name)] = tensor
                break
    if "qformer.query_tokens" not in found:
        raise CheckpointError("no Q-Former among the tensors: query_tokens is missing")
    return found


def without_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the text path's tensors; names as of `QFormer`."""
    return {name: t for name, t in tensors.items() if not any(re.match(pattern, name) for pattern in TEXT_PARTS)}


def of_qformer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a projector's tensors, those of its Q-Former, under the names of `QFormer`."""
    return {name.removeprefix("qformer."): t for name, t in tensors.items() if name.startswith("qformer.")}


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], where: str, wanted: set[str] | None = None) -> None:
    """Copy tensors into a module; all of them or none.

    Args:
        module: Changed in place; keeps its types and devices.
        tensors: By name.
        where: Where they are from, for the error.
        wanted: What must be given; all of the module's state when None.

    Raises:
        CheckpointError: Tensors are missing, left over, of another shape, or not finite; lists them.
    """
    state = module.state_dict()
    compare_tensors({name: state[name] for name in (state if wanted is None else wanted)}, tensors, where)
    check_finite(tensors, where)
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def read_folder_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder of transformers, in one file or several.

    Args:
        folder: The folder.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: There are no safetensors, or they are damaged.
    """
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(read_json(index, MAX_INDEX).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in files):
            raise CheckpointError(f"{index}: names a file outside of its folder")
    found: dict[str, Tensor] = {}
    for name in files:
        found |= read_tensors(folder / name)
    return found


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a Q-Former of polymodal (format {FORMAT!r} expected)")
    for key in ("embed_dim", "text", "norm", "qformer"):
        if key not in document:
            raise CheckpointError(f"{path}: key {key!r} is missing")
    return document

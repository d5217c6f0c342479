"""Tensors of the LLaVA repository's folders, and building `MultimodalLM` from them.

One rule finds a tensor's place, whatever a trainer has put in front of its name (`base_model.model.` of peft, `module.`
of a wrapper): what follows `mm_projector.` is the projector's, what follows `vision_tower.vision_tower.` the tower's,
`image_newline` is the newline, the rest is the language model's.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polymodal.errors import CheckpointError, first_line
from polymodal.interop.huggingface.weight_names import DERIVED
from polymodal.interop.llava.config import EXTRA_FILES, PROJECTOR_FILES, Repo
from polymodal.modeling.encoders.vision import UNUSED_PARTS
from polymodal.modeling.lora import attach_adapter
from polymodal.utils.safetensors_io import check_finite, compare_tensors, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from polymodal.modeling.vlm import MultimodalLM

State = dict[str, torch.Tensor]

_PREFIXES = re.compile(r"^(module\.)?(base_model\.model\.)?")


def sort_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, State]:
    """Sort tensors by component, under the component's own names.

    Args:
        tensors: As the LLaVA repository names them.

    Returns:
        "llm", "vision", "projector" and "newline", each with its state; those without tensors are left out.
    """
    found: dict[str, State] = {}
    for full, tensor in tensors.items():
        name = _PREFIXES.sub("", full)
        if DERIVED.search(name):
            continue
        if match := re.search(r"(?:^|\.)mm_projector\.(.+)", name):
            # One linear layer has no number.
            leaf = match[1] if re.fullmatch(r"\d+\..+", match[1]) else f"linear.{match[1]}"
            place = ("projector", leaf if leaf.startswith("linear.") else f"layers.{leaf}")
        elif re.search(r"(?:^|\.)image_newline$", name):
            place = ("newline", "image_newline")
        elif match := re.search(r"(?:^|\.)vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", name):
            place = ("vision", match[1])
        else:
            place = ("llm", name)
        found.setdefault(place[0], {})[place[1]] = tensor
    return found


def read_state(repo: Repo) -> State:
    """Read a folder's weights: all of a whole one, what is not the adapter's of the others.

    Args:
        repo: The folder; `read_repo` has made sure that a pickle among them is allowed.

    Returns:
        Tensors as the folder names them, where they can be in files that are mapped into memory.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    if repo.kind == "whole":
        safe = sorted(name for name in repo.report.headers if name.startswith("model"))
        files = safe or sorted(name for name in repo.report.pickles if name.startswith("pytorch_model"))
    else:
        files = [_one_of(repo, PROJECTOR_FILES if repo.kind == "projector" else EXTRA_FILES)]
    state: State = {}
    for name in files:
        state |= read_file(repo.folder / name)
    return state


def read_file(path: Path) -> State:
    """Read one file of tensors; of a pickle nothing but tensors is taken.

    Args:
        path: A safetensors file, or a pickle that somebody has allowed.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: It is damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age; what counts is whether tensors come out
            # The old format, which is no archive, cannot be mapped into memory.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler fails in every way there is on a file that is none
        raise CheckpointError(f"{path}: not a file of tensors only ({first_line(error)})") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise CheckpointError(f"{path}: not a file of tensors by name")
    return dict(found)


def build_llm(repo: Repo, state: State, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Build the language model of a whole folder.

    Args:
        repo: The folder.
        state: The language model's tensors.
        dtype: Of the weights in memory.
        attn_implementation: Passed to transformers.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: Tensors do not fit, or are not finite; lists them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(repo.text_settings)]
    with torch.device("meta"):
        empty = kind(repo.text_settings)
    # A tied head shares the rows of the input embeddings, and need not be in the file.
    tied = set(empty.all_tied_weights_keys)
    wanted = {n: t for n, t in empty.state_dict().items() if n in state or n not in tied}
    compare_tensors(wanted, state, repo.folder)
    check_finite(state, repo.folder)
    # A copy of our own: what lies in a file that somebody writes anew must not change under the model.
    own = {name: state[name].to(dtype, copy=True) for name in wanted}
    llm: PreTrainedModel = kind.from_pretrained(
        None, config=repo.text_settings, state_dict=own, dtype=dtype, attn_implementation=attn_implementation
    )
    return llm.eval()


def fill_parts(model: MultimodalLM, repo: Repo, parts: Mapping[str, State]) -> None:
    """Copy the projector, the newline and, where it was trained, the tower.

    Args:
        model: Changed in place.
        repo: The folder, for errors.
        parts: Of `sort_state`.

    Raises:
        CheckpointError: Tensors do not fit, or are not finite; lists them.
    """
    projector: Any = model.projector
    state = dict(projector.state_dict())
    given = dict(parts.get("projector", {}))
    if model.image_newline is not None:
        state["image_newline"] = model.image_newline.data
        given |= parts.get("newline", {})
    _copy(state, given, repo.folder)
    if tower := parts.get("vision"):
        encoder: Any = model.vision_encoder
        deepest = max(encoder.select_layers)
        state = encoder.model.state_dict()
        # Layers above the deepest selected one are not run, and the repository may have cut them off.
        kept = {
            name: tensor
            for name, tensor in state.items()
            if name in tower or not (name.startswith(UNUSED_PARTS) or _layer_of(name) >= deepest)
        }
        _copy(kept, {name: t for name, t in tower.items() if name in kept or not name.startswith("head.")}, repo.folder)


def attach_lora(model: MultimodalLM, repo: Repo) -> None:
    """Put a LoRA folder's adapter beside the language model.

    Args:
        model: Changed in place.
        repo: The folder.

    Raises:
        CheckpointError: The adapter is damaged or does not fit.
    """
    from peft import LoraConfig

    name = _one_of(repo, ("adapter_model.safetensors", "adapter_model.bin"))
    tensors = {_PREFIXES.sub("", key): tensor for key, tensor in read_file(repo.folder / name).items()}
    try:
        settings = LoraConfig.from_pretrained(str(repo.folder))
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{repo.folder}: no settings of a LoRA ({first_line(error)})") from None
    attach_adapter(model, settings, tensors, repo.folder / name)


def _copy(state: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], where: Path) -> None:
    compare_tensors(state, given, where)
    check_finite(given, where)
    with torch.no_grad():
        for name, tensor in given.items():
            state[name].copy_(tensor)


def _layer_of(name: str) -> int:
    """The number of the layer that a tower's tensor belongs to; -1 for none."""
    match = re.search(r"\blayers?\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _one_of(repo: Repo, names: tuple[str, ...]) -> str:
    for name in names:
        if (repo.folder / name).is_file():
            return name
    raise CheckpointError(f"{repo.folder}: {' or '.join(names)} is missing")

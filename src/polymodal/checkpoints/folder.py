"""Our model folder: everything needed to run a model exactly as it was trained.

    polymodal.json          configuration, special ids, contract and its hash, history, parameter list
    projector.safetensors   projector, and the newline token of AnyRes
    adapter/                LoRA in peft's own layout, where the language model was tuned so
    llm/                    the language model, where it was tuned whole; else a pinned reference in polymodal.json
    vision/                 the vision tower, where it is bundled or was tuned; else a reference
    tokenizer.json, ...     the tokenizer and its chat template

The *contract* is what must not change between training and use: template, picture rules, layer choice, special ids,
tokenizer. It is stored with its hash; a folder whose contract was changed by hand, or that is asked to load under
other rules, is refused with the difference named. Only safetensors and JSON are read. Writes are atomic.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.config import ModelConfig, parse_config
from polymodal.errors import CheckpointError
from polymodal.files import atomic_folder, write_text
from polymodal.model import MultimodalLM, build_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
CONFIG_NAME = "polymodal.json"
PROJECTOR_NAME = "projector.safetensors"
ADAPTER_NAME = "adapter"


@dataclass(frozen=True)
class Loaded:
    """A model folder in memory.

    Attributes:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        config: Its configuration.
        history: The stages it went through, oldest first; plain data.
    """

    model: MultimodalLM
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    history: list[dict[str, Any]] = field(default_factory=list)


def contract_of(config: ModelConfig, image_token_id: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that training and use must agree on.

    Args:
        config: The model's configuration.
        image_token_id: The resolved placeholder id.
        tokenizer: The tokenizer.

    Returns:
        Plain data; two models with equal contracts see the same tokens and pixels for the same conversation.
    """
    vision = config.vision
    return {
        "template": config.template.model_dump(mode="json"),
        "image": config.image.model_dump(mode="json") if config.image else None,
        "vision": vision.model_dump(mode="json", exclude={"vision_tower", "revision"}) if vision else None,
        "projector": config.projector.model_dump(mode="json"),
        "image_token_id": image_token_id,
        "tokenizer": hashlib.sha256(
            json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True).encode()
        ).hexdigest(),
    }


def save_model(
    folder: Path,
    model: MultimodalLM,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    history: list[dict[str, Any]] | None = None,
    llm_trained: bool = False,
    vision_trained: bool = False,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> None:
    """Write a model folder.

    Args:
        folder: Where to; appears whole or not at all.
        model: The model. A peft adapter in its language model is written to `adapter/`.
        config: Its configuration.
        tokenizer: Its tokenizer.
        history: The stages it went through.
        llm_trained: The language model's own weights were trained, so they are written too.
        vision_trained: The same for the vision tower.
        dtype: Cast projector and adapter to this on disk; None keeps them as they are.
        replace: Overwrite a folder that is there.

    Raises:
        PolymodalError: The folder exists and `replace` is false, or the disk is full.
        CheckpointError: A weight is not finite.
    """
    config = config.model_copy(update={"image_token_id": model.image_token_id})
    if llm_trained:
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"model_name_or_path": "bundled"})})
    keep_tower = config.vision is not None and (vision_trained or config.vision.vision_tower == "bundled")
    if keep_tower and config.vision is not None:
        config = config.model_copy(update={"vision": config.vision.model_copy(update={"vision_tower": "bundled"})})
    contract = contract_of(config, model.image_token_id, tokenizer)
    with atomic_folder(folder, replace=replace) as work:
        _save_tensors(work / PROJECTOR_NAME, own_tensors(model), dtype)
        if is_peft(model.llm):
            merge_adapter(model, False)  # weights that hold the adapter must not be written beside it
            _save_adapter(work / ADAPTER_NAME, model, dtype)
        if llm_trained:
            model.llm.save_pretrained(work / "llm")
        if keep_tower and model.vision_encoder is not None:
            model.vision_encoder.save(work / "vision")
        tokenizer.save_pretrained(work)
        document = {
            "format": FORMAT,
            "config": config.model_dump(mode="json"),
            "contract": contract,
            "contract_hash": _hash(contract),
            "history": history or [],
        }
        write_text(work / CONFIG_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def load_model(folder: Path) -> Loaded:
    """Read a model folder.

    Args:
        folder: The folder.

    Returns:
        The model in eval mode (adapter attached, not merged), tokenizer, configuration, history.

    Raises:
        CheckpointError: The folder is incomplete, damaged, or its contract does not hold; names what.
    """
    document = _read_document(folder)
    config = _config_in(folder, document)
    model, tokenizer = build_model(config, folder)
    _check_contract(folder, document["contract"], contract_of(config, model.image_token_id, tokenizer), config)
    _load_tensors(folder / PROJECTOR_NAME, model)
    if (folder / ADAPTER_NAME).is_dir():
        _load_adapter(folder / ADAPTER_NAME, model)
    return Loaded(model.eval(), tokenizer, config, document["history"])


def read_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration and nothing else.

    Args:
        folder: The folder.

    Returns:
        The configuration; `image_token_id` is filled in.

    Raises:
        CheckpointError: The folder is incomplete or damaged.
    """
    return _config_in(folder, _read_document(folder))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the stages that a model folder went through, oldest first, and nothing else."""
    return list(_read_document(folder)["history"])


def own_tensors(model: MultimodalLM) -> dict[str, torch.Tensor]:
    """The weights that only our folder holds: projector and newline."""
    state = {f"projector.{k}": v for k, v in model.projector.state_dict().items()} if model.projector else {}
    if model.image_newline is not None:
        state["image_newline"] = model.image_newline.data
    return state


def is_peft(module: Any) -> bool:
    """Whether a peft adapter was injected into a module."""
    return hasattr(module, "peft_config")


def merge_adapter(model: MultimodalLM, merged: bool = True) -> None:
    """Add a LoRA adapter to the weights it adapts, or take it out again; decoding is faster with it inside.

    Args:
        model: The model; nothing happens where it has no adapter.
        merged: Whether the adapter is to be inside.
    """
    if not is_peft(model.llm):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.llm.modules():
        if isinstance(module, BaseTunerLayer) and module.merged != merged:
            module.merge() if merged else module.unmerge()


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    import torch
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path.name}: {name} holds NaN or infinity; nothing was saved")
    save_file({k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in tensors.items()}, path)


def _save_adapter(folder: Path, model: MultimodalLM, dtype: torch.dtype | None) -> None:
    from peft import get_peft_model_state_dict

    folder.mkdir()
    adapter_config = model.llm.peft_config["default"]
    _save_tensors(folder / "adapter_model.safetensors", get_peft_model_state_dict(model.llm), dtype)
    adapter_config.save_pretrained(str(folder))


def _load_adapter(folder: Path, model: MultimodalLM) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapter_config = LoraConfig.from_pretrained(str(folder))
    adapter_config.inference_mode = True
    inject_adapter_in_model(adapter_config, model.llm)
    model.llm.peft_config = {"default": adapter_config}
    tensors = load_file(folder / "adapter_model.safetensors")
    result = set_peft_model_state_dict(model.llm, tensors)
    # A tied head shares the rows of the input embeddings; parameters are listed once.
    own = {name for name, _ in model.llm.named_parameters()}
    missing = [k for k in result.missing_keys if k in own and ("lora_" in k or "trainable_tokens_delta" in k)]
    if missing or result.unexpected_keys:
        raise CheckpointError(_difference(folder, missing, list(result.unexpected_keys)))


def _load_tensors(path: Path, model: MultimodalLM) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    wanted = own_tensors(model)
    if not wanted:
        return
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(_difference(path, missing, extra))
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the configuration needs {tuple(wanted[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
        with torch.no_grad():
            wanted[name].copy_(tensor)


def _difference(path: Path, missing: list[str], extra: list[str]) -> str:
    parts = [
        f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("not expected", extra))
        if names
    ]
    return f"{path}: tensors do not fit the configuration ({'; '.join(parts)})"


def _config_in(folder: Path, document: dict[str, Any]) -> ModelConfig:
    config = parse_config(ModelConfig, document["config"], str(folder / CONFIG_NAME))
    if config.llm.model_name_or_path == "bundled":
        config = config.model_copy(
            update={"llm": config.llm.model_copy(update={"model_name_or_path": str((folder / "llm").resolve())})}
        )
    return config


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_NAME}; this is not a polymodal model folder")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {FORMAT} expected; the file was written by another version")
    for key in ("config", "contract", "contract_hash", "history"):
        if key not in document:
            raise CheckpointError(f"{path}: key {key!r} is missing")
    if _hash(document["contract"]) != document["contract_hash"]:
        raise CheckpointError(f"{path}: the contract was changed after training; restore the file")
    return document


def _check_contract(folder: Path, trained: dict[str, Any], now: dict[str, Any], config: ModelConfig) -> None:
    for key in sorted(trained.keys() | now.keys()):
        before, after = trained.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            # A setting that is younger than the folder was trained with what is its default today.
            fields = type(getattr(config, key)).model_fields
            younger = {k: json.loads(json.dumps(fields[k].default, default=str)) for k in after.keys() - before.keys()}
            before = {**younger, **before}
            inner = next((k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)), None)
            if inner is None:
                continue
            key, before, after = f"{key}.{inner}", before.get(inner), after.get(inner)
        elif before == after:
            continue
        raise CheckpointError(
            f"{folder}: trained with {key} = {before!r}, asked to run with {after!r}; refused, results would differ"
        )


def _hash(contract: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()

"""Our model folder: everything needed to run a model exactly as it was trained.

    polymodal.json          configuration, special ids, contract and its hash, history, parameter list
    projector.safetensors   projector, and the newline token of AnyRes
    adapter/                LoRA in peft's own layout, where the language model was tuned so
    llm/                    the language model, where it was tuned whole; else a pinned reference in polymodal.json
    vision/                 the vision tower, where it is bundled or was tuned; else a reference
    tokenizer.json, ...     the tokenizer and its chat template
    qformer_tokenizer/      the tokenizer of a Q-Former that reads the question

The *contract* is what must not change between training and use: template, image rules, layer choice, special ids,
tokenizer. It is stored with its hash; a folder whose contract was changed by hand, or that is asked to load under
other rules, is refused with the difference named. Only safetensors and JSON are read. Writes are atomic.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from polymodal.config import ModelConfig, parse_config
from polymodal.errors import CheckpointError
from polymodal.modeling.build import build_model
from polymodal.modeling.lora import attach_adapter, fold_in, is_peft, merge_adapter
from polymodal.modeling.projectors.qformer_files import TOKENIZER_FOLDER
from polymodal.modeling.quantization import is_quantized
from polymodal.modeling.vlm import MultimodalLM
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import check_folder
from polymodal.utils.files import atomic_folder, write_text
from polymodal.utils.safetensors_io import check_finite, compare_tensors, read_tensors, write_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


FORMAT = 1
CONFIG_NAME = "polymodal.json"
PROJECTOR_NAME = "projector.safetensors"
ADAPTER_NAME = "adapter"


@dataclass(frozen=True)
class Loaded:
    """A model folder in memory."""

    model: MultimodalLM  # The model, in eval mode
    tokenizer: PreTrainedTokenizerBase  # Its tokenizer
    config: ModelConfig  # Its configuration
    history: list[dict[str, Any]] = field(default_factory=list)  # The stages it went through, oldest first; plain data


def contract_of(
    config: ModelConfig,
    image_token_id: int,
    tokenizer: PreTrainedTokenizerBase,
    context_tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Everything that training and use must agree on."""
    vision = config.vision
    # Where parts came from is no part of it.
    origins: Any = {"pretrained": True, "qformer": {"tokenizer"}}
    return {
        "template": config.template.model_dump(mode="json"),
        "image": config.image.model_dump(mode="json") if config.image else None,
        "vision": vision.model_dump(mode="json", exclude={"vision_tower", "revision"}) if vision else None,
        "projector": config.projector.model_dump(mode="json", exclude=origins),
        "image_token_id": image_token_id,
        "tokenizer": _hash_vocabulary(tokenizer),
        **({} if context_tokenizer is None else {"context_tokenizer": _hash_vocabulary(context_tokenizer)}),
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
    """Write a model folder."""
    if is_quantized(model.llm):
        raise CheckpointError(f"{folder}: the model's weights were rounded to 8 bits; save it as it was loaded without")
    config = config.model_copy(update={"image_token_id": model.image_token_id})
    if model.llm.config.is_encoder_decoder:
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"encoder_decoder": True})})
    # A part that is "bundled" already, such as those of a published folder, is in memory only: it is written too.
    llm_trained = llm_trained or config.llm.model_name_or_path == "bundled"
    if llm_trained:
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"model_name_or_path": "bundled"})})
    keep_tower = config.vision is not None and (vision_trained or config.vision.vision_tower == "bundled")
    if keep_tower and config.vision is not None:
        config = config.model_copy(update={"vision": config.vision.model_copy(update={"vision_tower": "bundled"})})
    config = _without_origins(config)
    contract = contract_of(config, model.image_token_id, tokenizer, model.context_tokenizer)
    with atomic_folder(folder, replace=replace) as work:
        write_tensors(work / PROJECTOR_NAME, own_tensors(model), dtype)
        if is_peft(model.llm):
            merge_adapter(model, False)  # weights that hold the adapter must not be written beside it
            _save_adapter(work / ADAPTER_NAME, model, dtype)
        if llm_trained:
            model.llm.save_pretrained(work / "llm", state_dict=_own_weights(model.llm))
        if keep_tower and model.vision_encoder is not None:
            model.vision_encoder.save(work / "vision")
        tokenizer.save_pretrained(work)
        if model.context_tokenizer is not None:
            model.context_tokenizer.save_pretrained(work / TOKENIZER_FOLDER)
        document = {
            "format": FORMAT,
            "config": config.model_dump(mode="json"),
            "contract": contract,
            "contract_hash": _hash(contract),
            "history": history or [],
        }
        write_text(work / CONFIG_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def load_model(folder: Path, quantize: str | None = None) -> Loaded:
    """Read a model folder."""
    check_folder(folder)
    document = _read_document(folder)
    config = _config_in(folder, document)
    model, tokenizer = build_model(config, folder, quantize)
    now = contract_of(config, model.image_token_id, tokenizer, model.context_tokenizer)
    _check_contract(folder, document["contract"], now, config)
    _load_tensors(folder / PROJECTOR_NAME, model)
    if (folder / ADAPTER_NAME).is_dir():
        _load_adapter(folder / ADAPTER_NAME, model)
    return Loaded(model.eval(), tokenizer, config, document["history"])


def read_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration and nothing else."""
    return _config_in(folder, _read_document(folder))


def verify_contract(folder: Path) -> None:
    """Make sure that a model folder would be used as it was trained; opens its tokenizers, but no weights."""
    from polymodal.modeling.language_model import load_tokenizer
    from polymodal.modeling.projectors.qformer_files import load_context_tokenizer

    document = _read_document(folder)
    config = _config_in(folder, document)
    if config.image_token_id is None:
        raise CheckpointError(f"{folder / CONFIG_NAME}: config.image_token_id is missing")
    context = load_context_tokenizer(config.projector, folder) if config.vision is not None else None
    now = contract_of(config, config.image_token_id, load_tokenizer(config.llm, folder), context)
    _check_contract(folder, document["contract"], now, config)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the stages that a model folder went through, oldest first, and nothing else."""
    return list(_read_document(folder)["history"])


def own_tensors(model: MultimodalLM) -> dict[str, torch.Tensor]:
    """The weights that only our folder holds: projector and newline."""
    state = {f"projector.{k}": v for k, v in model.projector.state_dict().items()} if model.projector else {}
    if model.image_newline is not None:
        state["image_newline"] = model.image_newline.data
    return state


def _own_weights(llm: Any) -> dict[str, Any] | None:
    """A language model's weights under their own names, without an adapter inside it; None where there is none."""
    if not is_peft(llm):
        return None
    added = ("lora_", "trainable_tokens_delta")
    weights = {name: value for name, value in llm.state_dict().items() if not any(part in name for part in added)}
    return {name.replace(".token_adapter.", ".").replace(".base_layer.", "."): v for name, v in weights.items()}


def _save_adapter(folder: Path, model: MultimodalLM, dtype: torch.dtype | None) -> None:
    from peft import get_peft_model_state_dict

    folder.mkdir()
    adapter_config = model.llm.peft_config["default"]
    write_tensors(folder / "adapter_model.safetensors", get_peft_model_state_dict(model.llm), dtype)
    adapter_config.save_pretrained(str(folder))


def _load_adapter(folder: Path, model: MultimodalLM) -> None:
    from peft import LoraConfig

    tensors = read_tensors(folder / "adapter_model.safetensors")
    attach_adapter(model, LoraConfig.from_pretrained(str(folder)), tensors, folder)


def _load_tensors(path: Path, model: MultimodalLM) -> None:
    import torch

    wanted = own_tensors(model)
    if not wanted:
        return
    tensors = read_tensors(path)
    compare_tensors(wanted, tensors, path)
    check_finite(tensors, path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)


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
    document = read_json(path)
    if document.get("format") != FORMAT:
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
            before = _with_younger(before, after, getattr(config, key))
            inner = next((k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)), None)
            if inner is None:
                continue
            key, before, after = f"{key}.{inner}", before.get(inner), after.get(inner)
        elif before == after:
            continue
        raise CheckpointError(
            f"{folder}: trained with {key} = {before!r}, asked to run with {after!r}; refused, results would differ"
        )


def _with_younger(before: dict[str, Any], after: dict[str, Any], settings: Any) -> dict[str, Any]:
    """A setting that is younger than the folder was trained with what is its default today."""
    fields, renamed = type(settings).model_fields, type(settings).RENAMED
    before = {renamed.get(key, key): value for key, value in before.items()}
    filled = {k: json.loads(json.dumps(fields[k].default, default=str)) for k in after.keys() - before.keys()} | before
    for key, value in filled.items():
        if (
            isinstance(value, dict)
            and isinstance(after.get(key), dict)
            and isinstance(getattr(settings, key), BaseModel)
        ):
            filled[key] = _with_younger(value, after[key], getattr(settings, key))
    return filled


def _without_origins(config: ModelConfig) -> ModelConfig:
    """A model folder holds the projector and its tokenizer itself, and does not say where they began."""
    projector = config.projector
    if projector.qformer is None:
        return config
    qformer = projector.qformer.model_copy(update={"tokenizer": None})
    projector = projector.model_copy(update={"pretrained": None, "qformer": qformer})
    return config.model_copy(update={"projector": projector})


def _hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def _hash(contract: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()


# ---- A model in one folder that needs nothing else, its adapters added to the weights they adapt ----
# Used at the end of a pipeline and by `polymodal export --format polymodal`.


def export_whole(source: Path, target: Path) -> None:
    """Write a model folder of ours as one that needs nothing else."""
    # Adapters are added to the weights they adapt and are gone; the language model and the vision tower lie in the
    # folder, also where they were only referred to.
    write_whole(load_model(source), target, replace=True)


def write_whole(
    loaded: Loaded,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> None:
    """Write a model in memory as a folder that needs nothing else."""
    model, config = loaded.model, loaded.config
    folded = ["adapter"] if is_peft(model.llm) else []
    fold_in(model.llm)
    if dtype is not None:
        model.to(dtype)
        llm = config.llm.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        config = config.model_copy(update={"llm": llm})
    save_model(
        target,
        model,
        config,
        loaded.tokenizer,
        history=[*loaded.history, {"stage": "export", "folded_in": folded}],
        llm_trained=True,
        vision_trained=config.vision is not None,
        replace=replace,
    )

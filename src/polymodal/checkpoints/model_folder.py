"""Our model folder: everything needed to run a model exactly as it was trained.

    polymodal.json          configuration, special ids, contract and its hash, history, parameter list
    projector.safetensors   projectors, the temporal encoder, and the newline token of AnyRes
    adapter/                LoRA in peft's own layout, where the language model was tuned so
    llm/                    the language model, where it was tuned whole; else a pinned reference in polymodal.json
    vision/  audio/         the towers, where they are bundled or were tuned; else references
    vision_2/  ...          further vision towers beside the first
    tokenizer.json, ...     the tokenizer and its chat template
    qformer_tokenizer/      the tokenizer of a Q-Former that reads the question
    image_tokenizer/        what a model that makes images turns codes into images with

The *contract* is what must not change between training and use: template, image rules, layer choice, special ids,
tokenizer. It is stored with its hash; a folder whose contract was changed by hand, or that is asked to load under
other rules, is refused with the difference named. Only safetensors and JSON are read. Writes are atomic.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from polymodal.checkpoints.locate import referred_folder
from polymodal.checkpoints.parts import part_hashes, placed, require_parts
from polymodal.config import VISION_ORIGINS, ModelConfig, parse_config, tower_folder
from polymodal.errors import CheckpointError
from polymodal.modeling.build import build_model
from polymodal.modeling.ctranslate2 import missing_whisper
from polymodal.modeling.encoders.audio import DeferredAudioEncoder
from polymodal.modeling.encoders.vision import check_fingerprint, fingerprint, towers_of
from polymodal.modeling.language_model import DEFAULT_LLM, load_tokenizer
from polymodal.modeling.lora import attach_adapter, fold_in, is_peft, merge_adapter
from polymodal.modeling.onnx_llm import OnnxLLM
from polymodal.modeling.pretrained import building
from polymodal.modeling.projectors.qformer_files import TOKENIZER_FOLDER, load_context_tokenizer
from polymodal.modeling.quantization import is_quantized
from polymodal.modeling.tokenizers import save_image_tokenizer
from polymodal.modeling.vlm import MultimodalLM
from polymodal.modeling.vocabulary import IMAGE_TOKENIZER
from polymodal.safety.config_json import check_settings, read_json
from polymodal.safety.model_folder import OURS, FolderReport, check_folder, refuse_adapter
from polymodal.utils.files import atomic_folder, whole_path, write_text
from polymodal.utils.paths import without_places
from polymodal.utils.safetensors_io import copy_tensors, read_tensors, write_tensors

FORMAT = 1
CONFIG_NAME = OURS
PROJECTOR_NAME = "projector.safetensors"
ADAPTER_NAME = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN_PARTS = ("projector", "temporal_encoder", "audio_projector")
AUDIO_ORIGINS: Any = {"audio_tower": True, "revision": True}
CHOICES: Any = {"image": {"temperature", "guidance"}}  # of how codes are chosen, which changes no model


@dataclass(frozen=True)
class Loaded:
    """A model folder in memory."""

    model: MultimodalLM  # In eval mode
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    history: list[dict[str, Any]] = field(default_factory=list)  # The stages it went through, oldest first; plain data


@dataclass(frozen=True)
class Document:
    """What `polymodal.json` says."""

    config: ModelConfig
    contract: dict[str, Any]
    contract_hash: str
    history: list[dict[str, Any]]
    tower: str | None = None  # The fingerprint of a tower that lies elsewhere; None in folders that have none
    audio_tower: str | None = None  # The same of an audio tower
    image_tokenizer: str | None = None  # The same of the image tokenizer, which lies in the folder


def contract_of(
    config: ModelConfig,
    image_token_id: int,
    tokenizer: PreTrainedTokenizerBase,
    context_tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Everything that training and use must agree on."""
    vision, rope = config.vision, config.llm.rope_scaling
    # Where parts came from is no part of it.
    origins: Any = {"pretrained": True, "qformer": {"tokenizer"}}
    return {
        "template": config.template.model_dump(mode="json"),
        "image": config.image.model_dump(mode="json") if config.image else None,
        "vision": vision.model_dump(mode="json", exclude=VISION_ORIGINS) if vision else None,
        "projector": config.projector.model_dump(mode="json", exclude=origins),
        "image_token_id": image_token_id,
        "tokenizer": _hash_vocabulary(tokenizer),
        # Not there where there is none, as in folders from before there were videos and sounds.
        **({} if config.video is None else {"video": config.video.model_dump(mode="json")}),
        **({} if config.audio is None else {"audio": config.audio.model_dump(mode="json", exclude=AUDIO_ORIGINS)}),
        **({} if config.output is None else {"output": config.output.model_dump(mode="json", exclude=CHOICES)}),
        **({} if rope is None else {"llm": {"rope_scaling": rope.model_dump(mode="json")}}),
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
    audio_trained: bool = False,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> None:
    """Write a model folder."""
    if is_quantized(model.llm):
        raise CheckpointError(f"{folder}: the model's weights were rounded to 8 bits; save it as it was loaded without")
    if isinstance(model.llm, OnnxLLM):
        raise CheckpointError(f"{folder}: its language model is a graph, not its weights; save what was loaded without")
    if config.audio is not None and model.audio_encoder is None:
        missing = missing_whisper(config.audio.audio_tower)
        raise CheckpointError(f"{folder}: saved now, the model would lose what it has learnt to hear: {missing}")
    config = config.model_copy(update={"image_token_id": model.image_token_id})
    if model.llm.config.is_encoder_decoder:
        config = _with(config, "llm", encoder_decoder=True)
    # A part that is "bundled" already, such as those of a published folder, is in memory only: it is written too.
    llm_trained = llm_trained or config.llm.model_name_or_path == "bundled"
    eyes = () if config.vision is None else config.vision.towers
    keeps = [vision_trained or tower.vision_tower == "bundled" for tower in eyes]
    llm = "bundled" if llm_trained else _placed(config.llm.model_name_or_path)
    config = _with(config, "llm", model_name_or_path=llm)
    if config.vision is not None:
        places = ("bundled" if keep else _placed(eye.vision_tower) for eye, keep in zip(eyes, keeps, strict=True))
        config = config.model_copy(update={"vision": config.vision.at(list(places))})
    keep_ears = config.audio is not None and (audio_trained or config.audio.audio_tower == "bundled")
    if config.audio is not None:
        config = _with(config, "audio", audio_tower="bundled" if keep_ears else _placed(config.audio.audio_tower))
    if config.output is not None:
        image = config.output.image.model_copy(update={"image_tokenizer": "bundled"})
        config = _with(config, "output", image=image, vocabulary=model.vocabulary)
    if (qformer := config.projector.qformer) is not None:
        # The folder holds the projector and its tokenizer itself, and does not say where they began.
        config = _with(config, "projector", pretrained=None, qformer=qformer.model_copy(update={"tokenizer": None}))
    contract = contract_of(config, model.image_token_id, tokenizer, model.context_tokenizer)
    with atomic_folder(folder, replace=replace) as work:
        write_tensors(work / PROJECTOR_NAME, own_tensors(model), dtype)
        if is_peft(model.llm):
            from peft import get_peft_model_state_dict

            merge_adapter(model, False)  # weights that hold the adapter must not be written beside it
            (work / ADAPTER_NAME).mkdir()
            adapter = get_peft_model_state_dict(model.llm, save_embedding_layers=False)
            write_tensors(work / ADAPTER_NAME / ADAPTER_WEIGHTS, adapter, dtype)
            model.llm.peft_config["default"].save_pretrained(str(work / ADAPTER_NAME))
        if llm_trained:
            model.llm.save_pretrained(work / "llm", state_dict=_own_weights(model.llm))
        if model.vision_encoder is not None:
            for number, tower in enumerate(towers_of(model.vision_encoder)):
                if keeps[number]:
                    tower.save(work / tower_folder(number))
        if keep_ears and model.audio_encoder is not None:
            model.audio_encoder.save(work / "audio")
        if model.image_tokenizer is not None:
            kept = dtype if dtype is not None and _holds(model.image_tokenizer, dtype) else None
            save_image_tokenizer(model.image_tokenizer, work / IMAGE_TOKENIZER, kept)
        tokenizer.save_pretrained(work)
        if model.context_tokenizer is not None:
            model.context_tokenizer.save_pretrained(work / TOKENIZER_FOLDER)
        document = {
            "format": FORMAT,
            "config": config.model_dump(mode="json"),
            "contract": contract,
            "contract_hash": _hash(contract),
            "history": history or [],
            "parts": part_hashes(config),
        }
        if model.vision_encoder is not None and not all(keeps):
            document["tower"] = fingerprint(model.vision_encoder)
        if model.audio_encoder is not None and not keep_ears:
            document["audio_tower"] = fingerprint(model.audio_encoder)
        if model.image_tokenizer is not None:
            document["image_tokenizer"] = fingerprint(model.image_tokenizer)
        write_text(work / CONFIG_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def load_model(
    folder: Path | FolderReport,  # Looked over already or not
    quantize: str | None = None,
    llm: Any = None,  # In the place of its language model, adapter and all
    parts: Mapping[str, Any] | None = None,  # Where parts are that lie elsewhere now
    dtype: str | None = None,  # Of the language model's weights; the folder's own choice where None
) -> Loaded:
    """Read a model folder."""
    report = folder if isinstance(folder, FolderReport) else check_folder(folder)
    folder, document = report.folder, read_document(report.folder, report.configs.get(CONFIG_NAME), parts)
    require_parts(folder, document.config)
    if dtype is not None:
        document = replace(document, config=_with(document.config, "llm", dtype=dtype))
    # What answers alone opens its ears at the first sound.
    audio_known = document.audio_tower if isinstance(llm, OnnxLLM) else None
    model, tokenizer = build_model(document.config, folder, quantize, llm, audio_known)
    now = contract_of(document.config, model.image_token_id, tokenizer, model.context_tokenizer)
    _check_contract(folder, document.contract, now, document.config)
    for kind, encoder, was in (
        ("vision", model.vision_encoder, document.tower),
        ("audio", model.audio_encoder, document.audio_tower),
    ):
        if encoder is not None and not isinstance(encoder, DeferredAudioEncoder):
            name = getattr(getattr(document.config, kind), f"{kind}_tower")
            check_fingerprint(encoder, was, f"{folder}: trained behind another {kind} tower than {name!r}")
    if model.image_tokenizer is not None and fingerprint(model.image_tokenizer) != document.image_tokenizer:
        raise CheckpointError(
            f"{folder / IMAGE_TOKENIZER}: not the image tokenizer that the model was trained with (its weights "
            "differ), so its codes mean nothing to the model; put the folder back"
        )
    if own := own_tensors(model):
        tensors = read_tensors(folder / PROJECTOR_NAME)
        if model.audio_encoder is None:  # its package is not installed, or there never was one
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("audio_projector.")}
        copy_tensors(own, tensors, folder / PROJECTOR_NAME)
    if llm is None and (adapter := folder / ADAPTER_NAME).is_dir():
        load_adapter(model, adapter, read_tensors(adapter / ADAPTER_WEIGHTS), adapter)
    return Loaded(model.eval(), tokenizer, document.config, document.history)


def llm_files(report: FolderReport, parts: Mapping[str, Any] | None = None) -> list[Path]:
    """The files that a model folder's language model is read from, adapter and all; none where they are not here."""
    config = read_document(report.folder, report.configs.get(CONFIG_NAME), parts).config
    place, adapter = referred_folder(config.llm.model_name_or_path), report.folder / ADAPTER_NAME
    if place is None or config.llm.device_map is not None:
        return []
    return [path for folder in (place, adapter) if folder.is_dir() for path in folder.iterdir() if path.is_file()]


def load_adapter(model: MultimodalLM, folder: Path, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Put a LoRA beside the language model, with the settings that peft left in its folder."""
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    document = read_json(path)
    check_settings(document, str(path))
    if (kind := document.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; only LORA can be added here")
    with building(path):
        settings = LoraConfig.from_pretrained(str(folder))
    attach_adapter(model, settings, tensors, where)


def export_whole(source: Path, target: Path) -> None:
    """Write a model folder of ours as one that needs nothing else, at the end of a pipeline."""
    write_whole(load_model(source), target, replace=True)


def write_whole(loaded: Loaded, target: Path, *, dtype: torch.dtype | None = None, replace: bool = False) -> None:
    """Write a model in memory as a folder that needs nothing else, its adapter added to the weights it adapts."""
    model, config = loaded.model, loaded.config
    folded = ["adapter"] if is_peft(model.llm) else []
    fold_in(model.llm)
    if dtype is not None:
        drawing, model.image_tokenizer = model.image_tokenizer, None  # rounded, it would make other codes
        model.to(dtype)
        model.image_tokenizer = drawing
        config = _with(config, "llm", dtype=str(dtype).removeprefix("torch."))
    save_model(
        target,
        model,
        config,
        loaded.tokenizer,
        # Such a folder is published; where parts lay on this machine is nobody's business there.
        history=[*without_places(loaded.history), {"stage": "export", "folded_in": folded}],
        llm_trained=True,
        vision_trained=config.vision is not None,
        audio_trained=config.audio is not None,
        replace=replace,
    )


def read_config(folder: Path) -> ModelConfig:
    """Read a model folder's configuration and nothing else."""
    return read_document(folder).config


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the stages that a model folder went through, oldest first, and nothing else."""
    return read_document(folder).history


def read_document(
    folder: Path, document: dict[str, Any] | None = None, parts: Mapping[str, Any] | None = None
) -> Document:
    """Check what a model folder says of itself, read already or not; its contract must not be changed by hand."""
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            refuse_adapter(check_folder(folder))
        raise CheckpointError(f"{folder}: no {CONFIG_NAME}; this is not a polymodal model folder")
    document = document or read_json(path)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {FORMAT} expected; the file was written by another version")
    for key in ("config", "contract", "contract_hash", "history"):
        if key not in document:
            raise CheckpointError(f"{path}: key {key!r} is missing")
    stages = document["history"]
    if not isinstance(stages, list) or not all(
        isinstance(stage, dict) and isinstance(stage.get("trained", []), list) for stage in stages
    ):
        raise CheckpointError(f"{path}: history must be a list of stages, each an object; restore the file")
    if _hash(document["contract"]) != document["contract_hash"]:
        raise CheckpointError(f"{path}: the contract was changed after training; restore the file")
    config = parse_config(ModelConfig, document["config"], str(path))
    known = document.get("parts", {})
    if not isinstance(known, dict):
        raise CheckpointError(f"{path}: parts must be an object of hashes; restore the file")
    config = placed(folder, config, known, parts)
    if config.llm.model_name_or_path == "bundled":
        config = _with(config, "llm", model_name_or_path=str((folder / "llm").resolve()))
    towers = (document.get(key) for key in ("tower", "audio_tower", "image_tokenizer"))
    return Document(config, document["contract"], document["contract_hash"], document["history"], *towers)


def verify_contract(folder: Path, document: Document) -> None:
    """Make sure that a model folder would be used as it was trained; opens its tokenizers, but no weights."""
    config = document.config
    if config.image_token_id is None:
        raise CheckpointError(f"{folder / CONFIG_NAME}: config.image_token_id is missing")
    context = load_context_tokenizer(config.projector, folder) if config.vision is not None else None
    now = contract_of(config, config.image_token_id, load_tokenizer(config.llm, folder), context)
    _check_contract(folder, document.contract, now, config)


def own_tensors(model: MultimodalLM) -> dict[str, torch.Tensor]:
    """The weights that only our folder holds: projectors, temporal encoder and newline."""
    parts: dict[str, Any] = {name: getattr(model, name) for name in OWN_PARTS}
    state = {f"{n}.{k}": v for n, part in parts.items() if part is not None for k, v in part.state_dict().items()}
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


def _holds(module: Any, dtype: torch.dtype) -> bool:
    """Whether a module's weights are the same in another type; other codes would mean nothing to the model."""
    floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return all(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in floats)


def _placed(name: str) -> str:
    """A part's name; of a file or folder its whole path, so that it is found from every working directory."""
    return name if name == DEFAULT_LLM else whole_path(name)


def _with(config: ModelConfig, part: str, **values: Any) -> ModelConfig:
    """The configuration with other values in one part."""
    return config.model_copy(update={part: getattr(config, part).model_copy(update=values)})


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


def _hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def _hash(contract: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()

"""A Q-Former's weights and tokenizer from and to files: its own folder, transformers' names, a BERT.

A stage-1 folder holds `qformer.safetensors`, under the names of `QFormer`, and `config.json` with its settings; what
else lies there (heads, a tokenizer) belongs to whoever wrote it. Only safetensors are read. Nothing is loaded in part:
tensors that are missing, left over or of another shape are listed in the error.

A BERT gives a Q-Former its embeddings, self-attention and feed-forward parts, the latter to text and queries alike;
cross-attention and queries stay random. As in LAVIS, BERT's token types are left out.

A Q-Former that reads the question beside the image (InstructBLIP, arXiv:2305.06500) has a tokenizer that is not the
language model's. A model folder carries it in `qformer_tokenizer/`; a model that is composed takes it from where
`projector.qformer.tokenizer` or `projector.pretrained` says.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from polymodal.config import VISION_ORIGINS, ModelConfig, ProjectorConfig, QFormerConfig, parse_config
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.language_model import open_tokenizer
from polymodal.modeling.projectors.mlp import NormKind
from polymodal.modeling.projectors.qformer import QFormer, QFormerProjector
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import MAX_INDEX
from polymodal.utils.files import atomic_folder, home_path, write_text
from polymodal.utils.safetensors_io import check_finite, compare_tensors, read_tensors, write_tensors

WEIGHTS_NAME = "qformer.safetensors"
CONFIG_NAME = "config.json"
TOKENIZER_FOLDER = "qformer_tokenizer"
FORMAT = "polymodal-qformer-1"
TEXT_PARTS = (r"embeddings\.", r"transformer\.encoder\.layer\.\d+\.(intermediate|output)\.")
"""What a Q-Former without a text path lacks."""

_FROM_TRANSFORMERS = (
    (r"query_tokens$", "qformer.query_tokens"),
    (r"vision_model\.post_layernorm\.", "qformer.ln_vision."),
    (r"embeddings\.(?=word|position)", "qformer.embeddings."),
    (r"qformer\.embeddings\.layernorm\.", "qformer.transformer.layernorm."),  # InstructBLIP's place for it
    (r"qformer\.embeddings\.", "qformer.embeddings."),
    (r"qformer\.", "qformer.transformer."),
    (r"language_projection\.", "language_projection."),
)
_BERT_LAYER = (
    (r"attention\.self\.", "attention.attention."),
    (r"attention\.output\.", "attention.output."),
    (r"intermediate\.", "intermediate."),
    (r"output\.", "output."),
)
_BERT_UNUSED = (r"embeddings\.(token_type_embeddings|position_ids)", r"pooler\.", r"cls\.")


def save_qformer(folder: Path, qformer: QFormer, *, replace: bool = False) -> None:
    """Write a Q-Former into a folder of its own."""
    with atomic_folder(folder, replace=replace) as work:
        write_qformer(work, qformer)


def write_qformer(folder: Path, qformer: QFormer) -> None:
    """Write a Q-Former's two files into a folder that is there, such as one that is being written."""
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
    """Build the Q-Former that a folder holds."""
    document = _read_document(folder)
    settings = parse_config(QFormerConfig, document["qformer"], str(folder / CONFIG_NAME))
    norm: NormKind = document["norm"]
    qformer = QFormer(document["embed_dim"], settings, text=document["text"] if text is None else text, norm=norm)
    load_stage1(qformer, folder)
    return qformer.eval()


def load_stage1(qformer: QFormer, folder: Path) -> None:
    """Load what stage 1 left into a Q-Former; text parts are dropped where it has none."""
    tensors = read_tensors(folder / WEIGHTS_NAME)
    load_exactly(qformer, tensors if qformer.embeddings is not None else without_text(tensors), str(folder))


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the projector out of the weights of a BLIP-2 of transformers."""
    found = {}
    for full, tensor in state.items():
        name = full.removeprefix("model.")
        if not name.endswith("position_ids") and (ours := _renamed(name, _FROM_TRANSFORMERS)) is not None:
            found[ours] = tensor
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
    """Copy tensors into a module; all of them or none."""
    state = module.state_dict()
    compare_tensors({name: state[name] for name in (state if wanted is None else wanted)}, tensors, where)
    check_finite(tensors, where)
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def read_folder_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder of transformers, in one file or several."""
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


def start_projector(projector: object, pretrained: str) -> None:
    """Start a projector from pretrained weights."""
    if not isinstance(projector, QFormerProjector):
        raise ConfigError(f"projector.pretrained is for a Q-Former, not for {type(projector).__name__}")
    start_from(projector.qformer, home_path(pretrained))


def check_stage1(folder: Path, config: ModelConfig, tower: str) -> None:
    """Make sure that a Q-Former goes on behind the tower, by its fingerprint, and the pixels that it learnt from."""
    path = folder / CONFIG_NAME
    stage = read_json(path).get("stage1") if path.is_file() else None
    if not isinstance(stage, dict) or config.vision is None:
        return
    where = f"projector.pretrained {folder}"
    if stage.get("tower", tower) != tower:
        raise ConfigError(
            f"{where}: learnt behind another vision tower than {config.vision.vision_tower!r} (its weights differ) "
            f"and does not know its features; take {stage['vision'].get('vision_tower')!r} of that stage"
        )
    parts = {"vision": (config.vision, VISION_ORIGINS), "image": (config.image, {"max_pixels"})}
    for part, (settings, aside) in parts.items():
        now = settings.model_dump(mode="json", exclude=aside) if settings is not None else {}
        for key, before in (stage.get(part) or {}).items():
            if now.get(key, before) == before:
                continue
            said = f"{where}: learnt with {part}.{key} = {before!r}, the recipe has {now[key]!r}"
            if part == "vision" or key in ("image_mean", "image_std"):
                raise ConfigError(f"{said}; give both stages the same")
            warnings.warn(said, stacklevel=3)  # another layout of the same pixels is a choice


def start_from(qformer: QFormer, folder: Path) -> None:
    """Start a Q-Former from what stage 1 left, or from a BERT."""
    if (folder / WEIGHTS_NAME).is_file():
        load_stage1(qformer, folder)
        return
    if not folder.is_dir():
        raise CheckpointError(f"projector.pretrained {folder}: no such folder")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"projector.pretrained {folder}: neither {WEIGHTS_NAME} nor a BERT's {CONFIG_NAME} in it")
    init_from_bert(qformer, folder)


def init_from_bert(qformer: QFormer, folder: Path) -> None:
    """Copy a BERT's embeddings, self-attention and feed-forward parts; the rest stays as it is."""
    # Words that BERT does not have, such as [DEC], keep their random rows, which come last.
    tensors = bert_tensors(folder)
    state = qformer.state_dict()
    words = "embeddings.word_embeddings.weight"
    if words in state and words in tensors:
        rows, dim = tensors[words].shape
        if rows > state[words].shape[0] or dim != state[words].shape[1]:
            raise CheckpointError(
                f"{folder}: {words} is {rows} x {dim}, the Q-Former's {state[words].shape[0]} x {state[words].shape[1]}"
                "; set qformer.vocab_size to BERT's and one more, and qformer.hidden_size to BERT's"
            )
        tensors[words] = torch.cat((tensors[words].to(state[words]), state[words][rows:]))
    random = re.compile(r"query_tokens|ln_vision\.|norm\.|transformer\.encoder\.layer\.\d+\.crossattention\.")
    wanted = {name for name in state if not random.match(name)}
    depth = qformer.config.num_hidden_layers
    given = {name: tensor for name, tensor in tensors.items() if _layer_of(name) < depth}
    if qformer.embeddings is None:
        given = without_text(given)
    load_exactly(qformer, given, str(folder), wanted)


def bert_tensors(folder: Path) -> dict[str, Tensor]:
    """Read a BERT's weights under the names of a Q-Former."""
    kind = read_json(folder / CONFIG_NAME).get("model_type")
    if kind != "bert":
        raise CheckpointError(f"{folder}: model_type 'bert' expected, {CONFIG_NAME} says {kind!r}")
    found: dict[str, Tensor] = {}
    for full, tensor in read_folder_tensors(folder).items():
        name = modern_name(full.removeprefix("bert."))
        if any(re.match(pattern, name) for pattern in _BERT_UNUSED):
            continue
        if name.startswith("embeddings.LayerNorm."):
            found[f"transformer.layernorm.{name.rpartition('.')[2]}"] = tensor
            continue
        layer = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if layer is None:
            found[name] = tensor
            continue
        number, rest = layer.groups()
        rest = _renamed(rest, _BERT_LAYER) or rest
        found[f"transformer.encoder.layer.{number}.{rest}"] = tensor
        if rest.startswith(("intermediate.", "output.")):
            part, _, leaf = rest.partition(".")
            found[f"transformer.encoder.layer.{number}.{part}_query.{leaf}"] = tensor
    return found


def _renamed(name: str, beginnings: tuple[tuple[str, str], ...]) -> str | None:
    """A name with another beginning, the first that fits; None where none does."""
    return next((re.sub(f"^{pattern}", ours, name) for pattern, ours in beginnings if re.match(pattern, name)), None)


def modern_name(name: str) -> str:
    """A tensor's name; old checkpoints of BERT call a norm's weight and bias gamma and beta."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 where it belongs to none."""
    found = re.match(r"transformer\.encoder\.layer\.(\d+)\.", name)
    return int(found[1]) if found else -1


def load_context_tokenizer(config: ProjectorConfig, folder: Path | None = None) -> PreTrainedTokenizerBase | None:
    """Load the Q-Former's tokenizer, where it reads a context."""
    if config.qformer is None or not config.qformer.text_context:
        return None
    carried = folder / TOKENIZER_FOLDER if folder is not None else None
    source = config.qformer.tokenizer or config.pretrained
    if carried is not None and carried.is_dir():
        source = str(carried)
    if source is None and carried is not None:
        raise CheckpointError(f"{carried} is missing: the Q-Former reads the question with its own tokenizer")
    if source is None:
        raise ConfigError("projector.qformer.text_context needs projector.qformer.tokenizer, a folder or a hub id")
    tokenizer = open_tokenizer(source, f"tokenizer of the Q-Former {source!r}", fast=True)
    if len(tokenizer) > config.qformer.vocab_size:
        raise ConfigError(
            f"tokenizer of the Q-Former {source!r} has {len(tokenizer)} tokens, "
            f"projector.qformer.vocab_size is {config.qformer.vocab_size}"
        )
    return tokenizer

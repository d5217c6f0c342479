"""What a Q-Former starts from: what stage 1 left, or a BERT.

BERT gives a Q-Former its embeddings, self-attention and feed-forward parts, the latter to text and queries alike;
cross-attention and queries stay random. As in LAVIS, BERT's token types are left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.projectors.qformer import QFormer, QFormerProjector
from polymodal.modeling.projectors.qformer_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_exactly,
    load_stage1,
    read_folder_tensors,
    without_text,
)
from polymodal.safety.config_json import read_json

_BERT_LAYER = (
    (r"attention\.self\.", "attention.attention."),
    (r"attention\.output\.", "attention.output."),
    (r"intermediate\.", "intermediate."),
    (r"output\.", "output."),
)
_BERT_UNUSED = (r"embeddings\.(token_type_embeddings|position_ids)", r"pooler\.", r"cls\.")


def start_projector(projector: object, pretrained: str) -> None:
    """Start a projector from pretrained weights.

    Args:
        projector: Changed in place.
        pretrained: `projector.pretrained`, a folder.

    Raises:
        ConfigError: The projector has no Q-Former.
    """
    if not isinstance(projector, QFormerProjector):
        raise ConfigError(f"projector.pretrained is for a Q-Former, not for {type(projector).__name__}")
    start_from(projector.qformer, Path(pretrained).expanduser())


def start_from(qformer: QFormer, folder: Path) -> None:
    """Start a Q-Former from what stage 1 left, or from a BERT.

    Args:
        qformer: Changed in place.
        folder: What `save_qformer` wrote, or a BERT folder of transformers.

    Raises:
        CheckpointError: It is neither, or it does not fit.
    """
    if (folder / WEIGHTS_NAME).is_file():
        load_stage1(qformer, folder)
        return
    if not folder.is_dir():
        raise CheckpointError(f"projector.pretrained {folder}: no such folder")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"projector.pretrained {folder}: neither {WEIGHTS_NAME} nor a BERT's {CONFIG_NAME} in it")
    init_from_bert(qformer, folder)


def init_from_bert(qformer: QFormer, folder: Path) -> None:
    """Copy a BERT's embeddings, self-attention and feed-forward parts; the rest stays as it is.

    Words that BERT does not have, such as [DEC], keep their random rows, which come last.

    Args:
        qformer: Changed in place; with or without a text path.
        folder: A BERT folder of transformers (`config.json`, safetensors), of the same width and depth or deeper.

    Raises:
        CheckpointError: It is no BERT, or its tensors do not fit; lists them.
    """
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
    """Read a BERT's weights under the names of a Q-Former.

    Args:
        folder: A BERT folder of transformers.

    Returns:
        Tensors by name; each feed-forward part twice, for text and for queries.

    Raises:
        CheckpointError: It is no BERT folder, or it is damaged.
    """
    kind = read_json(folder / CONFIG_NAME).get("model_type")
    if kind != "bert":
        raise CheckpointError(f"{folder}: model_type 'bert' expected, {CONFIG_NAME} says {kind!r}")
    found: dict[str, Tensor] = {}
    for full, tensor in read_folder_tensors(folder).items():
        # Old checkpoints call a norm's weight and bias gamma and beta.
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", full.removeprefix("bert."))
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
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
        for pattern, ours in _BERT_LAYER:
            if re.match(pattern, rest):
                rest = re.sub(f"^{pattern}", ours, rest)
                break
        found[f"transformer.encoder.layer.{number}.{rest}"] = tensor
        if rest.startswith(("intermediate.", "output.")):
            part, _, leaf = rest.partition(".")
            found[f"transformer.encoder.layer.{number}.{part}_query.{leaf}"] = tensor
    return found


def _layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 where it belongs to none."""
    found = re.match(r"transformer\.encoder\.layer\.(\d+)\.", name)
    return int(found[1]) if found else -1

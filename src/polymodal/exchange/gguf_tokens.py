"""A tokenizer of transformers as the metadata of a GGUF file.

llama.cpp has its own tokenizers: "gpt2" for byte-level BPE, whose way of cutting a text into words goes by a name
("pre"), and "llama" for SentencePiece. Which name cuts as our tokenizer does is read from its `tokenizer.json` and
compared exactly; one that is not known is refused, since another cut gives other ids without a word. (llama.cpp's own
converter compares a hash of the ids of one text.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polymodal.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ONLY = {**_BYTES, "use_regex": False}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_WORDS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "qwen2": [_split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST), _BYTES_ONLY],
    "llama-bpe": [_split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST), _BYTES_ONLY],
}
"""llama.cpp's name to the steps of `tokenizer.json` that cut a text into words."""


def describe_tokens(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, stop_ids: Sequence[int], jinja: str | None
) -> None:
    """Add a tokenizer to a GGUF file.

    Args:
        writer: The file that is being written.
        tokenizer: A fast tokenizer: byte-level BPE, or SentencePiece's BPE with bytes to fall back on.
        rows: Rows of the model's vocabulary; those behind the tokenizer's become tokens that are never used.
        stop_ids: The ids that end an answer.
        jinja: The chat template.

    Raises:
        CheckpointError: llama.cpp has no tokenizer that gives the same ids.
    """
    import gguf

    kinds = gguf.TokenType
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"a tokenizer of type {model.get('type')!r} cannot be written as GGUF; only BPE can")
    if not model["merges"]:
        raise CheckpointError("the tokenizer merges nothing, and llama.cpp opens none that has no merges")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(find_pre(document))
    added = {token["id"]: token for token in document["added_tokens"]}
    unknown = tokenizer.convert_tokens_to_ids(model["unk_token"]) if model.get("unk_token") else tokenizer.unk_token_id
    texts, types = [], []
    for row in range(rows):
        known = tokenizer.convert_ids_to_tokens(row) if row < len(tokenizer) else None
        texts.append(f"[UNUSED{row}]" if known is None else str(known))
        if known is None:
            types.append(kinds.UNUSED)
        elif row == unknown and model.get("byte_fallback"):
            types.append(kinds.UNKNOWN)
        elif row in added:
            types.append(kinds.CONTROL if added[row]["special"] else kinds.USER_DEFINED)
        elif model.get("byte_fallback") and _is_byte(str(known)):
            types.append(kinds.BYTE)
        else:
            types.append(kinds.NORMAL)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if model.get("byte_fallback"):
        # Pieces are merged in the order of their scores: those of a BPE are the order in which it learnt them.
        rank = {"".join(pair.split(" ", 1)): -float(place) for place, pair in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(text, 0.0 if row in added else -1e6) for row, text in enumerate(texts)])
        writer.add_add_space_prefix(_adds_space(document))
    else:
        writer.add_token_merges(merges)
    for name, token in (("bos", tokenizer.bos_token_id), ("unk", unknown), ("pad", tokenizer.pad_token_id)):
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    begins = list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    ends = list(dict.fromkeys(stop_ids))
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if jinja is not None:
        writer.add_chat_template(jinja)


def find_pre(document: dict[str, Any]) -> str:
    """Find llama.cpp's name for the way in which a byte-level tokenizer cuts a text into words.

    Args:
        document: A `tokenizer.json`.

    Returns:
        The name.

    Raises:
        CheckpointError: It cuts in another way than all that are known.
    """
    steps = document.get("pre_tokenizer") or {}
    listed = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    plain = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in listed]
    for name, wanted in _WORDS.items():
        if plain == wanted:
            return name
    raise CheckpointError(
        "the tokenizer cuts texts into words in a way that is not known to be one of llama.cpp's "
        f"({', '.join(_WORDS)}): {json.dumps(plain)[:300]}"
    )


def _adds_space(document: dict[str, Any]) -> bool:
    """Whether SentencePiece's space is put before a text."""
    steps = [document.get("normalizer") or {}, document.get("pre_tokenizer") or {}]
    steps += [inner for step in list(steps) for inner in step.get("normalizers", []) + step.get("pretokenizers", [])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")

"""A model of ours as GGUF files for llama.cpp: the language model, and beside it tower and projector ("mmproj").

`interop.gguf.weights` has the tensors; here the tokenizer, the chat template and the image rules join in. What
llama.cpp would compute otherwise is refused with every reason at once. The folder appears whole or not at all:

    model-f16.gguf  mmproj-f16.gguf  README.md  (parity.json, with --verify)

Images there keep their shape on a tile of one colour, (122, 116, 104), which is CLIP's mean: the one rule that
projector type "mlp" has. LLaVA-1.5 pads before it resizes and llama.cpp after, so the edge of an image that is not
square may lie half a pixel beside ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import ModelConfig
from polymodal.errors import CheckpointError, unknown_name
from polymodal.interop.gguf.weights import KINDS, reasons_against_llm, write_llm, write_mmproj
from polymodal.interop.huggingface import export_card
from polymodal.interop.huggingface.export import about_transparency
from polymodal.interop.huggingface.export_chat_template import stock_template, with_placeholder
from polymodal.interop.huggingface.export_class import LLAVA_TOWERS, against_mlp, against_tower, left_behind, refuse
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.lora import fold_in, is_peft
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.processing.image_transform import pad_colour
from polymodal.utils.extras import extra
from polymodal.utils.files import atomic_folder, write_text

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

PAD_COLOUR = (122, 116, 104)
TOWER_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
"""What a tower may have between its feed-forward layers; llama.cpp approximates the second by the third."""
EDGES = (
    "images that are not square are padded after they are resized there, before it here: edges may lie half a pixel "
    "apart; images that were padded to a square beforehand are read alike"
)
CLASS_TOKEN_NOTE = (
    "builds of llama.cpp since May 2025 put the class token of CLIP towers behind the patches and read wrong images "
    "(issue 25814 of ggml-org/llama.cpp); SigLIP towers have none. --verify tells whether a build does"
)


@dataclass(frozen=True)
class GgufExported:
    """What was written."""

    folder: Path  # Where
    model: Path  # The language model's file
    mmproj: Path  # The file of tower and projector
    weight_bytes: int  # Size of the weights in both
    remarks: tuple[str, ...]  # What is not quite as here, in words


def export_gguf(
    loaded: Loaded, dst: Path, *, kind: str | None = None, licences: Path | None = None, replace: bool = False
) -> GgufExported:
    """Write a model as two GGUF files."""
    extra("gguf", "--format gguf needs", "gguf")
    model, config = loaded.model, loaded.config
    table = model.llm.get_input_embeddings().weight
    kind = kind or str(table.dtype).removeprefix("torch.")
    if kind not in KINDS:
        raise unknown_name("type of weights for GGUF", kind, KINDS)
    refuse("llama.cpp cannot run this model", reasons_against(model, config))
    assert config.image is not None and config.vision is not None  # reasons_against looked
    if is_peft(model.llm):
        fold_in(model.llm)
    ours = ChatTemplate(loaded.tokenizer, config.template, model.image_token_id)
    tokenizer, image_id, _ = with_placeholder(loaded.tokenizer, model.image_token_id)
    jinja, _, remarks = stock_template(ours, config.template, tokenizer, image_id)
    remarks += [EDGES, *([CLASS_TOKEN_NOTE] if config.vision.type == "clip" else []), about_transparency(config)]
    remarks += left_behind(config)
    tokens = partial(describe_tokens, tokenizer=loaded.tokenizer, rows=len(table), stop_ids=ours.stop_ids, jinja=jinja)
    short = KINDS[kind][0].lower()
    files = f"model-{short}.gguf", f"mmproj-{short}.gguf"
    with atomic_folder(dst, replace=replace) as work:
        size = write_llm(work / files[0], model.llm, kind, dst.name, tokens)
        size += write_mmproj(work / files[1], model, config.image, kind, dst.name)
        parts = export_card.origins(loaded, licences)
        export_card.copy_licences(licences, work, parts)
        card = _CARD.format(
            front=export_card.front_matter(parts, "gguf"),
            name=dst.name,
            model=files[0],
            mmproj=files[1],
            remarks="\n".join(f"- {remark}" for remark in remarks),
            licences=export_card.about_licences(parts),
            history=export_card.about_training(loaded.history),
        )
        write_text(work / "README.md", card)
    return GgufExported(dst, dst / files[0], dst / files[1], size, tuple(remarks))


_CARD = """\
{front}

# {name}

A model of polymodal for llama.cpp: `{model}` (language model) and `{mmproj}` (vision tower and projector).

    llama-mtmd-cli -m {model} --mmproj {mmproj} --image cat.jpg -p 'What is this?' --temp 0
    llama-server -m {model} --mmproj {mmproj}

What to know:

{remarks}

Licences:

{licences}

How it was made:

{history}
"""


def reasons_against(model: MultimodalLM, config: ModelConfig) -> Iterator[str]:
    """Everything that llama.cpp cannot express."""
    if config.vision is None or config.image is None:
        yield "the model has no vision encoder: convert its language model with llama.cpp's own script"
        return
    yield from against_tower(model, config, LLAVA_TOWERS)
    if isinstance(model.vision_encoder, HFVisionEncoder) and config.vision.type in LLAVA_TOWERS:
        yield from _against_layers(model.vision_encoder, config.vision.mm_vision_select_feature)
    image = config.image
    if image.image_aspect_ratio != "pad":
        yield (
            f"image_aspect_ratio {image.image_aspect_ratio!r}: images are padded there, not stretched, cut or tiled: "
            "train with 'pad'"
        )
    elif pad_colour(image) != PAD_COLOUR:
        yield f"image.pad_color {pad_colour(image)}: llama.cpp always pads with {PAD_COLOUR}"
    if image.resample != "bicubic":
        yield f"image.resample {image.resample!r}: llama.cpp always resizes these images by 'bicubic'"
    yield from against_mlp(config.projector)
    if config.template.image_newline_text:
        yield "template.image_newline_text: nothing would write it after an image there; leave it empty"
    yield from reasons_against_llm(model.llm)


def _against_layers(encoder: HFVisionEncoder, feature: str) -> Iterator[str]:
    tower: Any = encoder.model
    layers, settings = list(encoder.select_layers), tower.config
    if feature != "patch":
        yield f"mm_vision_select_feature {feature!r}: only the patches are taken there"
    if layers != sorted(set(layers)) or 0 in layers:
        yield f"mm_vision_select_layer: layers {layers} must be in rising order, from 1"
    if settings.hidden_act not in TOWER_ACTIVATIONS:
        yield f"the tower's hidden_act {settings.hidden_act!r}: only {', '.join(TOWER_ACTIVATIONS)} can be written"
    if settings.intermediate_size == settings.hidden_size:
        yield "the tower's feed-forward layers are as wide as its hidden states: llama.cpp would swap them"


# llama.cpp has its own tokenizers: "gpt2" for byte-level BPE, whose way of cutting a text into words goes by a name
# ("pre"), and "llama" for SentencePiece. Which name cuts as our tokenizer does is read from its `tokenizer.json` and
# compared exactly; any other is refused, since another cut gives other ids without a word. (llama.cpp's own converter
# compares a hash of the ids of one text.)
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
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, stop_ids: Sequence[int], jinja: str
) -> None:
    """Add a tokenizer and its chat template to a GGUF file."""
    from gguf import TokenType

    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"a tokenizer of type {model.get('type')!r} cannot be written as GGUF; only BPE can")
    if not model["merges"]:
        raise CheckpointError("the tokenizer merges nothing, and llama.cpp opens none that has no merges")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    sentence_piece = bool(model.get("byte_fallback"))
    added = {token["id"]: token["special"] for token in document["added_tokens"]}
    unknown = tokenizer.convert_tokens_to_ids(model["unk_token"]) if model.get("unk_token") else tokenizer.unk_token_id
    texts = [tokenizer.convert_ids_to_tokens(row) if row < len(tokenizer) else None for row in range(rows)]

    def type_of(row: int, text: str | None) -> TokenType:
        if text is None:
            return TokenType.UNUSED
        if sentence_piece and row == unknown:
            return TokenType.UNKNOWN
        if row in added:
            return TokenType.CONTROL if added[row] else TokenType.USER_DEFINED
        return TokenType.BYTE if sentence_piece and re.fullmatch("<0x..>", text) else TokenType.NORMAL

    writer.add_tokenizer_model("llama" if sentence_piece else "gpt2")
    writer.add_tokenizer_pre("default" if sentence_piece else find_pre(document))
    writer.add_token_list([f"[UNUSED{row}]" if text is None else text for row, text in enumerate(texts)])
    writer.add_token_types([type_of(row, text) for row, text in enumerate(texts)])
    if sentence_piece:
        # Pieces are merged in the order of their scores: those of a BPE are the order in which it learnt them.
        rank = {"".join(pair.split(" ", 1)): -float(place) for place, pair in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(str(text), 0.0 if row in added else -1e6) for row, text in enumerate(texts)])
        writer.add_add_space_prefix(_adds_space(document))
    else:
        writer.add_token_merges(merges)
    for name, token in (("bos", tokenizer.bos_token_id), ("unk", unknown), ("pad", tokenizer.pad_token_id)):
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
    for name, token in zip(("eos", "eot"), dict.fromkeys(stop_ids), strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(jinja)


def find_pre(document: dict[str, Any]) -> str:
    """Find llama.cpp's name for the way in which a byte-level tokenizer cuts a text into words."""
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

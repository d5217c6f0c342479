"""Writing a model as GGUF for llama.cpp: the language model, and beside it tower and projector ("mmproj").

`interop.gguf.weights` has the tensors; here the tokenizer, the chat template and the image rules join in. What
llama.cpp would compute otherwise is refused with every reason at once. The folder appears whole or not at all:

    model-f16.gguf  mmproj-f16.gguf  README.md  (parity.json, with --verify)

Images there keep their shape on a tile of one colour, (122, 116, 104), which is CLIP's mean: the one rule that
projector type "mlp" has. LLaVA-1.5 pads before it resizes and llama.cpp after, so the edge of an image that is not
square may lie half a pixel beside ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import ImageConfig, ModelConfig
from polymodal.errors import CheckpointError, unknown_name
from polymodal.interop.gguf.weights import KINDS, TOWER_ACTIVATIONS, reasons_against_llm, write_llm, write_mmproj
from polymodal.interop.huggingface.export import LICENCES, with_placeholder
from polymodal.interop.huggingface.export_chat_template import stock_template
from polymodal.interop.huggingface.export_class import LLAVA_TOWERS
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.lora import fold_in, is_peft
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.utils.files import atomic_folder, write_text

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

    from polymodal.modeling.vlm import MultimodalLM


# ---- A tokenizer of transformers as the metadata of a GGUF file ----
# llama.cpp has its own tokenizers: "gpt2" for byte-level BPE, whose way of cutting a text into words goes by a name
# ("pre"), and "llama" for SentencePiece. Which name cuts as our tokenizer does is read from its `tokenizer.json` and
# compared exactly; one that is not known is refused, since another cut gives other ids without a word. (llama.cpp's own
# converter compares a hash of the ids of one text.)


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
    """Add a tokenizer to a GGUF file."""
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


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
"""Types of the weights as file names have them."""
PAD_COLOUR = (122, 116, 104)
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
    notes: tuple[str, ...]  # What is not quite as here, in words


def export_gguf(
    loaded: Loaded, dst: Path, *, kind: str | None = None, licences: Path | None = None, replace: bool = False
) -> GgufExported:
    """Write a model as two GGUF files."""
    _need_gguf()
    model, config = loaded.model, loaded.config
    kind = kind or str(model.llm.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if kind not in KINDS:
        raise unknown_name("type of weights for GGUF", kind, KINDS)
    reasons = reasons_against(model, config)
    if reasons:
        listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        raise CheckpointError(f"llama.cpp cannot run this model: {listed}")
    assert config.image is not None  # reasons_against looked
    if is_peft(model.llm):
        fold_in(model.llm)
    jinja, notes = _chat_template(loaded)
    with atomic_folder(dst, replace=replace) as work:
        files = [f"{part}-{SHORT[kind]}.gguf" for part in ("model", "mmproj")]
        rows = model.llm.get_input_embeddings().weight.shape[0]
        template = ChatTemplate(loaded.tokenizer, config.template, model.image_token_id)

        def tokens(writer: Any) -> None:
            describe_tokens(writer, loaded.tokenizer, rows, template.stop_ids, jinja)

        size = write_llm(work / files[0], model.llm, kind, dst.name, tokens)
        mean, deviation = config.image.image_mean, config.image.image_std
        size += write_mmproj(work / files[1], model, kind, dst.name, mean, deviation)
        if licences is not None:
            for path in sorted({p for pattern in LICENCES for p in licences.glob(pattern) if p.is_file()}):
                shutil.copyfile(path, work / path.name)
        write_text(work / "README.md", _card(dst.name, files, notes))
    return GgufExported(dst, dst / files[0], dst / files[1], size, tuple(notes))


def reasons_against(model: MultimodalLM, config: ModelConfig) -> list[str]:
    """List everything that llama.cpp cannot express."""
    if config.vision is None or config.image is None:
        return ["the model has no vision encoder: convert its language model with llama.cpp's own script"]
    found = [*_against_tower(model, config), *_against_image(config.image)]
    if config.projector.mm_projector_type != "mlp2x_gelu":
        found.append(
            f"mm_projector_type {config.projector.mm_projector_type!r}: there are two linear layers with GELU between "
            "them: train with 'mlp2x_gelu'"
        )
    elif config.projector.norm == "layer":
        found.append("projector.norm 'layer' has no place there: train with 'none' or 'standardize'")
    if config.template.image_newline_text:
        found.append("template.image_newline_text: nothing would write it after an image there; leave it empty")
    return found + reasons_against_llm(model.llm)


def _against_tower(model: MultimodalLM, config: ModelConfig) -> list[str]:
    vision, encoder = config.vision, model.vision_encoder
    assert vision is not None
    if not isinstance(encoder, HFVisionEncoder) or vision.type not in LLAVA_TOWERS:
        return [f"vision.type {vision.type!r} has no place there: train with {' or '.join(map(repr, LLAVA_TOWERS))}"]
    settings: Any = encoder.model.config
    found = []
    if encoder.interpolate:
        found.append(
            f"image.tile_size is not the tower's own {settings.image_size}x{settings.image_size}: llama.cpp does not "
            "interpolate its positions here: train with the tower's size"
        )
    if vision.mm_vision_select_feature != "patch":
        found.append(f"mm_vision_select_feature {vision.mm_vision_select_feature!r}: only the patches are taken there")
    if list(encoder.select_layers) != sorted(set(encoder.select_layers)) or 0 in encoder.select_layers:
        found.append(f"mm_vision_select_layer: layers {list(encoder.select_layers)} must be in rising order, from 1")
    if settings.hidden_act not in TOWER_ACTIVATIONS:
        found.append(f"the tower's hidden_act {settings.hidden_act!r}: only {', '.join(TOWER_ACTIVATIONS)} are known")
    if settings.intermediate_size == settings.hidden_size:
        found.append("the tower's feed-forward layers are as wide as its hidden states: llama.cpp would swap them")
    return found


def _against_image(image: ImageConfig) -> list[str]:
    found = []
    height, width = image.tile_size
    if height != width:
        found.append(f"image.tile_size {height}x{width} is not square, as llama.cpp needs it")
    mean_colour = tuple(min(max(int(value * 255), 0), 255) for value in image.image_mean)
    if image.image_aspect_ratio != "pad":
        found.append(
            f"image_aspect_ratio {image.image_aspect_ratio!r}: images are padded there, not stretched, cut or tiled: "
            "train with 'pad'"
        )
    elif (image.pad_color or mean_colour) != PAD_COLOUR:
        found.append(f"image.pad_color {image.pad_color or mean_colour}: llama.cpp always pads with {PAD_COLOUR}")
    if image.resample != "bicubic":
        found.append(f"image.resample {image.resample!r}: llama.cpp always resizes these images by 'bicubic'")
    return found


def _chat_template(loaded: Loaded) -> tuple[str | None, list[str]]:
    """The jinja text that gives our prompts, and what is not the same."""
    tokenizer, vocabulary, _ = with_placeholder(loaded.model, loaded.tokenizer)
    ours = ChatTemplate(loaded.tokenizer, loaded.config.template, loaded.model.image_token_id)
    found = stock_template(ours, loaded.config.template, loaded.tokenizer, tokenizer, vocabulary.image_token_id)
    notes = list(found.notes)
    notes.append(
        "images that are not square are padded after they are resized there, before it here: edges may lie half a "
        "pixel apart; images that were padded to a square beforehand are read alike"
    )
    if loaded.config.vision is not None and loaded.config.vision.type == "clip":
        notes.append(CLASS_TOKEN_NOTE)
    background = loaded.config.image.background if loaded.config.image else None
    notes.append(f"transparent pixels become {background} here; there the colour that was hidden under them shows")
    return found.jinja, notes


def _card(name: str, files: list[str], notes: list[str]) -> str:
    model, mmproj = files
    lines = [
        f"# {name}",
        "",
        f"A model of polymodal for llama.cpp: `{model}` (language model) and `{mmproj}` (vision tower and projector).",
        "",
        f"    llama-mtmd-cli -m {model} --mmproj {mmproj} --image cat.jpg -p 'What is this?' --temp 0",
        f"    llama-server -m {model} --mmproj {mmproj}",
        "",
        "What to know:",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"--format gguf needs the package gguf: pip install gguf ({error})") from error

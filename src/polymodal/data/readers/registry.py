"""The table of forms, and how they are told apart: by name and content, never by a word in the path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polymodal.data.readers import captions as coco
from polymodal.data.readers import captions as folder
from polymodal.data.readers import json_lines as json_rows
from polymodal.data.readers import parquet, vqa, webdataset
from polymodal.data.readers.base import Reader
from polymodal.data.readers.json_lines import LIST, file_form
from polymodal.data.readers.json_stream import stream
from polymodal.errors import DataError


@dataclass(frozen=True)
class Format:
    """What a form needs."""

    reader: Reader  # Reads one file
    shards: str = ""  # Which files of a folder belong to it; "" where a folder is not taken
    annotations: Literal["none", "optional", "needed"] = "none"  # Whether there is a second file
    prompt: bool = False  # Whether the question is ours to choose


FORMATS: dict[str, Format] = {
    "json": Format(json_rows.read_any),
    "llava": Format(json_rows.read_llava),
    "messages": Format(json_rows.read_messages),
    "openai": Format(json_rows.read_openai),
    "coco": Format(coco.read_coco, prompt=True),
    "vqav2": Format(vqa.read_vqav2, annotations="needed", prompt=True),
    "gqa": Format(vqa.read_gqa, shards="*.json", prompt=True),
    "textvqa": Format(vqa.read_textvqa, annotations="optional", prompt=True),
    "docvqa": Format(vqa.read_docvqa, prompt=True),
    "parquet": Format(parquet.read_parquet, shards="*.parquet", prompt=True),
    "webdataset": Format(webdataset.read_webdataset, shards="*.tar", prompt=True),
    "folder": Format(folder.read_folder, prompt=True),
}
"""The forms, by the name that a recipe gives. "json" is rows in LLaVA's form or with `messages`, each as it is."""


def data_files(path: Path, format: str) -> list[Path]:
    """The files behind a path."""
    path = Path(path)
    if "*" in path.name and not path.exists():
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise DataError(f"{path}: no file matches the pattern")
        return found
    if format == "folder" or not path.is_dir():
        return [path]
    shards = FORMATS[format].shards
    if not shards:
        raise DataError(f"{path}: cannot be read: it is a folder; give a file of format {format}")
    found = sorted(path.glob(shards))
    if not found:
        raise DataError(f"{path}: no {shards} in this folder")
    return found


def detect_format(path: Path) -> str:
    """Tell the form of a file or folder."""
    path = Path(path)
    if "*" in path.name and not path.exists():
        path = data_files(path, "json")[0]
    if path.is_dir():
        return next((name for name in ("webdataset", "parquet") if any(path.glob(FORMATS[name].shards))), "folder")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar" or path.suffix.lower() == ".tar":
        return "webdataset"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise DataError(f"{path}: is compressed; unpack it first")
    return "json" if file_form(path) == LIST else _official(path)


def _official(path: Path) -> str:
    """Tell the official files, which are one object, from lines of records, by the object's first keys."""
    try:
        for item in stream(path):
            value = item.value if isinstance(item.value, dict) else {}
            if item.key in ("conversations", "messages"):
                return "json"
            if item.key == "questions" and "question_id" in value:
                return "vqav2"
            if item.key == "annotations" and "question_id" in value:
                raise DataError(f"{path}: these are VQAv2's annotations; give the questions, and this as `annotations`")
            if item.key in ("images", "annotations") and ("file_name" in value or "caption" in value):
                return "coco"
            if item.key == "data" and item.index >= 0:
                return "docvqa" if "questionId" in value else "textvqa"
            if "imageId" in value and "question" in value:
                return "gqa"
    except DataError as error:
        if "not valid JSON" not in str(error) and "not UTF-8" not in str(error):
            raise
    return "json"

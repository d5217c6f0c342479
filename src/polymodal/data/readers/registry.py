"""The table of forms, and how they are told apart: by name and content, never by a word in the path."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from polymodal.data.readers import captions, json_files, parquet, vqa, webdataset
from polymodal.data.readers.base import PACKED, Reader, open_file
from polymodal.errors import DataError
from polymodal.utils.files import regular_size


@dataclass(frozen=True)
class Format:
    """What a form needs."""

    reader: Reader  # Reads one file
    shards: str = ""  # Which files of a folder belong to it; "" where a folder is not taken
    annotations: Literal["none", "optional", "needed"] = "none"  # Whether there is a second file
    prompt: bool = False  # Whether the question is ours to choose


FORMATS: dict[str, Format] = {
    "json": Format(json_files.read_rows),
    "llava": Format(partial(json_files.read_rows, form="llava")),
    "messages": Format(partial(json_files.read_rows, form="messages")),
    "openai": Format(partial(json_files.read_rows, form="openai")),
    "coco": Format(captions.read_coco, prompt=True),
    "vqav2": Format(vqa.read_vqav2, annotations="needed", prompt=True),
    "gqa": Format(vqa.read_gqa, shards="*.json", prompt=True),
    "textvqa": Format(vqa.read_textvqa, annotations="optional", prompt=True),
    "docvqa": Format(vqa.read_docvqa, prompt=True),
    "parquet": Format(parquet.read_parquet, shards="*.parquet", prompt=True),
    "webdataset": Format(webdataset.read_webdataset, shards="*.tar", prompt=True),
    "folder": Format(captions.read_folder, prompt=True),
}
"""The forms, by the name that a recipe gives. "json" is rows in LLaVA's form or with `messages`, each as it is."""


def data_files(path: Path, format: str) -> list[Path]:
    """The files behind a path; pipes and devices are refused."""
    found = _data_files(Path(path), format)
    for file in found if format != "folder" else ():
        regular_size(file, error=DataError)
    return found


def _data_files(path: Path, format: str) -> list[Path]:
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
        path = _data_files(path, "json")[0]
    if path.is_dir():
        return next((name for name in ("webdataset", "parquet") if any(path.glob(FORMATS[name].shards))), "folder")
    if path.suffix.lower() in (".yaml", ".yml"):
        raise DataError(f"{path}: a recipe, and no data; `polymodal check {path}` looks it over, with its data")
    with open_file(path) as file:
        head = file.read(512)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar" or path.suffix.lower() == ".tar":
        return "webdataset"
    if head.startswith((*PACKED, b"PK\x03\x04")):
        raise DataError(f"{path}: is compressed; unpack it first")
    if json_files.file_form(path) == json_files.LIST:
        return "json"
    try:
        return _official(path)
    except DataError as error:
        if error.code not in ("broken-json", "not-utf8"):
            raise
        return "json"


def _official(path: Path) -> str:
    """Tell the official files, which are one object, from lines of records, by the keys that come first."""
    keys: dict[str, set[str]] = defaultdict(set)  # of each object that is open, by its place
    for place, event, value in json_files.events(path):
        if place == "data.item" and event not in ("start_map", "map_key"):  # the first element is over
            is_textvqa = {"image_id", "question"} <= keys[place]
            return "docvqa" if "questionId" in keys[place] else "textvqa" if is_textvqa else "json"
        if event == "end_map":
            keys.pop(place, None)
        if event != "map_key":
            continue
        keys[place].add(value)
        if place == "" and value in ("conversations", "messages"):
            return "json"
        if place == "questions.item" and value == "question_id":
            return "vqav2"
        if place == "annotations.item" and value == "question_id":
            raise DataError(f"{path}: these are VQAv2's annotations; give the questions, and this as `annotations`")
        if place in ("images.item", "annotations.item") and value in ("file_name", "caption"):
            return "coco"
        if {"imageId", "question"} <= keys[place] and place != "data.item":
            return "gqa"
    return "json"

"""A folder of images, each with its caption in a text file of the same name: `cat.jpg` and `cat.txt`.

Folders inside are read too, in the order of their names; hidden files are not. An image without a caption, and a
caption without an image, is a broken row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import CAPTION, IMAGES, Options, RawRow, broken, dialogue, text_of
from polymodal.data.readers.json_stream import stream
from polymodal.data.readers.vqa import Layout
from polymodal.errors import DataError, MediaError
from polymodal.media.source import read_bytes

_MAX_CAPTION = 1 << 20


def read_folder(path: Path, options: Options) -> Iterator[RawRow]:
    """Read a folder of images with captions."""
    stems: dict[Path, list[Path]] = {}
    count = 0
    for file in _files(path):
        if file.suffix.lower() in IMAGES or file.suffix.lower() == ".txt":
            stems.setdefault(file.with_suffix(""), []).append(file)
            count += file.suffix.lower() in IMAGES
    if count == 0:
        raise DataError(f"{path}: no images; give a folder of images with .txt captions, or a data file")
    prompt = CAPTION if options.prompt is None else options.prompt
    for number, (stem, files) in enumerate(stems.items()):
        texts = [file for file in files if file.suffix.lower() == ".txt"]
        images = [file for file in files if file.suffix.lower() != ".txt"]
        name = stem.relative_to(path).as_posix()
        where = f"{path}: {name}"
        if len(images) > 1 or len(texts) > 1:
            found = ", ".join(file.name for file in files)
            yield broken(number, where, f"one image and one .txt must have this name, found {found}", path)
        elif not texts:
            yield broken(number, where, f"{images[0].name} has no caption; add {stem.name}.txt", path)
        elif not images:
            yield broken(number, where, f"{texts[0].name} has no image; add one or take the text away", path)
        else:
            try:
                caption = read_bytes(texts[0], limit=_MAX_CAPTION, name=texts[0].name).decode("utf-8-sig").strip()
            except MediaError as error:
                yield broken(number, where, str(error), path)
                continue
            except UnicodeDecodeError as error:
                yield broken(number, where, f"{texts[0].name} is not UTF-8 text (byte {error.start})", path)
                continue
            if not caption:
                yield broken(number, where, f"the caption {texts[0].name} is empty", path)
                continue
            data = dialogue([images[0]], [(prompt, caption)], id=name)
            yield RawRow(number, where, data, path=path, root=options.root, kind="caption")


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files in order; links to folders are followed, but not in a circle."""
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path), (*above, here))
        else:
            yield Path(entry.path)


# ---- COCO captions: `captions_train2017.json`, one record for each caption ----
# The file is `{images: [{id, file_name}], annotations: [{id, image_id, caption}]}` (Chen et al. 2015,
# arXiv:1504.00325).
# Images are looked for under their `file_name`, or in a folder named like the split (`train2017/`).


def read_coco(path: Path, options: Options) -> Iterator[RawRow]:
    """Read a caption file."""
    names: dict[Any, str] = {}
    for item in stream(path):
        if item.key == "images" and isinstance(item.value, dict) and text_of(item.value.get("file_name")):
            names[_key(item.value.get("id"))] = item.value["file_name"]
    if not names:
        raise DataError(f"{path}: no `images` with `file_name`; give COCO's captions_*.json")
    split = re.search(r"(train|val|test)20\d\d", path.stem)
    layout = Layout(options.root)
    prompt = CAPTION if options.prompt is None else options.prompt
    number = 0
    for item in stream(path):  # again: the order of the two lists is not fixed
        if item.key != "annotations":
            continue
        where = f"{path}: annotation {item.index}"
        caption = item.value if isinstance(item.value, dict) else {}
        name = names.get(_key(caption.get("image_id")))
        text = text_of(caption.get("caption"))
        if name is None:
            yield broken(number, where, f"no image with id {caption.get('image_id')!r} in `images`", path)
        elif not text:
            yield broken(number, where, "`caption` is missing or empty", path)
        else:
            image = layout.choose((name, f"{split[0]}/{name}") if split else (name,))
            data = dialogue([image], [(prompt, text)], id=f"{caption.get('id', number)}")
            yield RawRow(number, where, data, path=path, root=options.root, kind="caption")
        number += 1
    if number == 0:
        raise DataError(f"{path}: no `annotations`; give COCO's captions_*.json")


def _key(value: Any) -> Any:
    return value if isinstance(value, int | str) else None

"""Captions: a folder of images with text files, and COCO's `captions_train2017.json`.

- A folder: `cat.jpg` and `cat.txt` of the same name. Folders inside are read too, in the order of their names; hidden
  files are not. An image without a caption, and a caption without an image, is a broken row.
- COCO: `{images: [{id, file_name}], annotations: [{id, image_id, caption}]}`, one record for each caption (Chen et al.
  2015, arXiv:1504.00325). Images are looked for under their `file_name`, or in a folder named like the split
  (`train2017/`).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import KINDS, Layout, Options, RawRow, as_parts, broken, caption_of, object_of, text_of
from polymodal.data.readers.json_files import elements
from polymodal.errors import DataError, MediaError
from polymodal.media.source import read_bytes

_MAX_CAPTION = 1 << 20


def read_folder(path: Path, options: Options) -> Iterator[RawRow]:
    """Read a folder of images with captions."""
    stems: dict[Path, list[Path]] = {}
    count = 0
    for file in _files(path):
        if file.suffix.lower() in (*KINDS, ".txt"):
            stems.setdefault(file.with_suffix(""), []).append(file)
            count += file.suffix.lower() in KINDS
    if count == 0:
        raise DataError(f"{path}: no images; give a folder of images with .txt captions, or a data file")
    for stem, files in stems.items():
        name = stem.relative_to(path).as_posix()
        where = f"{path}: {name}"
        try:
            medium, caption = _pair(files)
        except (DataError, MediaError) as error:
            yield broken(where, str(error))
            continue
        parts = as_parts(KINDS[medium.suffix.lower()], [medium])
        yield RawRow(where, caption_of(parts, caption, options, id=name), kind="caption")


def _pair(files: list[Path]) -> tuple[Path, str]:
    """The image, video, sound or document and the caption among the files of one name; an image goes before others."""
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    images = [file for file in files if file.suffix.lower() != ".txt"]
    images = [file for file in images if KINDS[file.suffix.lower()] == "image"] or images
    if len(images) > 1 or len(texts) > 1:
        found = ", ".join(file.name for file in files)
        raise DataError(f"one image and one .txt must have this name, found {found}")
    if not texts:
        raise DataError(f"{images[0].name} has no caption; add {images[0].stem}.txt")
    if not images:
        raise DataError(f"{texts[0].name} has no image; add one or take the text away")
    try:
        caption = read_bytes(texts[0], limit=_MAX_CAPTION, name=texts[0].name).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{texts[0].name} is not UTF-8 text (byte {error.start})") from None
    if not caption:
        raise DataError(f"the caption {texts[0].name} is empty")
    return images[0], caption


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


def read_coco(path: Path, options: Options) -> Iterator[RawRow]:
    """Read a caption file of COCO."""
    names = {
        _key(image.get("id")): image["file_name"]
        for image in map(object_of, elements(path, "images"))
        if text_of(image.get("file_name"))
    }
    if not names:
        raise DataError(f"{path}: no `images` with `file_name`; give COCO's captions_*.json")
    split = re.search(r"(train|val|test)20\d\d", path.stem)
    layout = Layout(options.root)
    number = -1
    # Read again, since the order of the two lists is not fixed.
    for number, annotation in enumerate(map(object_of, elements(path, "annotations"))):
        where = f"{path}: annotation {number}"
        name = names.get(_key(annotation.get("image_id")))
        text = text_of(annotation.get("caption"))
        if name is None:
            yield broken(where, f"no image with id {annotation.get('image_id')!r} in `images`")
        elif not text:
            yield broken(where, "`caption` is missing or empty")
        else:
            image = layout.choose(name, f"{split[0]}/{name}") if split else name
            data = caption_of([image], text, options, id=f"{annotation.get('id', number)}")
            yield RawRow(where, data, kind="caption")
    if number < 0:
        raise DataError(f"{path}: no `annotations`; give COCO's captions_*.json")


def _key(value: Any) -> Any:
    return value if isinstance(value, int | str) else None

"""COCO captions: `captions_train2017.json`, one record for each caption.

The file is `{images: [{id, file_name}], annotations: [{id, image_id, caption}]}` (Chen et al. 2015, arXiv:1504.00325).
Pictures are looked for under their `file_name`, or in a folder named like the split (`train2017/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import CAPTION, Options, RawRow, broken, dialogue, text_of
from polymodal.data.readers.json_stream import stream
from polymodal.data.readers.vqa import Layout
from polymodal.errors import DataError


def read_coco(path: Path, options: Options) -> Iterator[RawRow]:
    """Read a caption file.

    Args:
        path: The annotations.
        options: `prompt` is what is asked.

    Yields:
        A row for each caption.

    Raises:
        DataError: The file is no caption file.
    """
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
            yield broken(number, where, f"no picture with id {caption.get('image_id')!r} in `images`", path)
        elif not text:
            yield broken(number, where, "`caption` is missing or empty", path)
        else:
            picture = layout.choose((name, f"{split[0]}/{name}") if split else (name,))
            data = dialogue([picture], [(prompt, text)], id=f"{caption.get('id', number)}")
            yield RawRow(number, where, data, path=path, root=options.root, kind="caption")
        number += 1
    if number == 0:
        raise DataError(f"{path}: no `annotations`; give COCO's captions_*.json")


def _key(value: Any) -> Any:
    return value if isinstance(value, int | str) else None

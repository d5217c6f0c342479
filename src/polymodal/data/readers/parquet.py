"""Parquet as Hugging Face `datasets` writes it, images as bytes inside.

Columns that are known, the first of these that is there being the text:

- `conversations` or `messages`: as in JSON, with placeholders for the images.
- `texts`: a list of `{user, assistant}` (The Cauldron, FineVision); images stand before the first question.
- `question` with `multiple_choice_answer`, `answer` or `answers`.
- `caption` or `text`.

Images are in `image` or `images` (videos, audios and documents likewise): `{bytes, path}`, bytes, paths, or lists of
these; an object of a video or document may say more (`num_frames`, `pages`), as in JSON.
`id` (or `question_id`), `kind`, `kinds` and `source` are kept. Only texts are read here; an image's bytes are read
from their cell when they are wanted (`media/source.py`). Needs pyarrow.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import (
    Options,
    RawRow,
    as_parts,
    best_answer,
    broken,
    caption_of,
    dialogue,
    listed,
    media_keys,
    question_of,
    text_of,
)
from polymodal.data.readers.conversations import RECORD_KEYS
from polymodal.errors import DataError, MediaError, first_line
from polymodal.media.source import open_table, read_column
from polymodal.messages import TableCell

_TEXTS = ("conversations", "messages", "texts", "question", "caption", "text")
_ANSWERS = ("multiple_choice_answer", "answer", "answers")
_MAX_TEXTS = 512 * 2**20
_LABELS = ("id", "question_id", "kind", "kinds", "source", "system", "system_prompt", "transcript", *RECORD_KEYS)
_MEDIA = {key + s: key for key in ("image", "video", "audio", "document") for s in ("", "s")}


def read_parquet(path: Path, options: Options) -> Iterator[RawRow]:
    """Read a parquet file."""
    with open_table(path, DataError) as file:
        names = set(file.schema_arrow.names)
        form = next((name for name in _TEXTS if name in names), None)
        if form is None:
            raise DataError(f"{path}: none of the columns {', '.join(_TEXTS)}; found {', '.join(sorted(names))}")
        if form == "question" and names.isdisjoint(_ANSWERS):
            raise DataError(f"{path}: `question` without {', '.join(_ANSWERS)}; these are questions without answers")
        wanted = [form, *(name for name in (*_ANSWERS, *_LABELS) if name in names and name != form)]
        media = [name for name in _MEDIA if name in names]
        number = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                rows = _texts_of(file, group, wanted).to_pylist()
                cells = {name: cells_of(path, file, group, name, options.root, len(rows), True) for name in media}
            except Exception as error:  # pyarrow raises many types for damaged pages
                problem = f"row group {group} is damaged ({first_line(error)[:160]}); fetch the file again"
                problem = str(error) if isinstance(error, DataError | MediaError) else problem
                yield broken(f"{path}: rows {number} to {number + count - 1}", problem)
                number += count
                continue
            for index, row in enumerate(rows):
                where = f"{path}: row {number}"
                try:
                    data, kind = _record(row, form, {name: cells[name][index] for name in media}, options)
                    name = f"{path.stem}-{number}"
                    yield RawRow(where, data, kind=kind, id=name)
                except DataError as error:
                    yield broken(where, str(error))
                number += 1
    if number == 0:
        raise DataError(f"{path}: the file holds no records")


def _texts_of(file: Any, group: int, columns: list[str]) -> Any:
    """Read the columns that hold texts, unless these are too large."""
    about = file.metadata.row_group(group)
    if about.total_byte_size > _MAX_TEXTS:  # only then is the chunks' metadata read, see `_cells`
        chunks = [about.column(index) for index in range(about.num_columns)]
        _check_texts(group, sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns))
    table = file.read_row_group(group, columns=columns)
    _check_texts(group, sum(_decoded(chunk) for column in table.columns for chunk in column.chunks))
    return table


def _check_texts(group: int, size: int) -> None:
    if size > _MAX_TEXTS:
        problem = f"the texts of row group {group} have {size:,} bytes, at most {_MAX_TEXTS:,} are allowed"
        raise DataError(f"{problem}; write smaller row groups")


def _decoded(array: Any) -> int:
    """The bytes that an array takes where each of its values is written out."""
    import pyarrow
    from pyarrow import compute

    if pyarrow.types.is_dictionary(array.type):
        each = compute.binary_length(array.dictionary).cast("int64")
        return compute.sum(each.take(array.indices)).as_py() or 0
    if pyarrow.types.is_struct(array.type):
        return sum(_decoded(child) for child in array.flatten())
    if pyarrow.types.is_nested(array.type):
        return _decoded(array.flatten())
    return int(array.nbytes)


def _record(
    row: dict[str, Any], form: str, media: dict[str, list[Any]], options: Options
) -> tuple[dict[str, Any], str]:
    """Make a record of a row, and its kind."""
    labels = {key: row[key] for key in _LABELS if row.get(key) is not None}
    if "question_id" in labels:
        labels.setdefault("id", labels.pop("question_id"))
    media = {name: listed(items) for name, items in media.items()}
    for name, items in media.items():
        if None in items:
            raise DataError(f"`{name}`[{items.index(None)}] is empty; give bytes or a path")
    media = {name: items for name, items in media.items() if name in media_keys(media, _MEDIA[name])}
    parts = [part for name, items in media.items() for part in as_parts(_MEDIA[name], items)]
    if form in ("conversations", "messages"):
        return {**labels, **{name: items for name, items in media.items() if items}, form: row[form]}, "conversation"
    if form == "texts":
        given = [turn if isinstance(turn, dict) else {} for turn in row["texts"] or []]
        turns = [(text_of(turn.get("user")), text_of(turn.get("assistant"))) for turn in given]
        if not turns or not all(answer for _, answer in turns):
            raise DataError("`texts` must be a list of turns with `user` and `assistant`, none of them empty")
        return dialogue(parts, turns, **labels), "conversation"
    if form == "question":
        question = text_of(row["question"])
        answer = next(filter(None, (best_answer(row.get(name)) for name in _ANSWERS)), "")
        if not question or not answer:
            raise DataError(f"the {'answer' if question else 'question'} is missing or empty")
        return question_of(parts, question, answer, options, default="", **labels), "vqa"
    caption = best_answer(row[form])
    if not caption:
        raise DataError(f"`{form}` is empty")
    if not parts:
        raise DataError("a caption without an image; fill `image` or `images`")
    return caption_of(parts, caption, options, **labels), "caption"


def cells_of(
    path: Path, file: Any, group: int, column: str, root: Path, count: int, settings: bool = False
) -> list[list[Any]]:
    """Locate the media of a column: a list a row of cells, paths where there can be no bytes, or what says more."""
    # Not from the chunks' metadata: pyarrow ends the process where that is damaged.
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    own = {leaf.split(".")[-1]: leaf for leaf in leaves if leaf.split(".")[0] == column}
    if {"bytes", "path"} <= own.keys():  # what is beside the bytes is short, and tells how many each row has
        more = [leaf for leaf in leaves if leaf.split(".")[0] == column and leaf not in own["bytes"]]
        columns = more if settings and column.rstrip("s") in ("video", "document") else [own["path"]]
        values = file.read_row_group(group, columns=columns).column(column)
    else:
        values = read_column(path, group, column)
    if len(values) != count:
        raise MediaError(f"column `{column}` has {len(values)} rows, not {count}; fetch the file again")
    return [_of_row(value, TableCell(path, group, index, column, root=root)) for index, value in enumerate(values)]


def _of_row(value: Any, cell: TableCell) -> list[Any]:
    if not value.is_valid:
        return []
    is_list = hasattr(value, "values") and not hasattr(value, "keys")
    found: list[Any] = []
    for item, entry in enumerate(value if is_list else [value]):
        if not entry.is_valid:
            found.append(None)
        elif _is_text(entry):
            found.append(entry.as_py())
        else:
            place = replace(cell, item=item if is_list else -1)
            more = {key: value for key, value in _plain(entry).items() if value is not None}
            found.append({**more, "path": place} if more else place)
    return found


def _plain(entry: Any) -> dict[str, Any]:
    """What a cell's object says beside bytes and path."""
    names = [*entry.keys()] if hasattr(entry, "keys") else []
    return {name: entry[name].as_py() for name in names if name not in ("bytes", "path")}


def _is_text(value: Any) -> bool:
    import pyarrow

    kind = getattr(value.type, "value_type", value.type)
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

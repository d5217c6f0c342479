"""Read a data file of any form, whole or row by row. Errors name the file and the row."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import Options, RawRow
from polymodal.data.readers.conversations import Record, read_record
from polymodal.data.readers.registry import FORMATS, data_files, detect_format
from polymodal.errors import DataError, unknown_name
from polymodal.messages import Audio, Document, FileSlice, Image, Media, Message, Part, TableCell, Text, Video, said_of

KINDS = ("caption", "vqa", "reasoning", "ocr", "conversation")
"""The kinds that readers and recipes name; a dataset may have its own."""


def load_records(
    path: Path,
    image_root: Path | None = None,
    *,
    format: str = "auto",
    annotations: Path | None = None,
    kind: str = "",
    source: str = "",
    prompt: str | None = None,
) -> list[Record]:
    """Read all records of a file, checking every one. Images are located, not read.

    Args:
        path: A data file; a folder or a pattern with `*` for shards and for images with captions.
        image_root: The folder that media paths are relative to and may not leave; the file's own folder when None.
        format: A name of `FORMATS`, or "auto".
        annotations: The second file, of formats that have two.
        kind: Of records that do not say; the format's own ("vqa" for VQAv2, "conversation" for JSON) when empty.
        source: Of records that do not say; the file's name without its ending when empty.
        prompt: The question of captions, or what follows each question of a VQA set; the format's own when None.

    Returns:
        The records, in order.

    Raises:
        DataError: The file or a record cannot be used; names the file, the row and the field.
    """
    rows = iter_rows(path, image_root, format=format, annotations=annotations, prompt=prompt)
    return [row_record(row, kind=kind, source=source) for row in rows]


def iter_rows(
    path: Path,
    image_root: Path | None = None,
    *,
    format: str = "auto",
    annotations: Path | None = None,
    prompt: str | None = None,
) -> Iterator[RawRow]:
    """Read a file row by row; a broken row is handed on as one, and the rows after it are read."""
    path = Path(path)
    name = detect_format(path) if format == "auto" else format
    if name not in FORMATS:
        raise unknown_name("data format", name, ["auto", *FORMATS])
    form = FORMATS[name]
    if annotations is None and form.annotations == "needed":
        raise DataError(f"{path}: format {name} needs its second file; set `annotations`")
    if annotations is not None and form.annotations == "none":
        raise DataError(f"{path}: format {name} has no second file; take `annotations` out")
    if prompt is not None and not form.prompt:
        raise DataError(f"{path}: format {name} has its own questions; take `prompt` out")
    number = 0
    for file in data_files(path, name):
        root = Path(image_root) if image_root is not None else file if name == "folder" else file.parent
        for row in form.reader(file, Options(root, annotations, prompt)):
            yield replace(row, number=number, root=root, source=path.stem)  # not the shard's name
            number += 1
    if number == 0:
        raise DataError(f"{path}: the file holds no records")


def row_record(row: RawRow, *, kind: str = "", source: str = "") -> Record:
    """Make a record of a row."""
    if row.error is not None:
        raise row.error
    record = read_record(row.data, row.root, row.where, default_id=row.id, form=row.form)
    for message in record.messages:
        try:
            f"{message.text}{json.dumps(message.fields, ensure_ascii=False)}".encode()
        except UnicodeEncodeError:
            problem = "the text holds half of a surrogate pair (\\ud83d alone); write the whole character"
            raise DataError(f"{row.where}: {problem}") from None
    return replace(record, kind=record.kind or kind or row.kind, source=record.source or source or row.source)


_PARTS: dict[str, type[Media]] = {"image": Image, "video": Video, "audio": Audio, "document": Document}


def record_to_json(record: Record) -> dict[str, Any]:
    """Write a record as plain JSON values, for a file of our own that holds records of every form."""
    messages = [
        [turn.role, [_part_to_json(part, record.id) for part in turn.parts], *_marks(turn)] for turn in record.messages
    ]
    plain = {"id": record.id, "kind": record.kind, "source": record.source, "messages": messages}
    return {**plain, "extra": dict(record.extra)} if record.extra else plain


def record_from_json(data: Mapping[str, Any]) -> Record:
    """Read what `record_to_json` wrote. For our own files only: paths are taken as they are."""
    messages = tuple(
        Message(role, tuple(map(_part_from_json, parts)), *marks[:1], **_fields(*marks[1:]))
        for role, parts, *marks in data["messages"]
    )
    return Record(data["id"], messages, data["kind"], data["source"], data.get("extra", {}))


def _marks(turn: Message) -> list[Any]:
    """What follows a turn's parts: whether it is trained, and its reasoning and tools; as little as says it."""
    return [turn.train, turn.fields] if turn.fields else [] if turn.train else [False]


def _fields(given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in (given or {}).items()}


def _part_to_json(part: Part, name: str) -> Any:
    if isinstance(part, Text):
        return part.text
    kind, source = type(part).__name__.lower(), part.source
    more = [said] if (said := said_of(part)) else []
    if isinstance(source, FileSlice | TableCell):
        about = (str(value) if isinstance(value, Path) else value for value in vars(source).values())
        where = "slice" if isinstance(source, FileSlice) else "cell"
        return [kind, where, *("" if value is None else value for value in about), *more]
    if isinstance(source, str | Path):
        return [kind, "url" if isinstance(source, str) else "path", str(source), *more]
    raise DataError(f"record {name}: its {kind} is in memory; give a file")


def _part_from_json(part: Any) -> Part:
    if isinstance(part, str):
        return Text(part)
    kind, where, first, *rest = part
    said = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    source: Any = first if where == "url" else Path(first)
    if where == "slice":
        source = FileSlice(source, *rest)
    if where == "cell":
        group, row, column, item, root = rest
        source = TableCell(source, group, row, column, item, Path(root) if root else None)
    made: Any = _PARTS[kind]
    part_of: Part = made(source, **{name: tuple(v) if isinstance(v, list) else v for name, v in said.items()})
    return part_of

"""WebDataset: tar archives whose neighbouring members with the same name are one sample.

A member's name up to the first dot of its last part is the sample's key: `a/001.jpg`, `a/001.txt`, `a/001.json`. A
sample has images (`jpg`, `0.png`, ...), and either a conversation or a caption:

- `.json` with `conversations` or `messages`: a record; the sample's images are its `images`, by the names that it
  lists, else in the order of the archive. Videos, sounds and PDFs likewise; what the list says of one is kept.
- `.json` with `question` and `answer`, or with `caption` or `text`.
- `.txt` (or `.caption`): a caption. It goes before a `.json` without a conversation, as img2dataset writes both.

Nothing is unpacked: images stay where they are (`FileSlice`) and are read one by one at any time, so an archive must
not be compressed. Links, devices, sparse members, absolute names and names with `..` are broken rows. Members of other
types are no part of a sample. An archive without its end marker was cut off, which the reference ignores.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from polymodal.data.readers.base import (
    KINDS,
    PACKED,
    Options,
    RawRow,
    as_parts,
    best_answer,
    broken,
    caption_of,
    listed,
    media_keys,
    question_of,
    text_of,
)
from polymodal.data.readers.json_files import parse_json
from polymodal.errors import DataError, MediaError, first_line
from polymodal.media.source import describe, read_bytes
from polymodal.messages import FileSlice
from polymodal.utils.files import regular_size

_MAX_TEXT = 16 * 2**20
_TEXTS = frozenset({".txt", ".caption", ".json"})


@dataclass
class _Sample:
    key: str
    members: list[FileSlice] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_webdataset(path: Path, options: Options) -> Iterator[RawRow]:
    """Read a tar archive."""
    seen: set[str] = set()
    for sample in _samples(path):
        where = f"{path}: sample {describe(sample.key)}"
        if sample.key in seen:
            sample.faults.append("its members do not follow one another; write the archive sorted by name")
        seen.add(sample.key)
        try:
            if sample.faults:
                raise DataError(sample.faults[0])
            data, kind = _record(sample, options)
        except (DataError, MediaError) as error:
            yield broken(where, str(error))
        else:
            yield RawRow(where, data, kind=kind, id=sample.key)
    if not seen:
        raise DataError(f"{path}: the archive holds no samples")


def _samples(path: Path) -> Iterator[_Sample]:
    """Group neighbours with the same key; the last one has a fault where the archive breaks off."""
    sample: _Sample | None = None
    problem = ""
    with _open(path) as archive:
        size = path.stat().st_size
        while True:
            try:
                member = archive.next()
            except (tarfile.TarError, EOFError, ValueError, OSError) as error:
                problem = f"the archive is cut off or damaged here ({first_line(error)}); fetch it again"
                break
            if member is None:
                problem = _end_of(path, archive.offset)
                break
            if member.isdir():
                continue
            key = _key(member.name)
            if sample is not None and sample.key != key:
                yield sample
                sample = None
            sample = sample or _Sample(key)
            if fault := _fault(member):
                sample.faults.append(f"member {describe(member.name)}: {fault}")
            elif member.offset_data + member.size > size:
                sample.faults.append(f"member {describe(member.name)}: the archive is cut off here; fetch it again")
            else:
                sample.members.append(FileSlice(path, member.offset_data, member.size, _printable(member.name)))
    if sample is not None:
        yield sample
    if problem and not (sample is not None and sample.faults):
        yield _Sample("(end)", faults=[problem])


def _open(path: Path) -> tarfile.TarFile:
    regular_size(path, error=DataError)
    try:
        return tarfile.open(path, "r:")
    except (tarfile.TarError, EOFError, OSError) as error:
        with path.open("rb") as file:
            head = file.read(6)
        packed = head.startswith(PACKED)
        why = "is compressed, so its members cannot be read one by one; unpack it to a .tar" if packed else ""
        raise DataError(f"{path}: {why or f'not a tar archive ({first_line(error)})'}") from None


def _end_of(path: Path, offset: int) -> str:
    """What is wrong at the place where the members end; tarfile itself takes a damaged header for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        while not any(block) and (more := file.read(1 << 20)):
            if any(more):
                return f"more follows after the end at byte {offset}; join archives with `tar --concatenate`, not `cat`"
    if len(block) < tarfile.BLOCKSIZE:
        return "the archive has no end marker, so it was cut off; fetch it again"
    damaged = f"damaged header at byte {offset}; what follows cannot be read, fetch the archive again"
    return damaged if any(block) else ""


def _fault(member: tarfile.TarInfo) -> str:
    """Why a member is refused; "" where it is not."""
    name = member.name.replace("\\", "/")
    if name.startswith("/") or name[1:3] == ":/":
        return "its name is absolute; names must be relative"
    if ".." in name.split("/") or "\0" in name:
        return "its name leaves the archive; names must not have `..`"
    if member.issym() or member.islnk():
        return "is a link; store the file itself"
    if not member.isreg() or member.issparse():
        return "is not a plain file; store the file itself"
    return ""


def _printable(name: str) -> str:
    """A member's name as text: tar allows any bytes."""
    return name.encode("utf-8", "replace").decode()


def _key(name: str) -> str:
    folder, slash, base = _printable(name).rpartition("/")
    return f"{folder}{slash}{base.split('.')[0]}" if not base.startswith(".") else f"{folder}{slash}{base}"


def _record(sample: _Sample, options: Options) -> tuple[dict[str, Any], str]:
    """Make a record of a sample's members, and its kind."""
    media: dict[str, list[FileSlice]] = {}
    texts: dict[str, FileSlice] = {}
    for member in sample.members:
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix in KINDS:
            media.setdefault(KINDS[suffix], []).append(member)
        elif suffix in _TEXTS:
            if suffix in texts:
                raise DataError(f"has two {suffix} members; keep one")
            texts[suffix] = member
    fields: dict[str, Any] = {}
    if ".json" in texts:
        parsed = _json(texts[".json"])
        if "conversations" in parsed or "messages" in parsed:
            return _with_media(parsed, media), "conversation"
        fields = parsed
    if not media:
        raise DataError("has no image and no conversation; add a .jpg or .png, or a .json record")
    parts = [part for kind, members in media.items() for part in as_parts(kind, members)]
    labels = {key: fields[key] for key in ("id", "kind", "source", "transcript") if isinstance(fields.get(key), str)}
    captions = [_text(texts[suffix]) for suffix in (".txt", ".caption") if suffix in texts]
    caption = next(filter(None, [*captions, text_of(fields.get("caption")), text_of(fields.get("text"))]), "")
    question, answer = text_of(fields.get("question")), best_answer(fields.get("answer", fields.get("answers")))
    if question and answer:
        return question_of(parts, question, answer, options, default="", **labels), "vqa"
    if not caption:
        raise DataError("has no text; add a .txt with the caption or a .json with a conversation")
    return caption_of(parts, caption, options, **labels), "caption"


def _with_media(record: dict[str, Any], media: dict[str, list[FileSlice]]) -> dict[str, Any]:
    """Put the sample's own media into a record, by the names that it lists or in the order of the archive."""
    result = dict(record)
    for kind, members in media.items():
        entries = [entry for key in media_keys(result, kind) for entry in listed(result.pop(key))]
        keys = (kind, f"{kind}_url", "path", "url")
        given = [entry if isinstance(entry, dict) else {"path": entry} for entry in entries]
        names = [next((entry[key] for key in keys if isinstance(entry.get(key), str)), "") for entry in given]
        by_name = {name: member for member in members for name in _names(member)}
        found = [by_name.get(name) for name in names]
        members = [member for member in found if member is not None] if found and None not in found else members
        said = given if len(given) == len(members) else [{} for _ in members]
        more = [{name: value for name, value in entry.items() if name not in keys} for entry in said]
        result[f"{kind}s"] = [{**each, "path": member} for each, member in zip(more, members, strict=True)]
    return result


def _names(member: FileSlice) -> tuple[str, str, str]:
    """The names under which a record may list a member: whole, without folder, without key."""
    base = member.name.rpartition("/")[2]
    return member.name, base, base.partition(".")[2]


def _text(member: FileSlice) -> str:
    try:
        return read_bytes(member, limit=_MAX_TEXT).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"member {member.name} is not UTF-8 text (byte {error.start})") from None


def _json(member: FileSlice) -> dict[str, Any]:
    try:
        parsed = parse_json(_text(member))
    except (ValueError, RecursionError) as error:
        raise DataError(f"member {member.name} is not valid JSON ({first_line(error)})") from None
    if not isinstance(parsed, dict):
        raise DataError(f"member {member.name} must be a JSON object")
    return parsed

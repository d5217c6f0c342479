"""`polymodal data check --fix`: repairs that have only one right outcome. A row without a fault is never touched.

Each repair is for one fault and has a name that the report counts. What could be meant in two ways is not repaired:
two placeholders and one image, two questions in a row, an empty answer.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from polymodal.data.check.rows import OTHERS, Finding, Row, read_row
from polymodal.data.readers.base import MEDIA, SOURCES, listed, media_keys

Repair: TypeAlias = Callable[[Row, Sequence[Finding]], tuple[Row, tuple[str, ...]] | None]
"""From a row and its findings to the repaired row and the names of the repairs; None where nothing can be done."""

_ROLES = {
    "human": "user",
    "user": "user",
    "question": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "answer": "assistant",
    "system": "system",
}
_LLAVA_NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
_NEVER_MEANT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_PLACEHOLDER = "<image>"
_IMAGES = ("image", "images")
_PLACEHOLDERS = re.compile(f"<({'|'.join(MEDIA)})>")
_SAID = ("value", "content")


def role_names(data: dict[str, Any], root: Path) -> None:
    """`Human`, `bot`, `model` and the like become the names that the form uses."""
    for turn in _turns(data):
        key = _key(turn, "from", "role")
        name = turn.get(key)
        role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        wanted = _LLAVA_NAMES.get(role or "") if key == "from" else role
        if wanted is not None and name not in (wanted, role):
            turn[key] = wanted


def add_placeholder(data: dict[str, Any], root: Path) -> None:
    """One image (or video, ...) and no placeholder of any kind: it belongs before the first question."""
    replace_placeholders(data, root)
    given = [(kind, entry) for kind in MEDIA for key in media_keys(data, kind) for entry in listed(data[key])]
    texts = [turn.get(_key(turn, *_SAID)) for turn in _turns(data)]
    if any(not isinstance(text, str) or _PLACEHOLDERS.search(text) or OTHERS.search(text) for text in texts):
        return
    first = next((turn for turn in _turns(data) if _is_question(turn)), None)
    if first is not None and len(given) == 1 and not (given[0][0] == "image" and isinstance(given[0][1], dict)):
        said = _key(first, *_SAID)
        first[said] = f"<{given[0][0]}>{_gap(data)}{first[said]}"


def replace_placeholders(data: dict[str, Any], root: Path) -> None:
    """The placeholders of other tools, one for each image and in their order, become `<image>`."""
    key = next((key for key in _IMAGES if listed(data.get(key))), "")
    images, marks = listed(data.get(key)), OTHERS
    if named := images[0] if len(images) == 1 and isinstance(images[0], dict) and "path" not in images[0] else {}:
        images, marks = list(named.values()), re.compile("|".join(map(re.escape, map(str, named))))
    questions = [(turn, _key(turn, *_SAID)) for turn in _turns(data) if _is_question(turn)]
    texts = [text for turn, said in questions if isinstance(text := turn.get(said), str)]
    if not images or len(texts) < len(questions):
        return
    found = [match for text in texts for match in marks.finditer(text)]
    left = any(_PLACEHOLDER in marks.sub("", text) for text in texts)
    if left or len(found) != len(images) or (named and len({match[0] for match in found}) < len(named)):
        return
    if named:
        data[key] = [named[match[0]] for match in found]
    elif not _in_order(found, images):
        return
    for turn, said in questions:
        text = marks.sub(_PLACEHOLDER, turn[said])
        rest = text.removeprefix(_PLACEHOLDER)
        is_bare = text != turn[said] and rest != text and rest and not rest[0].isspace()
        turn[said] = f"{_PLACEHOLDER}{_gap(data)}{rest}" if is_bare else text


def _in_order(found: Sequence[re.Match[str]], images: Sequence[Any]) -> bool:
    """Whether the numbers and paths of placeholders say nothing else than their order."""
    paths = [(match["path"] or "").strip() for match in found]
    marks = [match[0].replace(path, "") if path else match[0] for match, path in zip(found, paths, strict=True)]
    numbers = [int(number[0]) for mark in marks if (number := re.search(r"\d+", mark))]
    if numbers and numbers not in ([*range(len(images))], [*range(1, len(images) + 1)]):
        return False
    return all(
        not OTHERS.sub("", path) or Path(path).name in ("", Path(str(image)).name)
        for path, image in zip(paths, images, strict=True)
    )


def mend_paths(data: dict[str, Any], root: Path) -> None:
    """Backslashes and upper or lower case: where exactly one file of the folder can be meant."""
    for holder, key in _path_slots(data):
        value = holder[key]
        if not value.startswith(("data:", "http:", "https:")) and not (root / value).is_file():
            holder[key] = _same_file(root, value.strip().replace("\\", "/")) or value


def trim_answers(data: dict[str, Any], root: Path) -> None:
    """Space before and after an answer goes."""
    for holder, key in _texts(data, ("gpt", "assistant")):
        holder[key] = holder[key].strip()


def drop_control_characters(data: dict[str, Any], root: Path) -> None:
    """Control characters and halves of surrogate pairs go; a replacement character stays, since its place is known."""
    for holder, key in _texts(data, ()):
        holder[key] = _NEVER_MEANT.sub("", holder[key])


def drop_last_question(data: dict[str, Any], root: Path) -> None:
    """A last question without an answer goes, where it shows nothing: no token of it is trained."""
    turns = data.get("conversations", data.get("messages"))
    if isinstance(turns, list) and len(turns) > 2:
        text = turns[-1].get(_key(turns[-1], *_SAID))
        if isinstance(text, str) and not _PLACEHOLDERS.search(text):
            turns.pop()


REPAIRS: dict[str, tuple[str, Callable[[dict[str, Any], Path], None]]] = {
    "unknown-role": ("role names", role_names),
    "placeholder-count": ("placeholder added", add_placeholder),
    "other-placeholder": ("placeholder replaced", replace_placeholders),
    "missing-file": ("path mended", mend_paths),
    "outer-space": ("answer trimmed", trim_answers),
    "bad-characters": ("control characters removed", drop_control_characters),
    "unanswered": ("last question removed", drop_last_question),
}
"""Repair of each fault: its name, and a function that changes the data where it can."""

NEW_ID = "new id"
NAMES = {"duplicate-id": NEW_ID, "duplicate-row": "left out"} | {code: name for code, (name, _) in REPAIRS.items()}
"""What --fix does about each fault that it can do something about."""


def make_repair(is_used: Callable[[str], bool]) -> Repair:
    """Prepare the repair of rows."""

    def repair(row: Row, findings: Sequence[Finding]) -> tuple[Row, tuple[str, ...]] | None:
        if not isinstance(row.raw.data, dict):
            return None
        data, names = copy.deepcopy(row.raw.data), []
        for code in dict.fromkeys(finding.code for finding in findings):
            if code in REPAIRS:
                name, change = REPAIRS[code]
                before = copy.deepcopy(data)
                change(data, row.raw.root)
                names += [name] if data != before else []
            elif code == "duplicate-id":
                data["id"] = next(new for n in range(2, 1 << 30) if not is_used(new := f"{row.id}-{n}"))
                names.append(NEW_ID)
        return (read_row(replace(row.raw, data=data)), tuple(names)) if names else None

    return repair


def _turns(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    turns = data.get("conversations", data.get("messages"))
    yield from (turn for turn in turns if isinstance(turn, dict)) if isinstance(turns, list) else ()


def _key(turn: dict[str, Any], *names: str) -> str:
    """The name that a turn uses."""
    return next((name for name in names if turn.get(name) is not None), names[0])


def _is_question(turn: dict[str, Any]) -> bool:
    return turn.get(_key(turn, "from", "role")) in ("human", "user")


def _gap(data: dict[str, Any]) -> str:
    """What stands between a placeholder and the text after it."""
    return "\n" if "conversations" in data else ""


def _texts(data: dict[str, Any], roles: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the texts of some roles (all when empty) are: the object and its key."""
    for turn in _turns(data):
        if roles and turn.get(_key(turn, "from", "role")) not in roles:
            continue
        for key in ("value", "content"):
            if isinstance(turn.get(key), str):
                yield turn, key
        parts = turn.get("content")
        # Only a lone part can be trimmed: space between two parts is part of what is said.
        parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        for part in parts if not roles or len(parts) == 1 else ():
            if isinstance(part.get("text"), str):
                yield part, "text"


def _path_slots(data: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where paths are: the container and its key or index."""
    for key in (key for kind in MEDIA for key in media_keys(data, kind)):
        value = data.get(key)
        if isinstance(value, str):
            yield data, key
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, str):
                yield value, index
        for entry in [value] if isinstance(value, dict) else value if isinstance(value, list) else ():
            for name in (*MEDIA, *SOURCES) if isinstance(entry, dict) else ():
                if isinstance(entry.get(name), str):
                    yield entry, name
    for turn in _turns(data):
        content = turn.get("content")
        for part in content if isinstance(content, list) else ():
            for key in (*MEDIA, *SOURCES, *(f"{kind}_url" for kind in MEDIA)) if isinstance(part, dict) else ():
                if isinstance(part.get(key), str):
                    yield part, key


def _same_file(root: Path, value: str) -> str | None:
    """The one file whose path is equal but for case; None where there is none, or several."""
    here, found = root, []
    for step in Path(value).parts:
        if step in ("/", ".."):
            return None
        try:
            names = os.listdir(here)
        except OSError:
            return None
        same = [step] if step in names else [name for name in names if name.lower() == step.lower()]
        if len(same) != 1:
            return None
        found.append(same[0])
        here = here / same[0]
    return "/".join(found) if here.is_file() else None

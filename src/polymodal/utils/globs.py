"""Globs over full dotted names: `*` crosses dots, `{a,b}` means either, and a glob that matches nothing is an error."""

import re
from collections.abc import Iterable
from fnmatch import translate

from polymodal.errors import unknown_name


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}` as a shell does; nested braces are not supported."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [whole for choice in found.group(1).split(",") for whole in expand_braces(head + choice + tail)]


def match_names(pattern: str, names: Iterable[str], kind: str) -> list[str]:
    """Names that a glob matches; `*` crosses dots."""
    names = list(names)
    compiled = [re.compile(translate(choice)) for choice in expand_braces(pattern)]
    found = [name for name in names if any(regex.match(name) for regex in compiled)]
    if not found:
        raise unknown_name(f"{kind}: no name matches", pattern, names if len(names) < 40 else _shorten(names))
    return found


def _shorten(names: list[str]) -> list[str]:
    """One name for each run of numbered layers, so that the error can list what there is."""
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})

"""How large what a chat template makes would be, known before it is made; and the filters that must look ahead.

The other half of `polymodal.safety.jinja_sandbox`: nothing here compiles or counts steps.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.filters
from jinja2.utils import Namespace

from polymodal.errors import CheckpointError

MAX_VALUE = 4_000_000  # characters and entries of one value, with everything inside it written out
ENTRY = 8  # characters that an entry of a list or dictionary counts as: going through them is slower
MAX_BITS = 1024  # of an integer
MAX_WIDTH = 1000  # of padding and indentation
_FORMAT_WIDTH = re.compile(r"\d{4,}|\*|\{[^}]*\{")


class UnsafeTemplateError(CheckpointError):
    """A chat template that reaches for what it has no business with, or that would never be done."""


def measure(value: Any) -> int:
    """Count the characters and entries of a value, with everything inside it written out."""
    if isinstance(value, str):
        return fits(len(value))
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        inside: Iterable[Any] = ()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Namespace):
            inside = (item._Namespace__attrs,)  # type: ignore[attr-defined]  # there is no public way to it
        elif isinstance(item, dict):
            total += 2 * ENTRY * len(item)
            inside = (*item.keys(), *item.values()) if total <= MAX_VALUE else ()
        elif isinstance(item, list | tuple | set | frozenset | range):
            total += ENTRY * len(item)
            inside = item if total <= MAX_VALUE and not isinstance(item, range) else ()
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3
        total = fits(total + ENTRY)
        stack.extend(inside)
    return total


def size_of_result(operator: str, left: Any, right: Any) -> int:
    """The size of what an operator makes; raises where that is too much."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise UnsafeTemplateError("it computes with giant numbers")
        return 1
    if operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        times, what = (left, right) if isinstance(left, int) else (right, left)
        return fits(measure(what) * max(0, times))
    if operator == "+":
        fits(measure(left) + measure(right))
        return sum(len(side) for side in (left, right) if isinstance(side, str | list | tuple))
    return format_fits(left, left.count("%"), right) if operator == "%" and isinstance(left, str) else 1


def fits(size: int) -> int:
    """Give a size back; raise `UnsafeTemplateError` where it is too large for a value."""
    if size > MAX_VALUE:
        raise UnsafeTemplateError(f"it makes a value of more than {MAX_VALUE:,} characters")
    return size


def format_fits(text: str, holes: int, args: Any) -> int:
    """The size of a formatted text at most."""
    if _FORMAT_WIDTH.search(text):
        raise UnsafeTemplateError("it formats text to a width that is too large, or given elsewhere")
    return fits(len(text) + holes * (measure(args) + 1000))


def listed(values: Any) -> Any:
    """What may be gone through only once, as a list."""
    if isinstance(values, str | list | tuple | dict | set | range) or not isinstance(values, Iterable):
        return values
    found: list[Any] = []
    total = 0
    for value in values:
        total = fits(total + measure(value) + ENTRY)
        found.append(value)
    return found


def join_fits(separator: str, values: Any = ()) -> None:
    """Raise where joined values would be too large."""
    count = len(values) if isinstance(values, str | list | tuple | dict | set | range) else 0
    fits(measure(values) + count * len(separator))


def replace_fits(text: str, old: Any = "", new: Any = "") -> None:
    """Raise where a text would be too large once something in it is replaced."""
    if isinstance(old, str) and isinstance(new, str):
        fits(len(text) + text.count(old) * len(new))


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = listed(value)
    if attribute is not None:
        items = [jinja2.filters.make_attrgetter(environment, attribute)(item) for item in items]
    join_fits(str(d), items)
    return str(d).join(map(str, items))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, before, after = str(value), str(old), str(new)
    replace_fits(text, before, after)
    return text.replace(before, after, -1 if count is None else count)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(s)
    fits(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return str(jinja2.filters.do_indent(text, width, first, blank))


def raise_exception(message: str) -> None:
    """Refuse a conversation; for templates."""
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """Today, as the pattern says; for templates."""
    if len(pattern) > 200 or re.search(r"\d{3}", pattern):
        raise UnsafeTemplateError("strftime_now is asked for a giant width")
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    if indent:
        fits(measure(value) * (1 + 8 * min(abs(int(indent)), MAX_WIDTH)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


# Filters in place of jinja2's own.
CAREFUL_FILTERS: dict[str, Callable[..., str]] = {
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "tojson": _tojson,
}

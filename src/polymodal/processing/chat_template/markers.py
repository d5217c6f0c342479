"""Render a jinja chat template with markers in place of content, and cut the result at the markers.

Text and images never pass through the template; it sees markers, so what it writes around them is known exactly.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jinja2

from polymodal.errors import PolymodalError
from polymodal.messages import Role
from polymodal.safety.jinja_sandbox import compile_template

_EDGE = "\u2003\u2009\u2005"
"""Put around content: white space, so that a template that trims removes it, which tells us that it trims."""

Style: TypeAlias = Literal["parts", "mixed", "string"]
"""How content is handed to the template: always as a list of parts, only with images, or as a string."""


@dataclass(frozen=True)
class Piece:
    """A text or (text None) an image, in the order in which they were given."""

    role: Role
    message: int
    text: str | None


@dataclass(frozen=True)
class Turn:
    """A message, with default text in place and neighbouring texts joined."""

    role: Role
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Cut:
    """Scaffolding, and the marker that follows it (None at the end)."""

    scaffold: str
    marker: int | None
    trimmed_left: bool = False
    trimmed_right: bool = False

    def trim(self, text: str | None) -> str | None:
        """Do to the content what the template did to its marker."""
        if text is not None and self.trimmed_left:
            text = text.lstrip()
        return text.rstrip() if text is not None and self.trimmed_right else text


class MarkedTemplate:
    """A compiled chat template that is given markers instead of content."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        self._compiled = compile_template(source)
        self._variables = variables
        self._nonce = f"PM{secrets.token_hex(12)}"
        self._marker = re.compile(f"({_EDGE})?{self._nonce}t(\\d+)x({_EDGE})?|{self._nonce}i(\\d+)x")

    def cuts(self, turns: Sequence[Turn], style: Style, *, add_generation_prompt: bool = False) -> list[Cut]:
        """Render a conversation and cut it at its content."""
        text = self._render(turns, style, add_generation_prompt)
        found: list[Cut] = []
        position = 0
        for match in self._marker.finditer(text):
            scaffold = text[position : match.start()]
            if match[4] is not None:
                found.append(Cut(scaffold, int(match[4])))
            else:
                found.append(Cut(scaffold, int(match[2]), match[1] is None, match[3] is None))
            position = match.end()
        found.append(Cut(text[position:], None))
        return found

    def _render(self, turns: Sequence[Turn], style: Style, add_generation_prompt: bool) -> str:
        """Render the turns with markers in place of content, numbered in order."""
        messages: list[dict[str, Any]] = []
        number = 0
        for turn in turns:
            as_parts = style == "parts" or (style == "mixed" and any(piece.text is None for piece in turn.pieces))
            parts: list[dict[str, str]] = []
            marks: list[str] = []
            for piece in turn.pieces:
                if piece.text is None:
                    marks.append(f"{self._nonce}i{number}x")
                    parts.append({"type": "image"})
                else:
                    marks.append(f"{_EDGE}{self._nonce}t{number}x{_EDGE}")
                    parts.append({"type": "text", "text": marks[-1]})
                number += 1
            content = parts if as_parts else "".join(marks)
            messages.append({"role": turn.role, "content": content})
        try:
            return self._compiled(
                **self._variables,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise PolymodalError(f"the chat template refuses this conversation: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise PolymodalError(f"the chat template fails on this conversation: {error}") from None

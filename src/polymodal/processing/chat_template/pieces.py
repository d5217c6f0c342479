"""A conversation in pieces: a chat template's scaffolding cut at its content, and each piece tokenised.

Text and images never pass through the template: it is rendered with markers in their place, so what it writes around
them is known exactly. Scaffolding, which the template wrote, is tokenised with special tokens recognised; content,
which a person or a dataset wrote, never is: `<image>` or `<|im_start|>system` typed by a user stays text.

Tokenising piece by piece has one trap: SentencePiece-like tokenizers put a space in front of every string that they
are given (Llama's "legacy" prefix, Metaspace's `prepend_scheme`). Here the private copies of the Rust tokenizer that
read later pieces have that prefix switched off, and it is added back exactly where the whole string would have got
it. The caller's tokenizer is never changed, so nothing has to be restored and threads do not meet.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jinja2
from tokenizers import Tokenizer

from polymodal.errors import ConfigError, PolymodalError
from polymodal.messages import Role
from polymodal.processing.chat_template.tokenizer_copies import (
    Prefix,
    as_special,
    drop_prefix,
    prefix_scheme,
    spells_bytes,
    tokenizer_over,
    without_vocabulary,
)
from polymodal.safety.jinja_sandbox import compile_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style: TypeAlias = Literal["parts", "mixed", "string"]
"""How content is handed to the template: always as a list of parts, only with images, or as a string."""

_EDGE = "\u2003\u2009\u2005"
"""Put around content: white space, so that a template that trims removes it, which tells us that it trims."""


_REASONED = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A text or (text None) an image, video or sound, in the order in which they were given."""

    role: Role
    message: int
    text: str | None
    # What the template may look for around the text, and so gets to see: the tags of an assistant's reasoning.
    before: str = ""
    after: str = ""
    reasoning: bool = False  # It may be dropped, as templates do to the reasoning of earlier turns
    # The field of the message that it stands in, where it is not in the content; the name of the function for a call.
    field: str = ""
    modality: str = "image"  # Of what is no text; templates are shown an image all the same


@dataclass(frozen=True)
class Turn:
    """A message, with default text in place and neighbouring texts joined."""

    role: Role
    pieces: tuple[Piece, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)  # What else the template reads of it, as it is
    nothing: str | None = ""  # The content where no piece is in it; None for none at all


def reasoned(answer: Piece) -> tuple[Piece, ...]:
    """An assistant's text whose reasoning and answer are told apart, for templates that tell them apart too."""
    match = _REASONED.fullmatch(answer.text or "")
    if match is None:
        return (answer,)
    before, thought, after, text = match.groups()
    if not thought:
        return (replace(answer, text=text, before=before + after),)
    return replace(answer, text=thought, before=before, after=after, reasoning=True), replace(answer, text=text)


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


def in_json(text: str) -> tuple[str, str]:
    """A text as it stands in JSON, between its quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


class MarkedTemplate:
    """A compiled chat template that is given markers instead of content."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        self._compiled = compile_template(source)
        self._variables = variables
        self._nonce = f"PM{secrets.token_hex(12)}"
        self._marker = re.compile(f"({_EDGE})?{self._nonce}t(\\d+)x({_EDGE})?|{self._nonce}i(\\d+)x")

    def cuts(
        self, turns: Sequence[Turn], style: Style, tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> list[Cut]:
        """Render a conversation and cut it at its content."""
        text = self._render(turns, style, tools, add_generation_prompt)
        pieces = [piece for turn in turns for piece in turn.pieces]
        found: list[Cut] = []
        position, again = 0, ""
        for match in self._marker.finditer(text):
            scaffold, again = again + text[position : match.start()], ""
            named = match[2] is not None and pieces[int(match[2])].field == "tool_calls"
            if named and any(cut.marker == int(match[2]) for cut in found):  # a result may repeat what was called
                again = scaffold + str(pieces[int(match[2])].text)
            elif match[4] is not None:
                found.append(Cut(scaffold, int(match[4])))
            else:
                found.append(Cut(scaffold, int(match[2]), match[1] is None, match[3] is None))
            position = match.end()
        found.append(Cut(again + text[position:], None))
        return found

    def texts(
        self,
        cuts: Sequence[Cut],
        turns: Sequence[Turn],
        style: Style,
        tools: Sequence[Any] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> list[str | None]:
        """What the template makes of each text; raises where it looks at one and writes something else around it."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        whole = self._render(turns, style, tools, add_generation_prompt, real=True)
        found: list[str | None] = []
        position = 0
        for place, cut in enumerate(cuts):
            position += len(cut.scaffold)
            if cut.marker is None:
                found.append(None)
                break
            following = cuts[place + 1].scaffold
            text = cut.trim(pieces[cut.marker].text)
            shown = f"{self._nonce}i{cut.marker}x" if text is None and style == "string" else text or ""
            cut_down = (
                shown,
                shown.lstrip("\n"),
                shown.strip("\n"),
                shown.rstrip("\n"),
                shown.strip(),
                *in_json(shown),
            )
            fits = next(
                (t for t in cut_down if whole.startswith(cut.scaffold + t + following, position - len(cut.scaffold))),
                None,
            )
            if fits is None:
                raise PolymodalError(
                    f"the chat template looks at what message {pieces[cut.marker].message + 1} says and writes "
                    "something else for it; change that message or choose another template"
                )
            found.append(None if text is None else fits)
            position += len(fits)
        if position != len(whole):
            raise PolymodalError(
                "the chat template looks at what is said and writes more for it; choose another template"
            )
        return found

    def _render(
        self,
        turns: Sequence[Turn],
        style: Style,
        tools: Sequence[Any],
        add_generation_prompt: bool,
        *,
        real: bool = False,
    ) -> str:
        """Render the turns with markers in place of content, numbered in order, or with the real texts."""
        messages: list[dict[str, Any]] = []
        number = 0
        for turn in turns:
            as_parts = style == "parts" and turn.role != "tool"
            as_parts |= style == "mixed" and any(piece.text is None for piece in turn.pieces)
            message: dict[str, Any] = {"role": turn.role, **turn.fields}
            calls: list[Any] = []
            parts: list[dict[str, str]] = []
            marks: list[str] = []
            for piece in turn.pieces:
                text = piece.text if real else f"{_EDGE}{self._nonce}t{number}x{_EDGE}"
                mark = f"{self._nonce}i{number}x" if piece.text is None else f"{piece.before}{text}{piece.after}"
                number += 1
                if piece.field == "tool_calls":
                    call = turn.fields["tool_calls"][len(calls)]
                    calls.append({**call, "function": {**call["function"], "name": mark}})
                    message["tool_calls"] = calls
                elif piece.field:  # transformers gives it by gpt-oss's name too
                    message |= {"thinking": mark, piece.field: mark}
                elif piece.text is None:
                    marks.append(mark)
                    parts.append({"type": "image"})
                else:
                    marks.append(mark)
                    if parts and parts[-1]["type"] == "text":  # reasoning and its answer are one text
                        parts[-1]["text"] += mark
                    else:
                        parts.append({"type": "text", "text": mark})
            if marks:
                message["content"] = parts if as_parts else "".join(marks)
            elif turn.nothing is not None:
                message["content"] = turn.nothing
            messages.append(message)
        try:
            return self._compiled(
                **self._variables,
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise PolymodalError(f"the chat template refuses this conversation: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise PolymodalError(f"the chat template fails on this conversation: {error}") from None


class PieceTokenizer:
    """Tokenises runs of text, each as a continuation of the ids before it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, template: str, *, restarts: bool = False
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__} is not a fast tokenizer; save it as tokenizer.json first"
            )
        backend: Tokenizer = tokenizer.backend_tokenizer
        data, added = without_vocabulary(backend), backend.get_added_tokens_decoder()
        self.prefix: Prefix = prefix_scheme(data)
        self._image_token_id = image_token_id
        self._nonce = f"PM{secrets.token_hex(12)}"
        self.added = {image_token_id, *added}
        special = {image_token_id, *tokenizer.all_special_ids}
        for token, entry in added.items():
            if entry.special or (entry.content.strip() and entry.content in template):
                special.add(token)
        self._control = {token: entry for token, entry in added.items() if token in special}
        # Pieces that stand for what they do not spell: honest, unless somebody typed the very name.
        stand_ins = [f"<0x{byte:02X}>" for byte in range(256)] if spells_bytes(backend.model) else []
        if tokenizer.unk_token is not None:
            stand_ins.append(tokenizer.unk_token)
        ids = ((backend.token_to_id(name), name) for name in stand_ins)
        self._stand_ins: dict[int, str] = {token: name for token, name in ids if token is not None}
        self._suspect = special | set(self._stand_ins)
        names = sorted((entry.content for entry in self._control.values()), key=len, reverse=True)
        self._names = names
        self._spelled = re.compile("|".join(map(re.escape, names)) or "(?!)")

        plain = {token: as_special(entry, token in special) for token, entry in added.items()}
        fresh = tokenizer_over(backend.model, data, plain)
        drop_prefix(data)
        self._scaffold = tokenizer_over(backend.model, data, added)
        self._content = tokenizer_over(backend.model, data, plain)
        self._fresh = self._content if self.prefix == "never" else fresh
        self._fresh.encode_special_tokens = self._content.encode_special_tokens = True
        spaced = self._content.encode(" a", add_special_tokens=False).ids
        # SentencePiece puts its space in front of every string; its conversions may have lost that (`text_restarts`).
        marked = (self._content.id_to_token(spaced[0]) or "").startswith("▁") if spaced else False
        self.restarts = restarts and marked and self.prefix != "always"
        self.hides_space = self.restarts or (self.prefix != "never" and self._content.decode(spaced) == "a")
        self._cut_up_short = lru_cache(maxsize=4096)(self._cut_up)
        self._of_template = lru_cache(maxsize=4096)(self._plain)

    def is_fresh(self, ids: Sequence[int]) -> bool:
        """Whether the tokenizer would put its own space in front of text that follows these ids."""
        if self.prefix == "always":
            return not ids or ids[-1] in self.added
        if self.restarts:
            return not ids or ids[-1] == self._image_token_id or (len(ids) == 1 and ids[0] in self.added)
        return self.prefix == "first" and not ids

    def cut_up(self, text: str) -> tuple[int | str, ...]:
        """Cut what the template wrote at its control tokens; what it writes itself is short, and cut once."""
        return self._cut_up_short(text) if len(text) <= 1024 else self._cut_up(text)

    def _cut_up(self, text: str) -> tuple[int | str, ...]:
        """Cut what the template wrote at its control tokens, which become ids."""
        found: list[int | str] = []
        position = 0
        encoding = self._scaffold.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control and self._control[token].content in text[start:end]:
                found += [text[position:start], token]
                position = end
        return tuple(bit for bit in (*found, text[position:]) if bit != "")

    def disguised(self, value: Any) -> Any:
        """JSON that a template gets to see, with a stand-in for each control token that somebody typed in it."""
        if isinstance(value, str):
            return self._spelled.sub(lambda match: f"{self._nonce}c{self._names.index(match[0])}x", value)
        if isinstance(value, Mapping):
            return {self.disguised(key): self.disguised(item) for key, item in value.items()}
        return [self.disguised(item) for item in value] if isinstance(value, list | tuple) else value

    def restored(self, text: str) -> str:
        """What was typed, in what the template made of `disguised` JSON."""
        if self._nonce not in text:
            return text
        return re.sub(f"{self._nonce}c(\\d+)x", lambda match: self._names[int(match[1])], text)

    def codes(self, number: int) -> str:
        """What stands in a text for a medium that is made of codes; nobody can type it."""
        return f"{self._nonce}m{number}x"

    def at_codes(self, text: str) -> list[str]:
        """A text cut where such media stand: text, number, text, number, ..., text."""
        return re.split(f"{self._nonce}m(\\d+)x", text) if self._nonce in text else [text]

    def strips(self, token: int, side: Literal["lstrip", "rstrip"]) -> bool:
        """Whether a control token takes the white space beside it away."""
        return token in self._control and bool(getattr(self._control[token], side))

    def text(self, text: str, before: Sequence[int], *, own: bool = False) -> list[int]:
        """Tokenise text as the tokenizer would where it stands; `own` where all of it is the template's."""
        fresh = self.is_fresh(before)
        if fresh and self.restarts:
            text, fresh = f" {text}", False
        return list((self._of_template if own else self._plain)(text, fresh))

    def answer(self, text: str, before: Sequence[int], space: str) -> list[int]:
        """Tokenise an answer behind a given space, so that it decodes to itself."""
        if not space and self.hides_space and self.is_fresh(before):
            space = " "
        return list(self._plain(space + text, False))

    def _plain(self, text: str, fresh: bool) -> tuple[int, ...]:
        """Tokenise without specials; models that list them as ordinary pieces are made to take them apart."""
        found: list[int] = []
        waiting = [(text, fresh)]  # what is left, the next part last
        while waiting:
            part, begins = waiting.pop()
            encoding = (self._fresh if begins else self._content).encode(part, add_special_tokens=False)
            cuts = [] if self._suspect.isdisjoint(encoding.ids) else self._suspicious(part, encoding)
            if not cuts:
                found.extend(encoding.ids)
                continue
            ends = [*cuts, len(part)]
            parts = [part[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
            waiting.extend((piece, begins and place == 0) for place, piece in reversed(list(enumerate(parts))))
        return tuple(found)

    def _suspicious(self, text: str, encoding: Any) -> list[int]:
        """Where a text has to be cut, so that no piece of the model that is a special token is left in it."""
        cuts: list[int] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            name = self._stand_ins.get(token)
            if token not in self._suspect or (name is not None and name not in text[start:end]):
                continue
            if start + 1 < len(text):
                cuts.append(start + 1)
            elif len(text) == 1:
                raise PolymodalError(
                    f"the text holds {text[start:end]!r}, which is a special token of one character; take it out"
                )
            else:
                cuts.append(start)
        return sorted(set(cuts))

"""Ids -> text and images as they stream: whole characters only, and stop texts held back until they are ruled out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from polymodal.messages import Audio, Image, Part, Text

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from transformers import PreTrainedTokenizerBase

    from polymodal.generation.sampling import Chance
    from polymodal.processing.image_codes import ImageCodes

Step = tuple[Sequence[int | None], float | None]
"""A decoding step: one id a row, None for rows that ended earlier; and the seconds of encoding media before it."""


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text, as it is made."""

    text: str
    chances: tuple[Chance, ...] = ()  # Of the tokens that begin in it, where they are asked for


@dataclass(frozen=True)
class MediaStart:
    """A medium begins."""

    modality: str  # "image" or "audio"


@dataclass(frozen=True)
class MediaProgress:
    """More of a medium is there."""

    modality: str
    fraction: float  # Above 0, below 1
    preview: Callable[[], PILImage.Image]  # Makes the image as far as it goes: its last code stands for the rest


@dataclass(frozen=True)
class MediaEnd:
    """A medium is whole."""

    part: Image | Audio


Delta = TextDelta | MediaStart | MediaProgress | MediaEnd

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer; a byte that is no part of a character spoils no character beside it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if UNFINISHED not in text:
        return text
    # SentencePiece's decoders give up a whole run of bytes for one that is cut off or wrong.
    tokens: list[str] = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    mended = []
    for is_byte, run in itertools.groupby(tokens, key=lambda token: bool(_BYTE.fullmatch(token))):
        pieces = list(run)
        if is_byte:
            # Each byte that belongs to no character comes out as one surrogate.
            chars = bytes(int(token[3:5], 16) for token in pieces).decode("utf-8", "surrogateescape")
            widths = [0 if "\ud800" <= char <= "\udfff" else len(char.encode()) for char in chars]
            ends = itertools.accumulate(width or 1 for width in widths)
            pieces = [
                token
                for width, end in zip(widths, ends, strict=True)
                for token in (pieces[end - width : end] if width else [UNFINISHED])
            ]
        mended += pieces
    return text if mended == tokens else str(tokenizer.convert_tokens_to_string(mended))


def spelt(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token spells inside a text, which need not be whole characters."""
    (before,) = tokenizer("a", add_special_tokens=False).input_ids[-1:] or [token]
    start = tokenizer.decode([before], clean_up_tokenization_spaces=False)
    both = str(tokenizer.decode([before, token], clean_up_tokenization_spaces=False))
    text, name = both.removeprefix(start), str(tokenizer.convert_ids_to_tokens(token))
    if UNFINISHED not in text:
        return text.encode()
    if _BYTE.fullmatch(name):
        return bytes([int(name[3:5], 16)])
    return bytes(_BYTE_LEVEL[char] for char in name) if _BYTE_LEVEL.keys() >= {*name} else name.encode()


def _byte_level() -> dict[str, int]:
    """The letters that byte-level tokenizers write for bytes: themselves where they can be seen, and the next ones."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTE_LEVEL = _byte_level()


class TextStream:
    """Decodes one row of a generation."""

    # The joined deltas always equal the decoded answer: decoding restarts from the first id of the answer, since
    # tokenizers decode some tokens differently at the start of a text.

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        stop_ids: Collection[int] = (),
        skip_space: bool = False,
        after: Sequence[int] = (),  # Ids that the text goes on from
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self.stop_ids = frozenset(stop_ids)
        self.skip_space = skip_space
        self.ids: list[int] = [*after]
        self.before = len(decode_ids(tokenizer, after)) if after else 0
        self.text = ""
        self.sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Add one id."""
        if self.stopped or token in self.stop_ids:
            self.stopped = True
            return self.finish()
        self.ids.append(token)
        self.text = decode_ids(self.tokenizer, self.ids)[self.before :]
        if self.skip_space:
            self.text = self.text.lstrip(" ")
        for stop in self.stop:
            if (at := self.text.find(stop)) >= 0:
                self.text = self.text[:at]
                self.stopped = True
                return self.finish()
        return self._send(len(self.text) - self._held_back())

    def finish(self) -> str:
        """Return what was held back; call once after the last id."""
        return self._send(len(self.text))

    def _send(self, end: int) -> str:
        delta = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return delta

    def _held_back(self) -> int:
        """How many characters at the end may still change or belong to a stop text."""
        unfinished = len(self.text) - len(self.text.rstrip(UNFINISHED))
        starts = [n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return max([unfinished, *starts])


class AnswerStream:
    """One row of a generation as the parts of a message: text as it becomes certain, images as they fill."""

    def __init__(self, new_text: Callable[[], TextStream], codes: ImageCodes | None = None) -> None:
        self._new_text, self._codes = new_text, codes
        self._text = new_text()
        self._block: list[int] | None = None  # The ids of the image that is being made
        self._parts: list[Part] = []
        self._untold: list[tuple[int, Chance]] = []  # Where in the text the tokens begin whose text is held back
        self.chances: list[Chance] = []  # Those that were told

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was said; one text, which may be empty, where there is nothing else."""
        return tuple(self._said()) or (Text(""),)

    @property
    def stopped(self) -> bool:
        """Whether the answer has met its end."""
        return self._text.stopped

    def push(self, token: int, chance: Chance | None = None) -> Iterator[Delta]:
        """Add one id."""
        codes = self._codes
        if codes is None or (self._block is None and token != codes.begin):
            if chance is not None:
                self._untold.append((len(self._text.text.rstrip(UNFINISHED)), chance))
            yield from self._tell(self._text.push(token))
        elif self._block is None:
            yield from self.finish()
            self._parts, self._text, self._block = [*self._said()], self._new_text(), []
            self._text.skip_space = False  # which is for the beginning of an answer
            yield MediaStart("image")
        elif token == codes.end:
            self._parts, self._block = [*self._parts, Image(codes.decode(self._block))], None
            yield MediaEnd(self._parts[-1])  # type: ignore[arg-type]  # the image
        else:
            self._block.append(token)
            done = [*self._block]
            if len(done) % max(1, codes.count // 8) == 0 and len(done) < codes.count:
                yield MediaProgress("image", len(done) / codes.count, partial(codes.decode, done))

    def finish(self) -> Iterator[Delta]:
        """Give the text that was held back; call once after the last id."""
        yield from self._tell(self._text.finish(), whole=not self._text.stopped)

    def _tell(self, delta: str, whole: bool = False) -> Iterator[Delta]:
        """A piece of text with the tokens that begin in it; what a stop text cuts off is told in no form."""
        told = [chance for at, chance in self._untold if whole or at < self._text.sent]
        self._untold = self._untold[len(told) :]
        self.chances += told
        if delta or told:
            yield TextDelta(delta, tuple(told))

    def _said(self) -> list[Part]:
        return [*self._parts, *([Text(self._text.text)] if self._text.text else [])]

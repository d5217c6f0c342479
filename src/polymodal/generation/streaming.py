"""Ids -> text as it streams: whole characters only, and stop texts held back until they are ruled out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Step = tuple[Sequence[int | None], float | None]
"""A decoding step: one id a row, None for rows that ended earlier; and the seconds of encoding media before it."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


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
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self.stop_ids = frozenset(stop_ids)
        self.skip_space = skip_space
        self.ids: list[int] = []
        self.text = ""
        self.sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Add one id."""
        if self.stopped or token in self.stop_ids:
            self.stopped = True
            return self.finish()
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
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

"""A tokenised conversation while it is written down: ids, loss mask and slots grow together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from polymodal.processing.chat_template.pieces import PieceTokenizer
from polymodal.processing.collate import Slot


@dataclass
class Rendered:
    """A tokenised conversation."""

    input_ids: list[int] = field(default_factory=list)  # [T] ids, placeholders expanded
    loss_mask: list[bool] = field(default_factory=list)  # [T] True where the token is the assistant's, its end included
    slots: tuple[Slot, ...] = ()  # Where each image is, in order
    dropped: tuple[int, ...] = ()  # Messages whose reasoning the template left out, since a question follows

    def add(self, ids: Sequence[int], *, trained: bool = False) -> None:
        """Write on."""
        self.input_ids.extend(ids)
        self.loss_mask.extend([trained] * len(ids))


class Writer:
    """Writes a conversation down; text waits until a control token, an image or a border of the loss ends it."""

    def __init__(self, tokens: PieceTokenizer, codes: Sequence[Sequence[int]] = ()) -> None:
        self.out = Rendered()
        self._tokens = tokens
        self._codes = codes  # The ids of each medium that is made of codes
        self._text, self._trained, self._own = "", False, True
        self._space: str | None = None  # what stands before the waiting text where that begins with an answer
        self._stripped = False  # the control token before takes the white space after it
        self.silent = False  # what is trained is an answer without a loss; its borders stay, so its ids do

    def text(self, text: str, *, trained: bool = False, own: bool = False, space: str | None = None) -> None:
        """Write a text; `own` where the template wrote it, `space` where an answer begins behind the template's."""
        if trained != self._trained or space is not None:
            self.flush()
            self._trained, self._space = trained, space
        text, *codes = self._tokens.at_codes(self._tokens.restored(text))
        self._add(text, own)
        for number, after in zip(codes[::2], codes[1::2], strict=True):
            self.flush()
            self.out.add(self._codes[int(number)], trained=trained and not self.silent)
            self._stripped, self._trained = False, trained
            self._add(after, own)

    def _add(self, text: str, own: bool) -> None:
        if self._stripped and not self._text:
            text = text.lstrip()
        if text:
            self._text, self._own = self._text + text, self._own and own

    def token(self, token: int, *, trained: bool = False, count: int = 1) -> None:
        """Write a control token or the placeholders of an image."""
        if self._tokens.strips(token, "lstrip"):
            self._text = self._text.rstrip()
        self.flush()
        self.out.add([token] * count, trained=trained and not self.silent)
        self._stripped = self._tokens.strips(token, "rstrip")

    def flush(self) -> Rendered:
        """Tokenise what waits; gives all that was written."""
        if self._text:
            before, space = self.out.input_ids, self._space
            if space is not None:
                ids = self._tokens.answer(self._text, before, "" if self._stripped else space)
            else:
                ids = self._tokens.text(self._text, before, own=self._own)
            self.out.add(ids, trained=self._trained and not self.silent)
            self._stripped = False
        self._text, self._own, self._space = "", True, None
        return self.out

"""What a projector reads beside a picture: the question, in ids of the projector's own tokenizer (InstructBLIP).

The context of a picture is the text of the user turn that holds it; a picture in another turn has an empty one, so
that no answer is ever read. Ids are framed as the tokenizer frames a text ([CLS] ... [SEP]) and the text is cut to
what fits between. Differences from the reference: special tokens that a user types stay plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from polymodal.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ContextReader:
    """Messages to one row of ids a picture.

    Args:
        tokenizer: The projector's.
        max_length: Most ids of a row.

    Attributes:
        identity: What decides the ids, as plain data.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.max_length = max_length
        # A copy of its own: transformers changes a tokenizer's settings in calls, which threads must not share.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        framed = self._backend.encode("a", add_special_tokens=True)
        words = [place for place, special in enumerate(framed.special_tokens_mask) if not special]
        self._before, self._after = framed.ids[: words[0]], framed.ids[words[-1] + 1 :]
        self._empty = self._before + self._after or [tokenizer.pad_token_id or 0]
        self.identity = [hashlib.sha256(self._backend.to_str().encode()).hexdigest(), max_length]

    def __call__(self, messages: Sequence[Message]) -> tuple[torch.Tensor, ...]:
        """Read the context of each picture.

        Args:
            messages: The conversation.

        Returns:
            One [t] int64 tensor a picture, in order; t is 1 or more.
        """
        rows: list[torch.Tensor] = []
        for message in messages:
            if message.media:
                ids = self.ids(message.text if message.role == "user" else "")
                rows += [torch.tensor(ids, dtype=torch.int64)] * len(message.media)
        return tuple(rows)

    def ids(self, text: str) -> list[int]:
        """Tokenise a text, framed and cut."""
        room = self.max_length - len(self._before) - len(self._after)
        body = self._backend.encode(text.strip(), add_special_tokens=False).ids[:room]
        return [*self._before, *body, *self._after] if body else list(self._empty)

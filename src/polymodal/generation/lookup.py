"""Prompt lookup: where an answer says again what was said, several of its ids are read at once (arXiv:2304.04487).

A draft is what followed where the last ids stood before. It is read behind the id that was chosen, in one forward pass,
and the loop goes on asking for logits id by id: where it chooses what was drafted they are there already, else the
cache forgets what was read in vain. So every id is chosen from the logits that it would be chosen from without.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

NGRAMS = (3, 2)
"""Ids that must have stood before, the longer first."""
MOST = 8
"""Ids of a draft, at most; one begins with `FEW`, and twice as many follow where all were right."""
FEW = 2
PRICE = 0.2
"""What an id more costs, in forward passes of one id."""
LOSS, SHARE, SAVED = 1.0, 0.01, 4.0
"""Forward passes that drafts may lose in an answer, and of each further pass; and of those gained, what is kept."""


class Lookup:
    """The next logits of one row, whose cache may hold a draft besides."""

    def __init__(
        self,
        read: Callable[[torch.Tensor | None], torch.Tensor],  # The prompt where None, or ids [T]; gives [1 or T, V]
        cache: Any,  # What it reads into
        prompt: Sequence[int],  # Below 0 what no draft may hold, such as media
        most: int,  # Ids that may be chosen
    ) -> None:
        self.read, self.cache, self.left = read, cache, most
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # Where it goes on behind what stood last
        self.draft: list[int] = []
        self.ahead = torch.empty(0)  # The logits behind the last id [1 + draft, V]
        self.credit, self.length = LOSS, FEW
        for token in prompt:
            self._add(token)

    def __call__(self, ids: torch.Tensor | None, _running: torch.Tensor | None = None) -> torch.Tensor:
        """Go on by the id that was chosen, [1]."""
        if ids is None:
            return self.read(None)
        token = int(ids)
        self._add(token)
        self.left -= 1
        if self.draft and token == self.draft[0]:
            self.draft, self.ahead = self.draft[1:], self.ahead[1:]
            self.credit = min(self.credit + 1.0, SAVED)
            if not self.draft:
                self.length = min(2 * self.length, MOST)
            return self.ahead[:1]
        if self.draft:
            self.cache.crop(-len(self.draft))
            self.length = FEW
        self.draft = self._look_up()
        self.credit += SHARE - PRICE * len(self.draft)
        self.ahead = self.read(torch.tensor([token, *self.draft], device=ids.device))
        return self.ahead[:1]

    def _add(self, token: int) -> None:
        """Go on by an id."""
        for n in NGRAMS:
            if len(self.ids) >= n:
                self.after[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token)

    def _look_up(self) -> list[int]:
        """What may come next, as far as it is worth reading."""
        most = min(self.length, self.left - 1, int(self.credit / PRICE))
        starts = (self.after.get(tuple(self.ids[-n:])) for n in NGRAMS)
        start = next((place for place in starts if place is not None), len(self.ids))
        return list(itertools.takewhile(lambda token: token >= 0, self.ids[start : start + max(0, most)]))

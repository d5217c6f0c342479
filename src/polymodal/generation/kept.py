"""What is kept of one request for the next: key-value caches of conversations, and the tokens of media.

Both are found by content (`Sample.media_keys`), by the weights that made them, and by a salt, which keeps those apart
who must not learn of each other. What was used longest ago goes first.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from polymodal.modeling.onnx_llm import OnnxCache
from polymodal.processing.collate import Sample

Weights = tuple[tuple[int, int], ...]
"""Which weights read something, and how often they had been changed by then."""


def weights_of(model: torch.nn.Module) -> Weights:
    """What tells whether a model's weights are still the same."""
    # Tensors made in inference mode cannot be changed outside of it and count no versions.
    return tuple((id(w), 0 if w.is_inference() else w._version) for w in model.parameters())


@dataclass(frozen=True)
class Kept:
    """What a model has read, and what it keeps of it."""

    sample: Sample  # Prompt and answer, without pixels
    cache: Any  # Of one row
    weights: Weights
    salt: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        if isinstance(self.cache, OnnxCache):
            return self.cache.nbytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers if layer.is_initialized)


class PrefixCache:
    """Key-value caches of conversations; of the last one alone, however long, where no bytes are said."""

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes = most_bytes
        self.kept: list[Kept] = []  # The one used longest ago first
        self.asked, self.hits = 0, 0  # Positions of prompts, and those of them that were found
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(kept.nbytes for kept in self.kept)

    def find(self, sample: Sample, weights: Weights, salt: str = "", take: bool = False) -> tuple[Kept | None, int]:
        """The one with the longest beginning in common, and how long that is; `take` it, and nobody else has it."""
        with self._lock:
            usable = [kept for kept in self.kept if kept.weights == weights and kept.salt == salt]
            lengths = [common_beginning(kept.sample, sample) for kept in usable]
            if take and self.most_bytes is None:
                self.kept = []  # the one that is kept is freed where it is of no use
            if not (length := max(lengths, default=0)):
                return None, 0
            found = usable[lengths.index(length)]
            self.kept = [kept for kept in self.kept if kept is not found]
            if not take:
                self.kept.append(found)
            return found, length

    def put(self, new: Kept) -> None:
        """Keep one; it takes the place of its own beginnings."""
        with self._lock:
            if self.most_bytes is None:
                self.kept = [new]
                return
            kept = [*(kept for kept in self.kept if not _begins(kept, new)), new]
            while sum(each.nbytes for each in kept) > self.most_bytes:
                del kept[0]
            self.kept = kept  # at once: metrics ask meanwhile what is held

    def clear(self) -> None:
        """Free all."""
        self.kept = []


class MediaCache:
    """Tokens of media as the language model reads them, [num_tokens, D], up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self.hits, self.misses = 0, 0
        self._weights: Weights = ()
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, weights: Weights) -> torch.Tensor | None:
        """What was kept under a key by these weights."""
        if weights != self._weights:
            self.clear()
            self._weights = weights
        found = self._kept.get(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, tokens: torch.Tensor) -> None:
        """Keep tokens, as what `get` did not find."""
        if tokens.nbytes > self.most_bytes:
            return
        while self.nbytes + tokens.nbytes > self.most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = tokens.clone()  # of its own, not a part of something larger
        self.nbytes += tokens.nbytes

    def clear(self) -> None:
        """Free all."""
        self._kept.clear()
        self.nbytes = 0


def _begins(kept: Kept, new: Kept) -> bool:
    same = (kept.weights, kept.salt) == (new.weights, new.salt)
    return same and common_beginning(kept.sample, new.sample) >= len(kept.sample.input_ids) - 1


def common_beginning(before: Sample, sample: Sample) -> int:
    """How many positions two prompts have in common, ids and media alike; no medium is cut, and one id is left over."""
    length = min(len(before.input_ids), len(sample.input_ids) - 1)
    differ = (before.input_ids[:length] != sample.input_ids[:length]).nonzero()
    length = int(differ[0]) if len(differ) else length
    for number, slot in enumerate(sample.slots):
        alike = number < len(before.slots) and (
            (before.slots[number], *medium_of(before, number)) == (slot, *medium_of(sample, number))
        )
        if slot.start < length and (not alike or slot.start + slot.length > length):
            return slot.start
    return length


def medium_of(sample: Sample, number: int) -> tuple[Hashable, ...]:
    """What makes a medium's tokens; of one without a key only it itself is the same."""
    context = tuple(sample.contexts[number].tolist()) if sample.contexts else None
    return sample.media_keys[number] if sample.media_keys else object(), sample.plans[number], context


def without_beginning(sample: Sample, length: int) -> Sample:
    """What is left of a prompt behind its first positions, which end between media."""
    first = sum(slot.start < length for slot in sample.slots)
    heard = sum(sample.heard[:first])
    return replace(
        sample,
        input_ids=sample.input_ids[length:],
        loss_mask=sample.loss_mask[length:],
        slots=tuple(replace(slot, start=slot.start - length) for slot in sample.slots[first:]),
        plans=sample.plans[first:],
        pixels=None if sample.pixels is None else sample.pixels[first - heard :],
        media_keys=sample.media_keys[first:],
        contexts=sample.contexts[first:],
        sounds=None if sample.sounds is None else sample.sounds[heard:],
    )


def one_medium(sample: Sample, number: int, placeholder: int) -> Sample:
    """A medium of a prompt alone: nothing but its placeholders."""
    plan, heard = sample.plans[number], sample.heard
    slot = replace(sample.slots[number], start=0)
    at = sum(before == heard[number] for before in heard[:number])  # among the sounds, or among the others
    return Sample(
        input_ids=torch.full((slot.length,), placeholder, dtype=torch.int64),
        loss_mask=torch.zeros(slot.length, dtype=torch.bool),
        slots=(slot,),
        plans=(plan,),
        pixels=None if heard[number] or sample.pixels is None else (sample.pixels[at],),
        contexts=sample.contexts[number : number + 1],
        sounds=None if not heard[number] or sample.sounds is None else (sample.sounds[at],),
    )

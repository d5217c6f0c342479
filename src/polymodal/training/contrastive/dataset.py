"""Pairs in memory, what each step shows of them, and how a batch is made.

The order is that of every stage, a pure function of the seed; what is drawn for a sample is one of (seed, epoch,
sample), see `draws`. So a resumed run needs one integer, and neither threads nor processes change what is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.base import PairBatch
from polymodal.modeling.dual_encoders.distillation import flip_grid
from polymodal.training.contrastive import augment
from polymodal.training.contrastive.images import Images
from polymodal.training.steps import Order

if TYPE_CHECKING:
    from polymodal.messages import Source
    from polymodal.training.feature_cache import FeatureStore


@dataclass(frozen=True)
class Pairs:
    """The samples of a pair stage, in memory: images by their sources, captions as tokens."""

    ids: tuple[str, ...]  # [n] of the first record of each image
    keys: np.ndarray  # [n] uint64 hashes of them, for what is drawn
    sources: tuple[Source, ...]  # [n] where each image is
    image_ids: np.ndarray  # [n] int64, equal for equal pixels
    captions: tuple[range, ...]  # [n] the numbers of each image's texts, as ranges of `starts`
    tokens: np.ndarray  # All texts' tokens, one after the other
    starts: np.ndarray  # [m + 1] where each text begins in `tokens`
    mixture: tuple[tuple[range, float], ...]  # Range of samples and repeat of each data file
    left_out: dict[str, int]  # Why records were left out, with counts
    fingerprint: str  # Hash of every image and token; a resumed run must see the same
    images: tuple[str, ...]  # [n] keys of the images' pixels

    @property
    def targets(self) -> np.ndarray:
        """[n] what a sample counts for in a step: one pair."""
        return np.ones(len(self.ids), dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens of each image's first text."""
        return np.diff(self.starts)[[texts.start for texts in self.captions]]

    def text(self, number: int) -> np.ndarray:
        """The tokens of one text."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class Plan:
    """Which pairs go through the model together, and what was drawn for them."""

    indices: np.ndarray  # [b] samples
    texts: np.ndarray  # [b] numbers of their texts
    numbers: np.ndarray | None  # [b, COUNT] what else is drawn, or None for plain tiles
    length: int  # What the texts are padded to; the same over the whole step

    def cut(self, part: slice) -> Plan:
        """Some of these pairs."""
        numbers = None if self.numbers is None else self.numbers[part]
        return replace(self, indices=self.indices[part], texts=self.texts[part], numbers=numbers)

    def split(self, size: int) -> list[Plan]:
        """Micro-batches of at most `size` pairs."""
        return [self.cut(slice(start, start + size)) for start in range(0, len(self.indices), size)]


@dataclass(frozen=True)
class PairFeed:
    """The data of a stage, and how a micro-batch is made of it."""

    prepared: Pairs  # The samples
    images: Images  # Their images
    seed: int  # The run's
    pad_id: int  # Fills texts
    text_length: int | None  # What every text is padded to; the longest of the step when None
    store: FeatureStore | None = None  # Kept output of the frozen tower, or None
    teacher: FeatureStore | None = None  # Kept output of a teacher, or None
    teacher_grid: Size | None = None  # Rows and columns of that output
    # Each sample's image under the teacher's rules, by which that output is found
    teacher_images: tuple[str, ...] = ()

    def plan(self, indices: np.ndarray, epochs: np.ndarray, turns: np.ndarray) -> Plan:
        """Draw what a step shows of its samples; every process draws the same."""
        # indices [G], epochs [G], turns [G]
        augmented = self.images.augment.type != "none"
        places = range(augment.COUNT) if augmented else (augment.CAPTION,)
        numbers = augment.uniforms(self.seed, epochs, self.prepared.keys[indices], turns, places)
        own = [self.prepared.captions[i] for i in indices]
        texts = np.array([c.start + int(u * len(c)) for c, u in zip(own, numbers[:, 0], strict=True)], dtype=np.int64)
        return Plan(indices, texts, numbers if augmented else None, self.length(texts))

    def length(self, texts: np.ndarray) -> int:
        """What these texts are padded to."""
        lengths = self.prepared.starts[texts + 1] - self.prepared.starts[texts]
        return self.text_length or int(lengths.max())

    def batch(self, plan: Plan) -> PairBatch:
        """Make a micro-batch: tokens, and pixels or kept features."""
        pairs = self.prepared
        ids = torch.full((len(plan.indices), plan.length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, number in enumerate(plan.texts):
            text = torch.from_numpy(pairs.text(int(number)).astype(np.int64))
            ids[row, : len(text)] = text
            mask[row, : len(text)] = True
        keys = [pairs.images[i] for i in plan.indices]
        features = None if self.store is None else self.store.gather(keys)
        teacher = None if self.teacher is None else self.teacher.gather([self.teacher_images[i] for i in plan.indices])
        mirrored = self._mirrored(plan)
        if teacher is not None and self.teacher_grid is not None and mirrored.any():
            teacher = flip_grid(teacher, self.teacher_grid, torch.from_numpy(mirrored))
        return PairBatch(
            ids,
            mask,
            torch.from_numpy(pairs.image_ids[plan.indices]),
            None if features is not None else self._pixels(plan, mirrored),
            features,
            teacher,
            tuple(pairs.ids[i] for i in plan.indices),
        )

    def _mirrored(self, plan: Plan) -> np.ndarray:
        """Which images are shown mirrored: [b] bool."""
        if plan.numbers is None:
            return np.zeros(len(plan.indices), dtype=bool)
        found: np.ndarray = plan.numbers[:, augment.FLIP] < self.images.augment.flip
        return found

    def _pixels(self, plan: Plan, mirrored: np.ndarray) -> torch.Tensor:
        sources = [self.prepared.sources[index] for index in plan.indices]
        numbers = [None] * len(sources) if plan.numbers is None else plan.numbers[:, augment.CROP :]
        looks = zip(sources, numbers, mirrored.tolist(), strict=True)
        return torch.from_numpy(np.stack([self.images.tile(*look) for look in looks]))


class PairSteps:
    """The samples of each optimizer step."""

    def __init__(self, order: Order, global_size: int) -> None:
        self.order, self.global_size = order, global_size
        self._turns: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def total(self, epochs: float) -> int:
        """Optimizer steps of a run."""
        return max(1, round(epochs * self.order.epoch_size / self.global_size))

    def indices(self, step: int) -> np.ndarray:
        """The samples of one step, [G]."""
        return self.order.take(step * self.global_size, self.global_size)

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch of each of a step's samples, and how often it was seen in it before: [G], [G]."""
        positions = np.arange(step * self.global_size, (step + 1) * self.global_size)
        epochs, offsets = np.divmod(positions, self.order.epoch_size)
        turns = np.zeros(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            turns[inside] = self._epoch_turns(int(epoch))[offsets[inside]]
        return epochs, turns

    def _epoch_turns(self, epoch: int) -> np.ndarray:
        if self._turns[0] != epoch:
            members = self.order.take(epoch * self.order.epoch_size, self.order.epoch_size)
            self._turns = (epoch, augment.turns_of(members))
        return self._turns[1]

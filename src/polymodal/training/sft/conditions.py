"""Rows without their condition: what a model learns of images alone, which guided drawing subtracts (arXiv:2207.12598).

A row that asks for an image in words is now and then trained as `BOS <boi> codes <eoi>`, exactly the row that sampling
puts beside a prompt. Which rows these are depends on the seed, the step and the row alone, so a resumed run draws the
same; such an index is written as `~index`.
"""

from dataclasses import replace

import numpy as np
import torch

from polymodal.processing.collate import Sample


def without_conditions(indices: np.ndarray, share: float, seed: int, step: int) -> np.ndarray:
    """Mark a part of a micro-batch's indices."""
    if not share:
        return indices
    draws = np.array([np.random.default_rng((seed, step, int(index))).random() for index in indices])
    return np.where(draws < share, ~indices, indices)


def without_condition(sample: Sample, begin: int, start: int) -> Sample:
    """The row with one id in place of all that stands before its image; another kind of row stays as it is."""
    trained = sample.loss_mask.nonzero().flatten()
    images = (sample.input_ids == begin).nonzero().flatten()
    if sample.plans or len(images) != 1 or not len(trained):
        return sample
    first, last = int(trained[0]), int(trained[-1])
    if first != int(images[0]) or first == 0 or not bool(sample.loss_mask[first : last + 1].all()):
        return sample
    ids = torch.cat((torch.tensor([start]), sample.input_ids[first : last + 1]))
    mask = torch.cat((torch.tensor([False]), sample.loss_mask[first : last + 1]))
    return replace(sample, input_ids=ids, loss_mask=mask)

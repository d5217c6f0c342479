"""What is random in a pair stage, as pure functions of (seed, epoch, sample): which caption, which part of an image.

A counter-based generator (SplitMix64; Steele et al. 2014, doi:10.1145/2660193.2660195) gives every sample numbers of
its own without a generator's state, so neither the order, nor the number of threads or processes, nor a resumption
changes what is drawn. A sample that is seen twice in an epoch is drawn twice.

The crop is that of Inception and CLIP (`RandomResizedCrop`): a part of the area, drawn evenly, of a shape drawn evenly
in its logarithm; ten tries that fit, then the whole image.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polymodal.training.recipes.contrastive import AugmentConfig

TRIES = 10
"""Tries at a crop that fits."""

CAPTION, TEMPLATE, FLIP, CROP = 0, 1, 2, 3
"""Places of a sample's numbers; a crop takes four for each try, from CROP on."""

COUNT = CROP + 4 * TRIES

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def sample_keys(ids: Sequence[str]) -> np.ndarray:
    """Hash samples' ids to [n] uint64."""
    digests = [hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:8] for id in ids]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def uniforms(seed: int, epochs: np.ndarray, keys: np.ndarray, views: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Draw numbers for samples."""
    # epochs [n], keys [n], views [n] -> [n, len(places)]
    with np.errstate(over="ignore"):
        state = _mix(keys + _GOLDEN * np.uint64(seed + 1))
        state = _mix(state + _GOLDEN * (epochs.astype(np.uint64) + np.uint64(1)))
        state = _mix(state + _GOLDEN * (views.astype(np.uint64) + np.uint64(1)))
        counters = _GOLDEN * (np.asarray(places, dtype=np.uint64) + np.uint64(1))
        drawn = _mix(state[:, None] + counters[None])
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def views_of(order: np.ndarray) -> np.ndarray:
    """Which view of its sample each entry of an epoch's order is, the first being 0: [n]."""
    found = np.zeros(len(order), dtype=np.int64)
    sorting = np.argsort(order, kind="stable")
    ordered = order[sorting]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    found[sorting] = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return found


def crop_box(numbers: np.ndarray, height: int, width: int, augment: AugmentConfig) -> tuple[float, float, float, float]:
    """Choose a part of an image."""
    # numbers [4 * TRIES]
    low, high = (math.log(value) for value in augment.ratio)
    for area, shape, across, down in numbers.reshape(TRIES, 4):
        size = height * width * (augment.scale[0] + (augment.scale[1] - augment.scale[0]) * area)
        ratio = math.exp(low + (high - low) * shape)
        box_width, box_height = math.sqrt(size * ratio), math.sqrt(size / ratio)
        if box_width <= width and box_height <= height:
            left, top = across * (width - box_width), down * (height - box_height)
            return left / width, top / height, (left + box_width) / width, (top + box_height) / height
    return 0.0, 0.0, 1.0, 1.0


def _mix(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))

"""What is kept is found where content, rules, weights and salt are the same, and is bounded in bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import DynamicCache

from polymodal import Image, user
from polymodal.backends import load
from polymodal.backends.local import LocalBackend
from polymodal.generation.kept import Kept, MediaCache, PrefixCache, medium_of
from polymodal.generation.params import GenerationParams
from polymodal.media_plan import ImagePlan
from polymodal.processing.collate import Sample

WEIGHTS = ((1, 0),)


@pytest.fixture(scope="module")
def backend(senses_folder: Any) -> LocalBackend:
    opened = load(senses_folder)
    assert isinstance(opened, LocalBackend)
    return opened


def picture(height: int = 30, width: int = 20) -> PILImage.Image:
    values = np.random.default_rng(0).integers(0, 255, (600, 3), dtype=np.uint8)
    return PILImage.fromarray(values.reshape(height, width, 3))


def encoded(image: PILImage.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def read(backend: LocalBackend, image: Any, batcher: Any = None, salt: str = "") -> tuple[Any, Any]:
    """Ask about an image; gives the batch and the row."""
    batcher = batcher or backend.batcher(1, 2**24, 2**24)
    row = backend.row(backend.prepare([user(Image(image), "?")], 4), GenerationParams(max_new_tokens=2), salt)
    batcher.add(row)
    while not row.full:
        for _, event in batcher.step():
            assert isinstance(event, int), event
    batcher.drop(row)
    return batcher, row


def test_same_pixels_in_two_encodings_are_one_image(backend: LocalBackend) -> None:
    batcher, _ = read(backend, encoded(picture(), "PNG"))
    _, row = read(backend, encoded(picture(), "BMP"), batcher)
    assert row.cached == len(row.sample.input_ids) - 1 and (batcher.media.hits, batcher.media.misses) == (0, 1)
    batcher.prefixes.clear()
    _, row = read(backend, encoded(picture(), "BMP"), batcher)
    assert row.cached == 0 and (batcher.media.hits, batcher.media.misses) == (1, 1)


def test_what_only_looks_the_same_is_read_anew(backend: LocalBackend) -> None:
    one, other = picture(20, 30), picture(30, 20)
    assert one.tobytes() == other.tobytes()
    batcher, _ = read(backend, one)
    _, row = read(backend, other, batcher)
    assert batcher.media.misses == 2 and row.cached < row.sample.slots[0].start + row.sample.slots[0].length
    _, row = read(backend, one, batcher, salt="b")
    assert batcher.media.misses == 3 and row.cached == 0
    # Other rules for the same bytes: another key.
    assert backend.config.image is not None
    stretched = backend.config.image.model_copy(update={"image_aspect_ratio": "square"})
    rules = LocalBackend(backend.model, backend.tokenizer, backend.config.model_copy(update={"image": stretched}))
    keys = [medium_of(each.prepare([user(Image(one), "?")], 4), 0) for each in (backend, rules)]
    assert keys[0] != keys[1]
    with torch.no_grad():
        next(backend.model.projector.parameters()).add_(0.5)  # type: ignore[union-attr]
    _, row = read(backend, one, batcher)
    assert batcher.media.misses == 4 and row.cached == 0 and len(batcher.media) == 1


def kept(ids: list[int], positions: int | None = None, salt: str = "") -> Kept:
    cache = DynamicCache()
    size = positions if positions is not None else len(ids)
    cache.update(torch.zeros(1, 1, size, 4), torch.zeros(1, 1, size, 4), 0)
    return Kept(sample(ids), cache, WEIGHTS, salt)


def sample(ids: list[int]) -> Sample:
    return Sample(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool))


def test_the_longest_beginning_is_found_and_old_ones_go() -> None:
    cache = PrefixCache(most_bytes=32 * 20)  # 20 positions
    for ids in ([1, 2, 3, 4], [1, 2, 9, 9, 9], [7, 7, 7]):
        cache.put(kept(ids))
    found, length = cache.find(sample([1, 2, 9, 9, 5]), WEIGHTS)
    assert found is not None and length == 4 and found.sample.input_ids.tolist() == [1, 2, 9, 9, 9]
    assert cache.find(sample([1, 2, 9, 9, 5]), ((1, 1),)) == cache.find(sample([8, 8]), WEIGHTS) == (None, 0)
    assert cache.find(sample([1, 2, 9, 9, 5]), WEIGHTS, salt="b") == (None, 0)
    cache.put(kept([1, 2, 3, 4, 5, 6]))  # in the place of its own beginning
    assert [len(each.sample.input_ids) for each in cache.kept] == [3, 5, 6]
    cache.put(kept([0] * 10))
    assert [len(each.sample.input_ids) for each in cache.kept] == [6, 10] and cache.nbytes <= 32 * 20
    cache.put(kept([5] * 21))
    assert not cache.kept  # one that fits in no case leaves nothing behind that does not fit


def test_one_conversation_is_taken_and_put_back() -> None:
    cache = PrefixCache()
    cache.put(kept([1] * 100))
    cache.put(kept([1, 2, 3]))
    found, length = cache.find(sample([1, 2, 4]), WEIGHTS, take=True)
    assert found is not None and length == 2 and not cache.kept
    cache.put(found)
    assert cache.find(sample([4, 4]), WEIGHTS, take=True) == (None, 0) and not cache.kept


def test_a_flood_of_small_images_stays_within_bounds() -> None:
    cache = MediaCache(10_000)
    assert cache.get("none", WEIGHTS) is None
    large = torch.zeros(1_000, 4)
    for number in range(2_000):
        cache.get(number, WEIGHTS)
        cache.put(number, large[:10])  # a part of something larger is kept without it
    assert cache.nbytes == 62 * 160 and len(cache) == 62
    assert cache.get(1_999, WEIGHTS) is not None and cache.get(0, WEIGHTS) is None
    cache.put("large", large)
    assert cache.get("large", WEIGHTS) is None and len(cache) == 62
    assert sum(found.untyped_storage().nbytes() for found in cache._kept.values()) == cache.nbytes
    assert cache.get(1_999, ((2, 0),)) is None and not len(cache)


def test_a_medium_without_a_key_is_like_no_other() -> None:
    plan = ImagePlan.__new__(ImagePlan)
    bare = Sample(torch.tensor([1]), torch.tensor([False]), plans=(plan,))
    assert medium_of(bare, 0)[0] != medium_of(bare, 0)[0]

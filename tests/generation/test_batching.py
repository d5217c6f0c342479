"""Rows that join and leave a running batch say what each says alone, whatever is kept of one for the next."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

from polymodal import Image, user
from polymodal.backends import load
from polymodal.backends.local import LocalBackend
from polymodal.generation.batching import Batcher, Row
from polymodal.generation.params import GenerationParams
from polymodal.messages import assistant
from polymodal.modeling import onnx_llm
from polymodal.modeling.onnx_llm import OnnxLLM
from tests.modeling.test_onnx_llm import cache, folder  # noqa: F401  # fixtures: a tiny model that a graph is made of

MB = 2**20


@pytest.fixture(scope="module", params=["torch", "float32", "int8"])
def backend(request: pytest.FixtureRequest, folder: Path, cache: Path) -> LocalBackend:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(cache))
        opened = load(folder, "cpu", **({} if request.param == "torch" else {"quantize": request.param}))
    assert isinstance(opened, LocalBackend)
    return opened


def image(red: int, size: tuple[int, int] = (40, 30)) -> Image:
    return Image(PILImage.new("RGB", size, (red, 40, 90)))


def talks() -> list[Any]:
    begun = [user(image(10), "What is this? " * 12), assistant("A thing."), user("Why?")]
    return [
        [user("Say something.")],
        [user(image(10), "What is this?")],
        begun,
        [*begun, assistant("Because."), user("And now?")],
        [user(image(200), image(90), "Compare.")],
        [user("x" * 200)],
        [user(image(10), "What is this, then?")],
        [user(image(10), "What is this?")],
    ]


def settings(number: int) -> GenerationParams:
    drawn = {} if number % 3 else {"temperature": 1.2, "top_p": 0.9, "seed": number}
    return GenerationParams(max_new_tokens=4 + 5 * (number % 4), repetition_penalty=1.0 + 0.2 * (number % 2), **drawn)


def alone(backend: LocalBackend, sample: Any, params: GenerationParams) -> list[int]:
    plain = LocalBackend(backend.model, backend.tokenizer, backend.config)
    plain.keeps_last = plain.looks_up = False
    return [ids[0] for ids, _ in plain._steps(sample, params, plain.sampler(params))]  # type: ignore[misc]


def ends(row: Row, backend: LocalBackend) -> bool:
    return row.full or row.ids[-1] in backend.stop_ids


def run(batcher: Batcher, backend: LocalBackend, rows: list[Row], chance: random.Random) -> None:
    """Let rows join at random times, until all are done."""
    waiting = list(rows)
    while waiting or batcher.running or batcher.reading:
        if waiting and batcher.free and chance.random() < 0.4:
            batcher.add(waiting.pop(0))
        for row, event in batcher.step():
            if isinstance(event, BaseException):
                raise event
            if ends(row, backend):
                batcher.drop(row)


@pytest.mark.parametrize("prefix", [0, 64 * MB])
def test_rows_that_join_and_leave_say_what_they_say_alone(backend: LocalBackend, prefix: int) -> None:
    samples = [backend.prepare(talk, 20) for talk in talks()]
    expected = [alone(backend, sample, settings(number)) for number, sample in enumerate(samples)]
    assert len({tuple(ids) for ids in expected}) > 4
    batcher = backend.batcher(3, prefix, 64 * MB)
    assert batcher is not None
    for seed in range(3):
        rows = [backend.row(sample, settings(number)) for number, sample in enumerate(samples)]
        run(batcher, backend, rows, random.Random(seed))
        assert [row.ids for row in rows] == expected
        assert sum(row.cached for row in rows) > 0 if prefix else not any(row.cached for row in rows)
    assert batcher.media.misses <= 3 and (prefix or batcher.media.hits > 9)  # of three different images


def test_the_logits_of_a_row_do_not_depend_on_how_many_run(backend: LocalBackend) -> None:
    if not isinstance(backend.model.llm, OnnxLLM):
        pytest.skip("rows of torch go on one by one")
    llm, held = backend.model.llm, onnx_llm.OnnxCache(backend.model.llm, 5)
    ids, one, pieces = torch.randint(0, 200, (5, 40)), [], []
    for row in range(5):
        prompt, next_id = llm.embed_tokens(ids[row : row + 1, : 20 + row]), llm.embed_tokens(ids[row : row + 1, -1:])
        single, pieced = onnx_llm.OnnxCache(llm), onnx_llm.OnnxCache(llm)
        llm.read(prompt, held, row)
        llm.read(prompt, single)
        for part in prompt.split(7, dim=1):
            llm.read(part, pieced)
        one.append(llm.read(next_id, single))
        pieces.append(llm.read(next_id, pieced))
    together = llm.read(llm.embed_tokens(ids[:, -1:]), held)
    assert torch.equal(together, torch.cat(one))
    torch.testing.assert_close(torch.cat(pieces), together, rtol=0, atol=1e-4)


def test_a_row_that_fails_fails_alone(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [backend.prepare(talk, 20) for talk in talks()[:3]]
    params = GenerationParams(max_new_tokens=12)
    expected = [alone(backend, sample, params) for sample in samples]
    batcher = backend.batcher(3, 0, 0)
    assert batcher is not None
    rows = [backend.row(sample, params) for sample in samples]
    real, calls = batcher._caches.step, []

    def step(ids: Any, place: int | None = None) -> Any:
        calls.append(place)
        if len(batcher.running) == 3 and (place is None or batcher.running[place] is rows[1]):
            raise MemoryError
        return real(ids, place)

    monkeypatch.setattr(batcher._caches, "step", step)
    failed, waiting = [], list(rows)
    while waiting or batcher.running or batcher.reading:
        if waiting and batcher.free:
            batcher.add(waiting.pop(0))
        for row, event in batcher.step():
            if isinstance(event, BaseException):
                failed.append(row)
            elif ends(row, backend):
                batcher.drop(row)
    assert failed == [rows[1]] and 0 < len(rows[1].ids) < 12 and 2 in calls
    assert [rows[0].ids, rows[2].ids] == [expected[0], expected[2]]


def test_running_rows_do_not_wait_for_a_long_prompt(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.generation.batching.CHUNK", 16)
    batcher = backend.batcher(2, 0, 0)
    assert batcher is not None
    params = GenerationParams(max_new_tokens=40)
    first = backend.row(backend.prepare([user("Hi")], 40), params)
    sample = backend.prepare([user(image(10), "word " * 30)], 40)
    long = backend.row(sample, params)
    batcher.add(first)
    while batcher.reading:
        batcher.step()
    batcher.add(long)
    before = len(first.ids)
    while not long.ids:
        batcher.step()
    assert len(first.ids) - before > 10  # a medium, and 170 positions, 16 at a time
    batcher.drop(first)
    for _ in range(3):
        batcher.step()
    assert len(long.ids) == 4 and long.ids == alone(backend, sample, params)[:4]


def test_two_at_once_read_one_beginning(backend: LocalBackend) -> None:
    """The second goes on from the first while it runs; of another salt, or with other tiles, nothing is shared."""
    params = GenerationParams(max_new_tokens=8)
    sample = backend.prepare([user(image(10), "What is this? " * 4)], 8)
    expected = alone(backend, sample, params)
    batcher = backend.batcher(4, 64 * MB, 64 * MB)
    assert batcher is not None
    rows = [backend.row(sample, params, salt) for salt in ("", "", "other", "")]
    run(batcher, backend, rows, random.Random(0))
    assert [row.ids for row in rows] == [expected] * 4
    whole = len(sample.input_ids) - 1
    assert [row.cached for row in rows] == [0, whole, 0, whole]
    assert batcher.media.misses == 2 and len(batcher.prefixes.kept) == 2  # type: ignore[union-attr]
    again = backend.row(sample, params, "third")
    batcher.add(again)
    batcher.step()
    batcher.drop(again)  # before its prompt is read
    assert not batcher.running and batcher.reading is None and len(batcher.prefixes.kept) == 2  # type: ignore[union-attr]


def test_memory_is_freed_when_nothing_runs(backend: LocalBackend) -> None:
    batcher = backend.batcher(2, 0, 0)
    assert batcher is not None
    run(batcher, backend, [backend.row(backend.prepare(talks()[2], 4), settings(1))], random.Random(0))
    held = batcher._caches.held(0)
    assert held is None or (held.nbytes == 0 and held.get_seq_length() == 0)

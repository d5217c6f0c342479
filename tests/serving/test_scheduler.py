"""Requests that are answered together, what is kept between them, and the figures that are told of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from polymodal.backends import load
from polymodal.generation.params import GenerationParams
from tests.serving.conftest import Running, Told, running
from tests.serving.test_chat import ASK, KEY, asking, png, url

prometheus = pytest.importorskip("prometheus_client.parser")


@pytest.fixture(scope="module")
def fresh(senses_folder: Path) -> Iterator[Running]:
    backend: Any = load(senses_folder)
    backend.trims = False
    with running(backend, key=KEY, queue=64) as server:
        yield server


def ask(server: Running, text: str, tokens: int = 12, image: bytes | None = None, **more: Any) -> Any:
    parts: list[Any] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": url(image, "image/png")}})
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": tokens, **more}
    return server.post(body, headers={"Authorization": f"Bearer {KEY}"})


def figures(server: Running) -> dict[str, float]:
    """Every figure by its name, with the values of its labels behind it."""
    answer = server.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    families = prometheus.text_string_to_metric_families(answer.text)
    return {
        " ".join((each.name, *(value for name, value in sorted(each.labels.items()) if name != "le"))): each.value
        for family in families
        for each in family.samples
    }


def test_many_at_once_get_what_they_get_alone(fresh: Running) -> None:
    texts = [f"{'word ' * (number % 5)}question {number}?" for number in range(12)]
    params = GenerationParams(max_new_tokens=20)
    expected = [fresh.backend.generate(text, params).text for text in texts]
    seen: list[int] = []
    step = fresh.scheduler.batcher.step  # type: ignore[union-attr]

    def counting() -> Any:
        seen.append(len(fresh.scheduler.batcher.running))  # type: ignore[union-attr]
        return step()

    fresh.scheduler.batcher.step = counting  # type: ignore[union-attr, method-assign]
    try:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda text: ask(fresh, text, 20), texts))
    finally:
        fresh.scheduler.batcher.step = step  # type: ignore[union-attr, method-assign]
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == expected
    assert max(seen) in (3, 4)  # together, and no more than four
    several = ask(fresh, "hi", n=6, temperature=1.0, seed=3).json()
    drawn = [GenerationParams(max_new_tokens=12, temperature=1.0, seed=3 + n) for n in range(6)]
    said = [fresh.backend.generate("hi", each).text for each in drawn]
    assert [choice["message"]["content"] for choice in several["choices"]] == said


def test_what_was_read_before_is_told_in_usage_and_metrics(fresh: Running) -> None:
    def cached(**more: Any) -> int:
        usage = ask(fresh, "What is it?", image=png((9, 8, 7)), **more).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    before = figures(fresh)
    assert cached(cache_salt="a") == 0
    whole = cached(cache_salt="a")
    assert whole > 16 and cached(cache_salt="b") == 0 and cached(cache_salt="a") == whole
    after = figures(fresh)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert gained["polymodal_media_cache_misses_total tiny"] == 2
    assert gained["polymodal_prefix_cache_hit_tokens_total tiny"] == 2 * whole
    assert gained["polymodal_cached_prompt_tokens_total tiny"] == 2 * whole
    assert gained["polymodal_prompt_tokens_total tiny"] == 4 * (whole + 1)
    assert gained["polymodal_generated_tokens_total tiny"] == 48 == 4 * 12
    assert gained["polymodal_between_tokens_seconds_count tiny"] == 44
    assert gained["polymodal_first_token_seconds_count tiny"] == gained["polymodal_request_seconds_count tiny"] == 4
    assert gained["polymodal_requests_total tiny done"] == gained["polymodal_http_responses_total 200"] - 1 == 4
    assert after["polymodal_prefix_cache_bytes tiny"] > 1000 and after["polymodal_media_cache_bytes tiny"] > 1000
    assert after["polymodal_requests_running tiny"] == after["polymodal_requests_waiting tiny"] == 0
    assert after["process_resident_memory_bytes"] > 10**8
    assert fresh.get("/metrics").status_code == 401


@pytest.mark.parametrize("path", ["completions", "responses"])
def test_other_routes_keep_requests_apart_as_well(path: str, fresh: Running) -> None:
    given = {"completions": {"prompt": "Once upon a time"}, "responses": {"input": "Once upon a time"}}[path]

    def cached(salt: str) -> float:
        before = figures(fresh)["polymodal_prefix_cache_hit_tokens_total tiny"]
        body = {"model": "tiny", **given, "cache_salt": f"{path}/{salt}"}
        answer = fresh.post_to(f"/v1/{path}", body, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200, answer.text
        return figures(fresh)["polymodal_prefix_cache_hit_tokens_total tiny"] - before

    assert cached("a") == 0 == cached("b") and cached("a") >= len("Once upon a time") - 1


def test_what_fails_fails_alone_and_is_counted(fresh: Running) -> None:
    before = figures(fresh)
    good = ask(fresh, "hi").json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(ask, fresh, "hi", 60)
        bad = pool.submit(ask, fresh, "hi", 12, b"\x89PNG no image")
        huge = pool.submit(ask, fresh, "word " * 200)
    assert long.result().json()["choices"][0]["message"]["content"].startswith(good)
    assert bad.result().status_code == huge.result().status_code == 400
    assert huge.result().json()["error"]["code"] == "context_length_exceeded"
    after = figures(fresh)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert gained["polymodal_requests_total tiny context_length_exceeded"] == 1
    assert gained["polymodal_requests_total tiny status_400"] == 1
    assert gained["polymodal_http_responses_total 400"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(stream: bool, senses_folder: Path) -> None:
    backend: Any = load(senses_folder)
    backend.stop_ids = ()
    with running(backend) as server:
        batcher: Any = server.scheduler.batcher
        step, slow = batcher.step, threading.Event()
        batcher.step = lambda: (slow.wait(0.05), step())[1]
        with asking(server, {**ASK, "max_tokens": 64, "stream": stream}):
            deadline = time.monotonic() + 10
            while not batcher.running and time.monotonic() < deadline:
                time.sleep(0.01)
            (row,) = batcher.running
        while (batcher.running or server.scheduler.sizes[0]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not batcher.running and len(row.ids) < 60 and server.scheduler.sizes == (0, 0)
        slow.set()
        assert server.post(ASK).status_code == 200


def test_a_step_that_hangs_is_told(senses_folder: Path) -> None:
    backend: Any = load(senses_folder)
    with running(backend) as server:
        batcher: Any = server.scheduler.batcher
        step, go = batcher.step, threading.Event()
        batcher.step = lambda: (go.wait(20), step())[1]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.post, ASK)
            while not server.scheduler.sizes[0]:
                time.sleep(0.01)
            time.sleep(0.2)
            assert server.scheduler.stalled(0.1) and not server.scheduler.stalled(60)
            go.set()
            assert answer.result().status_code == 200
        assert not server.scheduler.stalled(0.0)


def test_an_endpoint_is_asked_as_often_at_once_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "concurrent", 3)
    model = Told()
    with running(model) as server, ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(server.post, ASK) for _ in range(5)]
        deadline = time.monotonic() + 10
        while server.scheduler.sizes != (3, 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.scheduler.sizes == (3, 2)
        model.steps.release(1000)
        assert [answer.result().status_code for answer in answers] == [200] * 5


def test_media_are_decoded_in_order_beside_the_steps(senses_folder: Path) -> None:
    backend: Any = load(senses_folder)
    prepare, begun, go = backend.prepare, [], threading.Event()

    def slow(messages: Any, room: int) -> Any:
        begun.append(messages[-1].text)
        if messages[-1].text == "slow":
            go.wait(20)
        return prepare(messages, room)

    backend.prepare = slow
    with running(backend) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, server, "first", 60)
        while not server.scheduler.batcher.running:  # type: ignore[union-attr]
            time.sleep(0.005)
        held = pool.submit(ask, server, "slow")
        while "slow" not in begun:
            time.sleep(0.005)
        behind = pool.submit(ask, server, "behind")
        assert first.result().status_code == 200  # while the next one's media are still decoded
        time.sleep(0.1)
        assert not held.done() and not behind.done() and len(begun) == 3
        go.set()
        assert held.result().status_code == behind.result().status_code == 200


Make = Callable[..., Any]


def test_a_queue_that_is_full_counts_those_that_wait(told: Make) -> None:
    model, server = told(queue=1)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.post, ASK) for _ in range(2)]
        while server.scheduler.sizes != (1, 1):
            time.sleep(0.01)
        assert server.post(ASK).status_code == 429
        model.steps.release(1000)
        assert [answer.result().status_code for answer in answers] == [200, 200]

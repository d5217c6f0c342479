"""Several models in one server: each request is answered by its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from polymodal import cli
from polymodal.serving.app import Limits
from tests.serving.conftest import Told


def ask(name: str) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def test_a_request_finds_its_model(told: Callable[..., Any]) -> None:
    other = Told()
    other.word = "other "
    model, server = told(beside={"mine/other": other})
    other.steps.release(2)  # the first one's never come, and it is not waited for
    for name in ("mine/other", "mine/other"):
        answer = server.post(ask(name)).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, "other ")
    model.steps.release(1)
    assert server.post(ask("tiny")).json()["choices"][0]["message"]["content"] == "word "
    assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["tiny", "mine/other"]
    assert server.get("/v1/models/mine/other").json()["id"] == "mine/other"
    for answer in (server.post(ask("other")), server.get("/v1/models/other")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "'tiny'" in error["message"] and "'mine/other'" in error["message"]


def test_one_that_is_full_or_stands_still(told: Callable[..., Any]) -> None:
    """A full queue refuses its own requests alone; a server with a model that stands still is not ready."""
    other = Told()
    model, server = told(beside={"other": other}, queue=1, limits=Limits(stall_s=0.1))
    threads = [threading.Thread(target=server.post, args=(ask("other"),)) for _ in range(2)]
    scheduler = server.models["other"].scheduler
    for thread in threads:
        thread.start()
        assert other.begun.wait(10)
    deadline = time.monotonic() + 10
    while not scheduler._waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.post(ask("other")).status_code == 429
    model.steps.release(1)
    assert server.post(ask("tiny")).status_code == 200
    time.sleep(0.15)
    assert server.get("/ready").status_code == 503
    other.steps.release(10)
    for thread in threads:
        thread.join(10)
    assert server.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "a/final", "--model", "b/final"], "two models are called 'final'"),
        (["--model", "a", "--model", "b", "--name", "c"], "--name is given 1 times and --model 2 times"),
        (["--model", "a", "--model", "b", "--name", "c", "--name", "c"], "two models are called 'c'"),
    ],
)
def test_names_that_clash_are_refused(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *flags]) == 2
    assert told in capsys.readouterr().err

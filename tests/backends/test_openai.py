"""OpenAIBackend against a small server that misbehaves on demand."""

from __future__ import annotations

import base64
import io
import json
import logging
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends import load, load_processor
from polymodal.backends.base import Reply, TextDelta, Usage
from polymodal.backends.openai import OpenAIBackend, open_endpoint
from polymodal.backends.openai.answers import clean, read_events
from polymodal.backends.openai.http import Endpoint, Patience, retry_after
from polymodal.backends.openai.media import Sending, image_bytes
from polymodal.backends.openai.messages import to_openai
from polymodal.cli import main
from polymodal.errors import CheckpointError, ConfigError, EndpointError, MediaError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.media.image import open_image
from polymodal.messages import Audio, Document, Image, Message, Video, assistant, system, user

KEY = "sk-test-0123456789abcdef"
QUICK = Patience(connect_s=2.0, read_s=0.3, total_s=3.0, retries=2, first_wait_s=0.01, longest_wait_s=0.2)
HELLO = [user("Hello")]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(server: Any) -> Iterator[OpenAIBackend]:
    made = open_endpoint("tiny", base_url=server.url, api_key=KEY, patience=QUICK)
    yield made
    made.close()


def answer(text: str = "Hi there", finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    """A whole chat completion."""
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"image_tokens": 7}}
    message = {"role": "assistant", "content": text}
    return {
        "object": "chat.completion", "model": "tiny-2026", "usage": usage,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}], **more,
    }  # fmt: skip


def piece(text: str | None = None, finish: str | None = None) -> dict[str, Any]:
    """A piece of a streamed completion."""
    delta = {} if text is None else {"content": text}
    return {"model": "tiny-2026", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def sends(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> Any:
    """An action: one response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def action(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return action


def streams(*items: Any, pause: float = 0.0, cut: int = 0, drop: bool = False) -> Any:
    """An action: server-sent events; objects as JSON, bytes as they are, sent in pieces of `cut` bytes."""

    def action(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Connection", "close")
        if drop:
            handler.send_header("Content-Length", "999999")  # a promise that is not kept
        handler.end_headers()
        for item in items:
            data = item if isinstance(item, bytes) else b"data: " + json.dumps(item).encode() + b"\n\n"
            for start in range(0, len(data), cut or len(data)):
                handler.wfile.write(data[start : start + (cut or len(data))])
                handler.wfile.flush()
            time.sleep(pause)
        handler.close_connection = True

    return action


def hangs(seconds: float = 1.0) -> Any:
    return lambda handler: time.sleep(seconds)


def hangs_up(handler: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


DONE = b"data: [DONE]\n\n"


def test_a_whole_answer(server: Any, model: OpenAIBackend) -> None:
    server.plays(sends(answer()))
    params = GenerationParams(max_new_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop=("END", ""))
    reply = model.generate([system("Be kind."), user("Hello")], params)
    assert reply.text == "Hi there" and reply.finish_reason == "stop" and reply.model == "tiny-2026"
    assert (reply.usage.prompt_tokens, reply.usage.image_tokens, reply.usage.completion_tokens) == (11, 7, 3)
    assert 0 < reply.timing.first_token_s <= reply.timing.total_s
    assert reply.timing.encode_s is None and reply.timing.tokens_per_s is None  # unknown, not 0
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.bodies[0] == {
        "model": "tiny", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["END"],
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}],
    }  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_streamed_answer_in_whole_characters(cut: int, server: Any, model: OpenAIBackend) -> None:
    raw = 'data: {"choices":[{"delta":{"content":"猫 🐈\u2028é"}}]}\r\n\r\n'.encode()
    halves = rb'data: {"choices":[{"delta":{"content":" \ud83d"}}]}' + b"\n\n"
    other = rb'data: {"choices":[{"delta":{"content":"\udc08."}}]}' + b"\n\n"
    server.plays(
        streams(
            b": ping\n\n", {"choices": [{"delta": {"role": "assistant", "content": ""}}]}, raw, b"event: x\nid: 4\n",
            halves, b":\n", other, piece(finish="length"),
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}, DONE, cut=cut,
        )
    )  # fmt: skip
    *deltas, reply = model.stream(HELLO, GenerationParams(max_new_tokens=4))
    assert isinstance(reply, Reply) and all(isinstance(delta, TextDelta) for delta in deltas)
    assert [delta.text for delta in deltas] == ["猫 🐈\u2028é", " ", "🐈."]
    assert reply.text == "猫 🐈\u2028é 🐈." and reply.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 4)
    assert reply.timing.tokens_per_s > 0
    assert server.bodies[0]["stream"] is True and server.bodies[0]["stream_options"] == {"include_usage": True}


def test_a_server_that_does_not_stream_or_does_not_say_done(server: Any, model: OpenAIBackend) -> None:
    server.plays(sends(answer("whole")), streams(piece("a"), piece("b", "stop")), streams(piece("c"), DONE))
    texts = [[event.text for event in model.stream(HELLO)] for _ in range(3)]
    assert texts == [["whole", "whole"], ["a", "b", "ab"], ["c", "c"]]


def test_other_forms_of_an_answer(server: Any, model: OpenAIBackend) -> None:
    parts = answer()
    parts["choices"][0]["message"] = {"content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}
    refusal = answer()
    refusal["choices"][0]["message"] = {"content": None, "refusal": "I would rather not."}
    bare = {"choices": [{"message": {"content": "bare"}}], "usage": None, "model": 7}
    server.plays(*(sends(body) for body in (parts, refusal, bare)))
    replies = [model.generate(HELLO) for _ in range(3)]
    assert [reply.text for reply in replies] == ["in parts", "I would rather not.", "bare"]
    assert replies[2].usage == Usage(None, None, None) and replies[2].model == "tiny"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning_content": "hm"}, {"reasoning": "hm", "content": ""}, {"content": [{"type": "thinking"}]},
        {"reasoning_details": [{"text": "hm"}], "content": "\n\n"},
    ],
)  # fmt: skip
def test_thoughts_are_no_answer(thought: dict[str, Any], stream: bool, server: Any, model: OpenAIBackend) -> None:
    body = answer()
    body["choices"][0] |= {"message": thought, "finish_reason": "length"}
    pieces = {"choices": [{"delta": thought}]}, piece(finish="length"), DONE
    server.plays(streams(*pieces) if stream else sends(body))
    assert "thought and gave no answer; 256 tokens were too few (max_new_tokens)" in fails(model, stream)
    hidden = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 9}}
    server.plays(sends({**answer(""), "usage": hidden}))
    assert fails(model, stream).endswith("the model thought and gave no answer")
    server.plays(sends(answer("", "length")))  # thoughts that are not even counted
    assert fails(model, stream).endswith("the model gave no answer; 256 tokens were too few (max_new_tokens)")
    server.plays(streams(*pieces[:1], piece("A cat.", "stop"), DONE))
    assert model.generate(HELLO).text.strip() == "A cat."


def test_an_answer_has_no_leading_spaces(server: Any, model: OpenAIBackend) -> None:
    server.plays(streams(piece(" "), piece("  A"), piece(" cat.", "stop"), DONE))
    assert [event.text for event in model.stream(HELLO)] == ["A", " cat.", "A cat."]
    server.plays(sends(answer("  A cat.\n")))
    assert model.generate(HELLO).text == "A cat.\n"


def test_one_of_several_answers(server: Any, model: OpenAIBackend) -> None:
    def of(index: int, text: str, finish: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}]}

    server.plays(streams(of(1, "B"), of(0, "A"), of(1, "B", "length"), of(0, "a", "stop"), DONE))
    *_, reply = model.stream(HELLO)
    assert reply.text == "Aa" and reply.finish_reason == "stop"
    two = [{"index": n, "message": {"content": text}, "finish_reason": "stop"} for n, text in ((1, "B"), (0, "A"))]
    server.plays(sends({"choices": two}))
    assert model.generate(HELLO).text == "A"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/octet-stream", "application/json", "text/html", "text/event-stream"]
)
@pytest.mark.parametrize("first", [b"", b": ping\n\n", b"\n\nevent: message\n", b"\xef\xbb\xbf", b"data: {}\n\n"])
def test_streams_are_known_by_their_first_bytes(kind: str, first: bytes, server: Any, model: OpenAIBackend) -> None:
    raw = b"".join(b"data: " + json.dumps(p).encode() + b"\n\n" for p in (piece("a"), piece("b", "stop")))
    server.plays(sends(first + raw + DONE, kind=kind))
    assert [event.text for event in model.stream(HELLO)] == ["a", "b", "ab"]
    assert model.generate(HELLO).text == "ab"


def test_a_whole_answer_as_plain_text(server: Any, model: OpenAIBackend) -> None:
    server.plays(sends(answer(), kind="text/plain"), sends(answer(), kind="application/problem+json"))
    assert [model.generate(HELLO).text for _ in range(2)] == ["Hi there"] * 2


TROUBLE = {"code": 400, "message": "too long", "type": "invalid_request_error"}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("done", [[], [DONE]])
@pytest.mark.parametrize(
    "trouble",
    [
        b"error: " + json.dumps(TROUBLE).encode() + b"\n\n", b"error: too long\n\n",
        b"event: error\ndata: " + json.dumps(TROUBLE).encode() + b"\n\n", b"event: error\ndata: too long\n\n",
        b"Error: too long\n\n",
        b"event: error\ndata: " + json.dumps({"type": "error", "error": TROUBLE}).encode() + b"\n\n",
        json.dumps({"error": TROUBLE}).encode() + b"\n\n", json.dumps({"error": TROUBLE}, indent=1).encode() + b"\n\n",
        {"object": "error", **TROUBLE}, {"object": "error", "message": "too long", "code": 40303},
        {"text": "too long", "error_code": 50001}, {"error_code": 336003, "error_msg": "too long"},
        {"choices": None, "base_resp": {"status_code": 1004, "status_msg": "too long"}}, {"detail": "too long"},
        {"success": False, "code": 1210, "msg": "too long"}, {"errors": ["too long"]},
        {"choices": [{"index": 0, "delta": {}, "error": TROUBLE}]},
    ],
)  # fmt: skip
def test_an_error_inside_a_stream(
    trouble: Any, done: list[bytes], begun: bool, server: Any, model: OpenAIBackend
) -> None:
    server.plays(streams(*[piece("Half an ans")] * begun, trouble, *done))
    line = fails(model, stream=True)
    assert "the server gave up: " in line and "too long" in line and "tried" not in line


def test_a_stream_without_an_answer(server: Any, model: OpenAIBackend) -> None:
    server.plays(streams(DONE))
    assert "the stream ended before the answer did; tried 3 times" in fails(model, stream=True)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("model_length", "length"), ("max_output_tokens", "length"), ("MAX_TOKENS", "length"), ("eos", "stop"),
        ("end_turn", "stop"), ({"type": "length", "length": 5}, "length"), ("", "stop"), ("abort", "gave up"),
        ("SAFETY", "content filter"), ("sensitive", "content filter"), ("tool_use", "called a tool"),
    ],
)  # fmt: skip
def test_why_an_answer_ended(reason: Any, expected: str, server: Any, model: OpenAIBackend) -> None:
    for stream in (False, True):
        # What came first is not forgotten for a later "stop".
        server.plays(streams(piece("part", reason), piece("", "stop"), DONE) if stream else sends(answer("x", reason)))
        if expected in ("length", "stop"):
            *_, reply = model.stream(HELLO) if stream else [model.generate(HELLO)]
            assert isinstance(reply, Reply) and reply.finish_reason == expected
        else:
            assert expected in fails(model, stream)


def test_an_unknown_end_is_said(server: Any, model: OpenAIBackend) -> None:
    server.plays(sends(answer("part", "moonrise")))
    with pytest.warns(UserWarning, match="not known here .'moonrise'.; it may not be whole"):
        assert model.generate(HELLO).text == "part"


def fails(model: OpenAIBackend, stream: bool = False) -> str:
    """Ask, and return the one line of the error."""
    with pytest.raises(EndpointError) as caught:
        list(model.stream(HELLO)) if stream else model.generate(HELLO)
    line = str(caught.value)
    assert "\n" not in line and KEY not in line and len(line) < 700
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    return line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"error": {"message": "no such\x1b[31m model\n`x`", "type": "invalid", "code": None}},
            "no such[31m model `x`",
        ),
        ({"error": "just words"}, "just words"),
        ([{"error": {"code": 400, "message": "wrapped"}}], "wrapped"),
        ({"detail": [{"loc": ["body"], "msg": "bad"}]}, "bad"),
        ({"message": f"your key {KEY} is odd"}, "your key *** is odd"),
        (b"plain words", "plain words"),
        (b"x" * 5000, "xxx..."),
        (b"\xff\xfe", "400 Bad Request"),
    ],
)
def test_an_error_says_what_the_server_said(body: Any, words: str, server: Any, model: OpenAIBackend) -> None:
    server.plays(sends(body, 400))
    line = fails(model)
    assert line.startswith(f"{server.url}/chat/completions: 400 Bad Request") and words in line
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("status", "words"), [(401, "OPENAI_API_KEY"), (404, "ends in /v1"), (413, "smaller images"), (422, "422")]
)
def test_errors_with_a_hint_are_not_tried_again(status: int, words: str, server: Any, model: OpenAIBackend) -> None:
    server.plays(sends(b"<html>not here</html>", status, "text/html"))
    line = fails(model)
    assert words in line and "html" not in line and len(server.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("action", "words"),
    [
        (sends(b"<html>welcome</html>", kind="text/html"), "answers with text/html, not with JSON"),
        (sends(b'{"choices": [', kind="application/json"), "no chat completion"),
        (sends(b"[" * 100_000), "no chat completion"),
        (sends({"object": "list"}), "no chat completion"),
        (sends({"choices": []}), "no chat completion"),
        (streams(b"data: {oops\n\n"), "no chat completion but: '{oops'"),
        (sends({"error": {"message": "in a 200"}}), "gave up: in a 200"),
        (sends(answer(finish="content_filter")), "content filter"),
        (sends(answer(finish="tool_calls")), "called a tool"),
        (streams(piece("a"), piece(finish="error"), DONE), "in the middle"),
    ],
)
def test_answers_that_are_none(action: Any, words: str, stream: bool, server: Any, model: OpenAIBackend) -> None:
    server.plays(action)
    assert words in fails(model, stream)
    assert len(server.bodies) == 1


def test_answers_that_are_too_large(server: Any, model: OpenAIBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.backends.openai.http.MAX_BODY", 5000)
    monkeypatch.setattr("polymodal.backends.openai.answers.MAX_EVENT", 5000)
    server.plays(sends(answer("x" * 6000)), streams(piece("x" * 6000)), sends(b"x" * 70_000, 400))
    assert "larger than 5,000 bytes" in fails(model)
    assert "more than 5,000 bytes" in fails(model, stream=True)
    assert fails(model).endswith("400 Bad Request")
    assert len(server.bodies) == 3


def test_passing_failures_are_tried_again(server: Any, model: OpenAIBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("polymodal.backends.openai.http.time.sleep", waits.append)
    server.plays(sends({"error": {"message": "busy"}}, 503), sends(b"", 429, Retry_After="0.2"), sends(answer()))
    assert model.generate(HELLO).text == "Hi there" and len(server.bodies) == 3
    assert 0 < waits[0] < waits[1] == 0.2  # each after a wait, and as long as the server asks for
    waits.clear()
    monkeypatch.undo()
    server.plays(hangs_up, hangs(), streams(piece("a", "stop"), DONE))
    assert [event.text for event in model.stream(HELLO)] == ["a", "a"] and len(server.bodies) == 6
    server.plays(sends({"error": {"message": f"no quota for {KEY}"}}, 403))
    assert server.headers[-1]["authorization"] == f"Bearer {KEY}" and "no quota for ***" in fails(model)


def test_retries_end(server: Any, model: OpenAIBackend) -> None:
    server.plays(sends({"error": {"message": "overloaded"}}, 529))
    assert "529: overloaded; tried 3 times" in fails(model)
    assert len(server.bodies) == 3
    server.plays(sends({"error": {"message": "pay first", "code": "insufficient_quota"}}, 429))
    assert "pay first" in fails(model) and len(server.bodies) == 4


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = open_endpoint("tiny", base_url=f"http://127.0.0.1:{port}", patience=QUICK)
    assert "the connection failed" in fails(model)


def test_retry_after_is_honoured(server: Any, model: OpenAIBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("polymodal.backends.openai.http.time.sleep", waits.append)
    server.plays(sends(b"", 429, Retry_After="0.15"), sends(answer()))
    assert model.generate(HELLO).text == "Hi there" and waits == [0.15]
    server.plays(sends(b"", 503, Retry_After=formatdate(time.time() + 3600, usegmt=True)))
    assert "the server asks to wait 3" in fails(model)
    waits.clear()
    server.plays(sends(b"", 503))
    fails(model)
    assert len(waits) == 2 and 0.005 <= waits[0] <= 0.01 <= waits[1] <= 0.02


def test_retry_after_is_read_as_seconds_or_a_date() -> None:
    assert retry_after("7") == 7.0 and retry_after(" 0.5 ") == 0.5 and retry_after("-3") == 0.0
    assert retry_after("Wed, 21 Oct 2015 07:28:30 GMT", now=1445412500.0) == 10.0
    assert retry_after("Wed, 21 Oct 2015 07:28:30 GMT", now=1445419999.0) == 0.0
    assert [retry_after(bad) for bad in ("", "soon", "nan", "inf", "-inf", "99999999 BC")] == [None] * 6


def test_nothing_is_tried_again_once_text_has_come(server: Any, model: OpenAIBackend) -> None:
    for end, words in (
        (streams(piece("a"), piece("b")), "the stream ended before the answer did"),
        (streams(piece("a"), piece("b"), drop=True), "the connection failed"),
        (streams(piece("a"), piece("b"), pause=0.5), "no answer in time"),
        (streams(piece("a"), piece("b"), {"error": {"message": "lost a card", "code": 500}}), "gave up: lost a card"),
        (streams(piece("a"), piece("b"), b'data: {"choi'), "no chat completion"),
    ):
        server.plays(end)
        server.bodies.clear()
        said = []
        with pytest.raises(EndpointError, match=words):
            for event in model.stream(HELLO):
                said.append(event.text)
        assert "".join(said).startswith("a") and len(server.bodies) == 1


def test_errors_before_the_first_text_are_tried_again(server: Any, model: OpenAIBackend) -> None:
    start = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    busy = {"error": {"message": "busy", "code": 503}}
    server.plays(streams(start), streams(start, busy), streams(start, piece("a", "stop"), DONE))
    assert [event.text for event in model.stream(HELLO)] == ["a", "a"]
    server.plays(streams({"error": {"message": "never", "code": 400}}))
    assert "never" in fails(model, stream=True)


def test_slow_servers_run_into_the_limits(server: Any) -> None:
    begin = time.monotonic()
    patience = Patience(read_s=0.2, total_s=0.6, retries=0)
    model = open_endpoint("tiny", base_url=server.url, patience=patience)
    server.plays(hangs())
    assert "no answer in time" in fails(model, stream=True)
    server.plays(streams(*[b": ping\n\n"] * 100, pause=0.05))
    assert "took more than 0.6 s" in fails(model, stream=True)
    server.plays(hangs(2.0))
    assert "no answer in time" in fails(model)  # a whole answer may take all of the time
    assert time.monotonic() - begin < 4
    patient = open_endpoint("tiny", base_url=server.url, patience=Patience(total_s=0.5, first_wait_s=5.0))
    server.plays(sends(b"", 500))
    assert "0.5 s are over" in fails(patient)


def test_closing_a_stream_closes_the_connection(server: Any, model: OpenAIBackend) -> None:
    server.plays(streams(*[piece("word ")] * 500, pause=0.01))
    stream = model.stream(HELLO)
    assert isinstance(next(stream), TextDelta)
    stream.close()  # type: ignore[attr-defined]
    assert server.gone.wait(5.0)


def test_names_of_limits_are_learnt(server: Any, model: OpenAIBackend) -> None:
    unsupported = "Unsupported parameter: 'max_tokens' is not supported, use 'max_completion_tokens' instead."
    refuse = sends({"error": {"message": unsupported, "param": "max_tokens"}}, 400)
    server.plays(refuse, sends(answer()))
    assert model.generate(HELLO).text == "Hi there"
    model.generate(HELLO)
    names = [next(name for name in body if name.startswith("max_")) for body in server.bodies]
    assert names == ["max_tokens", "max_completion_tokens", "max_completion_tokens"]
    server.plays(sends({"error": {"message": "max_tokens and max_completion_tokens: at most 5"}}, 400))
    assert "at most 5" in fails(model)
    assert len(server.bodies) == 5
    server.plays(sends(answer()))
    model.generate(HELLO)
    assert "max_completion_tokens" in server.bodies[-1]


@pytest.mark.parametrize(
    ("refusal", "most"),
    [
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", 8192),
        ("Range of max_tokens should be [1, 2000]", 2000),
        ("max_tokens must be at most 100", 100),
        ("max_tokens has to lie in [1,512]", 512),
        ("max_tokens: 10000 > 4096, which is the maximum allowed number of output tokens for claude-3-20240307", 4096),
        ("max_tokens is too large: 10000. This model supports at most 4,096 completion tokens, you gave 10000.", 4096),
        ("maxOutputTokens is 10000 but the supported range is from 1 (inclusive) to 8193 (exclusive)", 8192),
        ("max_tokens must be less than 513", 512),
        ("`max_new_tokens` must be <= 1024. Given: 10000", 1024),
        ("max_tokens (10000) exceeds the limit of this model, which is 4000", 4000),
        ("1 <= max_tokens <= 8192 is wanted", 8192),
        ("max_tokens 不能超过 4096", 4096),
    ],
)
def test_a_limit_that_is_too_large_is_lowered(refusal: str, most: int, server: Any, model: OpenAIBackend) -> None:
    params = GenerationParams(max_new_tokens=10_000)
    server.plays(sends({"error": {"message": refusal}}, 400), sends(answer("cut", "length")))
    with pytest.warns(UserWarning, match=f"makes at most {most:,} tokens an answer"):
        assert model.generate(HELLO, params).finish_reason == "length"
    model.generate(HELLO, params)
    model.generate(HELLO, GenerationParams(max_new_tokens=7))
    assert [body.get("max_tokens") for body in server.bodies] == [10_000, most, most, 7]


@pytest.mark.parametrize(
    "refusal",
    [
        "max_tokens is out of range",
        "Expected a max_tokens value >= 16, but got 4 instead",
        "'max_tokens' or 'max_completion_tokens' is too large: 256. This model's maximum context length is 128 tokens "
        "and your request has 40 input tokens (256 > 128 - 40).",
    ],
)
def test_a_limit_that_nobody_knows_is_not_left_out(refusal: str, server: Any, model: OpenAIBackend) -> None:
    server.plays(sends({"error": {"message": refusal}}, 400), sends(answer()))
    assert refusal[:20] in fails(model) and len(server.bodies) == 1


def test_a_server_that_takes_no_temperature_0(server: Any, model: OpenAIBackend) -> None:
    text = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
    refuse = sends({"error": {"message": text, "param": "temperature"}}, 400)
    server.plays(refuse, sends(answer()))
    with pytest.warns(UserWarning, match="openai:tiny takes no temperature 0"):
        model.generate(HELLO)
    model.generate(HELLO, GenerationParams(temperature=1.0))
    assert [body.get("temperature") for body in server.bodies] == [0.0, None, 1.0]
    server.plays(refuse)
    with pytest.raises(EndpointError, match="Only the default"):  # what somebody asked for is not left out
        model.generate(HELLO, GenerationParams(temperature=0.7))


def test_a_server_without_stream_options(server: Any, model: OpenAIBackend) -> None:
    refuse = sends({"error": {"message": "Unknown field stream_options"}}, 400)
    server.plays(refuse, streams(piece("a", "stop"), DONE))
    for _ in range(2):
        assert [event.text for event in model.stream(HELLO)] == ["a", "a"]
    assert [("stream_options" in body) for body in server.bodies] == [True, False, False]


def test_redirects_to_another_host_are_refused(server: Any, model: OpenAIBackend) -> None:
    other = server.root.replace("127.0.0.1", "127.0.0.2")
    for status, target in (
        (307, f"{other}/v1"), (308, "https://evil.example/x"), (302, "/v2"), (307, "//evil.example"), (307, ""),
        (307, "http://[bad"), (307, server.url.replace("http:", "https:")),
        (307, f"http://127.0.0.1:{server.http.server_address[1] % 65535 + 1}/v1/chat/completions"),
    ):  # fmt: skip
        server.paths.clear()
        server.plays(sends(b"", status, Location=target))
        line = fails(model)
        assert "redirects" in line and len(server.paths) <= 4
        if status != 307 or target:  # another port is another server
            assert "refused" in line and server.paths == ["/v1/chat/completions"]
    server.plays(sends(b"", 307, Location="/moved/here"), sends(answer()))
    assert model.generate(HELLO).text == "Hi there"
    assert server.paths[-1] == "/moved/here" and server.headers[-1]["authorization"] == f"Bearer {KEY}"
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_the_key_is_nowhere_to_be_seen(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    model = open_endpoint("tiny", base_url=f"{server.url}?api-version=1&secret=s3cr3t", api_key=KEY, patience=QUICK)
    server.plays(sends(answer()), sends({"error": {"message": f"bad key {KEY}"}}, 401))
    model.generate(HELLO)
    assert server.paths == ["/v1/chat/completions?api-version=1&secret=s3cr3t"]
    lines = [fails(model)]
    for echo in (f'"{KEY}"', f'{{"echo": "{KEY}"}}', "x" * 70 + KEY):
        server.plays(sends(echo.encode()))
        lines.append(fails(model))
    server.plays(streams(f"data: {KEY}\n\n".encode()))
    lines.append(fails(model, stream=True))
    assert "***" in lines[-1]
    lines += [repr(model), str(model), repr(model.endpoint), repr(vars(model.endpoint)["_key"])]
    assert not any(KEY in line or KEY in str(vars(model)) for line in [*lines, caplog.text])
    assert not any("s3cr3t" in line for line in lines)


@pytest.mark.parametrize("key", ["x", "token", "max", "test", "EMPTY", "completion"])
def test_a_key_that_is_a_word_is_hidden_where_it_is_the_key(key: str, server: Any) -> None:
    said = f"max_tokens, texts, tokens, EMPTYING and completions {key}ed; the key '{key}' is wrong"
    server.plays(sends({"error": {"message": said}}, 401))
    line = fails(open_endpoint("tiny", base_url=server.url, api_key=key, patience=QUICK))
    assert said.replace(f"'{key}'", "'***'") in line
    real = "sk-12345678"
    server.plays(sends({"error": {"message": f"bad{real}x"}}, 401))
    assert "bad***x" in fails(open_endpoint("tiny", base_url=server.url, api_key=real, patience=QUICK))


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a b", "sk-‘a’", "ключ"])
def test_a_damaged_key_is_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="copy it again") as caught:
        Endpoint("https://host/v1", key)
    assert key not in str(caught.value)
    assert Endpoint("https://host/v1", " sk-a\n").shown == "https://host/v1/chat/completions"


def test_a_key_does_not_travel_openly() -> None:
    for url in ("http://192.168.1.5:8000/v1", "http://models.example/v1"):
        with pytest.raises(ConfigError, match="would travel openly"):
            Endpoint(url, KEY)
        Endpoint(url, KEY, allow_http=True)
        Endpoint(url)
    for url in ("http://127.0.0.1:8000", "http://localhost/v1", "http://[::1]:8000/v1", "https://models.example/v1"):
        Endpoint(url, KEY)


def test_settings_of_the_environment_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://h")
    with pytest.raises(ConfigError, match="proxy or certificate settings"):
        Endpoint("https://host/v1")
    Endpoint("http://127.0.0.1/v1")  # no proxy stands before this machine


def test_addresses() -> None:
    assert Endpoint("https://h/v1/").shown == "https://h/v1/chat/completions"
    assert Endpoint("https://h/v1/chat/completions?a=b#c").shown == "https://h/v1/chat/completions"
    for bad in ("h/v1", "ftp://h", "https://", "https://h:port/v1", "http://[bad", "", "https://h:99999/v1"):
        with pytest.raises(ConfigError, match="base URL"):
            Endpoint(bad)
    with pytest.raises(ConfigError, match="holds a user name") as caught:
        Endpoint("https://me:pa55word@h/v1")
    assert "pa55word" not in str(caught.value)


def test_load_reads_the_environment(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY, or the address"):
        load("openai:gpt-4o")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    model = load("openai:gpt-4o")
    assert isinstance(model, OpenAIBackend) and model.endpoint.shown == "https://api.openai.com/v1/chat/completions"
    assert model.name == "openai:gpt-4o"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.plays(sends(answer("one")), sends(answer("two")))
    assert load("openai:a/b:c").ask("What?", PILImage.new("RGB", (4, 4))) == "one"
    assert load("openai:x", api_key="", base_url=f"{server.root}/other").ask("What?") == "two"
    assert [body["model"] for body in server.bodies] == ["a/b:c", "x"]
    assert server.paths[1] == "/other/chat/completions"
    assert "authorization" in server.headers[0] and "authorization" not in server.headers[1]
    for wrong, match in (
        (lambda: load("openai:"), "needs a model's name"),
        (lambda: load("openai:x", "cuda"), "leave device out"),
        (lambda: load("default", api_key="x"), "are for endpoints"),
    ):
        with pytest.raises(ConfigError, match=match):
            wrong()
    with pytest.raises(CheckpointError, match="behind an endpoint"):
        load_processor("openai:x")


def test_a_text_alone_and_dictionaries(server: Any, model: OpenAIBackend) -> None:
    server.plays(sends(answer()))
    model.generate("Hello")
    model.generate([{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Q"}]}])
    *_, reply = model.stream("Hello")
    assert reply.text == "Hi there" and model.generate_batch(["a", "b"], GenerationParams()) == ["Hi there"] * 2
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert server.bodies[1]["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]


def test_settings_that_cannot_be_sent_are_refused(server: Any, model: OpenAIBackend) -> None:
    for params in (GenerationParams(top_k=3), GenerationParams(repetition_penalty=1.1)):
        with pytest.raises(ConfigError, match="no part of OpenAI's API"):
            model.generate(HELLO, params)
    for messages in ([], [user("a"), assistant("b")]):
        with pytest.raises(PolymodalError, match="must end with a user message"):
            model.generate(messages)
    server.plays(sends(answer()))
    open_endpoint("tiny", base_url=server.url, extra={"top_k": 5, "temperature": 1}).generate(HELLO)
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 256,
            "temperature": 1,
            "top_k": 5,
        }
    ]


def test_a_batch_keeps_its_failures(server: Any, model: OpenAIBackend) -> None:
    def by_question(handler: Any) -> None:
        asked = server.bodies[-1]["messages"][-1]["content"]
        sends(answer(f" {asked}! "), 400 if asked == "bad" else 200)(handler)

    lock = threading.Lock()

    def one_at_a_time(handler: Any) -> None:
        with lock:
            by_question(handler)

    server.plays(one_at_a_time)
    first, last = model.generate_batch([[user("a")], [user(Image("absent.png"), "x")]], GenerationParams())
    assert first == "a!" and isinstance(last, MediaError)
    assert isinstance(model.generate_batch([[user("bad")]], GenerationParams())[0], EndpointError)
    server.plays(sends(answer("same")))
    many = model.generate_batch([[user(str(i))] for i in range(20)], GenerationParams())
    assert many == ["same"] * 20
    assert {body["messages"][0]["content"] for body in server.bodies} >= {str(i) for i in range(20)}


def decoded(part: dict[str, Any]) -> tuple[str, bytes]:
    head, _, payload = part[part["type"]]["url"].partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(payload)


def test_parts_keep_their_order_and_images_their_bytes(image_folder: Path) -> None:
    jpeg = image_folder / "cat.jpg"
    drawn = PILImage.new("RGB", (5, 4), (1, 2, 3))
    (message,) = to_openai([user("One: ", Image(jpeg), "", Image(drawn), "compare")], Sending(detail="low"))
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "image_url", "text"]
    assert decoded(message["content"][1]) == ("image/jpeg", jpeg.read_bytes())
    assert all(part["image_url"]["detail"] == "low" for part in message["content"][1:3])
    kind, data = decoded(message["content"][2])
    with PILImage.open(io.BytesIO(data)) as image:
        assert kind == "image/png" and image.size == (5, 4) and image.getpixel((0, 0)) == (1, 2, 3)
    assert "detail" not in to_openai([user(Image(drawn))])[0]["content"][0]["image_url"]
    assert to_openai([user("a", "b"), assistant("c")]) == [
        {"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}
    ]  # fmt: skip


def encoded(image: PILImage.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def test_images_that_are_drawn_anew() -> None:
    red = PILImage.new("RGB", (8, 6), "red")
    for kind in ("PNG", "JPEG"):
        for image in (red, red.convert("L")):
            data = encoded(image, kind)
            assert image_bytes(data) == (f"image/{kind.lower()}", data)
    phone = encoded(red, "MPO", save_all=True, append_images=[red.resize((4, 3))])
    assert image_bytes(phone) == ("image/jpeg", phone)
    for data in (
        encoded(red, "BMP"),
        encoded(red, "TIFF"),
        encoded(red, "WEBP"),
        encoded(red, "GIF"),
        encoded(red.convert("P"), "PNG"),
        encoded(red, "GIF", save_all=True, append_images=[PILImage.new("RGB", (8, 6), "blue")]),
    ):
        kind, sent = image_bytes(data)
        assert kind == "image/png" and PILImage.open(io.BytesIO(sent)).size == (8, 6)
    flat = encoded(PILImage.new("RGB", (60, 60)), "PNG", compress_level=0)
    kind, sent = image_bytes(flat, limit=2000)  # too large as it is, small enough anew
    assert kind == "image/png" and len(sent) <= 2000 < len(flat)
    noisy = PILImage.effect_noise((100, 100), 90)
    with pytest.raises(MediaError, match=r"at most 2,000 are sent; scale it down"):
        image_bytes(encoded(noisy, "PNG"), limit=2000)
    with pytest.raises(MediaError, match="damaged or cut off"):
        image_bytes(encoded(noisy, "PNG")[:500])
    kind, sent = image_bytes(encoded(noisy.convert("RGB"), "BMP"), limit=16_000)  # larger than that as a PNG
    assert kind == "image/jpeg" and len(sent) <= 16_000


def test_a_photograph_that_is_turned_stays_small() -> None:
    rng = np.random.default_rng(0)
    coarse = PILImage.fromarray(rng.integers(0, 256, (150, 200, 3), dtype=np.uint8)).resize((2400, 1800))
    grainy = np.asarray(coarse, int) + rng.integers(-12, 13, (1800, 2400, 3))
    photo = PILImage.fromarray(grainy.clip(0, 255).astype(np.uint8))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    for data in (encoded(photo, "MPO", quality=90, exif=exif), encoded(photo, "BMP")):
        kind, sent = image_bytes(data)
        assert kind == "image/jpeg" and len(sent) < 3_500_000
        assert PILImage.open(io.BytesIO(sent)).size == open_image(data).size


def seen(data: bytes) -> PILImage.Image:
    """What a server sees that looks at pixels only."""
    return PILImage.open(io.BytesIO(image_bytes(data)[1])).convert("RGB")


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_images_are_sent_upright(kind: str, orientation: int) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encoded(PILImage.linear_gradient("L").resize((96, 64)).convert("RGB"), kind, exif=exif)
    upright = open_image(data)
    sent, expected = np.asarray(seen(data), int), np.asarray(upright, int)
    assert sent.shape == expected.shape and np.abs(sent - expected).max() <= 6
    assert image_bytes(data)[0] == ("image/jpeg" if kind in ("JPEG", "MPO") else "image/png")


def test_images_are_sent_as_our_own_models_see_them() -> None:
    clear = PILImage.new("RGBA", (8, 8))
    clear.putpixel((3, 3), (255, 0, 0, 255))
    marked = PILImage.new("P", (4, 4))
    deep = PILImage.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    depth = 16  # of colour, which Pillow cannot write
    header = struct.pack(">2I5B", 2, 1, depth, 2, 0, 0, 0)
    lines = b"\0" + struct.pack(">6H", 65535, 0, 0, 257 * 100, 257 * 7, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    wide = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    moving = encoded(clear.convert("RGB"), "PNG", save_all=True, append_images=[PILImage.new("RGB", (8, 8), "blue")])
    for data in (
        encoded(clear, "PNG"), encoded(clear.convert("LA"), "PNG"), encoded(marked, "PNG", transparency=0), wide,
        moving, encoded(deep, "PNG"), encoded(clear, "WEBP", lossless=True),
        encoded(clear.convert("P"), "GIF", transparency=0),
    ):  # fmt: skip
        kind, sent = image_bytes(data)
        assert kind == "image/png" and sent != data and PILImage.open(io.BytesIO(sent)).mode == "RGB"
        assert np.array_equal(np.asarray(seen(data)), np.asarray(open_image(data)))
    inks = encoded(clear.convert("RGB").convert("CMYK"), "JPEG")
    assert image_bytes(inks)[0] == "image/jpeg" and PILImage.open(io.BytesIO(image_bytes(inks)[1])).mode == "RGB"


def test_sounds_and_videos(tmp_path: Path) -> None:
    wav, mp3, mp4 = b"RIFF\0\0\0\0WAVEfmt ", b"ID3\x03more", b"\0\0\0\x18ftypisom"
    (tmp_path / "a.mp4").write_bytes(mp4)
    (message,) = to_openai(
        [user(Audio(wav), Audio(mp3), Audio(b"\xff\xfb\x90\0"), Video(tmp_path / "a.mp4"), Video(b"\x1aE\xdf\xa3x"))]
    )
    sounds = [part["input_audio"] for part in message["content"][:3]]
    assert [sound["format"] for sound in sounds] == ["wav", "mp3", "mp3"]
    assert base64.b64decode(sounds[0]["data"]) == wav
    assert [decoded(part) for part in message["content"][3:]] == [("video/mp4", mp4), ("video/webm", b"\x1aE\xdf\xa3x")]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user(Document("absent.pdf"))], "absent.pdf: no such file"),
        ([user(Audio(b"OggS...."))], "sound of 8 bytes: "),
        ([user(Video(b"not a video"))], "is not a video that can be read"),
        ([user(Video("absent.mp4"))], "absent.mp4: no such file"),
        ([user(Audio(PILImage.new("L", (2, 2))))], "give it as an Image part"),
        ([user(Image(b"no image"))], "is not an image"),
        ([user(Image("absent.png"))], "no such file"),
        ([user(Image("https://example.com/a.png"))], "remote fetch is off"),
        ([assistant(Image(b"x")), user("?")], "not the assistant's"),
        ([user("half \ud83d")], "half of a surrogate pair"),
        ([user("a"), replace(assistant("b"), reasoning_content="c"), user("d")], "reasoning and tools cannot be given"),
        ([user("a"), assistant("b"), Message("tool", ())], "message 3: reasoning and tools cannot be given"),
        ([user("a"), assistant(""), user("b")], "message 2: the assistant's turn says nothing"),
        ([system("s"), user("a"), assistant(" \n", ""), user("b")], "message 3: the assistant's turn says nothing"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_sent(messages: Any, words: str) -> None:
    with pytest.raises(PolymodalError, match=words):
        to_openai(messages)


def test_events_of_any_shape() -> None:
    def read(*chunks: bytes) -> list[str]:
        return list(read_events(chunks))

    assert read(b"data:a\ndata: b\n\ndata:  c\n\n") == ["a\nb", " c"]
    assert read(b"\xef\xbb\xbfdata: a\r", b"\n\r", b"\ndata: b") == ["a", "b"]
    assert read(b"data: a\r\r", b"data: b\r\r") == ["a", "b"]
    assert read(b"data\n\n: c\nretry: 5\n\nid: 1\n\n", b"\n\n\n") == []
    with pytest.raises(EndpointError, match="more than"):
        read(b"data: ", *[b"x" * (1 << 20)] * 9)
    with pytest.raises(EndpointError, match="more than"):
        read(*[b"data: " + b"x" * (1 << 20) + b"\n"] * 9)


def test_clean() -> None:
    assert clean("a\x00\x1b[2J\u202eb\r\n\tc\ud83d") == "a[2Jb c"
    assert len(clean("word " * 1000, 50)) == 50


def test_generate_and_eval_on_the_command_line(
    server: Any, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cat = str(image_folder / "cat.jpg")
    ask = ["generate", "--model", "openai:tiny", "--base-url", server.url, "--image", cat, "--prompt", "What?"]
    server.plays(sends(answer("A cat.")))
    assert main([*ask, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["text"] == "A cat." and made["usage"]["image_tokens"] == 7
    assert made["timing"]["encode_s"] is None and made["timing"]["tokens_per_s"] is None
    server.plays(sends({**answer(), "usage": None}))
    assert main([*ask, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["usage"].values()) == {None}
    server.plays(streams(piece("A "), piece("cat.", "stop"), DONE))
    assert main([*ask, "--stream"]) == 0
    assert capsys.readouterr().out == "A cat.\n"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main([*ask[:4], "http://models.example/v1", "--prompt", "x"]) == 2
    assert "--allow-http" in capsys.readouterr().err

    def grey_is_unknown(handler: Any) -> None:
        url = server.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
        sends(answer("cat" if "jpeg" in url[:20] else "nothing"))(handler)

    rows = [
        {"id": str(n), "image": name, "kind": "name", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "cat"}]}
        for n, name in enumerate(["cat.jpg", "absent.jpg"])
    ]  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(rows))
    shutil.copy(cat, tmp_path)
    server.plays(grey_is_unknown)
    argv = ["eval", "openai:tiny", "--base-url", server.url, "--data", str(tmp_path / "val.json"), "--no-cache"]
    assert main([*argv, "--output", str(tmp_path / "out"), "--json", str(tmp_path / "scores.json")]) == 1
    items = json.loads((tmp_path / "scores.json").read_text())["items"]
    assert [(item["answer"], item["blind"], item["score"]) for item in items] == [
        ("cat", "nothing", 1.0),
        (None, None, 0.0),
    ]
    assert "absent.jpg" in items[1]["error"] and "1 of 2 items failed" in capsys.readouterr().out


def test_chat_on_the_command_line(
    server: Any, image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cat = str(image_folder / "cat.jpg")
    server.plays(streams(piece("A cat.", "stop"), DONE), sends({"error": {"message": "tired"}}, 400))
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this?\nand now?\n"))
    assert main(["chat", cat, "--model", "openai:tiny", "--base-url", server.url]) == 2
    out, err = capsys.readouterr()
    assert out == "A cat.\n" and f"{cat}: 451 × 300 pixels" in err and "400 Bad Request: tired" in err
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_an_endpoint_needs_no_torch() -> None:
    script = (
        "import sys, polymodal; polymodal.load('openai:x', base_url='http://localhost'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

"""The official client asks; answers are those of the model itself, whole or piece by piece."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image as PILImage

from polymodal import cli
from polymodal.backends.base import Reply, TextDelta
from polymodal.errors import CheckpointError, EndpointError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Document, Image, Message, Part, Text, Video, system, user
from polymodal.serving.app import Limits
from polymodal.serving.server import OneLine, is_loopback
from tests.media.makers import clip, many_pages, tone
from tests.serving.conftest import Running

openai = pytest.importorskip("openai")

KEY = "k" * 32
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def client(server: Running, key: str = "none") -> Any:
    web = httpx2.Client(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, http_client=web)


def packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{packed(data)}"


def png(colour: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def parts_of(kind: str, folder: Path) -> tuple[list[Any], list[Part]]:
    """Parts of a question as a client writes them, and as ours."""
    if kind == "image":
        data = png((200, 30, 30, 90))
        return [{"type": "image_url", "image_url": {"url": url(data, "image/png")}}], [Image(data)]
    if kind == "audio":
        data = tone(folder / "a.wav").read_bytes()
        return [{"type": "input_audio", "input_audio": {"data": packed(data), "format": "wav"}}], [Audio(data)]
    if kind.startswith("video"):
        data = clip(folder / "a.mp4").read_bytes()
        inner = {"url": url(data, "video/mp4")} if kind == "video_url" else {"data": packed(data)}
        name = "video_url" if kind == "video_url" else "input_video"
        return [{"type": name, name: inner}], [Video(data)]
    if importlib.util.find_spec("pypdfium2") is None:
        pytest.skip("needs the extra `documents`")
    data = many_pages(2)
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": url(data, "application/pdf")}}
    return [part], [Document(data)]


@pytest.mark.parametrize("kind", ["text", "image", "audio", "video_url", "video", "pdf"])
def test_an_answer_is_the_models_own(kind: str, tiny: Running, tmp_path: Path) -> None:
    theirs, ours = parts_of(kind, tmp_path) if kind != "text" else ([], [])
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": [*theirs, {"type": "text", "text": "What is it?"}]},
    ]
    said: list[Message] = [system("Be brief."), user("One?"), Message("assistant", (Text("Two."),)),
                           user(*ours, "What is it?")]  # fmt: skip
    expected = tiny.backend.generate(said, GenerationParams(max_new_tokens=10))
    answer = client(tiny).chat.completions.create(model="tiny", messages=messages, max_tokens=10)
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason == "length"
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.usage.prompt_tokens, 10)
    assert usage.total_tokens == usage.prompt_tokens + 10
    heard = usage.prompt_tokens_details.audio_tokens
    assert heard == (expected.usage.image_tokens if kind == "audio" else 0)
    assert usage.prompt_tokens_details.image_tokens == expected.usage.image_tokens - heard
    assert (expected.usage.image_tokens > 0) == (kind != "text")


def test_pieces_add_up_to_the_answer(tiny: Running) -> None:
    asked: dict[str, Any] = {**ASK, "max_completion_tokens": 16}
    whole = client(tiny).chat.completions.create(**asked)
    stream = client(tiny).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    told, whole.usage.prompt_tokens_details = chunks[-1].usage.prompt_tokens_details, None
    assert told.cached_tokens == whole.usage.prompt_tokens - 1  # the same question was read before
    chunks[-1].usage.prompt_tokens_details = None
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1 and all(c.object == "chat.completion.chunk" for c in chunks)
    response = tiny.post({**asked, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n") and '"usage"' not in response.text


def test_sampling_reaches_the_model(tiny: Running) -> None:
    def ask(**options: Any) -> Any:
        return client(tiny).chat.completions.create(**{**ASK, "max_tokens": 20, **options})

    drawn = GenerationParams(max_new_tokens=20, temperature=1.5, top_p=0.9, seed=7)
    first, second = (tiny.backend.generate("hi", drawn.model_copy(update={"seed": seed})).text for seed in (7, 8))
    answer = ask(temperature=1.5, top_p=0.9, seed=7, n=2)
    assert [choice.message.content for choice in answer.choices] == [first, second] and first != second
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage.completion_tokens == 40
    penal = GenerationParams(max_new_tokens=20, temperature=1.5, top_k=5, repetition_penalty=1.9, seed=3)
    answer = ask(temperature=1.5, seed=3, extra_body={"top_k": 5, "repetition_penalty": 1.9})
    assert answer.choices[0].message.content == tiny.backend.generate("hi", penal).text
    text = ask().choices[0].message.content
    stop = next(text[at] for at in range(3, len(text)) if text[at] not in text[:at])
    stopped = ask(stop=[stop, "\x00never"])
    assert stopped.choices[0].message.content == text.partition(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_what_asks_for_nothing_is_taken(tiny: Running) -> None:
    idle = {"presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "response_format": {"type": "text"},
            "tools": [], "tool_choice": "none", "logit_bias": {}, "user": None, "functions": None}  # fmt: skip
    answer = tiny.post({**ASK, **idle})
    assert answer.status_code == 200
    # What an assistant said goes back as the client's own object writes it, nulls and all.
    said = answer.json()["choices"][0]["message"]
    assert said["refusal"] is None
    again = {**ASK, "messages": [*ASK["messages"], {**said, "tool_calls": None, "audio": None}, *ASK["messages"]]}
    assert tiny.post(again).status_code == 200


def test_names_of_special_tokens_are_plain_text(tiny: Running) -> None:
    for text in ("<image> </s>", "<|im_start|>system", "<|im_end|>", "<|endoftext|>"):
        answer = tiny.post({**ASK, "messages": [{"role": "user", "content": text}]}).json()
        expected = tiny.backend.generate(text, GenerationParams(max_new_tokens=12))
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 0


def test_models_and_health(tiny: Running) -> None:
    (found,) = client(tiny).models.list().data
    assert found.id == "tiny" and found == client(tiny).models.retrieve("tiny")
    assert found.modalities == {"input": ["text", "image", "video", "audio"], "output": ["text"]}
    with pytest.raises(openai.NotFoundError):
        client(tiny).models.retrieve("../tiny")
    assert tiny.get("/health").status_code == tiny.get("/ready").status_code == 200


def test_a_request_fails_alone(told: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model, server = told()
    model.steps.release(1000)
    for fault, status, code in (
        (RuntimeError("secret /home/x\nforged line"), 500, "internal_error"),
        (MemoryError(), 503, "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 503, "out_of_memory"),
        (SystemExit("a panic"), 500, "internal_error"),
        (EndpointError("http://secret.example: said no"), 502, "upstream_error"),
        (CheckpointError("/secret/folder: is gone"), 500, "internal_error"),
        (PolymodalError("the text is odd; mend it"), 400, None),
    ):
        model.fault = fault
        with caplog.at_level(logging.INFO, "polymodal.serving"):
            answer = server.post(ASK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert "secret" not in answer.text
        streamed = server.post({**ASK, "stream": True})
        assert streamed.status_code == status  # nothing had been said yet
        model.fault = None
        assert server.post(ASK).status_code == 200
    lines = [OneLine().format(record) for record in caplog.records]
    assert any("secret" in line for line in lines) and not any("\n" in line for line in lines)


def test_a_stream_that_breaks_says_so(told: Callable[..., Any]) -> None:
    model, server = told()

    def breaks() -> None:
        model.begun.wait(10)
        while model.made < 2:
            time.sleep(0.01)
        model.fault = RuntimeError('"quotes" {')
        model.steps.release()

    model.steps.release(2)
    thread = threading.Thread(target=breaks)
    thread.start()
    events = server.post({**ASK, "stream": True}).text.split("\n\n")
    thread.join()
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert events[-2] == "data: [DONE]" and "word " in events[1]


def asking(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection over which a question was sent and no answer was read."""
    sent = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_request_along(stream: bool, told: Callable[..., Any]) -> None:
    model, server = told()
    with asking(server, {**ASK, "max_tokens": 60, "stream": stream}) as connection:
        assert model.begun.wait(10)
        model.steps.release(2)
        if stream:
            while b"word" not in connection.recv(4096):
                pass
    for _ in range(40):  # a step every now and then, until one finds that nobody waits
        time.sleep(0.05)
        model.steps.release()
        if model.closed.is_set():
            break
    assert model.closed.is_set() and model.made < 45
    model.steps.release(100)
    assert server.post(ASK).status_code == 200


def test_a_client_that_does_not_read_is_left(told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.serving.server.SEND_S", 0.3)
    model, server = told()
    model.word = 500_000 * "w"
    with asking(server, {**ASK, "max_tokens": 60, "stream": True}):
        assert model.begun.wait(10)
        model.steps.release(40)
        deadline = time.monotonic() + 10
        while not model.closed.is_set() and time.monotonic() < deadline:
            time.sleep(0.1)
            if model.made >= 40:
                time.sleep(0.5)
                model.steps.release()
        assert model.closed.is_set() and model.made < 60


def test_a_client_that_goes_gives_its_place_in_the_queue_back(told: Callable[..., Any]) -> None:
    model, server = told(queue=1)
    first = threading.Thread(target=server.post, args=(ASK,))
    first.start()
    assert model.begun.wait(10)
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=0.5, trust_env=False)
    deadline = time.monotonic() + 10
    while server.scheduler._waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.scheduler._waiting
    model.steps.release(1000)
    first.join()
    assert server.post(ASK).status_code == 200 and model.made == 24  # of two requests, not of three


def test_a_full_queue_says_when_to_come_back(told: Callable[..., Any]) -> None:
    model, server = told(queue=2)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(server.post({**ASK, "max_tokens": 2}))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert model.begun.wait(10)
    while len(server.scheduler._waiting) < 2:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError) as refused:
        client(server).chat.completions.create(**ASK)
    assert int(refused.value.response.headers["retry-after"]) >= 1 and refused.value.code == "queue_full"
    model.steps.release(1000)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert server.post(ASK).status_code == 200


def test_many_at_once(told: Callable[..., Any]) -> None:
    """Each is answered whole or told to come back; as many as there is room for are answered."""
    model, server = told(queue=4)
    model.steps.release(10_000)
    with ThreadPoolExecutor(40) as pool:
        answers = [answer.result() for answer in [pool.submit(server.post, ASK) for _ in range(120)]]
    assert {answer.status_code for answer in answers} == {200, 429}
    whole = [answer for answer in answers if answer.status_code == 200]
    assert len(whole) >= 5 and all(a.json()["choices"][0]["message"]["content"] == 12 * "word " for a in whole)
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_time_ends_a_request_and_a_stalled_model_is_not_ready(told: Callable[..., Any]) -> None:
    model, server = told(timeout=0.4, limits=Limits(stall_s=0.1))
    answer = server.post(ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
    assert server.get("/ready").status_code == 503 and server.get("/health").status_code == 200
    model.steps.release(1000)
    assert model.closed.wait(10)
    assert server.post(ASK).status_code == 200 and server.get("/ready").status_code == 200


def test_a_slow_start_is_bridged_by_pings(told: Callable[..., Any]) -> None:
    model, server = told(limits=Limits(first_s=0.1))
    timer = threading.Timer(0.5, model.steps.release, (1000,))
    timer.start()
    assert server.post({**ASK, "stream": True}).text.startswith(": ping\n\n")


def test_the_key_is_needed_everywhere_but_for_health(told: Callable[..., Any]) -> None:
    model, server = told(key=KEY, loopback=False)
    model.steps.release(1000)
    assert client(server, KEY).chat.completions.create(**ASK).choices[0].message.content
    for key in ("none", KEY[:-1], KEY + "k"):
        with pytest.raises(openai.AuthenticationError):
            client(server, key).models.list()
    for path in ("/v1/models", "/v1/models/tiny", "/docs", "/metrics", f"/v1/models?key={KEY}"):
        answer = server.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")]
    assert server.get("/v1/models", headers=twice).status_code == 401
    for wrong in (f"Basic {KEY}".encode(), "Bearer ключ".encode(), b"Bearer \xff", b"", b"Bearer " + 5000 * b"x"):
        assert server.get("/v1/models", headers={b"Authorization": wrong}).status_code == 401
    assert server.get("/health").status_code == server.get("/ready").status_code == 200


def test_strange_pages_and_names_are_refused(tiny: Running) -> None:
    for host in (
        "evil.example",
        f"evil.example:{tiny.port}",
        "localhost.evil.example",
        "[::1",
        "127.0.0.1@evil.example:1",
    ):
        assert tiny.get("/v1/models", headers={"Host": host}).status_code == 403
    for origin in ("http://evil.example", "null", "http://localhost:1", f"http://localhost.evil.example:{tiny.port}"):
        assert tiny.post(ASK, headers={"Origin": origin}).status_code == 403
    for host in (f"localhost:{tiny.port}", "127.0.0.1", "[::1]:80"):
        same = {"Host": host, "Origin": f"http://{host}"}
        answer = tiny.get("/v1/models", headers=same)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "a key is needed"),
        (["--host", "::"], "a key is needed"),
        (["--host", "192.0.2.7"], "a key is needed"),
        (["--api-key-env", "NO_SUCH_KEY"], "16 or more"),
        (["--api-key-file", "/no/such/file"], "no such file"),
        (["--port", "99999999"], "--port must be"),
        (["--host", "no such host", "--api-key-env", "SERVE_KEY"], "cannot be used"),
        (["--queue", "0"], "--queue must be"),
        (["--timeout", "nan"], "--timeout must be"),
    ],
)
def test_a_wrong_flag_is_told_before_a_model_is_opened(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_KEY", KEY)
    assert cli.main(["serve", "--model", "/no/such/model", *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--model", "/no/such/model", "--port", str(taken.getsockname()[1])]) == 2
    assert "give another port" in capsys.readouterr().err


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "192.168.0.1", "localhost.example")))


def test_the_command_answers_and_drains(senses_folder: Path, tmp_path: Path) -> None:
    """From the command line: it says where it is, answers, and at SIGTERM ends the answer under way, then itself."""
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    command = [sys.executable, "-m", "polymodal", "serve", "--model", str(senses_folder), "--port", "0",
               "--api-key-file", str(key), "--name", "tiny"]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "is served at" in line)
        port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
        server = Running.__new__(Running)
        server.url = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                assert server.get("/health").status_code == 200
                break
            except Exception:
                time.sleep(0.1)
        asked: dict[str, Any] = {**ASK, "max_tokens": 200, "stream": True}
        pieces = iter(client(server, KEY).chat.completions.create(**asked))
        first = next(pieces)
        process.send_signal(signal.SIGTERM)
        rest = list(pieces)
        assert first.choices[0].delta.role == "assistant" and rest[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()


def test_every_step_can_be_stopped(tiny: Running) -> None:
    """Steps that make no text for sure are told too, so that a request ends within one."""
    events = list(tiny.backend.stream("hi", GenerationParams(max_new_tokens=30)))
    reply = events[-1]
    assert isinstance(reply, Reply) and reply.usage.completion_tokens is not None
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert len(deltas) >= reply.usage.completion_tokens and "".join(d.text for d in deltas) == reply.text

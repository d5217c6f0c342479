"""Hard times: connections many or slow, damaged files, no memory, no disk, a clock that jumps, sudden death."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

import polymodal.serving
from polymodal.serving.bodies import Limits
from polymodal.utils.files import atomic_folder, write_text
from tests.conftest import tiny_config, write_tiny_llm
from tests.media.makers import many_pages, tone
from tests.serving.conftest import Running, running

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def asks(*content: Any, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": list(content) or "hi"}], **options}


def url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data, "image/png")}}


def photo(form: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    buffer = io.BytesIO()
    y, x = np.mgrid[: size[1], : size[0]]
    PILImage.fromarray(np.stack([x * 5 % 256, y * 7 % 256, x * y % 256], -1).astype(np.uint8)).save(
        buffer, form, **options
    )
    return buffer.getvalue()


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


# Connections


def test_hundreds_of_idle_connections_keep_nobody_out(told: Callable[..., Any]) -> None:
    """Row 8: they are closed as soon as there are too many, and long before the time that a head may take."""
    model, server = told()
    model.steps.release(1000)
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(500)]
        for number, connection in enumerate(idle):
            if number % 2:
                connection.sendall(b"GET /health HT")
        time.sleep(1.2)
        begin = time.monotonic()
        assert server.post(asks()).status_code == 200
        assert time.monotonic() - begin < 3
        closed = 0
        for connection in idle:
            connection.settimeout(5)
            try:
                closed += connection.recv(100) == b""
            except ConnectionResetError:
                closed += 1
        assert closed == 500


def test_slow_bodies_keep_nobody_out(told: Callable[..., Any]) -> None:
    """Row 8: bodies that come a byte now and then hold no place of those that are read."""
    model, server = told(limits=Limits(body_s=3))
    model.steps.release(1000)
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(server)) for _ in range(20)]
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 900\r\n\r\n{")
        time.sleep(0.3)
        begin = time.monotonic()
        assert server.post(asks()).status_code == 200
        assert time.monotonic() - begin < 1.5
        for connection in slow:
            assert connection.recv(100).split(b" ")[1] == b"408"


def test_large_bodies_wait_for_each_other(told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 7: of bodies beyond a small one, only a few are held at the same time."""
    monkeypatch.setattr("polymodal.serving.bodies.SMALL", 100_000)
    model, server = told(limits=Limits(body_s=1.5))
    model.steps.release(1000)
    with ExitStack() as stack:
        half = [stack.enter_context(connect(server)) for _ in range(6)]
        for connection in half:
            connection.sendall(HEAD + b"Content-Length: 900000\r\n\r\n" + b" " * 300_000)
        assert server.post(asks()).status_code == 200  # a small one passes them by
        assert {connection.recv(100).split(b" ")[1] for connection in half} == {b"408"}
    text = {"type": "text", "text": " " * 200_000}
    assert server.post(asks(text)).status_code == 400  # too long for the model, and read to its end


def test_two_hundred_at_once(told: Callable[..., Any]) -> None:
    """Row 12: each is answered, or told when to come back; nobody is left without a word."""
    model, server = told(queue=8)
    model.steps.release(100_000)
    with ThreadPoolExecutor(200) as pool:
        answers = [answer.result() for answer in [pool.submit(server.post, asks(max_tokens=2)) for _ in range(200)]]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] in ("queue_full", "too_many_connections")
            assert int(answer.headers["retry-after"]) >= 1
    assert server.post(asks()).status_code == 200


def test_the_queue_is_fair(told: Callable[..., Any]) -> None:
    """Row 12: whoever came first is answered first."""
    model, server = told()
    done: list[int] = []
    threads = []
    for number in range(6):
        threads.append(
            threading.Thread(target=lambda n=number: (server.post(asks(max_tokens=1)), done.append(n)))  # type: ignore[misc]
        )
        threads[-1].start()
        time.sleep(0.15)
    for count in range(1, 7):
        model.steps.release()
        deadline = time.monotonic() + 10
        while len(done) < count and time.monotonic() < deadline:
            time.sleep(0.01)
    assert done == [0, 1, 2, 3, 4, 5]
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_the_first_step(stream: bool, told: Callable[..., Any]) -> None:
    """Row 10: what is being encoded or read ends with the step that is under way."""
    model, server = told()
    body = json.dumps(asks(max_tokens=60, stream=stream)).encode()
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert model.begun.wait(10)
    time.sleep(0.3)
    model.steps.release(1)
    assert model.closed.wait(5) and model.made == 1


HEADS = {
    "10k lines": b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: 1\r\n" * 10_000 + b"\r\n",
    "1 MB line": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 2**20 + b"\r\n\r\n",
    "1 MB path": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 400 + b"\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
    "length and pieces": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n{}{}{}",
    "odd pieces": HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n{}\r\n",
    "odd encoding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}",
    "a folded line": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\n\x00 2\r\n\r\n",
}


@pytest.mark.parametrize("text", HEADS.values(), ids=HEADS)
def test_what_is_no_http_is_answered_as_an_error(text: bytes, tiny: Running, capfd: pytest.CaptureFixture[str]) -> None:
    """Row 9: with an error object, and never with a traceback in the log."""
    with connect(tiny) as connection:
        said = b""
        try:
            connection.sendall(text)
            while piece := connection.recv(65536):
                said += piece
        except ConnectionError:
            assert len(text) > 2**16  # refused before all of it was sent
    if said:
        head, _, body = said.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] in (b"400", b"501") and json.loads(body)["error"]["type"] == "invalid_request_error"
    assert tiny.post(asks()).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_rubbish_behind_an_answer(told: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Row 7: a body that goes wrong after it was refused ends its connection, quietly."""
    model, server = told(limits=Limits(body=1000))
    model.steps.release(100)
    with connect(server) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"100\r\n" + b" " * 256 + b"\r\n") * 8)
        assert connection.recv(4096).split(b" ")[1] == b"413"
        try:
            for _ in range(5):
                connection.sendall(b"ZZZ\r\n\r\n")
                time.sleep(0.05)
        except ConnectionError:
            pass
    assert server.post(asks()).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


# Bodies


def test_of_a_key_given_twice_the_last_counts(tiny: Running) -> None:
    """Row 6."""
    body = json.dumps(asks(max_tokens=3))
    once = tiny.post(body.encode())
    for twice in (body.replace('"model"', '"model": "other", "model"'),
                  body.replace('"content"', '"content": "other", "content"')):  # fmt: skip
        assert twice != body and tiny.post(twice.encode()).json()["choices"] == once.json()["choices"]
    assert (
        tiny.post(body.replace('"max_tokens"', '"max_tokens": 4, "max_tokens"').encode()).json()["usage"]
        == (once.json()["usage"])
    )
    wrong = tiny.post((body[:-1] + ', "model": "other"}').encode())
    assert wrong.status_code == 404


@pytest.mark.parametrize(
    ("content", "place"),
    [([None], "[0]"), (["hi"], "[0]"), ([1], "[0]"), ([{}], "[0].type"), ({"type": "text", "text": "hi"}, ""),
     ([{"type": "text", "text": "hi"}, []], "[1]"), ([{"type": "text", "text": {"value": "hi"}}], "[0].text"),
     (1.5, ""), ([{"type": ["text"]}], "[0].type")],
)  # fmt: skip
def test_content_of_another_form(content: Any, place: str, tiny: Running) -> None:
    """Row 15: told with its place."""
    answer = tiny.post({"model": "tiny", "messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == f"messages[0].content{place}"


# What a client writes is no word of the model's own language


def test_names_of_special_tokens_anywhere(tiny: Running) -> None:
    """Row 48: in what was said before, beside an image, in the name of a file."""
    odd = "<image> </s> <|im_start|>system <|image_pad|>"
    said = [{"role": "system", "content": odd}, {"role": "user", "content": odd}, {"role": "assistant", "content": odd}]
    for parts, seen in (([], 0), ([image(photo())], 16)):
        body = {
            "model": "tiny",
            "messages": [*said, {"role": "user", "content": [*parts, {"type": "text", "text": odd}]}],
        }
        answer = tiny.post(body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == seen
    pytest.importorskip("pypdfium2")
    texts = []
    for name in ("<image>.pdf", "a.pdf"):
        part = {"type": "file", "file": {"filename": name, "file_data": url(many_pages(1), "application/pdf")}}
        texts.append(tiny.post(asks(part)).json()["choices"])
    assert texts[0] == texts[1]


def test_images_alone_that_do_not_fit(tmp_path: Path, tiny_tower_folder: Path) -> None:
    """Row 47: refused with what they take and what there is."""
    from polymodal.backends.local import LocalBackend
    from polymodal.modeling.build import build_model

    write_tiny_llm(tmp_path / "llm", max_position_embeddings=96)
    config = tiny_config(tmp_path / "llm", tiny_tower_folder)
    model, tokenizer = build_model(config)
    backend = LocalBackend(model.eval(), tokenizer, config)
    backend.trims = False
    with running(backend) as server:
        answer = server.post(asks(*[image(photo())] * 7, max_tokens=4))
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded", answer.text
        numbers = [int(word) for word in error["message"].replace(",", "").split() if word.isdigit()]
        assert any(number >= 7 * 16 for number in numbers) and any(number <= 96 for number in numbers)
        assert server.post(asks(image(photo()), max_tokens=4)).status_code == 200


def test_a_placeholder_without_an_image_is_text(tiny: Running) -> None:
    """Row 49: and is read as the letters that it has."""
    usage = tiny.post(asks({"type": "text", "text": "<image>"})).json()["usage"]
    assert (
        usage["prompt_tokens"] == tiny.post(asks({"type": "text", "text": "#image#"})).json()["usage"]["prompt_tokens"]
    )
    assert usage["prompt_tokens_details"]["image_tokens"] == 0


# Damaged files


def flipped(data: bytes, draw: np.random.Generator) -> bytes:
    spoiled = bytearray(data)
    for at in draw.integers(0, len(spoiled), draw.integers(1, 9)):
        spoiled[at] ^= 1 << int(draw.integers(8))
    return bytes(spoiled)


def test_a_thousand_damaged_files(tiny: Running, tmp_path: Path) -> None:
    """Row 21: an answer or a refusal, and the next good request is answered as before."""
    draw = np.random.default_rng(17)
    good = asks(image(photo()), max_tokens=3)
    before = tiny.post(good).json()["choices"]
    images = [photo("PNG"), photo("JPEG"), photo("WEBP"), photo("GIF"), photo("BMP"), photo("JPEG", progressive=True)]
    sound = tone(tmp_path / "a.wav", seconds=0.1).read_bytes()
    statuses = set()
    import httpx2

    with httpx2.Client(trust_env=False, timeout=60) as client:
        for number in range(1000):
            if number % 10:
                part = image(flipped(images[number % len(images)], draw))
            else:
                data = base64.b64encode(flipped(sound, draw)).decode()
                part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
            answer = client.post(f"{tiny.url}/v1/chat/completions", json=asks(part, max_tokens=1))
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400), answer.text
    assert statuses == {200, 400}
    assert tiny.post(good).json()["choices"] == before


# The process


@contextmanager
def serve(folder: Path, *flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Running]]:
    """The command in a process of its own, as soon as it answers."""
    command = [
        sys.executable,
        "-m",
        "polymodal",
        "serve",
        "--model",
        str(folder),
        "--port",
        "0",
        "--name",
        "tiny",
        *flags,
    ]
    given = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=given)
    server = Running.__new__(Running)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "is served at" in line:
                break
        else:
            raise AssertionError("".join(lines))
        server.port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
        server.url = f"http://127.0.0.1:{server.port}"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        for _ in range(100):
            try:
                server.get("/health")
                break
            except Exception:
                time.sleep(0.1)
        yield process, server
    finally:
        process.kill()
        process.wait()


def status(pid: int, key: str) -> int:
    """Kibibytes of a process, as the system counts them."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_request_for_which_there_is_no_memory(senses_folder: Path) -> None:
    """Row 74: it fails alone, and the next one is answered as before."""
    large = asks(image(photo(size=(6000, 6000))), max_tokens=2)
    small = asks(image(photo()), max_tokens=2)
    with serve(senses_folder) as (process, server):
        before = server.post(small).json()["choices"]
        room = (status(process.pid, "VmSize") + 40 * 1024) * 1024
        resource.prlimit(process.pid, resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        answer = server.post(large)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory"), answer.text
        again = server.post(small)
        assert again.json().get("choices") == before, again.text
        resource.prlimit(process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert server.post(large).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a file", "no permission"])
def test_a_cache_folder_that_cannot_be_written(place: str, senses_folder: Path, tmp_path: Path) -> None:
    """Row 74: what needs no cache is served without one."""
    cache = tmp_path / "file" / "cache" if place == "a file" else Path("/proc/1/cache")
    (tmp_path / "file").write_text("x")
    with serve(senses_folder, POLYMODAL_CACHE=str(cache)) as (_, server):
        assert server.post(asks(max_tokens=2)).status_code == 200


@pytest.mark.slow
def test_sudden_death_and_a_restart(senses_folder: Path) -> None:
    """Row 74: killed in the middle of an answer, it starts again on the same port and answers the same."""
    with serve(senses_folder) as (process, server):
        port = server.port
        before = server.post(asks()).json()["choices"]
        body = json.dumps(asks(max_tokens=400, stream=True)).encode()
        with connect(server) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200 OK" in connection.recv(4096)
            process.kill()
            process.wait()
    with serve(senses_folder, "--port", str(port)) as (_, server):
        assert server.port == port and server.post(asks()).json()["choices"] == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Row 74: one clear line, and the folder as it was."""
    program = (
        "import resource, sys; from pathlib import Path; from polymodal.utils.files import atomic_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with atomic_folder(Path(sys.argv[1]), replace=True) as made:\n"
        "    (made / 'a').write_bytes(b'x' * 5000)\n"
    )
    target = tmp_path / "graph"
    target.mkdir()
    (target / "a").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be written (File too large); nothing was changed" in done.stderr
    assert (target / "a").read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_leaves_no_folder_that_looks_whole(tmp_path: Path) -> None:
    """Row 74: what it left behind is nobody's, and the next one writes it whole."""
    program = (
        "import os, sys; from pathlib import Path; from polymodal.utils.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), replace=True) as made:\n"
        "    (made / 'a').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    target = tmp_path / "graph"
    assert subprocess.run([sys.executable, "-c", program, str(target)]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left != target
    os.utime(left, (0, 0))  # a day later
    with atomic_folder(target, replace=True) as made:
        (made / "a").write_bytes(b"whole")
    assert (target / "a").read_bytes() == b"whole" and list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """Row 75: two servers with one cache folder; whoever is last wins, and neither sees half of it."""
    target, errors = tmp_path / "graph", []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                with atomic_folder(target, replace=True) as made:
                    for name in "abc":
                        write_text(made / name, str(number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({(target / name).read_text() for name in "abc"}) == 1


# The clock


def test_a_clock_that_jumps(told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 75: no deadline and no sign of life follows the time of day."""
    model, server = told(timeout=5)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(asks(max_tokens=4))))
    thread.start()
    assert model.begun.wait(10)
    now = time.time
    for jump in (10**8, -(10**8)):
        monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
        model.steps.release(2)
        time.sleep(0.2)
        assert server.get("/ready").status_code == 200
    thread.join(10)
    assert [answer.status_code for answer in answers] == [200]


def test_only_stamps_are_taken_from_the_time_of_day() -> None:
    """Row 75: in the server's code, `time.time` stands where an answer says when it was made."""
    for path in Path(next(iter(polymodal.serving.__path__))).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "time" and getattr(node.value, "id", "") == "time":
                line = path.read_text().splitlines()[node.lineno - 1]
                assert "created" in line or "int(time.time())" in line, f"{path.name}:{node.lineno}: {line.strip()}"

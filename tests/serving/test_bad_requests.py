"""The table of bad requests: each is told where it is wrong, and the next good one is answered as before.

Numbers are those of the rows of our list of bad inputs; one row may have several forms.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.serving.app import Limits
from tests.media.makers import many_pages, wav
from tests.serving.conftest import Running

TEXT: dict[str, Any] = {"type": "text", "text": "hi"}


def asks(*content: Any, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": list(content) or "hi"}], **options}


def image(data: bytes | str, kind: str = "image/png") -> dict[str, Any]:
    packed = base64.b64encode(data).decode() if isinstance(data, bytes) else None
    return {"type": "image_url", "image_url": {"url": data if packed is None else f"data:{kind};base64,{packed}"}}


def sound(data: bytes, form: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}


def video(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}


def file(data: bytes) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{base64.b64encode(data).decode()}"}}


def saved(form: str, size: tuple[int, int] = (24, 18), mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PILImage.new(mode, size, 90 if mode in ("L", "I;16", "F") else None).save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, body: bytes = b"\0" * 600) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + body
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data, b"IEND")
    )


def noise(form: str) -> bytes:
    """An image whose last pixel lies in its last bytes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    PILImage.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


PNG, JPEG = saved("PNG"), saved("JPEG")
URL = "messages[0].content[0].image_url.url"
PART = "messages[0].content[0].type"
SILENCE = np.zeros(1600, np.int16)
PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
DEEP = b'{"model":"tiny","messages":' + b"[" * 20_000 + b"]" * 20_000 + b"}"

# row, what is sent, the status, the place that is named
BAD: list[tuple[str, Any, int, str | None]] = [
    *[(f"1 {b[:9]!r}", b, 400, None) for b in (b"{", b"", b"[]", b"null", b'"x"', b"{}x", b"\xff\xfe")],
    ("4 deep", DEEP, 400, None),
    *[(f"5 {v[:8]}", b'{"model":"tiny","messages":[],"temperature":%s}' % v.encode(), 400, None)
      for v in ("NaN", "Infinity", "-Infinity")],
    ("5 1e400", json.dumps(asks()).replace('"model"', '"temperature":1e400,"model"').encode(), 400, "temperature"),
    ("5 digits", json.dumps(asks()).replace('"model"', f'"seed":{"9" * 5000},"model"').encode(), 400, None),
    ("6 unknown", asks(banana=1), 400, "banana"),
    ("6 proto", asks(__proto__={}), 400, "__proto__"),
    ("13 missing", {"model": "tiny"}, 400, "messages"),
    ("13 empty", {"model": "tiny", "messages": []}, 400, "messages"),
    ("13 text", {"model": "tiny", "messages": "hi"}, 400, "messages"),
    ("13 many", {"model": "tiny", "messages": [{"role": "user", "content": "hi"}] * 10_000}, 400, "messages"),
    ("13 long", {"model": "tiny", "messages": [{"role": "user", "content": "hi"},
                                                {"role": "assistant", "content": "ho"}] * 40
                                               + [{"role": "user", "content": "hi"}]}, 400, None),
    *[(f"14 {r!r}", {"model": "tiny", "messages": [{"role": r, "content": "hi"}]}, 400, "messages[0].role")
      for r in ("banana", 5, None, "tool", "assistant", "system")],
    ("14 no role", {"model": "tiny", "messages": [{"content": "hi"}]}, 400, "messages[0].role"),
    *[(f"15 {c!r}", {"model": "tiny", "messages": [{"role": "user", "content": c}]}, 400, "messages[0].content")
      for c in (None, 5, {}, [], True)],
    ("15 [[]]", asks([]), 400, "messages[0].content[0]"),
    ("15 message", {"model": "tiny", "messages": ["hi"]}, 400, "messages[0]"),
    ("16 no type", asks({"text": "hi"}), 400, PART),
    ("16 banana", asks(TEXT, {"type": "banana"}), 400, "messages[0].content[1].type"),
    ("16 type 5", asks({"type": 5}), 400, PART),
    ("16 no text", asks({"type": "text"}), 400, "messages[0].content[0].text"),
    ("16 text 5", asks({"type": "text", "text": 5}), 400, "messages[0].content[0].text"),
    ("16 extra", asks({**TEXT, "uuid": "x"}), 400, "messages[0].content[0].uuid"),
    *[(f"17 {u!r}", asks({"type": "image_url", "image_url": u}), 400, "messages[0].content[0].image_url")
      for u in (None, 5, "")],
    *[(f"17 url {u!r}", asks({"type": "image_url", "image_url": {"url": u}}), 400, URL) for u in (None, 5, "")],
    ("17 {}", asks({"type": "image_url", "image_url": {}}), 400, URL),
    ("17 both", asks({"type": "input_video", "input_video": {"url": "data:,", "data": "AA=="}}), 400,
     "messages[0].content[0].input_video"),
    ("17 neither", asks({"type": "input_video", "input_video": {}}), 400, "messages[0].content[0].input_video"),
    ("17 detail", asks({"type": "image_url", "image_url": {"url": "data:,x", "detail": "high"}}), 400,
     "messages[0].content[0].image_url.detail"),
    *[(f"18 {u}", asks(image(u)), 400, URL)
      for u in ("data:image/png", "data:image/png;base64,***", "data:image/png;base64,A", "data:,", "data:;base64,",
                "data:image/png;base64,iVBORw0KGgo", "data:image/png,%89PNG")],
    ("19 html", asks(image(b"<html><img src=x></html>")), 400, URL),
    ("19 mp4", asks(image(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom")), 400, URL),
    *[(f"20 {n}/16 {k}", asks(image(noise(k)[: len(noise(k)) * n // 16])), 400, URL)
      for k in ("PNG", "JPEG", "WEBP") for n in range(1, 16, 2)],
    ("22 30000", asks(image(png_header(30_000, 30_000))), 400, URL),
    ("23 1-bit", asks(image(saved("PNG", (16_000, 16_000), "1"))), 400, URL),
    ("26 svg", asks(image(b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')), 400, URL),
    *[(f"27 {k}", asks(image(d)), 400, URL)
      for k, d in (("psd", b"8BPS\0\1" + b"\0" * 60), ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("pdf", many_pages(1)),
                   ("ico", saved("ICO")), ("fits", b"SIMPLE  =" + b" " * 80), ("jp2", b"\0\0\0\x0cjP  \r\n\x87\n"),
                   ("avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1"), ("heic", b"\0\0\0\x18ftypheic\0\0\0\0heic"))],
    *[(f"37-45 {u!r:.40}", asks(image(u)), 400, URL)
      for u in ("http://127.0.0.1:9/a.png", "https://example.com/a.png", "http://2130706433/", "http://[::1]/",
                "ftp://x/a", "gopher://x", "file:///etc/passwd", "jar:x", "ws://x", "//host/a", "C:\\x", "/etc/passwd",
                "../a.png", "/dev/zero", "/proc/self/environ", "iVBORw0KGgo=", " data:image/png;base64,", "~/a.png")],
    ("45 sound", asks({"type": "input_audio", "input_audio": {"data": "/etc/passwd", "format": "wav"}}), 400,
     "messages[0].content[0].input_audio.data"),
    ("45 file", asks({"type": "file", "file": {"file_data": "/etc/passwd"}}), 400,
     "messages[0].content[0].file.file_data"),
    ("45 file id", asks({"type": "file", "file": {"file_id": "file-1"}}), 400, "messages[0].content[0].file.file_data"),
    ("46 nine", asks(*[image(PNG)] * 9), 400, "messages[0].content[8]"),
    ("46 thousand", asks(*[image(PNG)] * 1000), 400, "messages[0].content[8]"),
    ("46 role", {"model": "tiny", "messages": [{"role": "system", "content": [image(PNG)]},
                                               {"role": "user", "content": "hi"}]}, 400, PART),
    ("51 ten times", asks({**TEXT, "text": "word " * 1000}), 400, None),
    ("51 10 MB", asks({**TEXT, "text": "a" * 10_000_000}), 400, "messages"),
    ("52 surrogate", b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', 400, None),
    ("52 bytes", b'{"model":"tiny","messages":[{"role":"user","content":"\xff\xfe"}]}', 400, None),
    *[(f"53 {v!r}", asks(max_tokens=v), 400, "max_tokens") for v in (0, -1, 10**9, 1.5, "5", True, 65)],
    ("53 two", asks(max_tokens=5, max_completion_tokens=6), 400, "max_tokens"),
    *[(f"54 {k} {v!r}", asks(**{k: v}), 400, k)
      for k, v in (("temperature", -1), ("temperature", 1e9), ("temperature", "x"), ("top_p", 0), ("top_p", 5),
                   ("top_k", -5), ("frequency_penalty", 9), ("presence_penalty", -2.1), ("seed", 2**70), ("seed", 1.5),
                   ("repetition_penalty", 0), ("min_p", 1.1), ("frequency_penalty", False))],
    *[(f"55 {k}", asks(**{k: v}), 400, k)
      for k, v in (("n", 10**6), ("n", 0), ("best_of", 5), ("logprobs", 10**6), ("top_logprobs", 21),
                   ("top_logprobs", 5), ("stream", "yes"), ("stream_options", {"include_usage": True}))],
    *[("56", asks(logit_bias=bias), 400, place)
      for bias, place in (({"5": 1e9}, "logit_bias.5"), ({"999999": 1}, "logit_bias"), ({"x": 1}, None),
                          ({str(i): 1 for i in range(10**4)}, "logit_bias"), ([5], "logit_bias"))],
    *[(f"57 {str(v)[:9]}", asks(stop=v), 400, k)
      for v, k in (("", "stop"), ([""], "stop[0]"), (["a"] * 1000, "stop"), ("a" * 2**20, "stop"), (5, "stop"),
                   (["a", 5], "stop[1]"))],
    ("58", asks(response_format={"type": "json_schema", "json_schema": {"pattern": "(a+)+$"}}), 400,
     "response_format.json_schema.name"),
    ("58 none", asks(response_format={"type": "json_schema"}), 400, "response_format.json_schema"),
    ("58 both", asks(response_format={"type": "json_object", "json_schema": {"name": "x", "schema": {}}}), 400,
     "response_format.json_schema"),
    *[("58", asks(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}), 400,
       "response_format")
      for schema in ({"type": "banana"}, {"$ref": "#"}, {"$ref": "file:///etc/passwd"}, {"type": 5},
                     {"enum": ["x" * 2**20]}, {"type": "string", "pattern": "(?=a)b"},
                     {"type": "string", "pattern": "("},
                     {"type": "integer", "minimum": 10**30})],
    ("59", asks(tools=[{"type": "function"}]), 400, "tools[0].function"),
    ("59 type", asks(tools=[{"type": "web_search"}]), 400, "tools[0].type"),
    ("59 name", asks(tools=[{"type": "function", "function": {"name": "a b"}}]), 400, "tools[0].function.name"),
    ("59 no place", asks(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    ("59 word", asks(tool_choice="banana"), 400, "tool_choice"),
    ("59 call", {"model": "tiny", "messages": [
        {"role": "user", "content": "hi"}, {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "1"}]}, 400, "messages[2].tool_calls"),
    ("59 choice", asks(tool_choice="required"), 400, "tool_choice"),
    ("60", asks(chat_template="{{''.__class__}}"), 400, "chat_template"),
    ("60 kwargs", asks(chat_template_kwargs={"tokenize": True}), 400, "chat_template_kwargs"),
    ("60 audio", asks(modalities=["text", "audio"]), 400, "modalities"),
    *[(f"61 {m!r:.20}", {**asks(), "model": m}, s, "model")
      for m, s in (("other", 404), ("/etc", 404), ("../tiny", 404), ("x" * 2**20, 400), (5, 400), (None, 400),
                   ("a\r\nb\x1b[31m", 404))],
    ("62 no sound", asks(sound(b"not a sound")), 400, "messages[0].content[0].input_audio.data"),
    *[(f"62 {k}", asks(sound(d)), 400, "messages[0].content[0].input_audio.data")
      for k, d in (("0 samples", wav(SILENCE[:0])), ("1 Hz", wav(SILENCE, rate=1)),
                   ("NaN", wav(np.full(900, np.nan, np.float32), kind=3)),
                   ("65 channels", wav(SILENCE[:1300], channels=65)), ("playlist", PLAYLIST))],
    ("62 format", asks(sound(wav(SILENCE), "banana")), 400, "messages[0].content[0].input_audio.format"),
    ("64 no video", asks(video(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom")), 400, "messages[0].content[0].video_url.url"),
    ("64 playlist", asks(video(PLAYLIST)), 400, "messages[0].content[0].video_url.url"),
    ("pdf", asks(file(b"%PDF-1.4 broken")), 400, "messages[0].content[0].file.file_data"),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tiny: Running) -> str:
    """What a good request is answered."""
    return str(tiny.post(asks(image(PNG), TEXT)).json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize(("body", "status", "place"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_request(body: Any, status: int, place: str | None, tiny: Running, good: str) -> None:
    begin = time.perf_counter()
    answer = tiny.post(body)
    assert time.perf_counter() - begin < 10
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]
    assert "Traceback" not in answer.text and "0x" not in answer.text and len(answer.text) < 1000
    assert error["param"] == place or place is None
    assert tiny.post(asks(image(PNG), TEXT)).json()["choices"][0]["message"]["content"] == good


FINE: list[tuple[str, Any]] = [
    ("14 two assistants", {"model": "tiny", "messages": [{"role": r, "content": "hi"}
                                                        for r in ("user", "assistant", "assistant", "user")]}),
    ("18 blanks", asks(image("data:image/png;base64," + "\n ".join(base64.b64encode(PNG).decode())))),
    ("19 other mime", asks(image(JPEG, "image/png"))),
    *[(f"24 {s}", asks(image(saved("PNG", s)))) for s in ((1, 1), (2, 2), (3, 3), (1, 9), (3, 1))],
    ("25 gif", asks(image(saved("GIF", save_all=True, append_images=[PILImage.new("RGB", (24, 18), "red")] * 50)))),
    *[(f"30 {m}", asks(image(saved("PNG", mode=m)))) for m in ("1", "L", "LA", "P", "I;16", "RGBA")],
    ("30 CMYK", asks(image(saved("JPEG", mode="CMYK")))),
    ("48", asks({**TEXT, "text": "<image> </s> <|im_start|>system <|image_pad|>"})),
    ("52 NUL", asks({**TEXT, "text": "\0 \u202e \u0301" + "\u0301" * 50})),
    ("62 float", asks(sound(wav(np.array([9.0, -0.5, 0.5] * 900, np.float32), kind=3)))),
    ("27 TIFF", asks(image(saved("TIFF")))),
]  # fmt: skip


@pytest.mark.parametrize("body", [body for _, body in FINE], ids=[name for name, _ in FINE])
def test_an_odd_request_is_answered_or_refused_as_damaged(body: Any, tiny: Running) -> None:
    first, second = tiny.post(body), tiny.post(body)
    assert first.status_code == second.status_code == 200, first.text
    assert first.json()["choices"] == second.json()["choices"]


def test_flipped_bits(tiny: Running, good: str) -> None:
    """Row 21: an answer or a refusal, never a fault of the server's."""
    draw = np.random.default_rng(0)
    for original in (PNG, JPEG, saved("WEBP")):
        for _ in range(15):
            data = bytearray(original)
            for at in draw.integers(0, len(data), 3):
                data[at] ^= 1 << int(draw.integers(8))
            assert tiny.post(asks(image(bytes(data)))).status_code in (200, 400)
    assert tiny.post(asks(image(PNG), TEXT)).json()["choices"][0]["message"]["content"] == good


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Encoding": "gzip"}, 415),
        ({"X-Long": "a" * 2**20}, 400),
        ({"Content-Length": str(33 * 2**20)}, 413),
    ],
    ids=["2 text", "2 form", "2 parts", "2 charset", "3 gzip", "9 header", "7 length"],
)
def test_headers(headers: dict[str, str], status: int, tiny: Running) -> None:
    body = json.dumps(asks()).encode()
    given = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Host": "localhost", **headers}
    head = "POST /v1/chat/completions HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in given.items())
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as connection:
        try:
            connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        except OSError:
            assert status == 400  # refused before all of it was sent
        said = connection.recv(65536) if status != 400 else b"HTTP/1.1 400"
    assert said.startswith(f"HTTP/1.1 {status}".encode()), said
    assert tiny.post(asks()).status_code == 200


def test_a_body_beyond_the_limit_or_that_never_ends(told: Callable[..., Any]) -> None:
    """Row 7: with a length that lies, in pieces without an end, or a byte now and then."""
    model, server = told(limits=Limits(body=1000, body_s=0.5))
    model.steps.release(1000)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest, status in (
        (b"Content-Length: 1001\r\n\r\n{", b"413"),
        (b"Content-Length: 900\r\n\r\n{", b"408"),
        (b"Content-Length: 1\r\n\r\n{", b"400"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + b"100\r\n" + b" " * 256 + b"\r\n", b"408"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + (b"100\r\n" + b" " * 256 + b"\r\n") * 4, b"413"),
        (b"Content-Length: banana\r\n\r\n{", b"400"),
        (b"Content-Length: -1\r\n\r\n{", b"400"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head + rest)
            assert connection.recv(4096).split(b" ")[1] == status, rest
    assert server.post(asks()).status_code == 200


def test_a_head_that_never_ends(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 8: connections that say nothing, or half of a request, are closed; others are served meanwhile."""
    monkeypatch.setattr("polymodal.serving.server.HEADER_S", 0.5)
    said = (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
    idle = [socket.create_connection(("127.0.0.1", tiny.port), timeout=20) for _ in said]
    for connection, text in zip(idle, said, strict=True):
        connection.sendall(text)
    assert tiny.post(asks()).status_code == 200
    for connection in idle:
        assert connection.recv(4096) == b""
        connection.close()


def test_odd_requests_of_http(tiny: Running) -> None:
    """Row 9, and routes that there are none of."""
    for text, status in (
        (b"GET /health HTTP/1.0\r\n\r\n", b"200"),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (b"banana\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"400"),
    ):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as connection:
            connection.sendall(text)
            assert connection.recv(4096).split(b" ")[1] == status, text
    for path in (
        "/docs",
        "/openapi.json",
        "/v1/files",
        "/v1/banana",
        "/v1/chat",
        "/v1/embeddings",
        "/health/",
        "/index.html",
    ):
        answer = tiny.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"
    assert tiny.get("/v1/chat/completions").status_code == 405


def test_what_a_model_does_not_take(told: Callable[..., Any]) -> None:
    """Row 49; and nothing of a request, however written, makes or colours a line of the log (68)."""
    model, server = told()
    model.steps.release(1000)
    model.takes = ()
    answer = server.post(asks(image(PNG)))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_modality"


def test_the_log_keeps_to_its_lines(tiny: Running, caplog: pytest.LogCaptureFixture) -> None:
    from polymodal.serving.server import OneLine

    with caplog.at_level(logging.INFO, "polymodal.serving"):
        tiny.get("/v1/models/a%0aforged%1b[31m%C2%9b")
        tiny.post({**asks(), "model": "b\nforged\x1b[31m"})
    lines = [OneLine().format(record) for record in caplog.records]
    assert len(lines) == 2 and all(line.isprintable() for line in lines)

"""Hours of requests against a real `polymodal serve`: damaged ones (--fuzz), or many clients at once (--soak).

    python -m benchmarks.soak --fuzz MINUTES [--seed N]
    python -m benchmarks.soak --soak MINUTES [--clients 8] [--bad 0.1] [--gone 0.1]

Both start the server themselves (`--model`, and after `--` more flags of its own), print a line a minute and end with
status 1 where something failed.

--fuzz sends requests that hypothesis makes of a protocol's fields, good ones with a few places changed, good ones with
damaged media, and bytes turned over, to every route of `ROUTES` that the server has. A fault is a status of 500, no
answer in time, an error without its object, a traceback; and after every hundred, a good request that is answered
otherwise than before.

--soak lets clients talk: several turns about images, streamed or not; some requests are bad, some clients leave in the
middle. A request is lost where its client neither left nor got a whole answer or an error.

Of both, from minute 5 (or half of a shorter run) to the end: open files may not grow, and memory by 5%. The caches of
conversations and media fill up to the size that they were given, later or sooner, by what is asked: they are told
apart, by the server's own metrics; the others' memory is what may not grow, and the caches have to keep to their size.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from benchmarks.serve_process import Server, ours, started
from polymodal import PolymodalError
from polymodal.speech import AudioChunk, wav_bytes

IMAGES = sorted((Path(__file__).resolve().parent.parent / "examples" / "pictures").glob("*.[jp][pn]g"))
JSON = {"Content-Type": "application/json"}
MODEL = "model"
"""What requests call it."""
BOUNDARY = "polymodal-soak"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
PATIENCE = 60.0
"""Seconds in which a request of a fuzzer has to be answered: most are refused at once, none asks for many tokens."""
GROWTH = 0.05


def url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def small_image(number: int = 0, form: str = "PNG") -> bytes:
    with PILImage.open(IMAGES[number % len(IMAGES)]) as image:
        buffer = io.BytesIO()
        image.convert("RGB").resize((96, 72)).save(buffer, form)
    return buffer.getvalue()


def small_sound() -> bytes:
    return wav_bytes([AudioChunk(np.sin(np.arange(8000) / 9).astype(np.float32), 16_000, "")])


def asks(*parts: Any, **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What is this?"}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


def parts() -> dict[str, dict[str, Any]]:
    """A part of a message for each kind of medium."""
    sound, image = base64.b64encode(small_sound()).decode(), url(small_image(), "image/png")
    return {
        "image": {"type": "image_url", "image_url": {"url": image}},
        "jpeg": {
            "type": "image_url",
            "image_url": {"url": url(small_image(1, "JPEG"), "image/jpeg"), "detail": "auto"},
        },
        "sound": {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        "audio": {"type": "audio_url", "audio_url": {"url": url(small_sound(), "audio/wav")}},
        "gif": {"type": "video_url", "video_url": {"url": url(small_image(2, "GIF"), "image/gif")}},
        "pdf": {
            "type": "file",
            "file": {"file_data": url(small_image(3, "PDF"), "application/pdf"), "filename": "a.pdf"},
        },
    }


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {}}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {}}}}}
RICH = {"n": 2, "seed": 3, "temperature": 0.5, "top_p": 0.9, "stop": ["a"], "logprobs": True, "top_logprobs": 2,
        "logit_bias": {"5": -5}, "presence_penalty": 0.5, "frequency_penalty": 0.5}  # fmt: skip


@dataclass(frozen=True)
class Route:
    """A route, and good bodies of requests to it; one of bytes is a form."""

    path: str
    bodies: tuple[Any, ...] = ()
    method: str = "POST"


def form(**fields: str | bytes) -> bytes:
    """A form with a file in it."""
    pieces = b""
    for name, value in fields.items():
        file = b'; filename="a.wav"\r\nContent-Type: audio/wav' if isinstance(value, bytes) else b""
        data = value if isinstance(value, bytes) else value.encode()
        head = b'--%s\r\nContent-Disposition: form-data; name="%s"' % (BOUNDARY.encode(), name.encode())
        pieces += head + file + b"\r\n\r\n" + data + b"\r\n"
    return pieces + b"--%s--\r\n" % BOUNDARY.encode()


def routes() -> list[Route]:
    """Every route, with what is asked of it; one that a server has not is left out."""
    media = parts()
    image = {"type": "input_image", "image_url": media["image"]["image_url"]["url"]}
    said = [{"role": "user", "content": [image, {"type": "input_text", "text": "Hi"}]}]
    chats = [asks(), *(asks(part) for part in media.values()), asks(media["image"], media["jpeg"], **RICH)]
    chats += [
        asks(stream=True, stream_options={"include_usage": True}),
        asks(response_format=SCHEMA),
        asks(tools=[TOOL]),
    ]
    looks = ("/v1/models", f"/v1/models/{MODEL}", "/metrics", "/v1/runs", "/", "/ready")
    return [
        Route("/v1/chat/completions", tuple(chats)),
        Route("/v1/completions", ({"model": MODEL, "prompt": "Once", "max_tokens": 4, "echo": False},)),
        Route("/v1/responses", ({"model": MODEL, "input": said, "max_output_tokens": 4, "store": False},
                                {"model": MODEL, "input": "Hi", "max_output_tokens": 4, "stream": True})),
        Route("/v1/images/generations", ({"model": MODEL, "prompt": "a dot", "n": 1, "size": "64x64"},)),
        Route("/v1/audio/speech", ({"model": MODEL, "input": "Hi.", "voice": "x", "response_format": "wav"},)),
        Route("/v1/audio/transcriptions", (form(model=MODEL, file=small_sound(), response_format="json"),)),
        Route("/v1/preview", (asks(media["image"]),)),
        *(Route(path, method="GET") for path in looks),
    ]  # fmt: skip


# Damage

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -1e-300, 2**63, 2**64, 10**30, "", "a", "\0", "data:", "data:,", "\ud7ff",
    "data:image/png;base64,", "<image>", "<|im_start|>system", "\u202e\u0301", "x" * 5000, "http://127.0.0.1:9/a.png",
    "file:///etc/passwd", "../../a", [], {}, [[]], [None], {"type": "text"}, {"a": {}}, [{"type": "image_url"}],
]  # fmt: skip
KEYS = ("type", "url", "detail", "role", "x", "content", "text", "n", "stop", "seed", "stream", "tools", "__proto__")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a document."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def mutated(body: Any, draw: random.Random) -> Any:
    """A document with a few places changed, left out, added, doubled or misspelt."""
    body = json.loads(json.dumps(body))
    for _ in range(draw.choice((1, 1, 2, 3))):
        path = draw.choice(list(places(body)))
        if not path:
            continue
        holder = body
        for key in path[:-1]:
            holder = holder[key]
        key, how, odd = path[-1], draw.random(), json.loads(json.dumps(draw.choice(ODD)))
        if how < 0.45:
            holder[key] = odd
        elif how < 0.55:
            del holder[key]
        elif isinstance(holder[key], str) and holder[key].startswith("data:") and "," in holder[key] and how < 0.8:
            holder[key] = damaged_url(holder[key], draw)
        elif how < 0.65 and isinstance(holder, dict):
            holder[draw.choice(KEYS)] = odd
        elif how < 0.75 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif isinstance(holder[key], str) and holder[key]:
            letters = list(holder[key])
            for _ in range(draw.randint(1, 5)):
                letters[draw.randrange(len(letters))] = chr(
                    draw.choice((0, 9, 10, 37, 43, 47, 61, 65, 122, 233, 0x4E2D))
                )
            holder[key] = "".join(letters)
    return body


def flipped(data: bytes, draw: random.Random) -> bytes:
    spoiled = bytearray(data[: draw.randrange(1, len(data))] if draw.random() < 0.2 else data)
    for _ in range(draw.choice((1, 2, 8, 40))):
        spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
    return bytes(spoiled)


def damaged_url(text: str, draw: random.Random) -> str:
    head, _, packed = text.partition(",")
    with suppress(ValueError):
        return f"{head},{base64.b64encode(flipped(base64.b64decode(packed), draw)).decode()}"
    return text


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.sampled_from(ODD[5:24])
ANY = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=9), v, max_size=3), max_leaves=8
)


def made(bodies: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """Requests of the fields that good ones have, each with its own value or any."""
    fields: dict[str, list[Any]] = {}
    for body in bodies:
        for name, value in body.items():
            fields.setdefault(name, []).append(value)
    return st.fixed_dictionaries({}, optional={n: st.sampled_from(values) | ANY for n, values in fields.items()})


# Fuzzing


class Fuzzer:
    """Sends what is damaged and looks at what comes back."""

    def __init__(self, server: Server, number: int) -> None:
        self.server, self.draw = server, random.Random(number)
        self.web = httpx2.Client(trust_env=False, timeout=PATIENCE)
        self.statuses: dict[str, Counter[int]] = {}
        self.faults: list[str] = []
        self.bad = 0
        self.good = asks(parts()["image"])
        self.routes = [route for route in routes() if self.there(route)]
        self.wanted = self.answer()

    def there(self, route: Route) -> bool:
        path = f"{self.server.url}{route.path}"
        got = self.web.request(route.method, path, content=b"{}", headers=JSON) if route.bodies else self.web.get(path)
        return got.status_code != 404

    def answer(self) -> Any:
        got = self.web.post(f"{self.server.url}/v1/chat/completions", json=self.good)
        return got.json()["choices"] if got.status_code == 200 else got.text

    def send(self, route: Route, content: bytes, headers: dict[str, str]) -> None:
        begin = time.monotonic()
        try:
            got = self.web.request(route.method, f"{self.server.url}{route.path}", content=content, headers=headers)
        except (httpx2.HTTPError, ValueError) as error:
            self.fault(route, f"{type(error).__name__} after {time.monotonic() - begin:.1f} s", content)
            return
        self.statuses.setdefault(route.path, Counter())[got.status_code] += 1
        if got.status_code >= 400:
            self.bad += 1
            try:
                error = got.json()["error"]
                whole = set(error) == {"message", "type", "param", "code"} and error["message"]
            except (ValueError, KeyError, TypeError):
                whole = False
            if got.status_code == 500 or not whole or "Traceback (most" in got.text:
                self.fault(route, f"{got.status_code} {got.text[:200]}", content)
        if self.bad >= 100:
            self.bad = 0
            if (found := self.answer()) != self.wanted:
                self.fault(route, f"the next good request is answered {str(found)[:200]}", content)

    def fault(self, route: Route, what: str, content: bytes) -> None:
        self.faults.append(f"{route.path}: {what}; sent {content[:300]!r}")
        print(f"FAULT {self.faults[-1][:700]}", flush=True)

    def some(self) -> None:
        """A few dozen requests, of every sort and to every route."""
        for route in self.routes:
            if not route.bodies:
                self.send(route, b"", {})
            elif isinstance(route.bodies[0], bytes):
                for _ in range(6):
                    self.send(route, flipped(route.bodies[0], self.draw), FORM)
            else:
                for _ in range(20):
                    body = self.draw.choice(route.bodies)
                    content = json.dumps(mutated(body, self.draw)).encode()
                    self.send(route, flipped(content, self.draw) if self.draw.random() < 0.1 else content, JSON)
                self.hypothetical(route)

    def hypothetical(self, route: Route) -> None:
        @seed(self.draw.randrange(2**32))
        @settings(
            max_examples=20,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(made(route.bodies))
        def send(body: Any) -> None:
            self.send(route, json.dumps(body).encode("utf-8", "surrogatepass"), JSON)

        send()


def fuzz(server: Server, minutes: float, number: int) -> list[str]:
    fuzzer = Fuzzer(server, number)
    print(f"routes: {', '.join(route.path for route in fuzzer.routes)}")
    begin, sizes, told = time.monotonic(), list[Size](), 0.0
    while (now := time.monotonic() - begin) < 60 * minutes and server.alive:
        fuzzer.some()
        if not server.alive:
            break
        sizes.append(Size.of(server, now))
        if now >= told:
            told += 60
            total = sum((Counter(each) for each in fuzzer.statuses.values()), Counter())
            shown = " ".join(f"{status}:{count}" for status, count in sorted(total.items()))
            print(f"{now / 60:5.1f} min  {shown}  {sizes[-1]}  {sizes[-1].files} files", flush=True)
    for path, counts in fuzzer.statuses.items():
        print(f"  {path:<28}{' '.join(f'{status}:{count}' for status, count in sorted(counts.items()))}")
    return [*fuzzer.faults, *watched(server, sizes, minutes)]


# Clients


class Client(threading.Thread):
    """Somebody who talks, makes mistakes and leaves."""

    def __init__(self, server: Server, number: int, bad: float, gone: float, end: float) -> None:
        super().__init__(daemon=True)
        self.server, self.draw, self.share, self.end = server, random.Random(number), (bad, gone), end
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.lost: list[str] = []
        self.web = httpx2.Client(trust_env=False, timeout=300)

    def run(self) -> None:
        """Talk until it is time."""
        while time.monotonic() < self.end:
            messages: list[dict[str, Any]] = []
            for turn in range(self.draw.randint(1, 4)):
                image = {
                    "type": "image_url",
                    "image_url": {"url": url(small_image(self.draw.randrange(99)), "image/png")},
                }
                content = [image] if turn == 0 or self.draw.random() < 0.3 else []
                question = self.draw.choice(("What is this?", "Which colours?", "Is there a cat?", "Where is it?"))
                messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
                said = self.ask({"model": MODEL, "messages": messages, "max_tokens": self.draw.choice((4, 12, 32)),
                                 "temperature": 0, "stream": self.draw.random() < 0.5})  # fmt: skip
                if said is None or time.monotonic() > self.end:
                    break
                messages.append({"role": "assistant", "content": said or "."})

    def ask(self, body: dict[str, Any]) -> str | None:
        """Ask once, badly, or leave in the middle; the answer where there is one."""
        chance, (bad, gone) = self.draw.random(), self.share
        if chance < gone:
            self.leave(json.dumps(body).encode())
            return None
        if chance < gone + bad:
            body = mutated(body, self.draw)
        begin = time.monotonic()
        try:
            got = self.web.post(
                f"{self.server.url}/v1/chat/completions", content=json.dumps(body).encode(), headers=JSON
            )
            text = self.read(got)
        except Exception as error:
            self.lost.append(f"{type(error).__name__}: {error}")
            return None
        self.seconds.append(time.monotonic() - begin)
        return text

    def read(self, got: Any) -> str | None:
        """The text of an answer; raises where it is not whole."""
        if got.status_code != 200:
            assert got.json()["error"]["message"] and got.status_code != 500, got.text[:300]
            self.counts["told to wait" if got.status_code == 429 else "refused"] += 1
            if got.status_code == 429:
                time.sleep(min(2.0, float(got.headers["retry-after"])))
            return None
        if not got.headers["content-type"].startswith("text/event-stream"):
            self.counts["whole"] += 1
            choice = got.json()["choices"][0]
            assert choice["finish_reason"], got.text[:300]
            return str(choice["message"]["content"])
        events = [line.removeprefix("data: ") for line in got.text.split("\n\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]", got.text[-300:]
        chunks = [json.loads(event) for event in events[:-1]]
        if "error" in chunks[-1]:
            self.counts["refused"] += 1
            return None
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0]
        assert any(choice["finish_reason"] for choice in choices), got.text[-300:]
        self.counts["streamed"] += 1
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    def leave(self, body: bytes) -> None:
        """Ask, and go after a while."""
        where = urlsplit(self.server.url)
        assert where.hostname and where.port
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        try:
            with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
                cut = len(body) if self.draw.random() < 0.8 else self.draw.randrange(len(body))
                connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body[:cut])
                connection.settimeout(self.draw.choice((0.01, 0.1, 0.5, 2.0)))
                with suppress(TimeoutError):
                    connection.recv(self.draw.choice((1, 300, 5000)))
            self.counts["left"] += 1
        except OSError as error:
            self.lost.append(f"leaving: {error}")


def soak(server: Server, minutes: float, number: int, clients: int, bad: float, gone: float) -> list[str]:
    begin = time.monotonic()
    talking = [Client(server, 1000 * number + each, bad, gone, begin + 60 * minutes) for each in range(clients)]
    for client in talking:
        client.start()
    names = ("whole", "streamed", "refused", "told to wait", "left")
    measured = "   lost      MB  caches  files  threads   median s   slowest s"
    print(f"  min{''.join(f'{name:>14}' for name in names)}{measured}")
    sizes, told = list[Size](), 0.0
    while any(client.is_alive() for client in talking):
        time.sleep(1)
        if not server.alive:
            break
        now = time.monotonic() - begin
        sizes.append(Size.of(server, now))
        if now >= told or not any(client.is_alive() for client in talking):
            told += 60
            counts = sum((client.counts for client in talking), Counter())
            seconds = sorted(second for client in talking for second in client.seconds) or [0.0]
            cells = [
                f"{now / 60:5.1f}",
                *(f"{counts[name]:14}" for name in names),
                f"{sum(len(c.lost) for c in talking):7}",
            ]
            cells += [f"{sizes[-1].megabytes:8.0f}{sizes[-1].kept:8.0f}{sizes[-1].files:7}{server.threads:9}"]
            print("".join(cells), f"{statistics.median(seconds):10.2f}{seconds[-1]:12.2f}", flush=True)
    return [*(f"lost: {line[:300]}" for client in talking for line in client.lost), *watched(server, sizes, minutes)]


@dataclass(frozen=True)
class Size:
    """What a server takes at a time."""

    seconds: float
    megabytes: float
    kept: float  # Megabytes of these that caches hold
    limit: float  # That they may hold
    files: int

    @classmethod
    def of(cls, server: Server, seconds: float) -> Size:
        """As it is now."""
        return cls(seconds, server.megabytes, *server.kept, server.files)

    @property
    def rest(self) -> float:
        """Megabytes beside the caches."""
        return self.megabytes - self.kept

    def __str__(self) -> str:
        return f"{self.megabytes:.0f} MB ({self.rest:.0f} and {self.kept:.0f} of caches)"


def watched(server: Server, sizes: list[Size], minutes: float) -> list[str]:
    """What memory and files have come to, and what is wrong with that."""
    faults = [] if server.alive else [f"the server has ended: {server.log[-500:]}"]
    faults += ["a traceback in the log"] if "Traceback (most" in server.log else []
    if not sizes:
        return faults
    start = 60 * min(5.0, minutes / 2)
    first = [size for size in sizes if start <= size.seconds <= start + 60] or sizes[:1]
    last = [size for size in sizes if size.seconds >= max(start, sizes[-1].seconds - 60)] or sizes[-1:]
    found: dict[str, tuple[float, float]] = {}
    print(f"from minute {start / 60:.0f} to the end, medians of a minute:")
    for name, what in (("megabytes", "MB in all"), ("kept", "MB in caches"), ("rest", "MB beside"), ("files", "files")):
        found[name] = before, after = (
            statistics.median(getattr(size, name) for size in first),
            statistics.median(getattr(size, name) for size in last),
        )
        print(f"  {what:<14}{before:7.0f}{after:7.0f}" + (f"  {after / before - 1:+.1%}" if before else ""))
    most, limit = max(size.kept for size in sizes), sizes[-1].limit
    print(f"  caches held {most:.0f} of {limit:.0f} MB at most; all {max(size.megabytes for size in sizes):.0f} MB")
    before, after = found["rest"]
    if after > before * (1 + GROWTH):
        faults.append(f"memory beside the caches grew by {after / before - 1:.1%}")
    if most > limit:
        faults.append(f"caches hold {most:.0f} MB, more than the {limit:.0f} that they may")
    before, after = found["files"]
    if after > before + 16:
        faults.append(f"open files grew from {before:.0f} to {after:.0f}")
    return faults


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fuzz", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--bad", type=float, default=0.1, help="share of bad requests among those of --soak")
    parser.add_argument("--gone", type=float, default=0.1, help="share of clients that leave in the middle")
    parser.add_argument("--model", default="default")
    parser.add_argument("--seed", type=int, default=0)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    faults: list[str] = []
    for minutes, name in ((args.fuzz, "fuzz"), (args.soak, "soak")):
        if not minutes:
            continue
        print(f"== {name}, {minutes:g} minutes, model {args.model}")
        with started(ours(args.model, *arguments[cut + 1 :])) as server:
            if name == "fuzz":
                faults += fuzz(server, minutes, args.seed)
            else:
                faults += soak(server, minutes, args.seed, args.clients, args.bad, args.gone)
    for fault in faults[:20]:
        print(f"FAULT {fault[:700]}")
    print(f"{len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PolymodalError as error:
        sys.exit(f"soak: {error}")

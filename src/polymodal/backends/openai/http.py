"""Talking to one server: connecting, waiting, trying again, and saying clearly what went wrong.

The client is the one that huggingface_hub brings (httpx2, or httpx in its older releases); one road serves whole and
streamed answers. What failed for a passing reason (no connection, a timeout, 408, 409, 429, 5xx) is tried again after a
wait that doubles and is drawn at random, or as long as the server's Retry-After says; never once text has come. The key
stands in a request's header and nowhere else: not in errors, not in what is printed of these objects, and it goes to no
other host and over no open line.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from polymodal.backends.openai.responses import clean, error_of, finish_of, is_completion, parse_object, read_events
from polymodal.backends.openai.url import is_loopback, origin_of, secret_of, shown_url, split_url
from polymodal.errors import ConfigError, EndpointError

if TYPE_CHECKING:
    import httpx2

Event = dict[str, Any]

MAX_BODY = 32 * 2**20
"""The largest whole answer, in bytes."""

_PASSING = (408, 409, 429)
_HINTS = {
    401: "check the key in OPENAI_API_KEY",
    403: "check the key in OPENAI_API_KEY",
    404: "check the model's name and the base URL, which mostly ends in /v1",
    405: "check the base URL, which mostly ends in /v1",
    413: "send fewer or smaller images",
}


class Refused(EndpointError):
    """A request that the server will not answer however often it is sent."""


class _Passing(EndpointError):
    """A failure that may be gone the next time."""

    wait_s: float | None = None  # How long the server asks to wait; None where it does not say


@dataclass(frozen=True)
class Patience:
    """How long to wait, and how often to try again."""

    connect_s: float = 10.0  # For a connection
    # For the next piece of a streamed answer; a server that reads a long prompt is silent all that time
    read_s: float = 300.0
    total_s: float = 1800.0  # For one call, all its attempts and waits included
    retries: int = 4  # Attempts after the first
    first_wait_s: float = 0.5  # Before the second attempt; doubled for each further one
    longest_wait_s: float = 60.0  # The longest wait between attempts; a server that asks for more ends the call


class Endpoint:
    """One server's chat completions. Safe to use from several threads."""

    def __init__(
        self, base_url: str, key: str | None = None, patience: Patience | None = None, allow_http: bool = False
    ) -> None:
        parts = split_url(base_url)
        self._key = secret_of(key)
        self._loopback = is_loopback(parts.hostname or "")
        if self._key is not None and parts.scheme == "http" and not (self._loopback or allow_http):
            raise ConfigError(
                f"{shown_url(parts)}: the key would travel openly over http; use https, unset OPENAI_API_KEY, "
                "or allow it (--allow-http, allow_http=True)"
            )
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self._url = parts._replace(path=path, fragment="").geturl()
        self.patience = patience or Patience()
        self._lock = threading.Lock()
        self._client: httpx2.Client | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r})"

    @property
    def shown(self) -> str:
        """The address for people: without the query."""
        return shown_url(urlsplit(self._url))

    def send(self, body: dict[str, Any], has_text: Callable[[Event], bool]) -> Generator[Event]:
        """Send one request. Closing the generator closes the connection."""
        deadline = time.monotonic() + self.patience.total_s
        failures = 0
        while True:
            held: list[Event] | None = []  # None once text has come
            try:
                with closing(self._attempt(body, deadline)) as events:
                    for event in events:
                        if held is None:
                            yield event
                            continue
                        held.append(event)
                        if has_text(event):
                            ready, held = held, None
                            yield from ready
                yield from held or ()
                return
            except _Passing as error:
                if held is None:
                    raise
                failures += 1
                self._wait(error, failures, deadline)

    def close(self) -> None:
        """Close the connections that are kept open between calls."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _attempt(self, body: dict[str, Any], deadline: float) -> Generator[Event]:
        """Send once, and follow redirects that stay on the server."""
        http = _client_library()
        url = self._url
        read_s = self.patience.read_s if body.get("stream") else self.patience.total_s
        left = max(deadline - time.monotonic(), 0.001)
        timeout = http.Timeout(min(read_s, left), connect=min(self.patience.connect_s, left))
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "polymodal"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        content = json.dumps(body).encode()
        try:
            for _ in range(4):
                with self._open().stream("POST", url, content=content, headers=headers, timeout=timeout) as response:
                    if not 300 <= response.status_code < 400:
                        yield from self._read(response, deadline)
                        return
                    url = self._redirected(url, response.status_code, response.headers.get("location", ""))
            raise Refused(f"{self.shown}: redirects in circles")
        except http.TimeoutException as error:
            what = "no connection" if isinstance(error, http.ConnectTimeout) else "no answer"
            raise _Passing(f"{self.shown}: {what} in time") from error
        except http.InvalidURL as error:
            raise ConfigError(f"{self.shown}: is no address ({self._safe(str(error))})") from error
        except http.RequestError as error:
            raise _Passing(f"{self.shown}: the connection failed ({self._safe(str(error))})") from error

    def _read(self, response: httpx2.Response, deadline: float) -> Iterator[Event]:
        if response.status_code != 200:
            raise self._failure(response, deadline)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        chunks = self._timed(response, deadline)
        if kind == "text/event-stream":
            yield from self._streamed(chunks)
        elif kind in ("application/json", ""):
            answer = self._checked(parse_object(_join(chunks, MAX_BODY)))
            if not is_completion(answer):
                raise Refused(f"{self.shown}: the server sent no chat completion but: {self._safe(json.dumps(answer))}")
            yield answer
        else:
            raise Refused(
                f"{self.shown}: answers with {clean(kind, 60)}, not with JSON; "
                "check the base URL, which mostly ends in /v1"
            )

    def _streamed(self, chunks: Iterator[bytes]) -> Iterator[Event]:
        finished = False
        for data in read_events(chunks):
            if data.strip() == "[DONE]":
                return
            try:
                event = parse_object(data)
            except EndpointError as error:
                raise Refused(f"{self.shown}: {self._safe(str(error))}") from None
            event = self._checked(event)
            finished = finished or finish_of(event) is not None
            yield event
        if not finished:
            raise _Passing(f"{self.shown}: the stream ended before the answer did")

    def _checked(self, event: Event) -> Event:
        """Raise what is an error; pieces of a stream that are neither error nor answer are nothing to us."""
        if event.get("error"):
            found = event["error"]
            code = found.get("code") if isinstance(found, dict) else None
            raised = _Passing if isinstance(code, int) and _is_passing(code) else Refused
            raise raised(f"{self.shown}: the server gave up: {self._safe(error_of(event))}")
        return event

    def _timed(self, response: httpx2.Response, deadline: float) -> Iterator[bytes]:
        for chunk in response.iter_bytes():
            if time.monotonic() > deadline:
                raise Refused(f"{self.shown}: the answer took more than {self.patience.total_s:g} s")
            yield chunk

    def _failure(self, response: httpx2.Response, deadline: float) -> EndpointError:
        """Turn an error response into an error."""
        status = response.status_code
        try:
            text = _join(self._timed(response, deadline), 1 << 16).decode("utf-8", "replace")
        except (EndpointError, OSError):
            text = ""
        try:
            said = error_of(json.loads(text))
        except (ValueError, RecursionError):
            said = "" if "<" in text[:200] else text  # a page for people says nothing here
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
        pieces = [f"{self.shown}: {status} {phrase}".rstrip(), self._safe(said), _HINTS.get(status, "")]
        message = ": ".join(piece for piece in pieces[:2] if piece) + (f" ({pieces[2]})" if pieces[2] else "")
        if not _is_passing(status) or "insufficient_quota" in text:
            return Refused(message)
        error = _Passing(message)
        error.wait_s = retry_after(response.headers.get("retry-after", ""))
        return error

    def _wait(self, error: _Passing, failures: int, deadline: float) -> None:
        """Sleep before the next attempt, or raise where there is none."""
        patience = self.patience
        doubled = min(patience.first_wait_s * 2 ** min(failures - 1, 30), patience.longest_wait_s)
        wait = error.wait_s if error.wait_s is not None else doubled * random.uniform(0.5, 1.0)
        tried = f"; tried {failures} times" if failures > 1 else ""
        if failures > patience.retries:
            raise EndpointError(f"{error}{tried}") from error
        if wait > patience.longest_wait_s:
            raise EndpointError(f"{error}; the server asks to wait {wait:.0f} s, try again then") from error
        if time.monotonic() + wait > deadline:
            raise EndpointError(f"{error}{tried}, and {patience.total_s:g} s are over") from error
        time.sleep(wait)

    def _redirected(self, url: str, status: int, location: str) -> str:
        """Where a redirect leads, if it stays on the server and keeps the request as it is."""
        target = ""
        try:
            target = urljoin(url, location)
            there = origin_of(urlsplit(target))
        except ValueError:  # an address that cannot be read is another one
            there = ("", "", None)
        if there != origin_of(urlsplit(url)) or status not in (307, 308):
            where = clean(f"{there[0]}://{there[1]}", 100) if there[1] else "nowhere"
            raise Refused(
                f"{self.shown}: redirects ({status}) to {where}; refused, since the key would go there too; "
                "give the new address as the base URL if that is meant"
            )
        return target

    def _open(self) -> httpx2.Client:
        with self._lock:
            if self._client is None:
                # Proxies of the environment are for the world outside, not for a server on this machine.
                try:
                    self._client = _client_library().Client(follow_redirects=False, trust_env=not self._loopback)
                except (ImportError, ValueError, OSError) as error:
                    raise ConfigError(
                        f"{self.shown}: the proxy or certificate settings of the environment cannot be used "
                        f"({self._safe(str(error))})"
                    ) from error
            return self._client

    def _safe(self, text: str) -> str:
        """A server's words without the key, in case it repeats it."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "***")
        return clean(text)


def retry_after(value: str, now: float | None = None) -> float | None:
    """Read a Retry-After header."""
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return max(wait, 0.0) if math.isfinite(wait) else None


def _is_passing(status: int) -> bool:
    return status in _PASSING or 500 <= status < 600


def _join(chunks: Iterator[bytes], limit: int) -> bytes:
    data = b""
    for chunk in chunks:
        data += chunk
        if len(data) > limit:
            raise Refused(f"the server's answer is larger than {limit:,} bytes")
    return data


def _client_library() -> Any:
    """The HTTP client that huggingface_hub depends on."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        import httpx  # type: ignore[import-not-found]

        return httpx

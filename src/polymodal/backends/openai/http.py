"""One OpenAI-compatible server: its address and key, its answers and errors, waiting and trying again.

Whole and streamed answers take one road, through httpx2. What failed for a passing reason (no connection, a timeout,
408, 409, 429, 5xx) is tried again after a wait that doubles and is drawn at random, or as long as the server's
Retry-After says; never once text has come. The key stands in a request's header and nowhere else, and goes to no other
host and over no open line. Nothing a server sends is trusted: sizes are limited, types are checked, and its words are
cleaned before they are shown.
"""

import ipaddress
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from pydantic import SecretStr

from polymodal.backends.openai import answers
from polymodal.errors import ConfigError, EndpointError

MAX_BODY = 32 * 2**20
"""The largest whole answer, in bytes."""

_JSON = re.compile(r"(application/(.+[+])?json|application/octet-stream|text/plain)?")
"""The types under which servers send answers; what a stream is shows in its first bytes."""

_EVENTS = re.compile(rb"(\xef\xbb\xbf)?\s*(data|event|id|retry|error)?:")
"""How a stream of events begins, whatever its type says."""

_LASTING = re.compile(r"insufficient_quota|unsupported content|input is not supported")
"""What no later attempt gets, whatever the status; llama.cpp says so of media with 500."""

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
    """One server's chat completions, or another of its answers in a subclass. Safe to use from several threads."""

    path = "/chat/completions"  # Of the address, after the base URL
    what = "chat completion"  # What error lines call an answer
    has_answer: Callable[[answers.Event], Any] = staticmethod(answers.choice)

    def __init__(
        self, base_url: str, key: str | None = None, patience: Patience | None = None, allow_http: bool = False
    ) -> None:
        self._url = _leads_to(base_url, self.path)
        self._key = _secret(key)
        self.patience = patience or Patience()
        loopback = _is_loopback(self._url.host)
        if self._key is not None and self._url.scheme == "http" and not (loopback or allow_http):
            raise ConfigError(
                f"{self.shown}: the key would travel openly over http; use https, unset OPENAI_API_KEY, "
                "or allow it (--allow-http, allow_http=True)"
            )
        try:
            # Proxies of the environment are for the world outside, not for a server on this machine.
            self._client = httpx2.Client(follow_redirects=False, trust_env=not loopback)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(
                f"{self.shown}: the proxy or certificate settings of the environment cannot be used "
                f"({self._safe(str(error))})"
            ) from error

    @property
    def shown(self) -> str:
        """The address for people: without the query."""
        return _shown(self._url)

    def send(self, body: dict[str, Any]) -> Generator[answers.Event]:
        """Send one request. Closing the generator closes the connection."""
        deadline = time.monotonic() + self.patience.total_s
        for attempt in itertools.count(1):
            answered = False
            try:
                with closing(self._attempt(body, deadline)) as events:
                    for event in events:
                        answered = answered or bool(answers.text_of(event))
                        yield event
                return
            except _Passing as error:
                if answered:
                    raise
                self._wait(error, attempt, deadline)

    def close(self) -> None:
        """Close the connections that are kept open between calls; nothing can be sent after that."""
        self._client.close()

    def _attempt(self, body: dict[str, Any], deadline: float) -> Generator[answers.Event]:
        """Send once, and follow redirects that stay on the server."""
        read_s = self.patience.read_s if body.get("stream") else self.patience.total_s
        left = max(deadline - time.monotonic(), 0.001)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "polymodal"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        timeout = httpx2.Timeout(min(read_s, left), connect=min(self.patience.connect_s, left))
        content = json.dumps(body).encode()
        request = self._client.build_request("POST", self._url, content=content, headers=headers, timeout=timeout)
        try:
            for _ in range(4):
                with closing(self._client.send(request, stream=True)) as response:
                    if not 300 <= response.status_code < 400:
                        yield from self._read(response, deadline)
                        return
                    request = self._redirected(response)
            raise Refused(f"{self.shown}: redirects in circles")
        except httpx2.TimeoutException as error:
            what = "no connection" if isinstance(error, httpx2.ConnectTimeout) else "no answer"
            raise _Passing(f"{self.shown}: {what} in time") from error
        except httpx2.RequestError as error:
            raise _Passing(f"{self.shown}: the connection failed ({self._safe(str(error))})") from error

    def _redirected(self, response: httpx2.Response) -> httpx2.Request:
        """The request that a redirect asks for, if it stays on the server and is the same one."""
        request, here = response.next_request, response.url
        there = httpx2.URL() if request is None else request.url
        same = (there.scheme, there.host, there.port) == (here.scheme, here.host, here.port)
        if request is None or not same or response.status_code not in (307, 308):
            where = answers.clean(f"{there.scheme}://{there.host}", 100) if there.host else "nowhere"
            raise Refused(
                f"{self.shown}: redirects ({response.status_code}) to {where}; refused, since the key would go there "
                "too; give the new address as the base URL if that is meant"
            )
        return request

    def _read(self, response: httpx2.Response, deadline: float) -> Iterator[answers.Event]:
        """Read an answer in either form."""
        if response.status_code != 200:
            raise self._failure(response, deadline)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        chunks, head = self._chunks(response, deadline), b""
        while len(head.strip()) < len("event:") and (chunk := next(chunks, b"")):
            head += chunk
        rest = itertools.chain([head], chunks)
        if kind == "text/event-stream" or _EVENTS.match(head):
            yield from self._stream(rest)
            return
        if not _JSON.fullmatch(kind):
            raise Refused(
                f"{self.shown}: answers with {answers.clean(kind, 60)}, not with JSON; "
                "check the base URL, which mostly ends in /v1"
            )
        answer = self._event(self._whole(rest, MAX_BODY).decode("utf-8-sig", "replace"))
        if not self.has_answer(answer):
            raise Refused(f"{self.shown}: the server sent no {self.what} but: {self._safe(json.dumps(answer))}")
        yield answer

    def _stream(self, chunks: Iterable[bytes]) -> Iterator[answers.Event]:
        """Read a streamed answer, which has to end."""
        begun = finished = False
        for data in answers.read_events(chunks):
            if data.strip() == "[DONE]":
                finished = begun
                break
            event = self._event(data)
            begun = begun or bool(answers.choice(event))
            finished = finished or answers.finish_of(event) is not None
            yield event
        if not finished:
            raise _Passing(f"{self.shown}: the stream ended before the answer did")

    def _event(self, text: str) -> answers.Event:
        """Read one JSON object, and raise what is none or an error."""
        # Pieces of a stream that are neither error nor answer are nothing to us.
        found = answers.parsed(text)
        if not isinstance(found, dict):
            raise Refused(f"{self.shown}: the server sent no {self.what} but: {self._safe(text, 80)!r}")
        if (error := answers.trouble(found)) is not None:
            code = answers.code_of(error)
            raised = _Passing if code is not None and _is_passing(code) else Refused
            raise raised(f"{self.shown}: the server gave up: {self._safe(answers.words_of(error))}")
        return found

    def _failure(self, response: httpx2.Response, deadline: float) -> EndpointError:
        """Turn an error response into an error."""
        status = response.status_code
        try:
            text = self._whole(self._chunks(response, deadline), 1 << 16).decode("utf-8", "replace")
        except (EndpointError, OSError):
            text = ""
        found = answers.parsed(text)
        page = "<" in text[:200]  # a page for people says nothing here
        words = answers.words_of(found) if found is not None else "" if page else text
        title = f"{status} {httpx2.codes.get_reason_phrase(status)}".rstrip()
        line = ": ".join(filter(None, (self.shown, title, self._safe(words))))
        message = f"{line} ({_HINTS[status]})" if status in _HINTS else line
        if not _is_passing(status) or _LASTING.search(text):
            return Refused(message)
        error = _Passing(message)
        error.wait_s = retry_after(response.headers.get("retry-after", ""))
        return error

    def _chunks(self, response: httpx2.Response, deadline: float) -> Iterator[bytes]:
        """Read an answer within its limit of time."""
        for chunk in response.iter_bytes():
            if time.monotonic() > deadline:
                raise Refused(f"{self.shown}: the answer took more than {self.patience.total_s:g} s")
            yield chunk

    def _whole(self, chunks: Iterable[bytes], limit: int) -> bytes:
        """Join an answer within a limit of bytes."""
        whole = bytearray()
        for chunk in chunks:
            whole += chunk
            if len(whole) > limit:
                raise Refused(f"{self.shown}: the server's answer is larger than {limit:,} bytes")
        return bytes(whole)

    def _wait(self, error: _Passing, failures: int, deadline: float) -> None:
        """Sleep before the next attempt, or raise where there is none."""
        patience = self.patience
        doubled = min(patience.first_wait_s * 2 ** min(failures - 1, 30), patience.longest_wait_s)
        wait = error.wait_s if error.wait_s is not None else doubled * random.uniform(0.5, 1.0)
        tried = f"; tried {failures} times" if failures > 1 else ""
        if failures > patience.retries:
            raise EndpointError(f"{error}{tried}", "unreachable") from error
        if wait > patience.longest_wait_s:
            raise EndpointError(
                f"{error}; the server asks to wait {wait:.0f} s, try again then", "unreachable"
            ) from error
        if time.monotonic() + wait > deadline:
            raise EndpointError(f"{error}{tried}, and {patience.total_s:g} s are over", "unreachable") from error
        time.sleep(wait)

    def _safe(self, text: str, limit: int = 300) -> str:
        """A server's words without the key, in case it repeats it."""
        return answers.clean(text if self._key is None else _hidden(self._key.get_secret_value(), text), limit)


def _leads_to(base_url: str, end: str) -> httpx2.URL:
    """Check a base URL and lead it to what is asked of the server."""
    try:
        url = httpx2.URL(base_url.strip())
    except httpx2.InvalidURL:
        raise ConfigError("the base URL cannot be read; it must be like https://host/v1") from None
    # What httpx2 lets through: brackets that do not close, and ports that are too large.
    if url.scheme not in ("http", "https") or not url.host or "%5B" in url.host or (url.port or 1) >= 1 << 16:
        raise ConfigError(f"base URL {_shown(url)!r}: must begin with https:// or http:// and a host")
    if url.userinfo:
        raise ConfigError(f"base URL {_shown(url)!r}: holds a user name; give the key in OPENAI_API_KEY instead")
    path, mark, query = url.raw_path.partition(b"?")
    path = path.rstrip(b"/").removesuffix(end.encode()) + end.encode()
    return url.copy_with(raw_path=path + mark + query, fragment=None)


def _shown(url: httpx2.URL) -> str:
    """An address for people: without user name, query and fragment, any of which may be secret."""
    return answers.clean(f"{url.scheme}://{url.netloc.decode()}{url.path}", 200)


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or number alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _hidden(key: str, text: str) -> str:
    """A server's words with stars in place of a key."""
    # A real key is no word of any language; "x" or "token", which servers at home are given, stand inside many.
    real = len(key) >= 16 or (len(key) >= 8 and not key.isalpha() and not key.isdecimal())
    return text.replace(key, "***") if real else re.sub(rf"(?<![\w-]){re.escape(key)}(?![\w-])", "***", text)


def _secret(key: str | None) -> SecretStr | None:
    """Wrap a key so that printing it shows stars."""
    key = (key or "").strip()
    if any(not "!" <= c <= "~" for c in key):
        raise ConfigError(
            "the key holds characters that no key has (white space, a text editor's quotes); copy it again"
        )
    return SecretStr(key) if key else None


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
    return status in (408, 409, 429) or 500 <= status < 600

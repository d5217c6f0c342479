"""The process around the application: its address, its limits on connections, its log, and how it ends."""

import asyncio
import ctypes
import ipaddress
import json
import logging
import socket
from typing import Any

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from polymodal.backends.openai.answers import clean
from polymodal.errors import ConfigError
from polymodal.serving.errors import RequestError

MAX_HEADER = 16 * 1024
PIECE = 1024
HEADER_S = 10.0
"""Seconds in which a connection has to have sent the head of a request."""
SEND_S = 60.0
"""Seconds in which a client has to go on reading, where it has not taken what was sent before."""
CONNECTIONS = 64
"""That are served; beyond, those that have said nothing for `QUIET_S` are closed, and new ones are told to wait."""
QUIET_S = 1.0
MAX_LINE = 400
"""Characters of a line in the log."""


async def give_back_memory(every: float) -> None:
    """Let the heap return what is free in its middle, which glibc keeps by itself: requests are of all sizes."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    while True:
        await asyncio.sleep(every)
        await asyncio.to_thread(trim, 0)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before a model is opened for it; nobody is let in yet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        taken = socket.socket(family, kind, proto)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: cannot be used ({why}); give another port or host") from None
    return taken


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """What a connection too many is told."""
    error = RequestError("too many connections; try again", status=429, code="too_many_connections", retry=1)
    await JSONResponse(error.body, 429, {"Retry-After": "1", "Connection": "close"})(scope, receive, send)


class _Protocol(H11Protocol):
    """uvicorn's, which also ends connections whose client sends half of a head, or does not read what it asked for."""

    _late: asyncio.TimerHandle | None = None
    _since = 0.0  # When it began to be idle

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > CONNECTIONS:
            quiet = asyncio.get_running_loop().time() - QUIET_S
            for other in list(self.connections):
                if isinstance(other, _Protocol) and other._idle and other._since < quiet:
                    other.transport.abort()
                    self.connections.discard(other)
            if len(self.connections) > 4 * CONNECTIONS:
                transport.abort()
            elif len(self.connections) > CONNECTIONS:
                self.app = _busy

    def data_received(self, data: bytes) -> None:
        """Take the head of a request by and by, since its limit only holds for one that has not come whole."""
        while self.conn.their_state is h11.IDLE and len(data) > PIECE:
            super().data_received(data[:PIECE])
            data = data[PIECE:]
        if not self.transport.is_closing():
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered, unless an answer is under way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(RequestError(msg).body).encode()
            head = f"HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._late = asyncio.get_running_loop().call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._late is not None:
            self._late.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    @property
    def _idle(self) -> bool:
        """Whether no request is under way."""
        return self.conn.their_state is h11.IDLE and not self.transport.is_closing()

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        loop.call_later(HEADER_S, self._end_idle, self.cycle)

    def _end_idle(self, last: Any) -> None:
        if self.cycle is last and self._idle:
            self.transport.close()


class OneLine(logging.Formatter):
    """A log whose lines no request can end, colour or forge."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and behind it a traceback where one was asked for."""
        line = f"{self.formatTime(record)} {record.levelname.lower()} {clean(record.getMessage(), MAX_LINE)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_to_stderr(debug: bool) -> None:
    """Write what the server says to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.captureWarnings(True)  # of odd files
    for name in ("polymodal.serving", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel((logging.DEBUG if debug else logging.INFO) if name == "polymodal.serving" else logging.WARNING)


def make_server(app: ASGIApp, drain: float = 30.0) -> uvicorn.Server:
    """The server; at SIGTERM it takes no more, and ends what is under way within `drain` seconds."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(drain)),
            h11_max_incomplete_event_size=MAX_HEADER,
        )
    )

"""The process around the application: its address, its limits on connections, its log, and how it ends."""

import asyncio
import ipaddress
import logging
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from polymodal.backends.openai.answers import clean
from polymodal.errors import ConfigError

MAX_HEADER = 16 * 1024
HEADER_S = 10.0
"""Seconds in which a connection has to have sent the head of a request."""
SEND_S = 60.0
"""Seconds in which a client has to go on reading, where it has not taken what was sent before."""
CONNECTIONS = 64
MAX_LINE = 400
"""Characters of a line in the log."""


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


class _Protocol(H11Protocol):
    """uvicorn's, which also ends connections whose client sends half of a head, or does not read what it asked for."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

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

    def _watch(self) -> None:
        asyncio.get_running_loop().call_later(HEADER_S, self._end_idle, self.cycle)

    def _end_idle(self, last: Any) -> None:
        if self.cycle is last and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
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
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(drain)),
            h11_max_incomplete_event_size=MAX_HEADER,
        )
    )

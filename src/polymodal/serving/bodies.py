"""Bodies of requests: what is known of one before it is read, and reading it within its limits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from email.message import Message as Headers

from starlette.requests import Request

from polymodal.serving.errors import RequestError

SMALL = 2**20
"""Bytes of a body that is read at once, so that a few clients who send slowly do not keep all others out."""


@dataclass(frozen=True)
class Limits:
    """What a server takes."""

    body: int = 32 * 2**20  # Bytes
    body_s: float = 30.0  # For a body to arrive
    first_s: float = 10.0  # Until a stream begins with a ping, and between pings; before, an error has its own status
    stall_s: float = 180.0  # Without a step of the model, after which `/ready` says no


def check_headers(request: Request, most: int, kind: str = "application/json") -> None:
    """What is known of a body before it is read."""
    # A form or a plain text is what another site's page can send without asking; a packed body may unpack to anything.
    headers = Headers()
    headers["content-type"] = request.headers.get("content-type", "none/none")
    if headers.get_content_type() != kind:
        raise RequestError(f"the body must be {kind}", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("the body must not be compressed", status=415)
    if "transfer-encoding" in request.headers and "content-length" in request.headers:  # proxies may differ
        raise RequestError("give Content-Length or Transfer-Encoding, not both")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and (len(length) > 15 or int(length) > most):
        raise _too_large(most)


def _too_large(most: int) -> RequestError:
    return RequestError(f"the body has more than {most:,} bytes", status=413, code="request_too_large")


@asynccontextmanager
async def received(request: Request) -> AsyncIterator[bytes]:
    """The body, to be unpacked inside; a large one holds a reader's place until then."""
    async with AsyncExitStack() as place:
        yield await read_body(request, request.app.state.limits, place)


async def read_body(request: Request, limits: Limits, place: AsyncExitStack | None = None) -> bytes:
    """The body, within its size and time; `place` is where a large one waits for a reader."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.stream():
                if place is not None and len(body) <= SMALL < len(body) + len(piece):
                    await place.enter_async_context(request.app.state.readers)
                body += piece
                if len(body) > limits.body:
                    raise _too_large(limits.body)
    except TimeoutError:
        raise RequestError("the body did not arrive in time", status=408) from None
    return bytes(body)

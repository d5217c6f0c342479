"""From a request to its answer, whole or as server-sent events, whatever the route writes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from polymodal.backends.base import MediaEnd, RawPrompt, Reply, StreamEvent
from polymodal.generation.params import GenerationParams
from polymodal.messages import Message
from polymodal.serving.bodies import check_headers, received
from polymodal.serving.errors import Json, RequestError, as_request_error
from polymodal.serving.models import Served, check_room
from polymodal.serving.scheduler import Job

DONE = b"data: [DONE]\n\n"
Work: TypeAlias = tuple["Sequence[Message] | RawPrompt", Sequence[GenerationParams]]
"""A conversation or a prompt, and the settings of each of its answers."""


def data(document: Json, name: str = "") -> bytes:
    """An event."""
    written = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {written}\n\n".encode()


class Answer:
    """A request that was checked, and how a route writes its answers; they are numbered over all its work."""

    def __init__(self, served: Served, work: Sequence[Work], stream: bool, salt: str = "") -> None:
        self.served, self.work, self.stream = served, work, stream
        self.salt = salt  # Keeps what is kept of it from requests with another one

    def whole(self, replies: Sequence[Reply]) -> Json:
        """All of it."""
        raise NotImplementedError

    def first(self) -> Iterator[bytes]:
        """What a stream begins with."""
        yield from ()

    def pieces(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        """What is new of one of the answers."""
        raise NotImplementedError

    def last(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        """What a stream ends with."""
        raise NotImplementedError

    def broken(self, error: RequestError) -> Iterator[bytes]:
        """What it ends with where it breaks."""
        yield data(error.body)
        yield DONE


class Jobs:
    """The jobs of a request, whose events come one job after the other."""

    def __init__(self, answer: Answer) -> None:
        self.left: list[tuple[int, Job]] = []
        index = 0
        try:
            for given, choices in answer.work:
                self.left.append((index, answer.served.scheduler.submit(given, choices, answer.salt)))
                index += len(choices)
        except BaseException:
            self.cancel()
            raise

    async def next(self, patience: float = float("inf")) -> tuple[int, StreamEvent] | None:
        """The next event and the answer that it is of; None at the end, TimeoutError where patience ends first."""
        while self.left:
            offset, job = self.left[0]
            if (found := await job.next(patience)) is not None:
                return offset + found[0], found[1]
            self.left.pop(0)
        return None

    def cancel(self) -> None:
        """Stop the work of all."""
        for _, job in self.left:
            job.cancel()

    def put(self, event: BaseException) -> None:
        """Hand an event over to who waits for the first."""
        for _, job in self.left[:1]:
            job.put(event)


@asynccontextmanager
async def attended(request: Request, work: Jobs | Job) -> AsyncIterator[None]:
    """Work that ends where it fails, or where nobody waits for it any more."""
    watch = asyncio.create_task(_gone(request, work))
    try:
        yield
    except BaseException as error:
        work.cancel()
        if not isinstance(error, Exception) or isinstance(error, ClientDisconnect):
            raise
        raise as_request_error(error) from None
    finally:
        watch.cancel()


async def _gone(request: Request, work: Jobs | Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    work.cancel()
    work.put(ClientDisconnect())


async def respond(request: Request, read: Callable[[bytes, Mapping[str, Served]], Answer]) -> Response:
    """Answer a request, whole or piece by piece."""
    state = request.app.state
    check_headers(request, state.limits.body)
    check_room(state.models)  # before a body is read for nothing
    async with received(request) as body:
        answer = await asyncio.to_thread(read, body, state.models)
    del body
    jobs = Jobs(answer)
    async with attended(request, jobs):
        if not answer.stream:
            replies = {}  # which need not end in their order
            while (found := await jobs.next()) is not None:
                if isinstance(found[1], Reply):
                    replies[found[0]] = found[1]
            return JSONResponse(await asyncio.to_thread(answer.whole, [replies[place] for place in sorted(replies)]))
        first: Any = None
        try:
            first = await jobs.next(state.limits.first_s)
        except TimeoutError:
            first = ()
        return EventStream(_pieces(jobs, answer, first, state.limits.first_s), jobs)


def route(path: str, read: Callable[[bytes, Mapping[str, Served]], Answer]) -> Route:
    """The route that answers what a body asks."""

    async def answer(request: Request) -> Response:
        return await respond(request, read)

    return Route(path, answer, methods=["POST"])


class EventStream(StreamingResponse):
    """Server-sent events; the jobs end with them, also where the client leaves before the first."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], jobs: Jobs) -> None:
        super().__init__(pieces, headers={"X-Accel-Buffering": "no"})
        self.jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, until all is said or the client is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.jobs.cancel()


async def _pieces(jobs: Jobs, answer: Answer, found: Any, ping_s: float) -> AsyncIterator[bytes]:
    replies: dict[int, Reply] = {}
    try:
        for piece in answer.first():
            yield piece
        while found is not None:
            if found == ():
                yield b": ping\n\n"
            else:
                pieces = answer.pieces(*found)
                if isinstance(found[1], MediaEnd):  # packing a sound takes longer than others should wait
                    pieces = iter(await asyncio.to_thread(list, pieces))
                for piece in pieces:
                    yield piece
                if isinstance(found[1], Reply):
                    replies[found[0]] = found[1]
            try:
                found = await jobs.next(ping_s)
            except TimeoutError:
                found = ()
        for piece in answer.last([replies[place] for place in sorted(replies)]):
            yield piece
    except Exception as error:
        for piece in answer.broken(as_request_error(error)):
            yield piece

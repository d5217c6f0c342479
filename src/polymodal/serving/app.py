"""The routes, and the guard before them: who may ask, from which page, with which key, and how much.

Only `/health`, `/ready` and the web page's own files come without the key. A client that goes away, streaming or not,
takes its request along.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from polymodal.backends.openai.answers import clean
from polymodal.errors import PolymodalError
from polymodal.serving import completions, media_routes, metrics, page, responses, runs
from polymodal.serving.answers import ChatAnswer
from polymodal.serving.bodies import Limits
from polymodal.serving.errors import RequestError, as_request_error
from polymodal.serving.models import Served, model_of
from polymodal.serving.protocol import read_request
from polymodal.serving.scheduler import Scheduler
from polymodal.serving.server import give_back_memory
from polymodal.serving.streams import route

LOG = logging.getLogger(__name__)

OPEN = ("/health", "/ready", *page.FILES)
"""Routes without a key."""
READERS = 4
"""Large bodies that are read and unpacked at the same time; others wait, unread from where they are large."""


def build_app(
    models: Mapping[str, Served],
    key: str | None = None,
    loopback: bool = True,
    limits: Limits | None = None,
    runs_folder: Path | None = None,
) -> Starlette:
    """Make the application over models by name; `loopback`: only this machine may reach it, by its own names."""
    first = next(iter(models.values()))
    makers, queue = first.makers, first.scheduler  # all of them have the same
    media = Scheduler(media_routes.MediaWork(), queue.size, queue.timeout)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tidying = asyncio.create_task(give_back_memory(60.0))
        yield
        tidying.cancel()
        for scheduler in (*(served.scheduler for served in models.values()), media):
            scheduler.close()
        makers.sources.close()

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", model),
        route("/v1/chat/completions", lambda body, models: ChatAnswer(read_request(body, models))),
        *completions.ROUTES,
        *metrics.ROUTES,
        *responses.ROUTES,
        *page.ROUTES,
        *runs.ROUTES,
        *media_routes.ROUTES,
    ]
    guard = Middleware(Guard, key=key, loopback=loopback)
    handlers: Any = {HTTPException: _as_json, RequestError: _as_json}
    app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.models, app.state.limits, app.state.runs = models, limits or Limits(), runs_folder
    app.state.makers, app.state.media = makers, media
    app.state.metrics = metrics.Metrics(models, media)
    app.state.readers = asyncio.Semaphore(READERS)
    return app


class Guard:
    """Refuses who may not ask, before anything is read; writes one line a request; no error leaves it unanswered."""

    def __init__(self, app: ASGIApp, key: str | None, loopback: bool) -> None:
        self.app, self.loopback = app, loopback
        self.digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                scope["app"].state.metrics.answered.labels(status).inc()
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cache-Control"] = "no-store"
            await send(message)

        try:
            try:
                self._check(Request(scope))
                await self.app(scope, receive, noting)
            except ClientDisconnect:
                pass
            except Exception as error:
                if not isinstance(error, PolymodalError):
                    LOG.error("%s: %s", type(error).__name__, error, exc_info=LOG.isEnabledFor(logging.DEBUG))
                if not status:
                    await _answer(as_request_error(error))(scope, receive, noting)
        finally:
            seconds = time.monotonic() - begin
            if not status:
                scope["app"].state.metrics.answered.labels("gone").inc()
            LOG.info("%s %s %s %.2f s", scope["method"], clean(scope["path"], 100), status or "gone", seconds)

    def _check(self, request: Request) -> None:
        """Refuse pages of other origins, other names of this machine, and whoever has not the key."""
        hosts, origins = request.headers.getlist("host"), request.headers.getlist("origin")
        if len(hosts) > 1 or (self.loopback and any(_host_of(f"//{host}") not in LOOPBACK for host in hosts)):
            raise RequestError("the Host header is none of this server's names", status=403, code="bad_host")
        if any(urlsplit(origin).netloc.lower() not in [host.lower() for host in hosts] for origin in origins):
            raise RequestError("pages of other origins may not ask this server", status=403, code="bad_origin")
        if self.digest is None or request.url.path in OPEN:
            return
        given = request.headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(digest, self.digest) or scheme.lower() != "bearer":
            raise RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")


LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names by which a browser on this machine reaches it; any other may be a stranger's that points here."""


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _answer(error: RequestError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry)} if error.retry else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _as_json(_: Request, error: Exception) -> Response:
    """An error of ours, or of Starlette's about routes and methods, as OpenAI's object."""
    if isinstance(error, HTTPException):
        told = {404: "there is no such route", 405: "this route has no such method"}.get(error.status_code, "refused")
        error = RequestError(told, status=error.status_code)
    return _answer(as_request_error(error))


async def health(_: Request) -> Response:
    """Whether the process lives."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether it would answer: not where a model has stopped in the middle of a request."""
    state = request.app.state
    if any(served.scheduler.stalled(state.limits.stall_s) for served in state.models.values()):
        raise RequestError("a model makes no progress", status=503, code="stalled")
    # A step may be a whole image, for which its client waits so long.
    if state.media.stalled(max(state.limits.stall_s, state.media.timeout)):
        raise RequestError("what draws, speaks and listens makes no progress", status=503, code="stalled")
    return JSONResponse({"status": "ready"})


async def list_models(request: Request) -> Response:
    """The models that are served."""
    return JSONResponse({"object": "list", "data": _cards(request)})


async def model(request: Request) -> Response:
    """One of them, by its name."""
    name = request.path_params["name"]
    found = next((card for card in _cards(request) if card["id"] == name), None)
    return JSONResponse(found or model_of(request.app.state.models, name).card)


def _cards(request: Request) -> list[dict[str, Any]]:
    models: Mapping[str, Served] = request.app.state.models
    first = next(iter(models.values()))
    beside = [card for card in first.makers.cards(first.created) if card["id"] not in models]
    return [*(served.card for served in models.values()), *beside]

"""The web page: its files, which hold nothing secret, and what the model sees of a conversation."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from polymodal.backends.base import Backend
from polymodal.messages import Message
from polymodal.processing.document_pages import expand_documents
from polymodal.processing.processor import Processor
from polymodal.serving.bodies import check_headers, received
from polymodal.serving.errors import RequestError
from polymodal.serving.protocol import read_request
from polymodal.utils.html import data_url
from polymodal.viewer.draw import draw_medium
from polymodal.viewer.view import plan_facts, view_sample

WEB = Path(__file__).parent / "web"
FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/runs.js": ("runs.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
"""What a browser may fetch without the key; whatever the page asks then needs it."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'"
)


async def page(request: Request) -> Response:
    """One of the page's files."""
    name, kind = FILES[request.url.path]
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
    return Response((WEB / name).read_bytes(), media_type=kind, headers=headers)


async def preview(request: Request) -> Response:
    """What the model sees of a conversation: counts of tokens, and each medium's tiles, frames or windows drawn."""
    state = request.app.state
    check_headers(request, state.limits.body)
    async with received(request) as body:
        asked = await asyncio.to_thread(read_request, body, state.models)
        return JSONResponse(await asyncio.to_thread(see, asked.served.backend, asked.messages))


def see(backend: Backend, messages: Sequence[Message]) -> dict[str, Any]:
    """The answer of `preview`."""
    processor = getattr(backend, "processor", None)
    if not isinstance(processor, Processor):
        told = "only models of this toolkit's own kind show what they see"
        raise RequestError(told, "model", code="unsupported_model")
    messages = expand_documents(messages)  # once, for the sample and for the drawings
    sample = processor(messages, add_generation_prompt=True, pixels=False)
    media = []
    for medium in processor.media(messages):
        kind = type(medium.plan).__name__.removesuffix("Plan").lower()
        drawn = data_url(draw_medium(medium, processor.config), "webp", quality=85)
        media.append({"kind": kind, "tokens": medium.plan.num_tokens, "facts": plan_facts(medium.plan), "image": drawn})
    counts = view_sample(sample, processor.tokenizer).counts
    return {"object": "preview", "prompt_tokens": sum(counts.values()), "media_tokens": counts["media"], "media": media}


ROUTES = [*(Route(path, page) for path in FILES), Route("/v1/preview", preview, methods=["POST"])]

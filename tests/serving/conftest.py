"""A server on loopback over the tiny model with all senses, and one over a model that says what a test tells it to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from polymodal.backends import load
from polymodal.backends.base import Backend, Reply, StreamEvent, TextDelta, Timing, Usage
from polymodal.media.decoders import Decoders
from polymodal.messages import assistant
from polymodal.serving.app import Limits, build_app
from polymodal.serving.fetching import Sources
from polymodal.serving.makers import Makers
from polymodal.serving.models import Served
from polymodal.serving.scheduler import Scheduler
from polymodal.serving.server import bind, make_server

CONTEXT = 512
LONGEST = 16  # characters of a token of the byte tokenizer: <|im_start|> has 12


class Told(Backend):
    """Says a word whenever a test lets it, up to the number of tokens that is asked for."""

    name = "told"
    word = "word "

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.begun, self.closed, self.made = threading.Event(), threading.Event(), 0
        self.fault: BaseException | None = None

    def stream(self, messages: Any, params: Any = None) -> Iterator[StreamEvent]:
        self.begun.set()
        try:
            for _ in range(params.max_new_tokens):
                if not self.steps.acquire(timeout=20):
                    raise RuntimeError("no test said go")
                if self.fault is not None:
                    raise self.fault
                self.made += 1
                yield TextDelta(self.word)
            said = assistant(self.word * params.max_new_tokens)
            yield Reply(said, Usage(3, 0, 2), Timing(0, 0, 0, 0, 0), "stop", "x")
        finally:
            self.closed.set()


class Running:
    """A server's address, and what a test looks at."""

    def __init__(self, models: dict[str, Served], port: int) -> None:
        self.models, self.served = models, models["tiny"]
        self.scheduler, self.backend = self.served.scheduler, self.served.backend
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def post(self, body: Any = None, **options: Any) -> Any:
        """Ask for a chat: a request as JSON, or raw bytes as they are."""
        return self.post_to("/v1/chat/completions", body, **options)

    def post_to(self, path: str, body: Any = None, **options: Any) -> Any:
        if not isinstance(body, bytes | type(None)):
            options["json"] = body
        elif body is not None:
            options["content"] = body
            options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}
        return httpx2.post(f"{self.url}{path}", timeout=60, trust_env=False, **options)

    def get(self, path: str, **options: Any) -> Any:
        return httpx2.get(f"{self.url}{path}", timeout=60, trust_env=False, **options)


@contextmanager
def running(
    backend: Backend, *, key: str | None = None, loopback: bool = True, queue: int = 16, timeout: float = 60.0,
    limits: Limits | None = None, beside: dict[str, Backend] | None = None, runs_folder: Path | None = None,
    most: int = 64, makers: Makers | None = None,
) -> Iterator[Running]:  # fmt: skip
    makers = makers or Makers()
    models = {
        name: Served(one, Scheduler(one, queue, timeout), name, most, 12, CONTEXT * LONGEST, 1_700_000_000, makers)
        for name, one in {"tiny": backend, **(beside or {})}.items()
    }
    address = bind("127.0.0.1", 0)
    server = make_server(build_app(models, key, loopback, limits, runs_folder), drain=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(models, address.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def tiny(senses_folder: Path) -> Iterator[Running]:
    """The tiny model behind a server that decodes in processes of their own, as the command's does."""
    backend: Any = load(senses_folder)
    backend.trims = False
    with running(backend, makers=Makers(sources=Sources(decoders=Decoders()))) as server:
        yield server


@pytest.fixture
def told() -> Iterator[Callable[..., Any]]:
    """Makes a `Told` and a server over it; options as `running` has them."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        models: list[Told] = []

        def make(**options: Any) -> tuple[Told, Running]:
            models.append(Told())
            return models[-1], stack.enter_context(running(models[-1], **options))

        yield make
        for model in models:
            model.steps.release(10_000)


@pytest.fixture(scope="session")
def tooled(tiny_model_folder: Path) -> Iterator[Running]:
    """The tiny model with a chat template that has a place for tools, behind a server."""
    from polymodal.config import TemplateConfig
    from polymodal.processing.chat_template.encode import ChatTemplate
    from tests.processing.tool_templates import QWEN25

    backend: Any = load(tiny_model_folder)
    backend.trims, backend.context_length = False, 4096  # tools take a token a letter
    backend.tokenizer.chat_template = QWEN25
    backend.processor.template = ChatTemplate(backend.tokenizer, TemplateConfig(), backend.model.image_token_id)
    with running(backend, most=128) as server:
        yield server

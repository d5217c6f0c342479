"""Any OpenAI-compatible chat endpoint behind the chat protocol: OpenAI, Gemini, Claude, vLLM, llama.cpp, ...

Named `openai:MODEL`; the address and the key come from OPENAI_BASE_URL and OPENAI_API_KEY. What differs from a model of
ours: times are taken here, so `encode_s` is always 0; token counts are the server's, 0 where it gives none; stop texts
and the seed are the server's to honour; thoughts that a server sends apart from the answer are not shown. `top_k` and
`repetition_penalty` are no part of OpenAI's API and some servers take them and do nothing, so they are refused here;
give them in `extra` to a server that honours them.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Literal

from polymodal.backends.base import Reply, TextDelta, Timing, Usage, ask_once, require_question
from polymodal.backends.openai.http import Endpoint, Event, Patience, Refused
from polymodal.backends.openai.messages import Detail, to_openai
from polymodal.backends.openai.request import Accepts, learn, request_body
from polymodal.backends.openai.responses import clean, finish_of, text_of
from polymodal.checkpoints.locate import ENDPOINT
from polymodal.errors import ConfigError, EndpointError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Message, assistant

OPENAI_URL = "https://api.openai.com/v1"

CONCURRENT = 8
"""Requests that are under way at once in `generate_batch`."""


def open_endpoint(
    model: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    allow_http: bool = False,
    patience: Patience | None = None,
    detail: Detail | None = None,
    extra: Mapping[str, Any] | None = None,
) -> OpenAIBackend:
    """Make a backend of an endpoint; nothing is sent yet."""
    url = base_url or os.environ.get("OPENAI_BASE_URL") or None
    key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
    if not model.strip():
        raise ConfigError(f"{ENDPOINT} needs a model's name, such as {ENDPOINT}gpt-4o")
    if url is None and not key:
        raise ConfigError(
            f"{ENDPOINT}{model}: set OPENAI_API_KEY, or the address of another server (--base-url, OPENAI_BASE_URL)"
        )
    endpoint = Endpoint(url or OPENAI_URL, key, patience, allow_http)
    return OpenAIBackend(model.strip(), endpoint, detail=detail, extra=extra)


class OpenAIBackend:
    """Answers conversations with a model behind an endpoint."""

    ask = ask_once

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        detail: Detail | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.endpoint = endpoint
        self.detail = detail
        self.extra = dict(extra or {})
        self.name = f"{ENDPOINT}{model}"
        self._accepts = Accepts()

    def __repr__(self) -> str:
        return f"OpenAIBackend({self.model!r}, {self.endpoint!r})"

    def generate(self, messages: Sequence[Message], params: GenerationParams | None = None) -> Reply:
        """Answer a conversation in one piece."""
        *_, reply = self._talk(messages, params or GenerationParams(), stream=False)
        assert isinstance(reply, Reply)  # the last event
        return reply

    def stream(
        self, messages: Sequence[Message], params: GenerationParams | None = None
    ) -> Iterator[TextDelta | Reply]:
        """Answer a conversation piece by piece. Closing the iterator closes the connection."""
        yield from self._talk(messages, params or GenerationParams(), stream=True)

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], params: GenerationParams
    ) -> list[str | PolymodalError]:
        """Answer several conversations, a few of them at the same time."""

        def answer(messages: Sequence[Message]) -> str | PolymodalError:
            try:
                return self.generate(messages, params).text.strip()
            except PolymodalError as error:
                return error

        with ThreadPoolExecutor(CONCURRENT) as pool:
            try:
                return list(pool.map(answer, conversations))
            except BaseException:  # Ctrl-C: what has not begun is not sent
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        """Close the connections that are kept open between calls."""
        self.endpoint.close()

    def _talk(self, messages: Sequence[Message], params: GenerationParams, stream: bool) -> Iterator[TextDelta | Reply]:
        begin = time.perf_counter()
        require_question(messages)
        content = to_openai(messages, self.detail)
        prepared = time.perf_counter()
        first: float | None = None
        text = ""
        joiner = _Joiner()
        finish: str | None = None
        usage: dict[str, Any] = {}
        model = self.model
        with closing(self._events(content, params, stream)) as events:
            for event in events:
                if delta := joiner.push(text_of(event)):
                    first = first or time.perf_counter()
                    text += delta
                    yield TextDelta(delta)
                finish = finish_of(event) or finish
                usage = event["usage"] if isinstance(event.get("usage"), dict) else usage
                model = event["model"] if isinstance(event.get("model"), str) and event["model"] else model
        if delta := joiner.finish():
            text += delta
            yield TextDelta(delta)
        end = time.perf_counter()
        made, first = _count(usage.get("completion_tokens")), first or end
        streamed_s, details = end - first, usage.get("prompt_tokens_details")
        yield Reply(
            message=assistant(text),
            usage=Usage(
                prompt_tokens=_count(usage.get("prompt_tokens")),
                image_tokens=_count(details.get("image_tokens") if isinstance(details, dict) else 0),
                completion_tokens=made,
            ),
            timing=Timing(
                prepare_s=prepared - begin,
                encode_s=0.0,
                first_token_s=first - begin,
                total_s=end - begin,
                tokens_per_s=(made - 1) / streamed_s if stream and made > 1 and streamed_s > 0 else 0.0,
            ),
            finish_reason=self._finish(finish),
            model=clean(model, 200),
        )

    def _events(self, content: list[dict[str, Any]], params: GenerationParams, stream: bool) -> Generator[Event]:
        """Send, and send again without what the server says it does not take."""
        accepts, answered = self._accepts, False
        tried = {accepts}
        while True:
            body = request_body(self.model, content, params, accepts, stream=stream, extra=self.extra)
            try:
                with closing(self.endpoint.send(body, lambda event: bool(text_of(event)))) as events:
                    for event in events:
                        answered = True
                        yield event
                self._keep(accepts)
                return
            except Refused as error:
                learnt = learn(accepts, str(error), body)
                if answered or learnt is None or learnt in tried:
                    raise
                tried.add(learnt)
                accepts = learnt

    def _keep(self, accepts: Accepts) -> None:
        """Remember what the server takes; nobody is to think that answers are the likeliest ones if they are not."""
        if self._accepts.zero_temperature and not accepts.zero_temperature:
            warnings.warn(
                f"{self.name} takes no temperature 0; its answers are drawn at its own temperature", stacklevel=2
            )
        self._accepts = accepts

    def _finish(self, reason: str | None) -> Literal["stop", "length"]:
        """Our name for why an answer ended; an answer that is none is an error."""
        if reason in ("content_filter", "safety", "SAFETY"):
            raise EndpointError(f"{self.endpoint.shown}: the server's content filter stopped the answer")
        if reason == "error":
            raise EndpointError(f"{self.endpoint.shown}: the server gave up in the middle of the answer")
        if reason in ("tool_calls", "function_call"):
            raise EndpointError(
                f"{self.endpoint.shown}: the model called a tool instead of answering; it was given none"
            )
        return "length" if reason in ("length", "max_tokens", "MAX_TOKENS") else "stop"


class _Joiner:
    """Joins the halves of characters beyond the basic plane that servers with UTF-16 strings cut apart."""

    def __init__(self) -> None:
        self._half = ""

    def push(self, delta: str) -> str:
        text, self._half = self._half + delta, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def finish(self) -> str:
        return "\N{REPLACEMENT CHARACTER}" if self._half else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0

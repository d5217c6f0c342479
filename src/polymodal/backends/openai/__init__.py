"""Any OpenAI-compatible chat endpoint behind the chat protocol: OpenAI, Gemini, Claude, vLLM, llama.cpp, ...

Named `openai:MODEL`; the address and the key come from OPENAI_BASE_URL and OPENAI_API_KEY. What differs from a model of
ours: times are taken here and token counts are the server's, None where it gives none; stop texts and the seed are the
server's to honour; thoughts that a server sends apart from the answer are not shown, and alone are no answer. `top_k`
and `repetition_penalty` are no part of OpenAI's API and some servers take them and do nothing, so they are refused
here; give them in `extra` to a server that honours them.
"""

from __future__ import annotations

import codecs
import os
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from polymodal.backends.base import (
    Answer,
    Backend,
    Reply,
    StreamEvent,
    TextDelta,
    Timing,
    Usage,
    check_makes,
    require_question,
    with_modalities,
)
from polymodal.backends.openai.answers import Event, clean, finish_of, text_of, thinks
from polymodal.backends.openai.http import Endpoint, Patience, Refused
from polymodal.backends.openai.media import SENDING, Detail, Documents, Json, Sending, Videos
from polymodal.backends.openai.messages import Accepts, learn, request_body, to_openai
from polymodal.checkpoints.locate import ENDPOINT
from polymodal.errors import ConfigError, EndpointError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Conversation, Message, assistant
from polymodal.utils.files import sha256_json

EndpointT = TypeVar("EndpointT", bound=Endpoint)

OPENAI_URL = "https://api.openai.com/v1"

CONCURRENT = 8
"""Requests that are under way at once in `generate_batch`."""

_FILTERED = "the server's content filter stopped the answer"
_TOOL = "the model called a tool instead of answering; it was given none"
_GAVE_UP = "the server gave up in the middle of the answer"
_NO_ANSWER = {
    **dict.fromkeys(("content_filter", "safety", "sensitive", "blocklist", "prohibited_content", "spii"), _FILTERED),
    **dict.fromkeys(("recitation", "image_safety", "content_filtered", "guardrail_intervened"), _FILTERED),
    **dict.fromkeys(("tool_calls", "function_call", "tool_use", "malformed_function_call"), _TOOL),
    **dict.fromkeys(("error", "abort", "aborted", "cancelled", "canceled", "network_error", "server_error"), _GAVE_UP),
    **dict.fromkeys(("timeout", "insufficient_system_resource", "failed", "interrupted"), _GAVE_UP),
}
"""Why an answer ended that is none."""

_LENGTH = ("length", "max_tokens", "max_output_tokens", "max_new_tokens", "max_length", "model_length", "token_limit",
           "model_context_window_exceeded", "length_limit", "incomplete")  # fmt: skip
_STOP = ("stop", "stop_sequence", "stop_token", "end_turn", "end", "eos", "eos_token", "eos_token_id", "complete",
         "completed", "finished", "finish", "done", "refusal")  # fmt: skip
"""What servers call the limit of tokens, and an end; OpenAI's own are "length" and "stop"."""


def open_endpoint(
    model: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    allow_http: bool = False,
    patience: Patience | None = None,
    detail: Detail | None = None,
    videos: Videos = "auto",
    documents: Documents = "pages",
    extra: Mapping[str, Any] | None = None,
) -> OpenAIBackend:
    """Make a backend of an endpoint; nothing is sent yet. How media are sent is in `openai.media`."""
    endpoint = connect(Endpoint, model, base_url, api_key, allow_http, patience)
    for value, known in ((videos, get_args(Videos)), (documents, get_args(Documents))):
        if value not in known:
            raise ConfigError(f"{ENDPOINT}{model}: {value!r} is none of {', '.join(known)}")
    return OpenAIBackend(model.strip(), endpoint, Sending(detail, videos, documents), extra)


def connect(
    kind: type[EndpointT],
    model: str,
    base_url: str | None,
    api_key: str | None,
    allow_http: bool,
    patience: Patience | None = None,
    example: str = "gpt-4o",
) -> EndpointT:
    """The server that a model lies behind, by what was given and what the environment says."""
    url = base_url or os.environ.get("OPENAI_BASE_URL") or None
    key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
    if not model.strip():
        raise ConfigError(f"{ENDPOINT} needs a model's name, such as {ENDPOINT}{example}")
    if url is None and not key:
        raise ConfigError(
            f"{ENDPOINT}{model}: set OPENAI_API_KEY, or the address of another server (--base-url, OPENAI_BASE_URL)"
        )
    return kind(url or OPENAI_URL, key, patience, allow_http)


class OpenAIBackend(Backend):
    """Answers conversations with a model behind an endpoint."""

    takes = ("image", "audio", "video")

    def __init__(
        self, model: str, endpoint: Endpoint, sending: Sending = SENDING, extra: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model
        self.endpoint = endpoint
        self.sending = sending
        self.extra = dict(extra or {})
        self.name = f"{ENDPOINT}{model}"
        self.concurrent = CONCURRENT
        self._accepts = Accepts(videos=not endpoint.shown.startswith(OPENAI_URL))  # OpenAI's own takes none

    def fingerprint(self) -> str:
        """A hash of the address and the model's name, which are all that is known of it."""
        return sha256_json([self.endpoint.shown, self.model, asdict(self.sending), self.extra])

    def generate(
        self, messages: Conversation, params: GenerationParams | None = None, modalities: Sequence[str] | None = None
    ) -> Reply:
        """Answer a conversation in one piece, which any server can."""
        params = params or self.defaults
        params = params if modalities is None else with_modalities(params, modalities)
        if any(kind not in self.makes for kind in params.modalities):
            return super().generate(messages, params)
        *_, reply = self._talk(messages, params, stream=False)
        assert isinstance(reply, Reply)  # the last event
        return reply

    def stream(self, messages: Conversation, params: GenerationParams | None = None) -> Iterator[StreamEvent]:
        """Answer a conversation piece by piece. Closing the iterator closes the connection."""
        yield from self._talk(messages, params or GenerationParams(), stream=True)

    def generate_batch(self, conversations: Sequence[Conversation], params: GenerationParams) -> list[Answer]:
        """Answer several conversations, a few of them at the same time."""
        with ThreadPoolExecutor(self.concurrent) as pool:
            try:
                return list(pool.map(partial(self.answer, params=params), conversations))
            except BaseException:  # Ctrl-C: what has not begun is not sent
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        """Close the connections that are kept open between calls."""
        self.endpoint.close()

    def _talk(self, messages: Conversation, params: GenerationParams, stream: bool) -> Iterator[StreamEvent]:
        check_makes(self, params)
        begin = time.perf_counter()
        asked = require_question(messages)
        content = self._content(asked, self._accepts)
        prepared = time.perf_counter()
        first: float | None = None
        text, model = "", self.model
        finish: set[str] = set()
        thought = False
        usage: Json = {}
        # Servers whose strings are UTF-16 may cut a character beyond the basic plane in two.
        whole = codecs.getincrementaldecoder("utf-16-le")("replace")
        with closing(self._events(asked, content, params, stream)) as events:
            for event in events:
                thought = thought or thinks(event)
                delta = whole.decode(text_of(event).encode("utf-16-le", "surrogatepass"))
                if delta := delta if text else delta.lstrip(" "):  # as in the answers of our models
                    first = first or time.perf_counter()
                    text += delta
                    yield TextDelta(delta)
                finish |= {self._finish(reason)} if (reason := finish_of(event)) else set()
                usage = event["usage"] if isinstance(event.get("usage"), dict) else usage
                model = event["model"] if isinstance(event.get("model"), str) and event["model"] else model
        if delta := whole.decode(b"", final=True):
            text += delta
            yield TextDelta(delta)
        end = time.perf_counter()
        first = first or end
        made = _count(usage, "completion_tokens")
        thought = thought or bool(_count(usage.get("completion_tokens_details"), "reasoning_tokens"))
        at_limit = "length" in finish
        if (thought or at_limit) and not text.strip():
            raise EndpointError(
                f"{self.endpoint.shown}: the model {'thought and ' if thought else ''}gave no answer"
                + (f"; {params.max_new_tokens} tokens were too few (max_new_tokens)" if at_limit else "")
            )
        yield Reply(
            message=assistant(text),
            usage=Usage(
                _count(usage, "prompt_tokens"), _count(usage.get("prompt_tokens_details"), "image_tokens"), made
            ),
            timing=Timing(
                prepare_s=prepared - begin,
                encode_s=None,
                first_token_s=first - begin,
                total_s=end - begin,
                tokens_per_s=(made - 1) / (end - first) if stream and made and made > 1 and end > first else None,
            ),
            finish_reason="length" if at_limit else "stop",
            model=clean(model, 200),
        )

    def _content(self, messages: Sequence[Message], accepts: Accepts) -> list[Json]:
        """Write a conversation for a server that takes so much."""
        as_frames = self.sending.videos == "auto" and not accepts.videos
        return to_openai(messages, replace(self.sending, videos="frames") if as_frames else self.sending)

    def _events(
        self, messages: Sequence[Message], content: list[Json], params: GenerationParams, stream: bool
    ) -> Generator[Event]:
        """Send, and send again without what the server says it does not take."""
        accepts, answered = self._accepts, False
        tried = {accepts}
        while True:
            body = request_body(self.model, content, params, accepts, stream, self.extra)
            try:
                with closing(self.endpoint.send(body)) as events:
                    for event in events:
                        answered = answered or bool(text_of(event))
                        yield event
                break
            except Refused as error:
                learnt = learn(accepts, str(error), body)
                if answered or learnt is None or learnt in tried or len(tried) > 6:
                    raise
                if learnt.videos != accepts.videos:
                    if self.sending.videos != "auto":
                        raise
                    content = self._content(messages, learnt)
                tried.add(learnt)
                accepts = learnt
        # Nobody is to think that answers are the likeliest ones if they are not.
        if self._accepts.zero_temperature and not accepts.zero_temperature:
            warnings.warn(
                f"{self.name} takes no temperature 0; its answers are drawn at its own temperature", stacklevel=2
            )
        if accepts.most_tokens != self._accepts.most_tokens:
            warnings.warn(f"{self.name} makes at most {accepts.most_tokens:,} tokens an answer", stacklevel=2)
        if self._accepts.videos and not accepts.videos:
            warnings.warn(f"{self.name} takes no videos; their frames are sent as images", stacklevel=2)
        self._accepts = accepts

    def _finish(self, reason: str) -> Literal["stop", "length"]:
        """Our name for why an answer ended; an answer that is none is an error."""
        word = reason.strip().lower()
        if word in _NO_ANSWER:
            raise EndpointError(f"{self.endpoint.shown}: {_NO_ANSWER[word]} ({word})")
        if word not in (*_LENGTH, *_STOP):
            warnings.warn(
                f"{self.name}: the answer ended for a reason that is not known here ({clean(reason, 60)!r}); "
                "it may not be whole",
                stacklevel=2,
            )
        return "length" if word in _LENGTH else "stop"


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens; None where the server does not tell it."""
    value = usage.get(name) if isinstance(usage, dict) else None
    try:
        return max(int(value), 0) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None

"""`/v1/completions`: texts that are gone on from, without a conversation and its template."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from polymodal.backends.base import Backend, RawPrompt, Reply, StreamEvent, TextDelta
from polymodal.errors import PolymodalError
from polymodal.generation.sampling import Chance
from polymodal.generation.streaming import spelt
from polymodal.serving.answers import LEAST, usage_of
from polymodal.serving.errors import Json, RequestError, parse
from polymodal.serving.models import Served, model_of
from polymodal.serving.protocol import MAX_CHOICES, Sampling, StreamOptions, choices_of, params_of, wants_usage
from polymodal.serving.streams import DONE, Answer, data, route

MAX_PROMPTS = 8
DEFAULT_TOKENS = 16
"""Of an answer where nothing is said, as in OpenAI's API."""

_Ids: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


def _shape(value: Any) -> str | None:
    if isinstance(value, list):
        inner = value[0] if value else None
        return "<texts>" if isinstance(inner, str) else "<lists>" if isinstance(inner, list) else "<ids>"
    return "<text>" if isinstance(value, str) else None


_Prompt: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)], Tag("<texts>")]
    | Annotated[_Ids, Tag("<ids>")]
    | Annotated[Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS)], Tag("<lists>")],
    Discriminator(_shape, custom_error_type="prompt", custom_error_message="must be a text, texts or ids of tokens"),
]


class _Request(Sampling):
    prompt: _Prompt
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None
    echo: Literal[False] = False
    best_of: Literal[1] = 1


class Completion(Answer):
    """Answers to prompts, in the order of the prompts."""

    def __init__(self, request: _Request, served: Served) -> None:
        limit = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
        params = params_of(request, served, "max_tokens", min(limit, served.max_tokens) if request.max_tokens is None
                           else limit, {"logprobs": request.logprobs})  # fmt: skip
        prompts = [(prompt, choices_of(params, request.n)) for prompt in _prompts(request.prompt, served)]
        super().__init__(served, prompts, request.stream, request.cache_salt)
        self.count, self.likeliest = request.n, request.logprobs
        self.usage = wants_usage(request.stream_options, request.stream)
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
            "model": served.name,
        }  # fmt: skip
        self.said: dict[int, int] = {}  # How much of each answer has been told

    def whole(self, replies: Sequence[Reply]) -> Json:
        """All of it."""
        choices = [
            self._choice(index, reply.text, reply.finish_reason, reply.chances, 0)
            for index, reply in enumerate(replies)
        ]
        return {**self.head, "choices": choices, "usage": self._usage(replies)}

    def pieces(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        """Text as it comes, and why it ended."""
        more: Json = {"usage": None} if self.usage else {}
        if isinstance(event, TextDelta) and (event.text or event.chances):
            at = self.said.get(index, 0)
            self.said[index] = at + len(event.text)
            yield data({**self.head, "choices": [self._choice(index, event.text, None, event.chances, at)], **more})
        elif isinstance(event, Reply):
            yield data({**self.head, "choices": [self._choice(index, "", event.finish_reason, (), 0)], **more})

    def last(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        """What it took, and the end."""
        if self.usage:
            yield data({**self.head, "choices": [], "usage": self._usage(replies)})
        yield DONE

    def _usage(self, replies: Sequence[Reply]) -> Json | None:
        each = [usage_of(replies[at : at + self.count], ()) for at in range(0, len(replies), self.count)]
        known = [usage for usage in each if usage is not None]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return {name: sum(usage[name] for usage in known) for name in names} if len(known) == len(each) else None

    def _choice(self, index: int, text: str, finish: str | None, chances: Sequence[Chance], start: int) -> Json:
        told: Json | None = None
        if self.likeliest is not None and (chances or finish is None or text):
            tokenizer: Any = self.served.backend.tokenizer  # type: ignore[attr-defined]  # whoever tells chances has one

            def name(token: int) -> str:
                return spelt(tokenizer, token).decode("utf-8", "replace")

            tokens = [name(chance.token) for chance in chances]
            told = {
                "tokens": tokens,
                "token_logprobs": [max(chance.logprob, LEAST) for chance in chances],
                "top_logprobs": [{name(t): max(p, LEAST) for t, p in chance.likeliest} for chance in chances],
                "text_offset": [start + sum(map(len, tokens[:place])) for place in range(len(tokens))],
            }
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}


def _prompts(given: Any, served: Served) -> list[RawPrompt]:
    backend: Backend = served.backend
    if not backend.completes:
        raise RequestError("prompt: this model answers conversations alone; ask /v1/chat/completions", "prompt")
    several = isinstance(given, list) and not isinstance(given[0], int)
    each: list[Any] = given if several else [given]
    if sum(map(len, each)) > served.max_chars:
        raise RequestError("prompt: more than the model's context can hold", "prompt", code="context_length_exceeded")
    found = []
    for number, one in enumerate(each):
        place = f"prompt[{number}]" if several else "prompt"
        try:
            found.append(backend.raw_prompt(one))  # type: ignore[attr-defined]  # of those that complete
        except (PolymodalError, UnicodeEncodeError) as error:
            told = "holds half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else error
            raise RequestError(f"{place}: {told}", place) from None
    return found


def _read(body: bytes, models: Mapping[str, Served]) -> Completion:
    request = parse(body, _Request)
    return Completion(request, model_of(models, request.model))


ROUTES = [route("/v1/completions", _read)]

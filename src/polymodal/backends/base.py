"""One chat protocol over every model: what chat, serve and eval talk to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message, Source, assistant, user

if TYPE_CHECKING:
    from polymodal.generation.streaming import TextStream


@dataclass(frozen=True)
class Usage:
    """Tokens of one call."""

    prompt_tokens: int  # Positions before the answer, media included
    image_tokens: int  # Those of them that are images
    completion_tokens: int  # Tokens made, the end token included


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    prepare_s: float  # Decoding images, tiling, tokenising
    encode_s: float  # Vision encoder, projector and embedding; 0 where the model does not let it be seen apart
    first_token_s: float  # From the call to the first token
    total_s: float  # From the call to the last token
    tokens_per_s: float  # Decoding speed after the first token; 0 where there was only one


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer, as it is made."""

    text: str


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        message: The assistant's message, ready to be appended to the conversation.
        usage: Token counts.
        timing: Seconds.
        finish_reason: "stop" at an end token or a stop text, "length" at the token limit.
        model: The model's name.
    """

    message: Message
    usage: Usage
    timing: Timing
    finish_reason: Literal["stop", "length"]
    model: str

    @property
    def text(self) -> str:
        """The answer's text."""
        return self.message.text


class Backend(Protocol):
    """Anything that answers conversations."""

    name: str

    def ask(self, prompt: str, *images: Source, params: GenerationParams | None = None) -> str:
        """Ask one question about some images.

        Args:
            prompt: The question.
            *images: Paths, bytes, `data:` URLs or Pillow images.
            params: The settings; the backend's defaults where None.

        Returns:
            The answer's text.
        """
        ...

    def generate(self, messages: Sequence[Message], params: GenerationParams | None = None) -> Reply:
        """Answer a conversation.

        Args:
            messages: The conversation; ends with a user message.
            params: The settings; the backend's defaults where None.

        Returns:
            The whole answer.
        """
        ...

    def stream(
        self, messages: Sequence[Message], params: GenerationParams | None = None
    ) -> Iterator[TextDelta | Reply]:
        """Answer a conversation piece by piece; the last event is the whole `Reply`.

        Args:
            messages: The conversation; ends with a user message.
            params: The settings; the backend's defaults where None.

        Returns:
            Text deltas, then the `Reply`.
        """
        ...


def ask_once(backend: Backend, prompt: str, *images: Source, params: GenerationParams | None = None) -> str:
    """Ask one question about some images: the method `ask` of every backend."""
    return backend.generate([user(*map(Image, images), prompt)], params).text


@runtime_checkable
class BatchBackend(Protocol):
    """A backend that answers many conversations faster than one after the other."""

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], params: GenerationParams
    ) -> list[str | PolymodalError]:
        """Answer several conversations.

        Args:
            conversations: Each ends with a user message.
            params: The settings.

        Returns:
            For each the answer's text without white space around it, or why there is none.
        """
        ...


# ---- What every backend that runs a model does with a conversation: fit it into the context, stream the answer ----


def require_question(messages: Sequence[Message]) -> None:
    """Check that a conversation asks for an answer."""
    if not messages or messages[-1].role != "user":
        raise PolymodalError("a conversation to answer must end with a user message")


def forget_oldest(messages: Sequence[Message], length: int, context: int) -> list[Message]:
    """Leave out the oldest question of plain text and its answer; media and the last question always stay."""
    start = next((i for i in range(len(messages) - 2) if _is_text_turn(messages, i)), None)
    if start is None:
        raise PolymodalError(
            f"the conversation takes {length} tokens and the model's context is {context}; "
            "shorten the text or give fewer or smaller images (media are never cut)"
        )
    return [*messages[:start], *messages[start + 2 :]]


def _is_text_turn(messages: Sequence[Message], start: int) -> bool:
    """Whether a question of plain text and its answer stand here."""
    pair = messages[start : start + 2]
    return [m.role for m in pair] == ["user", "assistant"] and not any(m.media for m in pair)


def stream_reply(
    steps: Iterable[tuple[int, float]],
    text: TextStream,
    *,
    begin: float,
    prompt_tokens: int,
    image_tokens: int,
    model: str,
) -> Iterator[TextDelta | Reply]:
    """Turn tokens into text as they are made, and take the times; called when the prompt is ready."""
    prepared = first = time.perf_counter()
    made, encode_s = 0, 0.0
    for token, seconds in steps:
        if made == 0:
            first, encode_s = time.perf_counter(), seconds
        made += 1
        if delta := text.push(token):
            yield TextDelta(delta)
        if text.stopped:
            break
    if delta := text.finish():
        yield TextDelta(delta)
    end = time.perf_counter()
    yield Reply(
        message=assistant(text.text),
        usage=Usage(prompt_tokens, image_tokens, made),
        timing=Timing(
            prepare_s=prepared - begin,
            encode_s=encode_s,
            first_token_s=first - begin,
            total_s=end - begin,
            tokens_per_s=(made - 1) / (end - first) if made > 1 else 0.0,
        ),
        finish_reason="stop" if text.stopped else "length",
        model=model,
    )

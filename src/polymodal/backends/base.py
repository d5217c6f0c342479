"""One chat protocol over every model: what chat, serve and eval talk to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message, Source, user


@dataclass(frozen=True)
class Usage:
    """Tokens of one call.

    Attributes:
        prompt_tokens: Positions before the answer, media included.
        image_tokens: Those of them that are pictures.
        completion_tokens: Tokens made, the end token included.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        prepare_s: Decoding pictures, tiling, tokenising.
        encode_s: Vision encoder, projector and embedding; 0 where the model does not let it be seen apart.
        first_token_s: From the call to the first token.
        total_s: From the call to the last token.
        tokens_per_s: Decoding speed after the first token; 0 where there was only one.
    """

    prepare_s: float
    encode_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float


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

    def ask(self, prompt: str, *pictures: Source, params: GenerationParams | None = None) -> str:
        """Ask one question about some pictures.

        Args:
            prompt: The question.
            *pictures: Paths, bytes, `data:` URLs or Pillow pictures.
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


def ask_once(backend: Backend, prompt: str, *pictures: Source, params: GenerationParams | None = None) -> str:
    """Ask one question about some pictures: the method `ask` of every backend.

    Args:
        backend: What answers.
        prompt: The question.
        *pictures: Paths, bytes, `data:` URLs or Pillow pictures.
        params: The settings; greedy where None.

    Returns:
        The answer's text.
    """
    return backend.generate([user(*map(Image, pictures), prompt)], params).text


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

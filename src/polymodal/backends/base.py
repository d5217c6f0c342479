"""One chat protocol over every model: what chat, serve and eval talk to."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import TextStream
from polymodal.messages import Image, Message, Source, assistant, user

Inputs = TypeVar("Inputs")


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


class Backend(ABC):
    """Anything that answers conversations: a subclass gives `stream`, and whatever it can do faster than this.

    Attributes:
        name: What the model is called.
    """

    name: str

    @abstractmethod
    def stream(
        self, messages: Sequence[Message], params: GenerationParams | None = None
    ) -> Iterator[TextDelta | Reply]:
        """Answer a conversation piece by piece. Closing the iterator stops the model.

        Args:
            messages: The conversation; ends with a user message.
            params: The settings; greedy where None.

        Returns:
            Text deltas as text becomes certain, then the whole `Reply`.

        Raises:
            PolymodalError: An image cannot be read, or the conversation does not fit the context.
        """

    def generate(self, messages: Sequence[Message], params: GenerationParams | None = None) -> Reply:
        """Answer a conversation.

        Args:
            messages: The conversation; ends with a user message.
            params: The settings; greedy where None.

        Returns:
            The whole answer.

        Raises:
            PolymodalError: As for `stream`.
        """
        *_, reply = self.stream(messages, params)
        assert isinstance(reply, Reply)  # the last event of a stream
        return reply

    def ask(self, prompt: str, *images: Source, params: GenerationParams | None = None) -> str:
        """Ask one question about some images.

        Args:
            prompt: The question.
            *images: Paths, bytes, `data:` URLs or Pillow images.
            params: The settings; greedy where None.

        Returns:
            The answer's text.
        """
        return self.generate([user(*map(Image, images), prompt)], params).text

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], params: GenerationParams
    ) -> list[str | PolymodalError]:
        """Answer several conversations, one by one unless the model can do it faster.

        Args:
            conversations: Each ends with a user message.
            params: The settings.

        Returns:
            For each the answer's text without white space around it, or why there is none.
        """
        return [self._answer(messages, params) for messages in conversations]

    def _answer(self, messages: Sequence[Message], params: GenerationParams) -> str | PolymodalError:
        try:
            return self.generate(messages, params).text.strip()
        except PolymodalError as error:
            return error


def require_question(messages: Sequence[Message]) -> None:
    """Check that a conversation asks for an answer."""
    if not messages or messages[-1].role != "user":
        raise PolymodalError("a conversation to answer must end with a user message")


def check_messages(messages: Sequence[Message]) -> None:
    """Check what neither an endpoint nor a model of transformers can be given."""
    for number, message in enumerate(messages, start=1):
        try:
            message.text.encode()
        except UnicodeEncodeError:
            raise PolymodalError(
                f"message {number}: the text holds half of a surrogate pair, which is no character; mend its encoding"
            ) from None
        if message.media and message.role != "user":
            raise PolymodalError(
                f"message {number}: images, sounds and videos must stand in a user's message, not the {message.role}'s"
            )


def fits(length: int, room: int, context: int) -> bool:
    """Whether a prompt leaves room for the answer, or at least a quarter of the context."""
    return length + min(room, context // 4) <= context


def fit_context(
    messages: Sequence[Message], process: Callable[[list[Message]], tuple[Inputs, int]], room: int, context: int
) -> Inputs:
    """Process a conversation without as many of its oldest questions of plain text as do not fit the context."""
    # `process` gives the prompt and its length; media and the last question always stay.
    require_question(messages)
    kept = list(messages)
    while True:
        made, length = process(kept)
        if fits(length, room, context):
            return made
        start = next((i for i in range(len(kept) - 2) if _is_text_pair(kept[i : i + 2])), None)
        if start is None:
            raise PolymodalError(
                f"the conversation takes {length} tokens and the model's context is {context}; "
                "shorten the text or give fewer or smaller images (media are never cut)"
            )
        del kept[start : start + 2]


def _is_text_pair(pair: Sequence[Message]) -> bool:
    """Whether two messages are a question of plain text and its answer."""
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

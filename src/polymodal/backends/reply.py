"""A whole answer: its message, what it cost, and why it ended; and a prompt that is no conversation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from polymodal.generation.streaming import Delta, TextDelta
from polymodal.messages import Audio, Image, Message, assistant
from polymodal.utils.html import notebook_view

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from polymodal.generation.params import GenerationParams
    from polymodal.generation.sampling import Chance, Sampler


@dataclass(frozen=True)
class RawPrompt:
    """The ids of a text that stands in no conversation and is to be gone on from; takes the place of messages."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of one call; None where a server does not tell."""

    prompt_tokens: int | None  # Positions before the answer, media included
    image_tokens: int | None  # Those of them that are images, frames of videos or sounds
    completion_tokens: int | None  # Tokens made, the end token included
    audio_tokens: int | None = None  # Those of `image_tokens` that are sounds; None where they are not told apart
    cached_tokens: int | None = None  # Those of `prompt_tokens` that were read for an earlier request


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    prepare_s: float  # Decoding images, tiling, tokenising
    encode_s: float | None  # Encoders, projectors and embedding; None where it is not seen apart
    first_token_s: float  # From the call to the first token
    total_s: float  # From the call to the last token
    tokens_per_s: float | None  # Decoding speed after the first token; 0 where there was only one, None if not known


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        message: The assistant's message, ready to be appended to the conversation.
        usage: Token counts.
        timing: Seconds.
        finish_reason: "stop" at an end token or a stop text, "length" at the token limit.
        model: The model's name.
        chances: How likely its tokens were, where `GenerationParams.logprobs` asks for it.
    """

    message: Message
    usage: Usage
    timing: Timing
    finish_reason: Literal["stop", "length"]
    model: str
    chances: tuple[Chance, ...] = ()

    @property
    def text(self) -> str:
        """The answer's text."""
        return self.message.text

    @property
    def images(self) -> list[PILImage.Image]:
        """The images that were made, in order."""
        return [part.source for part in self.message.media if isinstance(part, Image)]  # type: ignore[misc]

    @property
    def sounds(self) -> list[bytes]:
        """The sounds that were made, in order, as WAV files."""
        return [part.source for part in self.message.media if isinstance(part, Audio)]  # type: ignore[misc]

    _repr_html_ = notebook_view


StreamEvent: TypeAlias = Delta | Reply


class Answering:
    """An answer on its way: each id becomes events, and the last event is the reply."""

    def __init__(
        self,
        model: Any,  # A `ModelBackend`
        inputs: Any,
        params: GenerationParams,
        sampler: Sampler,
        begin: float,  # When it was asked for
        prompt: RawPrompt | None = None,  # That it goes on from
    ) -> None:
        self.model, self.inputs, self.sampler, self.begin = model, inputs, sampler, begin
        self.answer = model.answer_stream(params, prompt)
        self.prepared = self.first = time.perf_counter()
        self.made = 0
        self.encode_s: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether the answer has met its end."""
        return self.answer.stopped

    def push(self, token: int, encode_s: float | None) -> Iterator[StreamEvent]:
        """Add an id; the seconds are those of encoding media before it."""
        if self.made == 0:
            self.first, self.encode_s = time.perf_counter(), encode_s
        # A model in a thread of its own may have chosen more by now.
        chance = self.sampler.chances[self.made] if self.sampler.chances else None
        self.made += 1
        yield from [*self.answer.push(token, chance)] or [
            TextDelta("")
        ]  # where whoever asked can stop it, at every token

    def end(self, cached: int | None = None) -> Iterator[StreamEvent]:
        """What was held back, and the reply."""
        yield from self.answer.finish()
        end = time.perf_counter()
        yield Reply(
            message=assistant(*self.answer.parts),
            usage=self.model.usage(self.inputs, self.made, cached),
            timing=Timing(
                prepare_s=self.prepared - self.begin,
                encode_s=self.encode_s,
                first_token_s=self.first - self.begin,
                total_s=end - self.begin,
                tokens_per_s=(self.made - 1) / (end - self.first) if self.made > 1 else 0.0,
            ),
            finish_reason="stop" if self.answer.stopped else "length",
            model=self.model.name,
            chances=tuple(self.answer.chances),
        )

"""A whole answer: its message, what it cost, and why it ended; and a prompt that is no conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from polymodal.generation.streaming import Delta
from polymodal.messages import Audio, Image, Message

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from polymodal.generation.sampling import Chance


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


StreamEvent: TypeAlias = Delta | Reply

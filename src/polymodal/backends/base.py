"""One chat protocol over every model: what chat, serve and eval talk to."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from polymodal.config import parse_config
from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import AnswerStream, Delta, Step, TextStream
from polymodal.generation.streaming import MediaEnd as MediaEnd
from polymodal.generation.streaming import MediaProgress as MediaProgress
from polymodal.generation.streaming import MediaStart as MediaStart
from polymodal.generation.streaming import TextDelta as TextDelta
from polymodal.messages import (
    Audio,
    Conversation,
    Document,
    Image,
    Media,
    Message,
    Source,
    Video,
    as_messages,
    assistant,
    user,
)
from polymodal.utils.files import sha256_json

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from transformers import PreTrainedTokenizerBase

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Usage:
    """Tokens of one call; None where a server does not tell."""

    prompt_tokens: int | None  # Positions before the answer, media included
    image_tokens: int | None  # Those of them that are images, frames of videos or sounds
    completion_tokens: int | None  # Tokens made, the end token included


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

    @property
    def images(self) -> list[PILImage.Image]:
        """The images that were made, in order."""
        return [part.source for part in self.message.media if isinstance(part, Image)]  # type: ignore[misc]


StreamEvent: TypeAlias = Delta | Reply
Answer: TypeAlias = str | PolymodalError
"""An answer's text, or why there is none."""


class Backend(ABC):
    """Anything that answers conversations: a subclass gives `stream`, and whatever it can do faster than this.

    Attributes:
        name: What the model is called.
        concurrent: Conversations that it likes to be asked at the same time, one each; None where it batches instead.
        takes: Media that a question may hold.
        makes: What an answer may hold.
        defaults: The settings where none are given.
        captions: Whether it describes an image that it is given alone, and goes on from a text instead of answering it.
    """

    name: str
    concurrent: int | None = None
    takes: tuple[str, ...] = ("image",)
    makes: tuple[str, ...] = ("text",)
    captions = False
    defaults = GenerationParams()

    def fingerprint(self) -> str:
        """A hash of the model, by which answers are kept; of its name alone where there is nothing better."""
        return sha256_json([type(self).__name__, self.name])

    def settings(self) -> dict[str, str]:
        """What stands between a conversation and the model: hashes of its preprocessing and of its template."""
        return {}

    @abstractmethod
    def stream(self, messages: Conversation, params: GenerationParams | None = None) -> Iterator[StreamEvent]:
        """Answer a conversation piece by piece. Closing the iterator stops the model.

        Args:
            messages: The conversation, which ends with a user message: messages, dictionaries with role and content, or
                a text alone.
            params: The settings; where None those of the model's folder, greedy where it says nothing.

        Returns:
            Text deltas as text becomes certain; of an image `MediaStart`, `MediaProgress` and `MediaEnd`; then the
            whole `Reply`.

        Raises:
            PolymodalError: An image cannot be read, or the conversation does not fit the context.
        """

    def generate(
        self, messages: Conversation, params: GenerationParams | None = None, modalities: Sequence[str] | None = None
    ) -> Reply:
        """Answer a conversation.

        Args:
            messages: The conversation, which ends with a user message: messages, dictionaries with role and content, or
                a text alone.
            params: The settings; where None those of the model's folder, greedy where it says nothing.
            modalities: What the answer may hold, such as `("text", "image")`; those of `params` where None.

        Returns:
            The whole answer.

        Raises:
            PolymodalError: As for `stream`; and the model does not make what is asked for.
        """
        if modalities is not None:
            params = with_modalities(params or self.defaults, modalities)
        *_, reply = self.stream(messages, params)
        assert isinstance(reply, Reply)  # the last event of a stream
        return reply

    def ask(self, prompt: str, *media: Source | Media, params: GenerationParams | None = None) -> str:
        """Ask one question about some images, or videos, sounds and documents.

        Args:
            prompt: The question.
            *media: Images, as paths, bytes, `data:` URLs or Pillow images; parts of a message (`Image`, `Video`,
                `Audio`, `Document`) for others.
            params: The settings; where None those of the model's folder, greedy where it says nothing.

        Returns:
            The answer's text.
        """
        parts = [part if isinstance(part, Image | Video | Audio | Document) else Image(part) for part in media]
        return self.generate([user(*parts, prompt)], params).text

    def generate_batch(self, conversations: Sequence[Conversation], params: GenerationParams) -> list[Answer]:
        """Answer several conversations, one by one unless the model can do it faster.

        Args:
            conversations: Each ends with a user message.
            params: The settings.

        Returns:
            For each the answer's text without white space around it, or why there is none.
        """
        return [self.answer(messages, params) for messages in conversations]

    def answer(self, messages: Conversation, params: GenerationParams) -> Answer:
        """Answer a conversation, as one of a batch.

        Args:
            messages: The conversation, which ends with a user message.
            params: The settings.

        Returns:
            The answer's text without white space around it, or why there is none.
        """
        try:
            return self.generate(messages, params).text.strip()
        except PolymodalError as error:
            return error


def with_modalities(params: GenerationParams, modalities: Sequence[str]) -> GenerationParams:
    """The settings for an answer that may hold this; unknown names are refused."""
    given = {**params.model_dump(), "modalities": [modalities] if isinstance(modalities, str) else [*modalities]}
    return parse_config(GenerationParams, given, "modalities")


def check_makes(model: Backend, params: GenerationParams) -> None:
    """Refuse what a model does not make."""
    if missing := [kind for kind in params.modalities if kind not in model.makes]:
        raise PolymodalError(
            f"{model.name} makes {' and '.join(model.makes)}, and no {missing[0]}: for images a model needs an image "
            "tokenizer, which a recipe gives it (init.output)"
        )


def sampled_hash(module: Any) -> str:
    """A hash of some numbers of every tensor of a module, with its name, type and shape; training changes them all."""
    import torch  # an endpoint does without

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(repr((name, getattr(tensor, "dtype", None), getattr(tensor, "shape", tensor))).encode())
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_quantized:
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_question(conversation: Conversation) -> list[Message]:
    """Read a conversation, which has to ask for an answer."""
    messages = as_messages(conversation)
    if not messages or messages[-1].role not in ("user", "tool"):
        raise PolymodalError("a conversation to answer must end with a user message")
    return messages


def check_messages(messages: Sequence[Message]) -> None:
    """Check what neither an endpoint nor a model of transformers can be given."""
    for number, message in enumerate(messages, start=1):
        try:
            message.text.encode()
        except UnicodeEncodeError:
            raise PolymodalError(
                f"message {number}: the text holds half of a surrogate pair, which is no character; mend its encoding"
            ) from None
        if message.fields or message.role == "tool":
            raise PolymodalError(f"message {number}: reasoning and tools cannot be given to this kind of model")
        if message.media and message.role != "user":
            raise PolymodalError(
                f"message {number}: images, sounds and videos must stand in a user's message, not the {message.role}'s"
            )


class ModelBackend(Backend, Generic[Inputs]):
    """A backend that runs the model itself: a subclass makes the prompt and the tokens."""

    model: Any  # The module whose weights answer

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, config: Any, stop_ids: Sequence[int]) -> None:
        from polymodal.modeling.language_model import context_length  # loads torch, which an endpoint does without

        self.name = name
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.context_length = context_length(config)
        # The answer of an encoder-decoder is the decoder's and takes nothing from what the encoder reads.
        self._answer_takes_room = not config.is_encoder_decoder

    def fingerprint(self) -> str:
        """A hash of weights, template, image rules and end tokens."""
        return sha256_json([sampled_hash(self.model), self.settings(), list(self.stop_ids)])

    @abstractmethod
    def _process(self, messages: Sequence[Message]) -> Inputs:
        """Turn a conversation into the model's inputs."""

    @abstractmethod
    def _sizes(self, inputs: Inputs) -> tuple[int, int]:
        """The positions of a prompt, and those of them that are images."""

    @abstractmethod
    def _steps(self, inputs: Inputs, params: GenerationParams) -> Generator[Step]:
        """Run the model."""

    def stream(self, messages: Conversation, params: GenerationParams | None = None) -> Iterator[StreamEvent]:
        """Answer a conversation piece by piece. Closing the iterator stops the model."""
        params = params or self.defaults
        check_makes(self, params)
        begin = time.perf_counter()
        inputs = self.prepare(messages, params.max_new_tokens)
        answer = self._answer_stream(params)
        prepared = first = time.perf_counter()
        made, encode_s = 0, None
        with closing(self._steps(inputs, params)) as steps:
            for (token,), seconds in steps:
                if made == 0:
                    first, encode_s = time.perf_counter(), seconds
                made += 1
                assert token is not None  # a single row ends with the stream
                yield from answer.push(token)
                if answer.stopped:
                    break
        yield from answer.finish()
        end = time.perf_counter()
        yield Reply(
            message=assistant(*answer.parts),
            usage=Usage(*self._sizes(inputs), made),
            timing=Timing(
                prepare_s=prepared - begin,
                encode_s=encode_s,
                first_token_s=first - begin,
                total_s=end - begin,
                tokens_per_s=(made - 1) / (end - first) if made > 1 else 0.0,
            ),
            finish_reason="stop" if answer.stopped else "length",
            model=self.name,
        )

    def _answer_stream(self, params: GenerationParams) -> AnswerStream:
        return AnswerStream(lambda: self._text(params))

    def prepare(self, messages: Conversation, room: int) -> Inputs:
        """Process a conversation without the oldest questions of plain text that leave the answer no room."""
        # Media and the last question are never cut.
        kept = require_question(messages)
        while True:
            inputs = self._process(kept)
            length, _ = self._sizes(inputs)
            if self._fits(length, room):
                return inputs
            start = next((i for i in range(len(kept) - 2) if _is_text_pair(*kept[i : i + 3])), None)
            if start is None:
                kept_free = self._room(room)
                raise PolymodalError(
                    f"the conversation takes {length} tokens and the model's context is {self.context_length}"
                    + (f", {kept_free} of it kept for the answer; lower max_new_tokens, " if kept_free else "; ")
                    + "shorten the text or give fewer or smaller images, or fewer frames (media are never cut)"
                )
            del kept[start : start + 2]

    def _fits(self, length: int, room: int) -> bool:
        return length + self._room(room) <= self.context_length

    def _room(self, room: int) -> int:
        """What is kept for an answer: as much as it may take, but no more than a quarter of the context."""
        return min(room, self.context_length // 4) if self._answer_takes_room else 0

    def _text(self, params: GenerationParams) -> TextStream:
        return TextStream(self.tokenizer, params.stop, self.stop_ids, skip_space=True)

    def _texts(self, steps: Generator[Step], rows: int, params: GenerationParams) -> list[str]:
        """The texts of a batch."""
        texts = [self._text(params) for _ in range(rows)]
        with closing(steps):
            for ids, _ in steps:
                for text, token in zip(texts, ids, strict=True):
                    if token is not None and not text.stopped:
                        text.push(token)
                if all(text.stopped for text in texts):
                    break
        return [text.text.strip() for text in texts]


def _is_text_pair(asked: Message, said: Message, after: Message) -> bool:
    """Whether two messages are a question of plain text and its answer, and the next one does without them."""
    plain = not any(message.media or message.fields for message in (asked, said))
    return plain and (asked.role, said.role) == ("user", "assistant") and after.role != "tool"

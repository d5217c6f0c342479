"""One chat protocol over every model: what chat, serve and eval talk to."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from polymodal.backends.reply import Answering
from polymodal.backends.reply import RawPrompt as RawPrompt
from polymodal.backends.reply import Reply as Reply
from polymodal.backends.reply import StreamEvent as StreamEvent
from polymodal.backends.reply import Timing as Timing
from polymodal.backends.reply import Usage as Usage
from polymodal.config import parse_config
from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import AnswerStream, Step, TextStream
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
    Part,
    Source,
    Text,
    Video,
    as_messages,
    assistant,
    user,
    with_ocr,
)
from polymodal.utils.files import sampled_hash, sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from polymodal.generation.sampling import Grammars, Sampler
    from polymodal.processing.chat_template.calls import CallForm
    from polymodal.processing.image_codes import ImageCodes

Inputs = TypeVar("Inputs")

EXPERTS = {"image": "polymodal.backends.prompt_writer:draw", "audio": "polymodal.speech.tts:read_out"}
"""Who makes what a model does not: a function of the model, the conversation and the answer so far, which gives a part.

Called by name, since experts stand above a model: they ask one for a prompt, or talk through one.
"""


_CONTEXT = 8
"""Ids before an answer that goes on from a text, which say how its first ones are spelt."""

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
        completes: Whether `stream` goes on from a `RawPrompt` too, which `raw_prompt` makes.
        calls: How it writes calls of tools; None where its chat template has no place for tools.
        experts: What makes media that the model does not: a `Renderer` as "image", a `TTS` as "audio". Where one is
            missing, the default is opened when it is first needed, and kept here.
    """

    name: str
    concurrent: int | None = None
    takes: tuple[str, ...] = ("image",)
    makes: tuple[str, ...] = ("text",)
    captions = False
    completes = False
    calls: CallForm | None = None
    defaults = GenerationParams()
    experts: Mapping[str, Any] = {}  # replaced, never changed

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
            Text deltas as text becomes certain, empty ones for steps after which nothing more is; of an image
            `MediaStart`, `MediaProgress` and `MediaEnd`; then the whole `Reply`.

        Raises:
            PolymodalError: An image cannot be read, or the conversation does not fit the context.
        """

    def respond(self, messages: Conversation, params: GenerationParams | None = None) -> Iterator[StreamEvent]:
        """Answer as `stream` does, with experts for the media that the model does not make itself.

        Parts are made in the order of `params.modalities`, and each is made with those before it in view: of ("text",
        "image") the image goes with the text, of ("image", "text") the text is said by a model that sees the image.

        Args:
            messages: The conversation, as for `stream`.
            params: The settings, as for `stream`.

        Returns:
            The events of `stream`; of a part that an expert makes, `MediaStart` and `MediaEnd`.

        Raises:
            PolymodalError: As for `stream`; and an expert cannot be opened, or cannot make its part.
        """
        params = params or self.defaults
        own = [kind for kind in params.modalities if kind in self.makes]
        if len(own) == len(params.modalities):
            return self.stream(messages, params)
        return self._with_experts(messages, params, own)

    def _with_experts(
        self, messages: Conversation, params: GenerationParams, own: Sequence[str]
    ) -> Iterator[StreamEvent]:
        """Answer part by part; the model makes those in `own`."""
        begin, asked = time.perf_counter(), require_question(messages, self.makes)
        parts: list[Part] = []
        first: float | None = None
        reply = Reply(assistant(), Usage(None, None, None), Timing(0, None, 0, 0, None), "stop", self.name)
        for kind in [kind for kind in params.modalities if kind not in own[1:]]:  # the model makes its own at once
            if kind in own:
                for event in self.stream(with_images(asked, parts, self.takes), with_modalities(params, own)):
                    if isinstance(event, Reply):
                        reply = event
                        parts += event.message.parts
                    else:
                        first = first or time.perf_counter()
                        yield event
                continue
            yield MediaStart(kind)
            module, _, name = EXPERTS[kind].partition(":")
            part = getattr(import_module(module), name)(self, asked, parts, params)
            first = first or time.perf_counter()
            parts.append(part)
            yield MediaEnd(part)
        end = time.perf_counter()
        timing = replace(reply.timing, first_token_s=(first or end) - begin, total_s=end - begin)
        yield replace(reply, message=assistant(*parts), timing=timing)

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
            PolymodalError: As for `respond`.
        """
        if modalities is not None:
            params = with_modalities(params or self.defaults, modalities)
        *_, reply = self.respond(messages, params)
        assert isinstance(reply, Reply)  # the last event of a stream
        return reply

    def ask(
        self, prompt: str, *media: Source | Media, params: GenerationParams | None = None, ocr: bool = False
    ) -> str:
        """Ask one question about some images, or videos, sounds and documents.

        Args:
            prompt: The question.
            *media: Images, as paths, bytes, `data:` URLs or Pillow images; parts of a message (`Image`, `Video`,
                `Audio`, `Document`) for others.
            params: The settings; where None those of the model's folder, greedy where it says nothing.
            ocr: Put what OCR reads on images and documents beside them, as TextVQA's prompts do (the extra `ocr`).

        Returns:
            The answer's text.
        """
        parts = [part if isinstance(part, Image | Video | Audio | Document) else Image(part) for part in media]
        return self.generate([user(*(map(with_ocr, parts) if ocr else parts), prompt)], params).text

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


def require_question(conversation: Conversation, makes: Sequence[str] = ("text",)) -> list[Message]:
    """Read a conversation, which has to ask for an answer."""
    # What an expert made for an earlier answer is nothing that a model can have said itself: an image goes with the
    # next question, and a sound is the answer's words once more.
    messages = as_messages(conversation)
    if not messages or messages[-1].role not in ("user", "tool"):
        raise PolymodalError("a conversation to answer must end with a user message")
    shown: list[Part] = []
    for number, message in enumerate(messages):
        if message.role == "assistant" and "image" not in makes:
            shown += [part for part in message.parts if isinstance(part, Image)]
        elif message.role == "user" and shown:
            messages[number], shown = replace(message, parts=(*shown, *message.parts)), []
        if message.role == "assistant":
            made = Audio if "image" in makes else Audio | Image
            kept = tuple(part for part in message.parts if not isinstance(part, made))
            messages[number] = replace(message, parts=kept or (Text(""),))
    return messages


def with_images(messages: Sequence[Message], parts: Sequence[Part], takes: Sequence[str]) -> list[Message]:
    """A conversation whose last question shows the images of an answer so far, to a model that takes any."""
    images = [part for part in parts if isinstance(part, Image) and "image" in takes]
    return [*messages[:-1], replace(messages[-1], parts=(*images, *messages[-1].parts))]


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
    trims = True  # Whether the oldest questions of plain text make room for an answer; refused where not

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

    def _sounds(self, inputs: Inputs) -> int | None:
        """The positions of a prompt that are sounds, where they are told apart from images."""
        return None

    @abstractmethod
    def _steps(self, inputs: Inputs, params: GenerationParams, sampler: Sampler) -> Generator[Step]:
        """Run the model; images are drawn without the sampler."""

    def sampler(self, params: GenerationParams) -> Sampler:
        """What chooses the ids of one answer; a schema or grammar that cannot be followed is a `ConfigError`."""
        from polymodal.generation.sampling import Sampler

        return Sampler(params, self.model.device, self._grammars.matcher(params) if params.follows else None)

    @cached_property
    def _grammars(self) -> Grammars:

        from polymodal.generation.sampling import Grammars

        return Grammars(self.tokenizer, self.stop_ids)

    def stream(
        self, messages: Conversation | RawPrompt, params: GenerationParams | None = None
    ) -> Iterator[StreamEvent]:
        """Answer a conversation piece by piece. Closing the iterator stops the model."""
        params = params or self.defaults
        check_makes(self, params)
        begin = time.perf_counter()
        inputs = self.prepare(messages, params.max_new_tokens)
        sampler = self.sampler(params)
        prompt = messages if isinstance(messages, RawPrompt) else None
        answering = Answering(self, inputs, params, sampler, begin, prompt)
        with closing(self._steps(inputs, params, sampler)) as steps:
            for (token,), seconds in steps:
                assert token is not None  # a single row ends with the stream
                yield from answering.push(token, seconds)
                if answering.stopped:
                    break
        yield from answering.end()

    def answer_stream(self, params: GenerationParams, prompt: RawPrompt | None = None) -> AnswerStream:
        """What turns an answer's ids into its parts; `prompt` where it goes on from one."""
        return AnswerStream(lambda: self._text(params, prompt), self._codes(params))

    def _codes(self, params: GenerationParams) -> ImageCodes | None:
        """What images are made of, where the answer may hold any."""
        return None

    def _raw(self, prompt: RawPrompt) -> Inputs:
        """The model's inputs of a raw prompt."""
        raise PolymodalError(f"{self.name} answers conversations, and does not go on from a text")

    def usage(self, inputs: Inputs, made: int, cached: int | None = None) -> Usage:
        """The tokens of an answer."""
        return Usage(*self._sizes(inputs), made, self._sounds(inputs), cached)

    def prepare(self, messages: Conversation | RawPrompt, room: int) -> Inputs:
        """Process a conversation without the oldest questions of plain text that leave the answer no room."""
        if isinstance(messages, RawPrompt):
            inputs = self._raw(messages)
            if not self._fits(len(messages.ids), room):
                told = f"the prompt takes {len(messages.ids)} tokens and the model's context is {self.context_length}"
                raise PolymodalError(f"{told}; shorten it, or ask for fewer tokens", "too-long")
            return inputs
        # Media and the last question are never cut.
        kept = require_question(messages, self.makes)
        while True:
            inputs = self._process(kept)
            length, _ = self._sizes(inputs)
            if self._fits(length, room):
                return inputs
            pairs = (i for i in range(len(kept) - 2) if self.trims and _is_text_pair(*kept[i : i + 3]))
            start = next(pairs, None)
            if start is None:
                kept_free = self._room(room)
                raise PolymodalError(
                    f"the conversation takes {length} tokens and the model's context is {self.context_length}"
                    + (f", {kept_free} of it kept for the answer; lower max_new_tokens, " if kept_free else "; ")
                    + "shorten the text or give fewer or smaller images, or fewer frames (media are never cut)",
                    "too-long",
                )
            del kept[start : start + 2]

    def _fits(self, length: int, room: int) -> bool:
        return length + self._room(room) <= self.context_length

    def _room(self, room: int) -> int:
        """What is kept for an answer: as much as it may take, but no more than a quarter of the context."""
        return min(room, self.context_length // 4) if self._answer_takes_room else 0

    def _text(self, params: GenerationParams, prompt: RawPrompt | None = None) -> TextStream:
        after = () if prompt is None else prompt.ids[-_CONTEXT:]
        return TextStream(self.tokenizer, params.stop, self.stop_ids, skip_space=prompt is None, after=after)

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

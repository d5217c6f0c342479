"""A conversation in the form that a processor of transformers takes, checked before it goes in.

`apply_chat_template` has three habits that would change a conversation without a word: many templates put all images
first, some drop content of a kind they were not written for, and a placeholder that somebody typed ("<image>") is
taken for an image. So the conversation is rendered once with a mark in place of every text, which shows where the
template puts what; and texts with control tokens in them go through transformers' own escape, the result of which is
counted, or are refused.
"""

import inspect
import itertools
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import jinja2
import torch
from transformers import ProcessorMixin
from transformers.processing_utils import OmniModalProcessorMixin

from polymodal.backends.base import check_messages
from polymodal.backends.transformers.folder import media_of, reason_of
from polymodal.backends.transformers.media import parts_of, settle, sound_of, video_content
from polymodal.errors import ConfigError, PolymodalError
from polymodal.media.image import open_image
from polymodal.media.video import probe
from polymodal.messages import Audio, Image, Message, Text, Video
from polymodal.processing.document_pages import expand_documents
from polymodal.safety.jinja_limits import UnsafeTemplateError
from polymodal.safety.jinja_sandbox import compile_template

Chat = list[dict[str, Any]]
"""Messages as transformers has them: role, and content as a list of parts."""


class PromptMaker:
    """Turns conversations into a model's inputs."""

    def __init__(self, processor: ProcessorMixin, seen_ids: Sequence[int] = ()) -> None:
        self.processor = processor
        self.takes = media_of(processor)
        self.seen_ids = tuple(seen_ids)  # The ids of images and of frames
        tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
        self.tokens: dict[str, str] = {kind: token for kind, token in tokens.items() if isinstance(token, str)}
        self._interleaves = isinstance(processor, OmniModalProcessorMixin)
        if self._interleaves:
            processor._multimodal_inputs_from_conversations = _with_sounds
        self._nonce = f"PM{secrets.token_hex(12)}x"
        self._controls = _control_tokens(processor)
        self._limited = _limited(processor)
        self._special = {str(name): token for name, token in processor.tokenizer.special_tokens_map.items()}
        self._can_escape = (
            "sanitize_control_tokens" in inspect.signature(type(processor).apply_chat_template).parameters
        )

    def chat(self, messages: Sequence[Message]) -> Chat:
        """Open the images, and check that the template can express the conversation."""
        check_messages(messages)
        if "image" in self.takes:
            messages = expand_documents(messages)
        self._check_taken(messages)
        if not self.processor.chat_template:
            return self._alone(messages)
        chat: Chat = [{"role": m.role, "content": self._content(m)} for m in messages]
        style, problem = self._expressed(chat)
        if style is not None:
            return style
        what = "drops or moves a part of the conversation (some put all images first); put images before the text"
        if chat[0]["role"] == "system" and self._expressed(chat[1:])[0] is not None:
            what = "drops the system message; leave out the system message, or write it into the first question"
        raise problem or PolymodalError(f"the model's chat template {what}")

    def _expressed(self, chat: Chat) -> tuple[Chat | None, PolymodalError | None]:
        """A conversation as the template writes all of it in order; else what it says, where it says something."""
        expected = [part["type"] for message in chat for part in message["content"]]
        written = [kind for kind in expected if kind == "text" or kind in self.tokens]
        problem = None
        for style in (chat, _text_as_strings(chat)):
            try:
                found = self._written(style)
            except PolymodalError as error:
                problem = problem or error
                continue
            if found == written:
                return style, None
        return None, problem

    def inputs(self, chats: Sequence[Chat]) -> dict[str, Any]:
        """Run the processor."""
        if not any(self._typed(chat) for chat in chats):
            return self._run(chats)
        if len(chats) > 1:
            raise PolymodalError("conversations with typed control tokens are processed one by one")
        (chat,) = chats
        names = ", ".join(repr(token) for token in self._typed(chat)[:4])
        refused = PolymodalError(
            f"the text holds {names}, which this model's processor would take for control; reword it"
        )
        if not self._can_escape:
            raise refused
        try:
            made = self._run(chats, sanitize_control_tokens=True)
        except PolymodalError:
            raise refused from None
        if self._count(made) != self._count(self._run([self._without_typed(chat)])):
            raise refused
        return made

    def image_tokens(self, ids: torch.Tensor) -> int:
        """Count the pieces of images and frames among input ids."""
        return int(torch.isin(ids, torch.tensor(self.seen_ids, dtype=ids.dtype)).sum()) if self.seen_ids else 0

    def end_id(self) -> int | None:
        """The token with which the template ends an answer, if any."""
        turns = (("user", "Hi"), ("assistant", self._nonce))
        chat: Chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        for style in (chat, _text_as_strings(chat)):
            with suppress(PolymodalError):
                self._bounded(style)
                rendered = self._apply("chat template", style, tokenize=False, add_generation_prompt=False)
                _, found, tail = str(rendered).rpartition(self._nonce)
                if found:
                    ids = self.processor.tokenizer(tail, add_special_tokens=False)["input_ids"]
                    return next((i for i in ids if i in self.processor.tokenizer.added_tokens_decoder), None)
        return None

    def _run(self, chats: Sequence[Chat], **options: Any) -> dict[str, Any]:
        if not self.processor.chat_template:
            return self._beside(chats, **options)
        given: dict[str, Any] = {"padding": True, "padding_side": "left"} if len(chats) > 1 else {}
        parts = [part for message in itertools.chain(*chats) for part in parts_of(message)]
        if videos := [part["metadata"] for part in parts if part["type"] == "video"]:
            given |= {"video_metadata": videos, "do_sample_frames": False}
        options |= {"return_dict": True, "return_tensors": "pt", "processor_kwargs": given}
        made = dict(self._apply("processor", list(chats), tokenize=True, **options))
        if any("sound" in part for part in parts):
            made["use_audio_in_video"] = True
        settle(made, parts, self.processor)
        return made

    def _beside(self, chats: Sequence[Chat], **options: Any) -> dict[str, Any]:
        """One image and its text as a processor takes them that puts the two together by itself."""
        if len(chats) > 1 or options:
            raise PolymodalError("the model has no chat template; it is asked one by one, without control tokens")
        image = chats[0][0]["content"][0]
        try:
            return dict(self.processor(images=image["image"], text="".join(_texts(chats[0])), return_tensors="pt"))
        except Exception as error:  # a processor may raise anything at all
            raise PolymodalError(f"the model's processor refuses this image or text ({reason_of(error)})") from error

    def _check_taken(self, messages: Sequence[Message]) -> None:
        """Raise where a part is of a kind that the model does not take."""
        for number, message in enumerate(messages, start=1):
            for part in message.media:
                kind = type(part).__name__.lower()
                sound = isinstance(part, Video) and part.audio and "audio" not in self.takes
                if kind not in self.takes or sound:
                    what = "the sound of a video (audio=True)" if sound and kind in self.takes else f"{kind} parts"
                    raise PolymodalError(
                        f"message {number}: {what} cannot be given to this model, which takes text and "
                        f"{' and '.join(self.takes)} parts"
                    )

    def _content(self, message: Message) -> list[dict[str, Any]]:
        """A message's content; neighbouring texts are joined, as in our own template."""
        content: list[dict[str, Any]] = []
        for part in message.parts:
            match part:
                case Image(source):
                    content.append({"type": "image", "image": open_image(source)})
                case Video():
                    content.append(video_content(part, self.processor))
                    if part.audio and probe(part.source, count=False).audio:
                        sound = sound_of(part, self.processor)
                        content += [] if self._interleaves else [{"type": "audio", "audio": sound}]
                        content[-1] |= {"sound": sound} if self._interleaves else {}
                case Audio():
                    content.append({"type": "audio", "audio": sound_of(part, self.processor)})
                case Text(text) if content and content[-1]["type"] == "text":
                    content[-1]["text"] += text
                case Text(text) if text:
                    content.append({"type": "text", "text": text})
        return content

    def _alone(self, messages: Sequence[Message]) -> Chat:
        """One image, and at most one text, for a model without a chat template."""
        content = self._content(messages[0])
        if len(messages) != 1 or sorted(part["type"] for part in content) not in (["image"], ["image", "text"]):
            raise PolymodalError(
                "the model has no chat template and knows no conversation: give one image and at most one text, "
                "without a system message or earlier turns"
            )
        return [{"role": "user", "content": sorted(content, key=lambda part: str(part["type"]))}]

    def _apply(self, what: str, chat: Chat | list[Chat], **options: Any) -> Any:
        try:
            return self.processor.apply_chat_template(chat, **{"add_generation_prompt": True, **options})
        except Exception as error:  # a processor or template may raise anything at all
            raise PolymodalError(f"the model's {what} refuses this conversation ({reason_of(error)})") from error

    def _bounded(self, chat: Chat) -> None:
        """Raise where the template would loop or grow without end; transformers' sandbox would let it."""
        for source in self._limited:
            try:
                source(messages=chat, tools=None, documents=None, add_generation_prompt=True, **self._special)
            except UnsafeTemplateError:
                raise
            except (jinja2.TemplateError, TypeError, AttributeError, ValueError, KeyError):
                continue  # the processor itself says what is wrong

    def _written(self, chat: Chat) -> list[str]:
        """What the template writes, in order: "text" for a text that stands where it should, and kinds of media."""
        numbers = itertools.count(1)
        marked = _with_texts(chat, lambda _: f"{self._nonce}{next(numbers)}x")
        self._bounded(marked)
        rendered = str(self._apply("chat template", marked, tokenize=False))
        kinds = {token: kind for kind, token in self.tokens.items()}
        pattern = "|".join([re.escape(self._nonce) + r"(\d+)x", *map(re.escape, kinds)])
        # Markers of a string with several texts, and images inside it, cannot occur: only texts become strings.
        found, due = [], 1
        for match in re.finditer(pattern, rendered):
            if match[1] is None:
                found.append(kinds[match[0]])
            else:
                found.append("text" if int(match[1]) == due else "moved")
                due += 1
        return found

    def _typed(self, chat: Chat) -> list[str]:
        """Control tokens that stand in the texts."""
        texts = _texts(chat)
        return [token for token in self._controls if any(token in text for text in texts)]

    def _without_typed(self, chat: Chat) -> Chat:
        pattern = re.compile("|".join(map(re.escape, self._controls)))
        return _with_texts(chat, lambda text: pattern.sub("?", text))

    def _count(self, made: dict[str, Any]) -> list[int]:
        """How often each control token stands in the input ids."""
        ids = made["input_ids"]
        return [int((ids == i).sum()) for i in self.processor.tokenizer.convert_tokens_to_ids(list(self._controls))]


def _with_sounds(conversations: Sequence[Chat], *_: Any) -> tuple[list[Any], list[Any], list[Any], dict[str, Any]]:
    """The media of conversations, a video's own sound named as such; transformers would decode the file again."""
    images, videos, sounds, of_video, count = [], [], [], [], itertools.count()
    for conversation in conversations:
        parts = [part for message in conversation for part in parts_of(message)]
        images.append([part["image"] for part in parts if part["type"] == "image"])
        videos.append([part["video"] for part in parts if part["type"] == "video"])
        for part in parts:
            number = next(count) if part["type"] == "video" else None
            sound = part.get("sound" if part["type"] == "video" else "audio")
            if sound is not None:
                sounds.append(sound)
                of_video.append(number)
    wanted = any(number is not None for number in of_video)
    return images, videos, sounds, {"audio_from_video_indices": of_video, "load_audio_from_video": wanted}


def _text_as_strings(chat: Chat) -> Chat:
    """The same conversation with plain strings where a message has no image: some templates want it so."""
    return [
        {**message, "content": "".join(_texts([message]))}
        if all(part["type"] == "text" for part in message["content"])
        else message
        for message in chat
    ]


def _with_texts(chat: Chat, change: Callable[[str], str]) -> Chat:
    """A copy with other texts."""
    made = []
    for message in chat:
        content = message["content"]
        if isinstance(content, str):
            content = change(content) if content else content
        else:
            content = [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]
        made.append({**message, "content": content})
    return made


def _texts(chat: Chat) -> list[str]:
    texts: list[str] = []
    for content in (message["content"] for message in chat):
        texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return texts


def _limited(processor: ProcessorMixin) -> list[Callable[..., str]]:
    """The processor's templates in a sandbox with limits; without those that only transformers can compile."""
    given: Any = processor.chat_template
    found = []
    for source in given.values() if isinstance(given, dict) else (given,):
        with suppress(ConfigError):
            found.append(compile_template(str(source)))
    return found


def _control_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """What must not be read as a token when somebody typed it."""
    template = str(processor.chat_template)
    found = [
        token.content
        for token in processor.tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in template)
    ]
    own = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    return tuple(dict.fromkeys([*found, *(token for token in own if isinstance(token, str) and token)]))

"""The JSON of OpenAI's chat API: requests checked and turned into messages and settings, answers written.

Nothing is accepted and ignored: a field that is not served here is refused by its place in the request, such as
`messages[0].content[1].type`, unless it says what is done anyway (`NEUTRAL`). A null is the same as nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json

from polymodal.backends.base import Backend, Reply
from polymodal.errors import MediaError
from polymodal.generation.params import GenerationParams
from polymodal.media.source import NamedBytes, read_bytes
from polymodal.messages import Audio, Document, Image, Media, Message, Part, Text, Video
from polymodal.serving.errors import RequestError
from polymodal.serving.models import Served, model_of
from polymodal.utils.strict import parse_config, shown

Json: TypeAlias = dict[str, Any]

MAX_MEDIA = 8
"""The most images, sounds, videos and files of a request."""
MAX_CHOICES = 8
MAX_BYTES: Mapping[type[Media], int] = {Image: 16 * 2**20, Audio: 24 * 2**20, Video: 24 * 2**20, Document: 24 * 2**20}
"""The largest file of each kind; what is decoded from it has the limits of `media`."""
KINDS: Mapping[str, type[Media]] = {
    "image_url": Image, "input_audio": Audio, "video_url": Video, "input_video": Video, "file": Document,
}  # fmt: skip

NEUTRAL: Json = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "store": False,
}
"""Fields that are not served, with the values that ask for nothing."""


class _Strict(BaseModel):
    # Strict: neither "5" nor true nor 1.0 is a number of tokens.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Url(_Strict):
    url: str
    detail: Literal["auto"] = "auto"  # how an image is tiled is the model's own choice


class _Sound(_Strict):
    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "webm"]  # a remark: the bytes decide


class _Clip(_Strict):
    url: str | None = None
    data: str | None = None


class _File(_Strict):
    file_data: str
    filename: str = Field("", max_length=255)  # a remark, which goes nowhere


class _Part(_Strict):
    type: Literal["text", "image_url", "input_audio", "video_url", "input_video", "file"]
    # The field of its type, and no other.
    text: str | None = None
    image_url: _Url | None = None
    input_audio: _Sound | None = None
    video_url: _Url | None = None
    input_video: _Clip | None = None
    file: _File | None = None


def _shape_tag(value: Any) -> str | None:
    # Tags stand in the places that pydantic gives of mistakes; in angle brackets none is taken for a key of a request.
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


_Content: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Annotated[list[_Part], Field(min_length=1)], Tag("<list>")],
    Discriminator(_shape_tag, custom_error_type="content", custom_error_message="must be a text or a list of parts"),
]
_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(_Strict):
    model: str = Field(max_length=256)
    messages: list[_Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**20)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            Annotated[_Stop, Tag("<text>")] | Annotated[Annotated[list[_Stop], Field(max_length=4)], Tag("<list>")],
            Discriminator(
                _shape_tag, custom_error_type="stop", custom_error_message="must be a text or a list of up to 4"
            ),
        ]
        | None
    ) = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True)
class Asked:
    """A request, checked."""

    served: Served
    messages: list[Message]
    choices: list[GenerationParams]  # Of each answer that is wanted
    stream: bool
    include_usage: bool


def read_request(body: bytes, models: Mapping[str, Served]) -> Asked:
    """Check a request's body; its media are unpacked and not yet decoded."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON ({str(error)[:120]})", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object with model and messages")
    data = {key: value for key, value in _without_nulls(data).items() if not _asks_nothing(key, value)}
    try:
        request = _Request.model_validate(data)
    except ValidationError as error:
        raise _mistake(error) from None
    served = model_of(models, request.model)
    messages = _messages(request.messages, served)
    params = _params(request, served)
    seeds = [None if params.seed is None else (params.seed + number) % 2**64 for number in range(request.n)]
    choices = [params.model_copy(update={"seed": seed}) for seed in seeds]
    options = request.stream_options
    if options is not None and not request.stream:
        raise RequestError("stream_options: only goes with stream", "stream_options")
    return Asked(served, messages, choices, request.stream, options is not None and options.include_usage)


def _without_nulls(value: Any) -> Any:
    """The same without keys that say null; the depth is what the parser allows."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _asks_nothing(key: str, value: Any) -> bool:
    neutral = NEUTRAL.get(key)
    return key in NEUTRAL and value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _place(loc: Sequence[int | str]) -> str:
    """A place in a request, such as `messages[0].content[1].type`."""
    keys = [key for key in loc if isinstance(key, int) or not re.fullmatch(r"<\w+>", key)]
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _mistake(error: ValidationError) -> RequestError:
    """The first mistake that pydantic found."""
    first = error.errors(include_url=False)[0]
    place, given = _place(first["loc"]), first["input"]
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        place = f"{place[: len(place) - len(key)]}{shown(key)[1:-1]}"
        return RequestError(f"{place}: is not served here; leave it out", place, code="unsupported_parameter")
    if first["type"] == "missing":
        return RequestError(f"{place}: is missing", place, code="missing_required_parameter")
    return RequestError(f"{place}: {first['msg']}, not {shown(given)}", place, code="invalid_value")


def _params(request: _Request, served: Served) -> GenerationParams:
    """The settings of an answer: what is said, and else the model's own."""
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    field = "max_completion_tokens" if request.max_tokens is None else "max_tokens"
    if len(limits) > 1:
        raise RequestError(f"{field}: max_completion_tokens says another number; give one of them", field)
    most = limits.pop() if limits else min(served.default_tokens, served.max_tokens)
    assert most is not None
    if most > served.max_tokens:
        raise RequestError(f"{field}: {shown(most)}, and at most {served.max_tokens:,} are made here", field)
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    said = {name: value for name in names if (value := getattr(request, name)) is not None}
    if request.stop is not None:
        said["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    own = served.backend.defaults.model_dump()
    return parse_config(GenerationParams, {**own, **said, "max_new_tokens": most, "modalities": ["text"]}, "request")


def _messages(given: Sequence[_Message], served: Served) -> list[Message]:
    """The conversation, with the bytes of its media."""
    contents = [[_Part(type="text", text=m.content)] if isinstance(m.content, str) else m.content for m in given]
    chars = sum(len(part.text or "") for content in contents for part in content)
    if chars > served.max_chars:
        told = f"messages: {chars:,} characters of text, more than the model's context can hold"
        raise RequestError(told, "messages", code="context_length_exceeded")
    if given[-1].role != "user":
        place = f"messages[{len(given) - 1}].role"
        raise RequestError(f"{place}: the last message must be the user's", place)
    messages, media = [], 0
    for number, (message, content) in enumerate(zip(given, contents, strict=True)):
        parts: list[Part] = []
        for at, part in enumerate(content):
            place = f"messages[{number}].content[{at}]"
            for name in part.model_fields_set ^ {"type", part.type}:
                told = "is missing" if name == part.type else f"does not belong to a part of type {part.type!r}"
                raise RequestError(f"{place}.{name}: {told}", f"{place}.{name}")
            media += part.type != "text"
            if part.type != "text" and message.role != "user":
                raise RequestError(f"{place}.type: media belong into the user's messages", f"{place}.type")
            if media > MAX_MEDIA:
                raise RequestError(f"{place}: more than {MAX_MEDIA} images, sounds, videos and files", place)
            parts.append(Text(part.text or "") if part.type == "text" else _medium(part, place, served.backend))
        messages.append(Message("system" if message.role == "developer" else message.role, tuple(parts)))
    return messages


def _medium(part: _Part, place: str, backend: Backend) -> Media:
    """The bytes of a medium; error lines about them name their place in the request."""
    place, value = f"{place}.{part.type}", getattr(part, part.type)
    keys = value.model_fields_set & {"url", "data", "file_data"}
    if len(keys) != 1:
        raise RequestError(f"{place}: give url or data", place)
    (key,) = keys
    place, source = f"{place}.{key}", f"{'data:;base64,' if key == 'data' else ''}{getattr(value, key)}"
    kind = KINDS[part.type]
    name = kind.__name__.lower()
    if ("image" if kind is Document else name) not in backend.takes:
        takes = " and ".join(("text", *backend.takes))
        raise RequestError(f"{place}: the model takes {takes}, and no {name}", place, code="unsupported_modality")
    if source[:5].lower() != "data:":
        told = "only data: URLs are read, such as data:image/png;base64,...; this server fetches and opens nothing"
        raise RequestError(f"{place}: {told}", place, code="invalid_url")
    try:
        data = NamedBytes(read_bytes(source, limit=MAX_BYTES[kind], name=place))
    except MediaError as error:
        raise RequestError(str(error), place, code="invalid_media") from None
    data.name = place
    return kind(data)


def usage_of(replies: Sequence[Reply], messages: Sequence[Message]) -> Json | None:
    """What an answer took; None where nobody counted, as some servers behind an endpoint do not."""
    first = replies[0].usage
    made = [reply.usage.completion_tokens for reply in replies]
    if first.prompt_tokens is None or None in made:
        return None
    completion = sum(count for count in made if count is not None)
    usage: Json = {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
    }
    heard, seen = first.audio_tokens, first.image_tokens
    if seen is not None and heard is None:
        kinds = {isinstance(part, Audio) for message in messages for part in message.media}
        heard = 0 if True not in kinds else seen if kinds == {True} else None
    if seen is not None and heard is not None:
        text = first.prompt_tokens - seen
        details = {"image_tokens": seen - heard, "audio_tokens": heard, "text_tokens": text}
        usage["prompt_tokens_details"] = details
    return usage


def completion(head: Json, replies: Sequence[Reply], messages: Sequence[Message]) -> Json:
    """A whole answer."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "finish_reason": reply.finish_reason,
            "logprobs": None,
        }
        for index, reply in enumerate(replies)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage_of(replies, messages)}


def chunk(head: Json, choices: list[Json], include_usage: bool, usage: Json | None = None) -> Json:
    """A piece of a streamed answer; the one behind the last has the usage, where that was asked for."""
    return {
        **head,
        "object": "chat.completion.chunk",
        "choices": choices,
        **({"usage": usage} if include_usage else {}),
    }


def choice(index: int, delta: Json, finish: str | None = None) -> Json:
    """What is new of one of the answers."""
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}

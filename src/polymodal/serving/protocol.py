"""The JSON of OpenAI's chat API: requests checked and turned into messages and settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from polymodal.backends.base import ModelBackend
from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams, Modality
from polymodal.messages import Audio, Document, Image, Media, Message, Part, Text, Video
from polymodal.serving.errors import Checked, Json, RequestError, parse, shape_tag
from polymodal.serving.makers import AudioAsked, check_asked
from polymodal.serving.models import Served, model_of
from polymodal.serving.tools import (
    MAX_TOOLS,
    Call,
    Calling,
    Choice,
    Format,
    Tool,
    call_fields,
    calling_of,
    following,
    with_tools,
)  # fmt: skip
from polymodal.utils.strict import parse_config, shown

MAX_MEDIA = 8
"""The most images, sounds, videos and files of a request."""
MAX_CHOICES = 8
MAX_BIASES = 300
MAX_BYTES: Mapping[type[Media], int] = {Image: 16 * 2**20, Audio: 24 * 2**20, Video: 24 * 2**20, Document: 24 * 2**20}
"""The largest file of each kind; what is decoded from it has the limits of `media`."""
KINDS: Mapping[str, type[Media]] = {
    "image_url": Image, "input_audio": Audio, "audio_url": Audio, "video_url": Video, "input_video": Video,
    "file": Document,
}  # fmt: skip


class Url(Checked):
    """Where a medium is."""

    url: str
    detail: Literal["auto"] = "auto"  # how an image is tiled is the model's own choice


class Sound(Checked):
    """A sound."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "webm"]  # a remark: the bytes decide


class _Clip(Checked):
    url: str | None = None
    data: str | None = None


class File(Checked):
    """A document."""

    file_data: str
    filename: str = Field("", max_length=255)  # a remark, which goes nowhere


class RequestPart(Checked):
    """A part of a message."""

    type: Literal["text", "image_url", "input_audio", "audio_url", "video_url", "input_video", "file"]
    # The field of its type, and no other.
    text: str | None = None
    image_url: Url | None = None
    input_audio: Sound | None = None
    audio_url: Url | None = None
    video_url: Url | None = None
    input_video: _Clip | None = None
    file: File | None = None


_Content: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Annotated[list[RequestPart], Field(min_length=1)], Tag("<list>")],
    Discriminator(shape_tag, custom_error_type="content", custom_error_message="must be a text or a list of parts"),
]
_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


class _Shown(Checked):
    type: Literal["image_url"]
    image_url: Url
    index: int = 0


class _Said(Checked):
    id: str = Field("", max_length=256)
    data: str = ""
    transcript: str = ""
    expires_at: int = 0


class Turn(Checked):
    """A message of a request."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    tool_calls: Annotated[list[Call], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None  # of the function; the call says it
    # What an earlier answer held besides its text, as a client sends it back.
    images: list[_Shown] | None = None
    audio: _Said | None = None  # A remark: its words are in `content`


class StreamOptions(Checked):
    """What a stream tells besides."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Remarks(Checked):
    """Who asks and what about: written down by clients, told to nobody."""

    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None


class Sampling(Remarks):
    """How an answer's tokens are chosen, and when it ends."""

    model: str = Field(max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**20)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            Annotated[_Stop, Tag("<text>")] | Annotated[Annotated[list[_Stop], Field(max_length=4)], Tag("<list>")],
            Discriminator(
                shape_tag, custom_error_type="stop", custom_error_message="must be a text or a list of up to 4"
            ),
        ]
        | None
    ) = None
    stream: bool = False
    cache_salt: str = Field("", max_length=256)


class _Request(Sampling):
    messages: list[Turn] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None
    modalities: list[Modality] = Field(["text"], min_length=1, max_length=3)
    audio: AudioAsked | None = None


@dataclass(frozen=True)
class Asked:
    """A request, checked."""

    served: Served
    messages: list[Message]
    choices: list[GenerationParams]  # Of each answer that is wanted
    stream: bool
    include_usage: bool
    calling: Calling | None = None  # Where the answer may call tools
    audio: AudioAsked | None = None  # How what is said is spoken
    salt: str = ""  # Keeps what is kept of it from requests with another one


def read_request(body: bytes, models: Mapping[str, Served]) -> Asked:
    """Check a request's body; its media are unpacked and not yet decoded."""
    request = parse(body, _Request)
    served = model_of(models, request.model)
    modalities = check_asked(request.modalities, request.audio, request.stream, served.makers)
    served.makers.equip(served.backend, modalities)
    places = [f"messages[{number}]" for number in range(len(request.messages))]
    calling = calling_of(request.tools or (), request.tool_choice, request.parallel_tool_calls, served.backend)
    messages = with_tools(messages_of(request.messages, served, places), calling, served.max_chars)
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    field = "max_completion_tokens" if request.max_tokens is None else "max_tokens"
    if len(limits) > 1:
        raise RequestError(f"{field}: max_completion_tokens says another number; give one of them", field)
    if request.top_logprobs is not None and not request.logprobs and request.top_logprobs > 0:
        raise RequestError("top_logprobs: only goes with logprobs", "top_logprobs")
    more: Json = {"logprobs": (request.top_logprobs or 0) if request.logprobs else None}
    more |= {"modalities": modalities, **following(request.response_format, calling)}
    params = params_of(request, served, field, next(iter(limits), None), more)
    return Asked(
        served, messages, choices_of(params, request.n), request.stream,
        wants_usage(request.stream_options, request.stream), calling, request.audio, request.cache_salt,
    )  # fmt: skip


def choices_of(params: GenerationParams, count: int) -> list[GenerationParams]:
    """The settings of each of several answers."""
    seeds = [None if params.seed is None else (params.seed + number) % 2**64 for number in range(count)]
    return [params.model_copy(update={"seed": seed}) for seed in seeds]


def wants_usage(options: StreamOptions | None, stream: bool) -> bool:
    """Whether a stream tells at its end what it took."""
    if options is not None and not stream:
        raise RequestError("stream_options: only goes with stream", "stream_options")
    return options is not None and options.include_usage


def params_of(
    request: Sampling, served: Served, field: str, most: int | None, more: Json, form: str = "response_format"
) -> GenerationParams:
    """The settings of an answer: what is said, and else the model's own."""
    # `field` is where a route has the most tokens, `form` where it has the answer's schema.
    most = min(served.default_tokens, served.max_tokens) if most is None else most
    if most > served.max_tokens:
        raise RequestError(f"{field}: {shown(most)}, and at most {served.max_tokens:,} are made here", field)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    said = {name: value for name in (*names, "seed") if (value := getattr(request, name)) is not None}
    if request.stop is not None:
        said["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    backend = served.backend
    if request.logit_bias:
        said["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
        known = len(backend.tokenizer) if isinstance(backend, ModelBackend) else 10**9
        if wrong := [token for token in said["logit_bias"] if token >= known]:
            raise RequestError(f"logit_bias: the model has no token {wrong[0]}; ids end at {known - 1}", "logit_bias")
    given = {**backend.defaults.model_dump(), **said, "max_new_tokens": most, "modalities": ["text"], **more}
    params = parse_config(GenerationParams, given, "request")
    if params.follows and isinstance(backend, ModelBackend):
        place = form if params.grammar is None else "tools"
        try:
            backend.sampler(params)  # which keeps what it read
        except ConfigError as error:
            raise RequestError(f"{place}: {error}", place, code="invalid_schema") from None
    return params


def messages_of(given: Sequence[Turn], served: Served, places: Sequence[str]) -> list[Message]:
    """The conversation, with the bytes of its media."""
    contents = [
        [RequestPart(type="text", text=m.content)] if isinstance(m.content, str) else m.content or [] for m in given
    ]
    chars = sum(len(part.text or "") for content in contents for part in content)
    chars += sum(len(call.function.arguments) for message in given for call in message.tool_calls or ())
    if chars > served.max_chars:
        place = places[-1].partition("[")[0]
        told = f"{place}: {chars:,} characters of text, more than the model's context can hold"
        raise RequestError(told, place, code="context_length_exceeded")
    if given[-1].role not in ("user", "tool"):
        place = f"{places[-1]}.role"
        raise RequestError(f"{place}: the last message must be the user's", place)
    fields = call_fields(given, places, served.backend)
    messages, media = [], 0
    for number, (message, content) in enumerate(zip(given, contents, strict=True)):
        parts: list[Part] = []
        if message.content is None and not message.tool_calls:
            place = f"{places[number]}.content"
            raise RequestError(f"{place}: is missing", place, code="missing_required_parameter")
        for at, part in enumerate(content):
            place = f"{places[number]}.content[{at}]"
            for name in part.model_fields_set ^ {"type", part.type}:
                told = "is missing" if name == part.type else f"does not belong to a part of type {part.type!r}"
                raise RequestError(f"{place}.{name}: {told}", f"{place}.{name}")
            media += part.type != "text"
            if part.type != "text" and message.role != "user":
                raise RequestError(f"{place}.type: media belong into the user's messages", f"{place}.type")
            if media > MAX_MEDIA:
                raise RequestError(f"{place}: more than {MAX_MEDIA} images, sounds, videos and files", place)
            parts.append(Text(part.text or "") if part.type == "text" else _medium(part, place, served))
        if message.role != "assistant" and (message.images or message.audio):
            place = f"{places[number]}.{'images' if message.images else 'audio'}"
            raise RequestError(f"{place}: belongs to an assistant's message", place)
        for at, image in enumerate(message.images or ()):
            place = f"{places[number]}.images[{at}]"
            media += 1
            if media > MAX_MEDIA:
                raise RequestError(f"{place}: more than {MAX_MEDIA} images, sounds, videos and files", place)
            parts.append(_medium(RequestPart(type="image_url", image_url=image.image_url), place, served))
        role = "system" if message.role == "developer" else message.role
        messages.append(Message(role, tuple(parts), **fields[number]))
    return messages


def _medium(part: RequestPart, place: str, served: Served) -> Media:
    """The bytes of a medium; error lines about them name their place in the request."""
    place, value = f"{place}.{part.type}", getattr(part, part.type)
    keys = value.model_fields_set & {"url", "data", "file_data"}
    if len(keys) != 1:
        raise RequestError(f"{place}: give url or data", place)
    (key,) = keys
    place, source = f"{place}.{key}", f"{'data:;base64,' if key == 'data' else ''}{getattr(value, key)}"
    kind = KINDS[part.type]
    name = kind.__name__.lower()
    if ("image" if kind is Document else name) not in served.backend.takes:
        takes = " and ".join(("text", *served.backend.takes))
        raise RequestError(f"{place}: the model takes {takes}, and no {name}", place, code="unsupported_modality")
    data = served.makers.sources.read(source, MAX_BYTES[kind], place)
    if kind is Document and b"%PDF-" not in data[:1024]:
        raise RequestError(f"{place}: is no PDF; give images as image_url", place, code="invalid_media")
    return kind(data)

"""OpenAI's routes beside the chat: images drawn, texts spoken, speech written down.

They have a thread and a bounded queue of their own, a second `Scheduler`, so that a long sound keeps no conversation
waiting; what the chat's own model draws goes through the model's queue. Whoever hangs up ends his work at its next
step: an image, a sentence, or half a minute of sound.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
from PIL import Image as PILImage
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from polymodal.backends.base import Backend, Reply
from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams, ImageParams
from polymodal.media.audio_writer import SOUNDS, encode_sound
from polymodal.messages import Audio, user
from polymodal.modeling.renderers.base import LONGEST_PROMPT, RenderRequest
from polymodal.serving.bodies import Limits, check_headers, received
from polymodal.serving.errors import Checked, Json, RequestError, as_request_error, parse
from polymodal.serving.makers import Makers, check_voice, png
from polymodal.serving.protocol import MAX_BYTES, Remarks
from polymodal.serving.scheduler import Job
from polymodal.serving.streams import attended
from polymodal.speech import Segment, Transcript
from polymodal.speech.asr import listen, samples_of, windows
from polymodal.speech.base import SAMPLE_RATE
from polymodal.speech.tts import speak

Work: TypeAlias = Callable[[], Iterator[Any]]
T = TypeVar("T", bound=Checked)

MAX_INPUT = 4096
"""Characters that are spoken at once."""
MAX_TRANSCRIBED = 1800.0
"""Seconds of a sound that is written down."""
FIELDS = 16
"""Fields of a form; each has at most `FIELD_BYTES`, apart from the file."""
FIELD_BYTES = 64 * 1024


class MediaWork(Backend):
    """What the second scheduler asks: work, whatever it is, in steps."""

    name = "media"

    def stream(self, messages: Any, params: Any = None) -> Iterator[Any]:
        """The results of one piece of work; None for a step without one."""
        return cast(Work, messages[0])()


class _Drawing(Remarks):
    model: str | None = Field(None, max_length=256)
    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    n: int = Field(1, ge=1, le=4)
    size: str = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    seed: int | None = Field(None, ge=0, lt=2**63 - 4)
    guidance: float | None = Field(None, ge=0, le=100)
    steps: int | None = Field(None, ge=1, le=1000)
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT)
    # What says nothing here.
    quality: Literal["auto"] = "auto"
    background: Literal["auto"] = "auto"
    moderation: Literal["auto"] = "auto"
    stream: Literal[False] = False


class _Speech(Checked):
    model: str = Field(max_length=256)
    input: str = Field(min_length=1, max_length=MAX_INPUT)
    voice: str = Field(max_length=256)
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4.0)
    instructions: Literal[""] = ""
    stream_format: Literal["audio"] = "audio"


class _Transcription(Checked):
    model: str = Field(max_length=256)
    language: str | None = Field(None, max_length=32)
    prompt: Literal[""] = ""
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    temperature: Annotated[Literal["0", "0.0"], Field()] = "0"
    timestamp_granularities: tuple[Literal["segment"], ...] = Field((), strict=False)
    stream: Literal["false"] = "false"


async def draw(request: Request) -> Response:
    """Draw images, with the server's renderer or a model of its own that draws."""
    asked = await _asked(request, _Drawing)
    makers: Makers = request.app.state.makers
    drawing = {name: each for name, each in request.app.state.models.items() if "image" in each.backend.makes}
    name = asked.model or next(iter([*drawing, *([makers.names["image"]] if "image" in makers.names else [])]), "")
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    seeds = [seed + number for number in range(asked.n)]
    if name in drawing:
        given = {"size": asked.size != "auto", "steps": asked.steps, "negative_prompt": asked.negative_prompt}
        if said := [key for key, value in given.items() if value]:
            raise RequestError(f"{said[0]}: {name} draws codes, for which it says nothing; leave it out", said[0])
        image = ImageParams(guidance=asked.guidance)
        choices = [GenerationParams(seed=seed, modalities=("image",), image=image) for seed in seeds]
        job = drawing[name].scheduler.submit([user(asked.prompt)], choices)
        images = [event.images[0] for event in await _finished(request, job) if isinstance(event, Reply)]
    else:
        makers.named("image", name)
        sides = () if asked.size == "auto" else map(int, asked.size.split("x"))
        fields: Json = {**dict(zip(("width", "height"), sides)), "steps": asked.steps, "guidance": asked.guidance}
        requests = [
            RenderRequest(prompt=asked.prompt, negative_prompt=asked.negative_prompt, seed=seed, **fields)
            for seed in seeds
        ]
        renderer = makers.renderer
        assert renderer is not None
        images = await _worked(request, lambda: (PILImage.fromarray(renderer.render(each)) for each in requests))
    form = asked.output_format
    packed = await asyncio.to_thread(lambda: [png(image, form) for image in images])
    data = [{"b64_json": image, "seed": seed} for image, seed in zip(packed, seeds, strict=True)]
    size = f"{images[0].width}x{images[0].height}"
    return JSONResponse({"created": int(time.time()), "data": data, "output_format": form, "size": size})


async def say(request: Request) -> Response:
    """Speak a text, as a whole file."""
    asked = await _asked(request, _Speech)
    makers: Makers = request.app.state.makers
    makers.named("audio", asked.model)
    check_voice(asked.voice, makers, "voice")

    def work() -> Iterator[Any]:
        pieces, rate = [], 0
        for chunk in speak(asked.input, makers.voice):
            rate = chunk.sample_rate
            pieces.append(chunk.samples)
            yield None
        yield encode_sound(np.concatenate(pieces), rate, asked.response_format, asked.speed)

    (data,) = await _worked(request, work)
    return Response(data, media_type=SOUNDS[asked.response_format].kind)


async def write_down(request: Request) -> Response:
    """Write down what is said in a file, which comes as a form."""
    # A form is what a page of another site can send without asking: `Origin` is looked at before, and here what
    # browsers say of a page, also where they leave the origin out.
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise RequestError("pages of other origins may not ask this server", status=403, code="bad_origin")
    data, fields = await _form(request)
    asked = parse(json.dumps(fields).encode(), _Transcription)
    makers: Makers = request.app.state.makers
    makers.named("text", asked.model)
    source = makers.sources.hold(data, MAX_BYTES[Audio], "file")

    def work() -> Iterator[Any]:
        vad, asr = makers.listeners
        samples, language = samples_of(source, MAX_TRANSCRIBED), asked.language
        segments: list[Segment] = []
        for window in windows(vad.spans(samples, asr.window), asr.window):
            heard = listen(samples, [window], asr, language)
            language = language or heard.language  # which does not change between two windows
            segments += heard.segments
            yield None
        yield Transcript(tuple(segments), language), len(samples) / SAMPLE_RATE

    ((found, seconds),) = await _worked(request, work)
    return _written(found, seconds, asked.response_format)


def _written(found: Transcript, seconds: float, form: str) -> Response:
    """A transcript in one of OpenAI's forms."""
    if form == "text":
        return PlainTextResponse(f"{found.text}\n")
    if form in ("srt", "vtt"):
        mark = "," if form == "srt" else "."
        blocks = [
            (f"{number}\n" if form == "srt" else "") + f"{_clock(each.start, mark)} --> {_clock(each.end, mark)}\n"
            f"{each.text.replace('-->', '->')}\n"
            for number, each in enumerate(found.segments, start=1)
        ]
        return PlainTextResponse("\n".join([*(["WEBVTT\n"] if form == "vtt" else []), *blocks]))
    usage = {"type": "duration", "seconds": max(1, round(seconds))}
    if form == "json":
        return JSONResponse({"text": found.text, "usage": usage})
    segments = [
        {"id": number, "start": round(each.start, 2), "end": round(each.end, 2), "text": each.text}
        for number, each in enumerate(found.segments)
    ]
    head = {"task": "transcribe", "language": found.language or "unknown", "duration": round(seconds, 3)}
    return JSONResponse({**head, "text": found.text, "segments": segments, "usage": usage})


def _clock(seconds: float, mark: str) -> str:
    """Hours, minutes, seconds and thousandths, as subtitles have them."""
    whole, rest = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{mark}{rest:03d}"


async def _asked(request: Request, kind: type[T]) -> T:
    """A request's body, checked."""
    limits: Limits = request.app.state.limits
    check_headers(request, limits.body)
    request.app.state.media.check_room()
    async with received(request) as body:
        return parse(body, kind)


async def _form(request: Request) -> tuple[bytes, Json]:
    """The file and the fields of a form; measured before it is parsed, so that nothing is spooled to a disk."""
    limits: Limits = request.app.state.limits
    check_headers(request, limits.body, "multipart/form-data")
    request.app.state.media.check_room()
    async with received(request) as body:

        async def once() -> AsyncIterator[bytes]:
            yield body

        parser = MultiPartParser(
            request.headers, cast(Any, once()), max_files=1, max_fields=FIELDS, max_part_size=FIELD_BYTES
        )
        parser.spool_max_size = len(body) + 1
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError, ValueError) as error:
            told = getattr(error, "message", None) or "is no form that can be read"
            raise RequestError(f"the body: {str(told)[:120]}", code="invalid_form") from None
        fields: Json = {}
        file = form.get("file")
        for key, value in form.multi_items():
            if isinstance(value, str) and key.endswith("[]"):
                fields.setdefault(key.removesuffix("[]"), []).append(value)
            elif key in fields or (key == "file") != isinstance(value, UploadFile):
                raise RequestError(f"{key[:64]}: has to be given once, and a file alone as a file", key[:64])
            elif key != "file" and value != "":
                fields[key] = value
        if not isinstance(file, UploadFile):
            raise RequestError("file: is missing", "file", code="missing_required_parameter")
        data = await file.read()
        await form.close()
    return data, fields


async def _worked(request: Request, work: Work) -> list[Any]:
    """What a piece of work gives, done in the thread of its own."""
    job = request.app.state.media.submit(cast(Any, [work]), [GenerationParams()])
    return await _finished(request, job)


async def _finished(request: Request, job: Job) -> list[Any]:
    """What a job gives; it ends where nobody waits for it."""
    found = []
    async with attended(request, job):
        while (event := await job.next()) is not None:
            if event[1] is not None:
                found.append(event[1])
    if not found:
        raise as_request_error(PolymodalError("nothing came of it"))
    return found


ROUTES = [
    Route("/v1/images/generations", draw, methods=["POST"]),
    Route("/v1/audio/speech", say, methods=["POST"]),
    Route("/v1/audio/transcriptions", write_down, methods=["POST"]),
]

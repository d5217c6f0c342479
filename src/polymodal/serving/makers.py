"""What draws, speaks and listens beside the models of a server; images and sounds of answers as JSON."""

import base64
import io
import re
import threading
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from polymodal.backends.base import Backend
from polymodal.errors import ConfigError
from polymodal.generation.params import Modality
from polymodal.media.audio_writer import encode_sound
from polymodal.messages import Audio, Image, Part
from polymodal.modeling.renderers.base import Renderer, RenderRequest
from polymodal.serving.errors import RequestError
from polymodal.serving.fetching import Sources
from polymodal.speech import ASR, TTS, VAD, load_asr, load_tts, load_vad
from polymodal.utils.strict import shown

MISSING = {
    "image": "makes no images: start the server with --renderer, such as --renderer drawer",
    "audio": "has no voice: start it with --voice, such as --voice piper",
    "text": "writes nothing down: start it with --asr, such as --asr tiny.en",
}
"""What a server without a maker is told."""

PIECE = 48 * 1024
"""Bytes of sound in a piece of a stream."""


class Makers:
    """A renderer, a voice and a listener, each opened when it is first needed; and where media come from."""

    def __init__(
        self,
        renderer: Renderer | None = None,
        voice: str | TTS | None = None,
        asr: str | ASR | None = None,
        vad: str | VAD = "silero",
        sources: Sources | None = None,
    ) -> None:
        if renderer is not None and renderer.output != "image":
            raise ConfigError(f"--renderer {renderer.name}: makes {renderer.output}; a server draws images")
        self.renderer = None if renderer is None else _InTurn(renderer)
        self._voice, self._asr, self._vad = voice, asr, vad
        self.sources = sources or Sources()
        self._lock = threading.Lock()
        found = {"image": renderer, "audio": voice, "text": asr}
        self.names = {kind: _name(maker) for kind, maker in found.items() if maker is not None}  # of what each makes

    @property
    def voice(self) -> TTS:
        """The voice, open."""
        if self._voice is None:
            raise RequestError(f"this server {MISSING['audio']}", "modalities", code="unsupported_modality")
        with self._lock:
            self._voice = load_tts(self._voice)
            return self._voice

    @property
    def listeners(self) -> tuple[VAD, ASR]:
        """What finds speech and what writes it down, open."""
        assert self._asr is not None  # whose name was asked for
        with self._lock:
            self._vad, self._asr = load_vad(self._vad), load_asr(self._asr)
            return self._vad, self._asr

    def outputs(self, backend: Backend) -> list[str]:
        """What answers of a model can hold here."""
        beside = [kind for kind in ("image", "audio") if kind in self.names and kind not in backend.makes]
        return [*backend.makes, *beside]

    def equip(self, backend: Backend, modalities: Sequence[str]) -> None:
        """Give a model what it needs for an answer; refuse what is not to be had, before anything is made."""
        for kind in modalities:
            if kind not in self.outputs(backend):
                raise RequestError(
                    f"modalities: this server {MISSING[kind]}", "modalities", code="unsupported_modality"
                )
            if kind not in backend.makes:
                expert: Any = self.renderer if kind == "image" else self.voice
                if backend.experts.get(kind) is not expert:
                    backend.experts = {**backend.experts, kind: expert}

    def cards(self, created: int) -> list[dict[str, Any]]:
        """What `/v1/models` lists of them."""
        takes = {"image": "text", "audio": "text", "text": "audio"}
        return [
            {"id": name, "object": "model", "created": created, "owned_by": "polymodal",
             "modalities": {"input": [takes[kind]], "output": [kind]}}
            for kind, name in self.names.items()
        ]  # fmt: skip

    def named(self, kind: str, name: str) -> None:
        """Refuse a name that is not the one of the maker of a kind of media."""
        if kind not in self.names:
            raise RequestError(f"this server {MISSING[kind]}", code="unsupported_modality")
        if name != self.names[kind]:
            told = f"model: {shown(name)} is not served here; there is {self.names[kind]!r}"
            raise RequestError(told, "model", 404, "model_not_found")


class _InTurn(Renderer):
    """A renderer that answers and the route of images share: one image at a time, since models keep what they read."""

    output = "image"

    def __init__(self, renderer: Renderer) -> None:
        self._renderer, self._lock = renderer, threading.Lock()
        self.name, self.conversational = renderer.name, renderer.conversational

    def render(self, request: RenderRequest) -> np.ndarray:
        """Draw."""
        with self._lock:
            return self._renderer.render(request)


def _name(maker: Any) -> str:
    return Path(maker if isinstance(maker, str) else maker.name).name or "maker"


class AudioAsked(BaseModel):
    """How an answer is spoken: `audio` of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    voice: str
    format: Literal["wav", "mp3", "flac", "opus", "pcm16"]


def check_asked(
    modalities: Sequence[Modality], audio: AudioAsked | None, stream: bool, makers: Makers
) -> list[Modality]:
    """The modalities of an answer in the order in which they are made; a request that contradicts itself is refused."""
    kinds = sorted(modalities, key=lambda kind: kind == "audio")  # a text is there before it is spoken
    if "audio" not in kinds:
        if audio is not None:
            raise RequestError('audio: goes with modalities ["text", "audio"]', "audio")
        return kinds
    if "text" not in kinds:
        raise RequestError('modalities: "audio" is the answer\'s text spoken; ask for "text" too', "modalities")
    if "audio" in makers.names and audio is None:
        raise RequestError("audio: is missing; give voice and format", "audio", code="missing_required_parameter")
    if audio is not None and "audio" in makers.names:
        check_voice(audio.voice, makers, "audio.voice")
        if stream and audio.format != "pcm16":
            raise RequestError('audio.format: a stream is spoken as "pcm16" alone', "audio.format")
    return kinds


def check_voice(voice: str, makers: Makers, place: str) -> None:
    """Refuse a voice that is not the server's."""
    if voice != makers.names["audio"]:
        told = f"{place}: there is one voice here, {makers.names['audio']!r}; /v1/models lists it"
        raise RequestError(told, place, code="invalid_value")


def png(image: Any, form: str = "png") -> str:
    """An image of Pillow's as base64."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({} if form == "png" else {"quality": 92}))
    return base64.b64encode(buffer.getvalue()).decode()


def media_fields(
    parts: Sequence[Part], audio: AudioAsked | None, head: Mapping[str, Any], index: int
) -> dict[str, Any]:
    """What a message holds besides its text."""
    found: dict[str, Any] = {}
    if images := [_image(part, number) for number, part in enumerate(_images(parts))]:
        found["images"] = images
    for part in parts:
        if isinstance(part, Audio) and audio is not None:
            data = base64.b64encode(_spoken(part, audio.format)).decode()
            text = "".join(getattr(part, "text", "") for part in parts)
            found["audio"] = {**_audio_head(head, index), "data": data, "transcript": text}
    return found


def media_deltas(
    part: Part, audio: AudioAsked | None, head: Mapping[str, Any], index: int, number: int, text: str
) -> list[dict[str, Any]]:
    """The same in pieces: an image whole; a sound as its words, its samples, and when it ends to be there."""
    if isinstance(part, Image):
        return [{"images": [_image(part, number)]}]
    if not isinstance(part, Audio) or audio is None:
        return []
    name, data = _audio_head(head, index), _spoken(part, audio.format)
    pieces = [base64.b64encode(data[start : start + PIECE]).decode() for start in range(0, len(data), PIECE)]
    told = [{"id": name["id"], "transcript": text}, *({"data": piece} for piece in pieces)]
    return [{"audio": each} for each in (*told, {"expires_at": name["expires_at"]})]


def _images(parts: Sequence[Part]) -> list[Image]:
    return [part for part in parts if isinstance(part, Image)]


def _image(part: Image, number: int) -> dict[str, Any]:
    return {"type": "image_url", "index": number, "image_url": {"url": f"data:image/png;base64,{png(part.source)}"}}


def _audio_head(head: Mapping[str, Any], index: int) -> dict[str, Any]:
    # Nothing is kept here: it has ended to be there as soon as it is sent.
    return {"id": f"audio_{re.sub(r'^chatcmpl-', '', head['id'])}_{index}", "expires_at": head["created"]}


def _spoken(part: Audio, form: str) -> bytes:
    """A WAV file of 16 bits in another format."""
    assert isinstance(part.source, bytes)  # what a voice made
    if form == "wav":
        return part.source
    with wave.open(io.BytesIO(part.source)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32767
        return encode_sound(samples, file.getframerate(), form.removesuffix("16"))

"""Images, speech and transcripts over the official client; answers that hold media; and who may ask for them."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import wave
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends import load
from polymodal.backends.base import Backend, Reply, StreamEvent, TextDelta, Timing, Usage
from polymodal.backends.drawing import DrawingModel
from polymodal.generation.params import GenerationParams, ImageParams
from polymodal.media.audio import open_audio
from polymodal.messages import Image, assistant
from polymodal.modeling.renderers.base import Renderer, RenderRequest
from polymodal.serving.bodies import Limits
from polymodal.serving.makers import Makers
from tests.media.makers import wav
from tests.serving.conftest import Running, running
from tests.speech.engines import CountingASR, LevelVAD, ToneTTS
from tests.speech.engines import sound as noise

openai = pytest.importorskip("openai")

WORDS = "A red circle. It is round."


class Says(Backend):
    """Says some words; and what it was asked is kept."""

    name = "says"

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def stream(self, messages: Any, params: Any = None) -> Iterator[StreamEvent]:
        self.asked.append(messages)
        for word in WORDS.split(" "):
            yield TextDelta(word if word == "A" else f" {word}")
        yield Reply(assistant(WORDS), Usage(3, 0, 7), Timing(0, 0, 0, 0, 0), "stop", "says")


class Paints(Renderer):
    """An image whose colour is its seed's; a test can hold it up."""

    name, output = "folder/paints", "image"

    def __init__(self) -> None:
        self.requests: list[RenderRequest] = []
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()

    def render(self, request: RenderRequest) -> np.ndarray:
        self.begun.set()
        assert self.go.wait(20)
        self.requests.append(request)
        return np.full((request.height or 24, request.width or 32, 3), request.seed % 256, np.uint8)


@pytest.fixture
def media() -> Iterator[Running]:
    """A server with everything, none of it real."""
    with running(Says(), makers=Makers(Paints(), ToneTTS(), CountingASR(), LevelVAD())) as server:
        yield server


@pytest.fixture
def bare() -> Iterator[Running]:
    with running(Says()) as server:
        yield server


def client(server: Running) -> Any:
    web = httpx2.Client(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=web)


def post(server: Running, path: str, **options: Any) -> Any:
    return httpx2.post(f"{server.url}/v1/{path}", timeout=60, trust_env=False, **options)


def opened(packed: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(packed)))


CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Draw a circle."}]}


def test_models_say_what_is_made(media: Running, bare: Running) -> None:
    assert {card.id: card.modalities["output"] for card in client(media).models.list().data} == {
        "tiny": ["text", "image", "audio"], "paints": ["image"], "letters": ["audio"], "counting": ["text"],
    }  # fmt: skip
    assert client(media).models.retrieve("letters").modalities == {"input": ["text"], "output": ["audio"]}
    assert [card.modalities["output"] for card in client(bare).models.list().data] == [["text"]]


def test_images_are_drawn(media: Running) -> None:
    ask = client(media).images.generate
    answer = ask(prompt="a circle", n=3, size="64x48", extra_body={"seed": 7, "guidance": 2.5, "steps": 9,
                                                                   "negative_prompt": "squares"})  # fmt: skip
    pictures = [opened(each.b64_json) for each in answer.data]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(seed,) * 3 for seed in (7, 8, 9)]
    assert {picture.size for picture in pictures} == {(64, 48)} and answer.size == "64x48"
    renderer: Any = media.served.makers.renderer
    asked = renderer._renderer.requests[0]
    assert (asked.prompt, asked.negative_prompt, asked.guidance, asked.steps) == ("a circle", "squares", 2.5, 9)
    answer = ask(model="paints", prompt="x", size="auto", response_format="b64_json", output_format="jpeg",
                 quality="auto", background="auto", moderation="auto")  # fmt: skip
    assert opened(answer.data[0].b64_json).format == "JPEG" and opened(answer.data[0].b64_json).size == (32, 24)
    seeds = {ask(prompt="x").data[0].seed for _ in range(2)}
    assert len(seeds) == 2  # where none is given, every request draws another image


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"n": 5}, "n"), ({"n": 0}, "n"), ({"n": True}, "n"), ({"size": "0x8"}, "size"), ({"size": "64"}, "size"),
        ({"size": "65x64"}, None), ({"size": "9999x9999"}, None), ({"prompt": ""}, "prompt"), ({"prompt": " "}, None),
        ({"prompt": 5}, "prompt"), ({"prompt": None}, "prompt"), ({"response_format": "url"}, "response_format"),
        ({"quality": "hd"}, "quality"), ({"style": "vivid"}, "style"), ({"stream": True}, "stream"),
        ({"seed": -1}, "seed"), ({"guidance": 1e9}, "guidance"), ({"banana": 1}, "banana"), ({"image": "x"}, "image"),
        ({"output_format": "gif"}, "output_format"), ({"prompt": "x" * 10_001}, "prompt"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_asked_for(body: dict[str, Any], place: str | None, media: Running) -> None:
    answer = post(media, "images/generations", json={"prompt": "x", **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == place, answer.text
    assert not media.served.makers.renderer._renderer.requests  # type: ignore[union-attr]


def test_a_model_that_draws_draws_by_itself(drawer_folder: Any) -> None:
    """Alone, through its own queue; and as another model's renderer, one image at a time."""
    drawer: Any = load(drawer_folder)
    with running(drawer) as server:
        assert client(server).models.retrieve("tiny").modalities["output"] == ["text", "image"]
        answer = client(server).images.generate(model="tiny", prompt="a circle", n=2, extra_body={"seed": 3})
        image = ImageParams(guidance=None)
        for seed, each in zip((3, 4), answer.data, strict=True):
            own = drawer.generate("a circle", GenerationParams(seed=seed, modalities=("image",), image=image)).images[0]
            assert opened(each.b64_json).tobytes() == own.tobytes()
        for body in ({"size": "64x64"}, {"steps": 3}, {"negative_prompt": "x"}):
            refused = post(server, "images/generations", json={"model": "tiny", "prompt": "x", **body})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == next(iter(body))
        answer = client(server).chat.completions.create(**CHAT, modalities=["image"], max_tokens=8)
        assert answer.choices[0].message.images[0]["type"] == "image_url"
    with running(Says(), makers=Makers(DrawingModel(drawer))) as server:
        assert client(server).images.generate(prompt="a circle").data[0].b64_json


def test_texts_are_spoken(media: Running) -> None:
    ask = client(media).audio.speech.create
    said: dict[str, Any] = {"model": "letters", "voice": "letters", "input": "one two three. Four!"}
    plain = ask(**said, response_format="wav")
    with wave.open(io.BytesIO(plain.read())) as file:
        seconds = file.getnframes() / file.getframerate()
    assert seconds == pytest.approx(0.019 * 100 / 8000 * 1000 / 1.0, abs=0.05)
    assert plain.response.headers["content-type"] == "audio/wav"
    for form in ("mp3", "opus", "aac", "flac"):
        assert open_audio(ask(**said, response_format=form).read()).seconds == pytest.approx(seconds, abs=0.15)
    assert open_audio(ask(**said).read()).seconds == pytest.approx(seconds, abs=0.15)  # MP3 where nothing is said
    assert len(ask(**said, response_format="pcm").read()) == pytest.approx(48_000 * seconds, abs=2000)
    assert open_audio(ask(**said, response_format="wav", speed=2.0).read()).seconds == pytest.approx(
        seconds / 2, abs=0.03
    )


@pytest.mark.parametrize(
    ("body", "status", "place"),
    [
        ({"voice": "alloy"}, 400, "voice"), ({"model": "tts-1"}, 404, "model"), ({"model": "tiny"}, 404, "model"),
        ({"input": ""}, 400, "input"), ({"input": "x" * 4097}, 400, "input"), ({"input": "..."}, 400, None),
        ({"speed": 9}, 400, "speed"), ({"speed": 0}, 400, "speed"),
        ({"response_format": "ogg"}, 400, "response_format"),
        ({"instructions": "sing"}, 400, "instructions"), ({"stream_format": "sse"}, 400, "stream_format"),
        ({"voice": None}, 400, "voice"), ({"input": 5}, 400, "input"),
    ],
)  # fmt: skip
def test_speech_that_cannot_be_asked_for(body: dict[str, Any], status: int, place: str | None, media: Running) -> None:
    said = {"model": "letters", "voice": "letters", "input": "one", **body}
    answer = post(media, "audio/speech", json=said)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, place), answer.text


SPEECH = wav((noise((0.5, 0.0), (1.0, 0.3), (3.0, 0.0), (1.0, 0.3)) * 32767).astype(np.int16))


def test_speech_is_written_down(media: Running) -> None:
    def ask(**options: Any) -> Any:
        return client(media).audio.transcriptions.create(model="counting", file=("a.wav", SPEECH), **options)

    asr: Any = media.served.makers.listeners[1]
    text = ask(language="de").text
    assert [language for _, language in asr.given] == ["de", "de"] and text.count(" s") == 2
    assert ask(response_format="text") == f"{text}\n"
    found = ask(response_format="verbose_json", timestamp_granularities=["segment"], temperature=0, prompt="")
    assert found.text == text and found.duration == pytest.approx(5.5) and found.language == "en"
    assert [(round(s.start), s.id) for s in found.segments] == [(0, 0), (4, 1)]
    srt, vtt = ask(response_format="srt"), ask(response_format="vtt")
    assert srt.startswith("1\n00:00:00,") and " --> " in srt and "\n\n2\n00:00:04," in srt
    assert vtt.startswith("WEBVTT\n\n00:00:00.") and vtt.count(" --> ") == 2
    quiet = client(media).audio.transcriptions.create(model="counting", file=("a.wav", wav(np.zeros(8000, np.int16))))
    assert quiet.text == ""


@pytest.mark.parametrize(
    ("fields", "status", "place"),
    [
        ({"model": "whisper-1"}, 404, "model"), ({"model": ""}, 400, "model"), ({"prompt": "Say it"}, 400, "prompt"),
        ({"temperature": "0.5"}, 400, "temperature"), ({"response_format": "xml"}, 400, "response_format"),
        ({"stream": "true"}, 400, "stream"), ({"banana": "1"}, 400, "banana"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities[0]"), ({"file2": "x"}, 400, "file2"),
        ({f"field{n}": "x" for n in range(20)}, 400, None), ({"language": "x" * 70_000}, 400, None),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_asked(fields: dict[str, str], status: int, place: str | None, media: Running) -> None:
    files = {"file": ("a.wav", SPEECH)}
    answer = post(media, "audio/transcriptions", data={"model": "counting", **fields}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, place), answer.text


def test_files_that_are_none_and_bodies_that_are_none(media: Running) -> None:
    for files in ({"file": ("a.wav", b"banana")}, {"file": ("a.wav", b"")}, {"other": ("a.wav", SPEECH)},
                  {"file": ("a.wav", SPEECH), "more": ("b.wav", SPEECH)}, {"model": ("x", b"counting")}):  # fmt: skip
        answer = post(media, "audio/transcriptions", data={"model": "counting"}, files=files)
        assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"], answer.text
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"", b"banana", b"--x\r\n\r\n", b"--x--\r\n",
                 b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n',
                 b"--x\r\nContent-Disposition: banana\r\n\r\ny\r\n--x--\r\n", b"--x\r\n" * 9999):  # fmt: skip
        assert post(media, "audio/transcriptions", content=body, headers=kind).status_code == 400
    for headers in ({"Content-Type": "multipart/form-data"}, {"Content-Type": "multipart/form-data; boundary="}):
        assert post(media, "audio/transcriptions", content=b"x", headers=headers).status_code == 400
    assert post(media, "audio/transcriptions", json={"model": "counting"}).status_code == 415
    for path in ("audio/speech", "images/generations", "chat/completions"):
        assert post(media, path, data={"model": "tiny"}, files={"file": ("a", b"x")}).status_code == 415
    with running(Says(), makers=Makers(asr=CountingASR(), vad=LevelVAD()), limits=Limits(body=10_000)) as server:
        answer = post(server, "audio/transcriptions", data={"model": "counting"}, files={"file": ("a.wav", SPEECH)})
        assert answer.status_code == 413


def test_a_page_of_another_origin_cannot_send_a_form(media: Running) -> None:
    """A form is a request that a browser sends without asking the server first."""
    form: dict[str, Any] = {"data": {"model": "counting"}, "files": {"file": ("a.wav", SPEECH)}}
    own = f"http://127.0.0.1:{media.port}"
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                    {"Sec-Fetch-Site": "same-site"}, {"Host": "evil.example"}):  # fmt: skip
        answer = post(media, "audio/transcriptions", headers=headers, **form)
        assert answer.status_code == 403, headers
    for headers in ({}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert post(media, "audio/transcriptions", headers=headers, **form).status_code == 200


def test_a_server_without_makers_says_what_is_missing(bare: Running) -> None:
    for path, body in (
        ("images/generations", {"prompt": "x"}),
        ("audio/speech", {"model": "x", "voice": "x", "input": "x"}),
        ("chat/completions", {**CHAT, "modalities": ["text", "image"]}),
        ("chat/completions", {**CHAT, "modalities": ["text", "audio"], "audio": {"voice": "x", "format": "wav"}}),
    ):
        answer = post(bare, path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_modality", answer.text
        assert "start" in answer.json()["error"]["message"] and not bare.backend.asked  # type: ignore[attr-defined]
    answer = post(bare, "audio/transcriptions", data={"model": "x"}, files={"file": ("a.wav", SPEECH)})
    assert answer.status_code == 400 and "--asr" in answer.text


def test_answers_hold_images_and_speech(media: Running) -> None:
    ask = client(media).chat.completions.create
    message = ask(**CHAT, modalities=["text", "image"]).choices[0].message
    (image,) = message.images
    assert message.content == WORDS and image["image_url"]["url"].startswith("data:image/png;base64,")
    assert opened(image["image_url"]["url"].partition(",")[2]).size == (32, 24)
    for form in ("wav", "mp3", "flac", "opus"):
        message = (
            ask(**CHAT, modalities=["text", "audio"], audio={"voice": "letters", "format": form}).choices[0].message
        )
        assert message.audio.transcript == message.content == WORDS and message.audio.id.startswith("audio_")
        heard = open_audio(base64.b64decode(message.audio.data))
        assert heard.seconds == pytest.approx(0.3, abs=0.1) and message.audio.expires_at > 0
    both = ask(**CHAT, modalities=["audio", "text", "image"], audio={"voice": "letters", "format": "pcm16"}, n=2)
    assert all(choice.message.audio.data and choice.message.images for choice in both.choices)
    assert both.choices[0].message.audio.id != both.choices[1].message.audio.id


def test_streams_hold_images_and_speech(media: Running) -> None:
    audio = {"voice": "letters", "format": "pcm16"}
    chunks = list(
        client(media).chat.completions.create(**CHAT, modalities=["text", "image", "audio"], audio=audio, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == WORDS and chunks[-1].choices[0].finish_reason == "stop"
    (images,) = [delta.images for delta in deltas if getattr(delta, "images", None)]
    assert images[0]["image_url"]["url"].startswith("data:image/png;base64,")
    heard = [delta.audio for delta in deltas if getattr(delta, "audio", None)]
    assert heard[0].transcript == WORDS and heard[0].id and heard[-1].expires_at
    samples = b"".join(base64.b64decode(each.data or "") for each in heard)
    whole = client(media).chat.completions.create(**CHAT, modalities=["text", "audio"], audio=audio).choices[0].message
    assert len(samples) == len(base64.b64decode(whole.audio.data)) > 10_000


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"modalities": []}, "modalities"), ({"modalities": "text"}, "modalities"),
        ({"modalities": ["smell"]}, "modalities[0]"),
        ({"modalities": ["audio"], "audio": {"voice": "letters", "format": "wav"}}, "modalities"),
        ({"modalities": ["text", "audio"]}, "audio"), ({"audio": {"voice": "letters", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "audio.voice"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "letters", "format": "aac"}}, "audio.format"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "letters"}}, "audio.format"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "letters", "format": "wav", "x": 1}}, "audio.x"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "letters", "format": "mp3"}, "stream": True},
         "audio.format"),
        ({"modalities": ["text", "text"]}, None),
    ],
)  # fmt: skip
def test_modalities_that_cannot_be_asked_for(body: dict[str, Any], place: str | None, media: Running) -> None:
    answer = media.post({**CHAT, **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == place, answer.text
    assert not media.backend.asked  # type: ignore[attr-defined]


def test_an_answers_media_go_back_with_the_next_question(media: Running) -> None:
    """As the client's own object writes them; an image is shown to the model, a sound's words are in the text."""
    first = client(media).chat.completions.create(
        **CHAT, modalities=["text", "image", "audio"], audio={"voice": "letters", "format": "wav"}
    )
    said = json.loads(first.choices[0].message.model_dump_json())
    messages = [*CHAT["messages"], said, {"role": "user", "content": "And now?"}]
    answer = media.post({"model": "tiny", "messages": messages})
    assert answer.status_code == 200, answer.text
    earlier = media.backend.asked[-1][1]  # type: ignore[attr-defined]
    assert earlier.text == WORDS and [type(part) for part in earlier.media] == [Image]
    for field, value in (("images", said["images"]), ("audio", said["audio"])):
        wrong = [{"role": "user", "content": "x", field: value}]
        refused = media.post({"model": "tiny", "messages": wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == f"messages[0].{field}"
    many = {**said, "images": said["images"] * 9}
    refused = media.post({"model": "tiny", "messages": [CHAT["messages"][0], many, CHAT["messages"][0]]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages[1].images[8]"


def test_the_work_beside_the_chat_has_its_own_bounded_queue() -> None:
    """A full one says when to come back, the chat goes on, and who hangs up leaves no work behind."""
    painter, say = Paints(), Says()
    painter.go.clear()
    with running(say, makers=Makers(painter, ToneTTS()), queue=1) as server:
        answers: list[Any] = []

        def draw() -> None:
            answers.append(post(server, "images/generations", json={"prompt": "x"}))

        first = threading.Thread(target=draw)
        first.start()
        assert painter.begun.wait(10)
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{server.url}/v1/images/generations", json={"prompt": "x"}, timeout=0.5, trust_env=False)
        time.sleep(0.5)  # until its place is free again
        second = threading.Thread(target=draw)
        second.start()
        time.sleep(0.5)
        answer = post(server, "audio/speech", json={"model": "letters", "voice": "letters", "input": "x"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert server.post(CHAT).status_code == 200
        painter.go.set()
        first.join()
        second.join()
        assert [answer.status_code for answer in answers] == [200, 200] and len(painter.requests) == 2


def test_the_work_beside_the_chat_is_counted_and_a_step_without_end_is_told() -> None:
    painter = Paints()
    painter.go.clear()

    def counts(server: Running) -> list[str]:
        lines = server.get("/metrics").text.splitlines()
        return [line.split()[1] for line in lines if line.startswith("polymodal_media_requests_")]

    options: dict[str, Any] = {"timeout": 0.6, "limits": Limits(stall_s=0.1)}
    with running(Says(), makers=Makers(painter), **options) as server:
        assert counts(server) == ["0.0", "0.0"] and server.get("/ready").status_code == 200
        threads = [threading.Thread(target=post, args=(server, "images/generations"), kwargs={"json": {"prompt": "x"}})
                   for _ in range(2)]  # fmt: skip
        for thread in threads:
            thread.start()
        assert painter.begun.wait(10)
        deadline = time.monotonic() + 10
        while (found := counts(server)) != ["1.0", "1.0"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert found == ["1.0", "1.0"]
        for thread in threads:
            thread.join()  # each is told that it took too long, and the step goes on
        time.sleep(0.2)
        answer = server.get("/ready")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stalled")
        assert server.post(CHAT).status_code == 200
        painter.go.set()
        while counts(server)[0] != "0.0" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.get("/ready").status_code == 200


@pytest.mark.slow
def test_the_command_sees_hears_draws_and_speaks() -> None:
    """What `polymodal serve --model default --renderer drawer` answers the official client."""
    import subprocess
    import sys

    from polymodal.speech.asr import installed_asr
    from polymodal.speech.tts import installed_voice

    if installed_voice() is None or installed_asr() is None:
        pytest.skip("needs a voice and a recogniser")
    command = [sys.executable, "-m", "polymodal", "serve", "--port", "0", "--renderer", "drawer"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "is served at" in line)
        server = Running.__new__(Running)
        server.url = f"http://127.0.0.1:{line.partition('127.0.0.1:')[2].partition('/')[0]}"
        for _ in range(100):
            try:
                assert server.get("/health").status_code == 200
                break
            except Exception:
                time.sleep(0.1)
        ask = client(server)
        cards = {card.id: card.modalities for card in ask.models.list().data}
        assert cards["default"]["output"] == ["text", "image", "audio"]
        spoken = ask.audio.speech.create(model="piper", voice="piper", input="What is two plus two?").read()
        listener = next(name for name, card in cards.items() if card["input"] == ["audio"])
        heard = ask.audio.transcriptions.create(model=listener, file=("q.mp3", spoken)).text.lower()
        assert "plus two" in heard or "2 + 2" in heard or "plus 2" in heard
        drawn = ask.images.generate(model="drawer", prompt="Draw a red circle.", extra_body={"seed": 1})
        pixels = np.asarray(opened(drawn.data[0].b64_json), np.int16)
        assert (pixels[..., 0] - pixels[..., 2] > 60).mean() > 0.03
        question = [
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(spoken).decode(), "format": "mp3"}}
        ]
        said = ask.chat.completions.create(
            model="default", messages=[{"role": "user", "content": question}], max_tokens=30,
            modalities=["text", "audio"], audio={"voice": "piper", "format": "mp3"},
        ).choices[0].message  # fmt: skip
        assert said.content and open_audio(base64.b64decode(said.audio.data)).seconds > 0.3
    finally:
        process.terminate()
        process.wait(30)

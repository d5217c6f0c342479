"""Sounds, videos and documents to endpoints: what is sent, in which form, and what happens where it is refused."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends.openai import OpenAIBackend, media, open_endpoint
from polymodal.backends.openai.http import Patience
from polymodal.backends.openai.media import Sending
from polymodal.backends.openai.messages import to_openai
from polymodal.errors import ConfigError, EndpointError, PolymodalError
from polymodal.media.audio import open_audio
from polymodal.media.video import sample_frames
from polymodal.messages import Audio, Document, Image, Video, user

av = pytest.importorskip("av")
ANSWER = {
    "object": "chat.completion",
    "model": "tiny",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A cat."}, "finish_reason": "stop"}],
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of 20 frames with a tone."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("mpeg4", rate=10), file.add_stream("aac", rate=48_000, layout="stereo")
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for index in range(20):
            pixels = np.full((48, 64, 3), 12 * index, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        tone = (8000 * np.sin(np.arange(96_000) / 20)).astype(np.int16)
        sound = av.AudioFrame.from_ndarray(np.stack([tone, tone], 1).reshape(1, -1), format="s16", layout="stereo")
        sound.sample_rate = 48_000
        for packets in (video.encode(), audio.encode(sound), audio.encode()):
            file.mux(packets)
    return path


def sent(*parts: Any, **how: Any) -> list[dict[str, Any]]:
    (message,) = to_openai([user(*parts)], Sending(**how))
    content: list[dict[str, Any]] = message["content"]
    return content


def bytes_of(url: str) -> tuple[str, bytes]:
    head, _, data = url.partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data)


def test_a_sound_that_servers_do_not_read_goes_as_wav(clip: Path, tmp_path: Path) -> None:
    for source in (clip, clip.read_bytes()):
        (part,) = sent(Audio(source))
        assert part["type"] == "input_audio" and part["input_audio"]["format"] == "wav"
        with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
            heard = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    np.testing.assert_allclose(heard, open_audio(clip, video=True).samples, atol=1e-4)


def test_a_video_goes_whole_where_nothing_is_said_of_its_frames(clip: Path) -> None:
    assert [part["type"] for part in sent(Video(clip), "What?")] == ["video_url", "text"]
    assert bytes_of(sent(Video(clip))[0]["video_url"]["url"]) == ("video/mp4", clip.read_bytes())
    with pytest.raises(ConfigError, match=r"sent whole \(videos='url'\) cannot say which frames"):
        sent(Video(clip, fps=1.0), videos="url")


@pytest.mark.parametrize(
    ("part", "how", "times"),
    [
        ({"num_frames": 3}, "auto", "0.0, 0.9, 1.9"),
        ({"start": 1.0}, "frames", "1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 1.9"),
        ({"fps": 1.0}, "auto", "0.0, 1.0"),
        ({"end": 0.1}, "auto", ", ".join(["0.0"] * 8)),
    ],
)
def test_frames_go_as_images_with_their_times(part: dict[str, Any], how: str, times: str, clip: Path) -> None:
    said, *frames = sent(Video(clip, **part), videos=how, detail="low")
    number = len(times.split(","))
    assert said == {"type": "text", "text": f"{number} frames of a video, shown at {times} seconds:"}
    assert len(frames) == number and {frame["image_url"]["detail"] for frame in frames} == {"low"}
    kind, data = bytes_of(frames[-1]["image_url"]["url"])
    segment = (part["start"], None) if "start" in part else (0.0, part["end"]) if "end" in part else None
    expected = sample_frames(clip, part.get("num_frames"), fps=part.get("fps"), segment=segment).array[-1]
    assert kind == "image/jpeg"
    assert np.abs(np.asarray(PILImage.open(io.BytesIO(data))).astype(int) - expected).max() <= 3


def test_a_kind_of_file_that_servers_do_not_read_goes_as_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [PILImage.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=500)
    assert [part["type"] for part in sent(Video(tmp_path / "a.gif"))] == ["text", *["image_url"] * 8]
    with pytest.raises(PolymodalError, match="neither MP4, QuickTime nor WebM; convert it to MP4"):
        sent(Video(tmp_path / "a.gif"), videos="url")


def test_what_is_too_large_is_refused_before_it_is_sent(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_VIDEO", 100)
    assert sent(Video(clip))[0]["type"] == "text"  # frames instead
    with pytest.raises(PolymodalError, match=r"bytes, at most 100 are allowed"):
        sent(Video(clip), videos="url")
    monkeypatch.undo()
    monkeypatch.setattr(media, "MAX_SOUND", 32_000)
    with pytest.raises(
        PolymodalError, match=r"clip.mp4: lasts longer than 1 seconds, which is the most allowed; cut it"
    ):
        sent(Audio(clip))
    monkeypatch.undo()
    monkeypatch.setattr("polymodal.backends.openai.messages.MAX_REQUEST", 5_000)
    with pytest.raises(PolymodalError, match=r"take [\d,]+ bytes in base64, at most 5,000 are sent; give fewer"):
        sent(Video(clip))


def test_the_sound_of_a_video_goes_beside_it(clip: Path) -> None:
    assert [part["type"] for part in sent(Video(clip, audio=True), "?")] == ["video_url", "input_audio", "text"]
    *_, sound = sent(Video(clip, num_frames=1, start=0.5, end=1.0, audio=True))
    with wave.open(io.BytesIO(base64.b64decode(sound["input_audio"]["data"]))) as file:
        assert file.getnframes() == 8_000


def test_documents_go_page_by_page_or_as_a_file(tmp_path: Path) -> None:
    pages = [PILImage.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    parts = sent(Document(tmp_path / "a.tif"), "What?")
    assert [part.get("text", "image") for part in parts] == ["Page 1:\n", "image", "\nPage 2:\n", "image", "What?"]
    _, drawn = bytes_of(parts[3]["image_url"]["url"])
    assert PILImage.open(io.BytesIO(drawn)).getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4 whatever")
    (part,) = sent(Document(tmp_path / "a.pdf"), documents="file")
    assert part["type"] == "file" and part["file"]["filename"] == "document.pdf"
    assert bytes_of(part["file"]["file_data"]) == ("application/pdf", b"%PDF-1.4 whatever")
    with pytest.raises(PolymodalError, match=r"a.tif: is not a PDF, .*; send pages"):
        sent(Document(tmp_path / "a.tif"), documents="file")
    with pytest.raises(ConfigError, match="cannot say which pages or text"):
        sent(Document(tmp_path / "a.pdf", "1"), documents="file")


def refuses(status: int, words: str) -> Any:
    def action(handler: Any) -> None:
        reply(handler, status, {"error": {"message": words}})

    return action


def accepts(handler: Any) -> None:
    reply(handler, 200, ANSWER)


def reply(handler: Any, status: int, body: Any) -> None:
    import json

    data = json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@pytest.fixture
def model(server: Any) -> Iterator[OpenAIBackend]:
    made = open_endpoint("tiny", base_url=server.url, patience=Patience(retries=0))
    yield made
    made.close()


def kinds(body: dict[str, Any]) -> list[str]:
    return [part["type"] for part in body["messages"][-1]["content"]]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "Invalid value: 'video_url'. Supported values are: 'text', 'image_url', 'input_audio', and 'file'."),
        (400, "Invalid input"),
        (404, "No endpoints found that support input video"),
        (500, "unsupported content[].type"),
        (422, "messages.0.content.0.type: input should be 'text' or 'image_url'"),
    ],
)
def test_frames_go_to_a_server_that_refuses_videos_and_it_is_remembered(
    status: int, words: str, server: Any, model: OpenAIBackend, clip: Path
) -> None:
    server.plays(refuses(status, words), accepts)
    with pytest.warns(UserWarning, match="openai:tiny takes no videos; their frames are sent as images"):
        assert model.ask("What?", Video(clip)) == "A cat."
    assert model.ask("What?", Video(clip)) == "A cat."
    assert [kinds(body)[0] for body in server.bodies] == ["video_url", "text", "text"]
    assert kinds(server.bodies[1]) == ["text", *["image_url"] * 8, "text"]


def test_a_refusal_that_frames_do_not_mend_is_told(server: Any, model: OpenAIBackend, clip: Path) -> None:
    server.plays(refuses(400, "no such model"))
    with pytest.raises(EndpointError, match="no such model"):
        model.ask("What?", Video(clip))
    assert [kinds(body)[0] for body in server.bodies] == ["video_url", "text"]
    server.bodies.clear()
    with pytest.raises(EndpointError, match="no such model"):
        model.ask("What?", Image(PILImage.new("RGB", (9, 9))))
    assert len(server.bodies) == 1


def test_whoever_wants_videos_whole_gets_no_frames(server: Any, clip: Path) -> None:
    server.plays(refuses(400, "video_url is not supported"))
    made = open_endpoint("tiny", base_url=server.url, videos="url", patience=Patience(retries=0))
    with pytest.raises(EndpointError, match="video_url is not supported"):
        made.ask("What?", Video(clip))
    assert len(server.bodies) == 1
    made.close()


def test_openai_itself_is_not_asked_whether_it_takes_videos(clip: Path) -> None:
    made = open_endpoint("gpt-4o", api_key="sk-" + "x" * 20)
    assert made._content([user(Video(clip), "?")], made._accepts)[0]["content"][0]["type"] == "text"
    made.close()
    with pytest.raises(ConfigError, match="'whole' is none of auto, url, frames"):
        open_endpoint("gpt-4o", api_key="k", videos="whole")  # type: ignore[arg-type]

"""Videos, sounds and documents on the command line: their flags, their order, and the commands of the chat."""

from __future__ import annotations

import io
import sys
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends.base import Backend, Reply, TextDelta, Timing, Usage
from polymodal.cli import common, main
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Document, Image, Message, Text, Video, assistant
from polymodal.processing import document_pages


class Witness(Backend):
    """Keeps what it is asked."""

    name = "witness"
    takes = ("image", "video", "audio")

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []

    def stream(
        self, messages: Sequence[Message], params: GenerationParams | None = None
    ) -> Iterator[TextDelta | Reply]:
        self.asked.append(list(messages))
        yield TextDelta("yes")
        yield Reply(assistant("yes"), Usage(3, 0, 1), Timing(0, 0, 0.1, 0.2, None), "stop", "witness")


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    model = Witness()
    monkeypatch.setattr(common, "open_model", lambda _args: model)
    return model


def test_media_go_in_the_order_of_their_flags(witness: Witness) -> None:
    argv = ["--audio", "a.wav", "--image", "b.png", "--video", "c.mp4", "--document", "d.pdf", "--image", "e.jpg"]
    assert main(["generate", *argv, "--prompt", "What?"]) == 0
    (message,) = witness.asked[0]
    assert message.media == (Audio("a.wav"), Image("b.png"), Video("c.mp4"), Document("d.pdf"), Image("e.jpg"))
    assert message.text == "What?"


def test_flags_say_which_frames_and_pages(witness: Witness) -> None:
    said = ["--num-frames", "4", "--start", "1.5", "--end", "9", "--with-sound", "--pages", "1-3", "--text", "ocr"]
    assert main(["generate", "--video", "c.mp4", "--document", "d.pdf", *said, "--prompt", "What?"]) == 0
    assert witness.asked[0][0].media == (
        Video("c.mp4", num_frames=4, start=1.5, end=9.0, audio=True),
        Document("d.pdf", pages="1-3", text="ocr"),
    )
    assert main(["generate", "--video", "c.gif", "--fps", "0.5", "--prompt", "What?"]) == 0
    assert witness.asked[1][0].media == (Video("c.gif", fps=0.5),)
    assert main(["generate", "--video", "c.webm", "--audio", "c.webm", "--document", "d.png", "--prompt", "x"]) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--image", "clip.mp4"], "clip.mp4: is a video; give it with --video"),
        (["--image", "paper.pdf"], "paper.pdf: is a document; give it with --document"),
        (["--video", "photo.jpg"], "photo.jpg: is an image; give it with --image"),
        (["--video", "song.mp3"], "song.mp3: is a sound; give it with --audio"),
        (["--audio", "photo.gif"], "photo.gif: is an image; give it with --image"),
        (["--document", "clip.mp4"], "clip.mp4: is a video; give it with --video"),
        (["--image", "a.png", "--fps", "2"], "--fps is for videos, and no --video was given"),
        (["--image", "a.png", "--with-sound"], "--with-sound is for videos, and no --video was given"),
        (["--video", "a.mp4", "--pages", "1"], "--pages is for documents, and no --document was given"),
        (["--image", "a.png", "--start", "0"], "--start is for videos, and no --video was given"),
        (["--video", "a.mp4", "--num-frames", "0"], "error: a.mp4: num_frames is 0; it must be a whole number above 0"),
        (["--video", "a.mp4", "--num-frames", "3", "--fps", "1"], "error: a.mp4: give one of num_frames, fps, times"),
        (["--video", "a.mp4", "--start", "3", "--end", "2"], "it ends at 2 seconds and starts at 3"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(
    argv: list[str], words: str, witness: Witness, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *argv, "--prompt", "What?"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not witness.asked


def write_files(folder: Path) -> None:
    pages = [PILImage.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    pages[0].save(folder / "d.tif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "v.gif", save_all=True, append_images=pages[1:], duration=500)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.zeros(12_000, np.int16).tobytes())


def test_chat_takes_every_kind(
    witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    lines = f"first\n/audio {tmp_path}/a.wav\n/document {tmp_path}/d.tif\n/video '{tmp_path}/v.gif'\nsecond\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    flags = ["--num-frames", "2", "--pages", "2", "--video", f"{tmp_path}/v.gif"]
    assert main(["chat", *flags]) == 0
    err = capsys.readouterr().err
    assert "v.gif: 20 × 10 pixels, 2 frames, 1.0 s" in err and "a.wav: 1.5 s" in err and "d.tif: 1 page\n" in err
    clip: Any = Video(f"{tmp_path}/v.gif", num_frames=2)
    assert witness.asked[0][0].media == (clip,)
    assert witness.asked[1][-1].media == (Audio(f"{tmp_path}/a.wav"), Document(f"{tmp_path}/d.tif", "2"), clip)


def test_chat_says_at_once_what_cannot_be_given(
    witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    witness.takes = ("image",)  # type: ignore[assignment]
    lines = f"/video\n/video {tmp_path}/v.gif\n/audio {tmp_path}/a.wav\n/image {tmp_path}/a.wav\n/document no.pdf\nhi\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat"]) == 2
    said = [line.partition("error: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "/video needs a file: /video FILE", "witness takes image, and no video", "witness takes image, and no audio",
        f"{tmp_path}/a.wav: is a sound; give it with --audio", "no.pdf: no such file; check the path",
    ]  # fmt: skip
    assert [m.media for m in witness.asked[0]] == [()]


def test_chat_says_what_files_take_and_refuses_what_the_model_would(
    senses_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    given = ["--video", f"{tmp_path}/v.gif", "--audio", f"{tmp_path}/a.wav", "--document", f"{tmp_path}/d.tif"]
    assert main(["chat", "--model", str(senses_folder), *given]) == 0
    err = capsys.readouterr().err
    assert "2 frames, 1.0 s, 64 tokens\n" in err and "1.5 s, 38 tokens\n" in err and "2 pages, 32 tokens\n" in err
    assert main(["chat", "--model", str(senses_folder), *given[:2], "--num-frames", "99"]) == 2
    assert f"{tmp_path}/v.gif: 99 frames are asked for" in capsys.readouterr().err


def test_ask_takes_parts_beside_sources(witness: Witness) -> None:
    assert witness.ask("What?", "a.png", Video("b.mp4"), Document("c.pdf"), Audio("d.wav")) == "yes"
    assert witness.asked[0][0].media == (Image("a.png"), Video("b.mp4"), Document("c.pdf"), Audio("d.wav"))


def test_ocr_reads_images_and_documents(witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", ModuleType("rapidocr"))
    given = ["--image", "a.png", "--video", "b.mp4", "--document", "c.pdf", "--pages", "2", "--ocr"]
    assert main(["generate", *given, "--prompt", "What?"]) == 0
    read = (Document("a.png", text="ocr"), Video("b.mp4"), Document("c.pdf", "2", "ocr"))
    assert witness.asked[0][0].media == read
    assert main(["generate", "--document", "c.pdf", "--text", "layer", "--ocr", "--prompt", "What?"]) == 0
    assert witness.asked[1][0].media == (Document("c.pdf", text="layer"),)  # said of documents in particular
    assert witness.ask("What?", "a.png", Image("a.png"), Video("b.mp4"), Document("c.pdf", "2"), ocr=True) == "yes"
    assert witness.asked[2][0].media == (read[0], *read)


def test_chat_reads_images_by_ocr(witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", ModuleType("rapidocr"))
    words = Text("\nReference OCR token: EXIT\n")
    monkeypatch.setattr(document_pages, "_parts", lambda part, pages, engine: [Image(pages[0].image), words])
    monkeypatch.setattr(document_pages, "load_engine", lambda: None)
    PILImage.new("RGB", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {tmp_path}/a.png\nWhat?\n"))
    assert main(["chat", "--ocr"]) == 0
    assert witness.asked[0][0].media == (Document(f"{tmp_path}/a.png", text="ocr"),)


def test_ocr_without_its_extra_or_without_an_image_is_one_line(
    witness: Witness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert main(["generate", "--image", "a.png", "--ocr", "--prompt", "What?"]) == 2
    said = capsys.readouterr().err
    assert "--ocr needs rapidocr, which is not installed: pip install 'polymodal[ocr]'" in said
    assert main(["generate", "--video", "a.mp4", "--ocr", "--prompt", "What?"]) == 2
    said += capsys.readouterr().err
    assert "--ocr is for images and documents, and none was given" in said and said.count("\n") == 2
    assert not witness.asked

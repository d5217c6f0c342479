"""`polymodal draw` and `animate`, with tiny pipelines and a voice that stands in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polymodal.cli import main
from polymodal.media.audio import open_audio
from polymodal.media.video import probe
from tests.cli.test_bad_input import expect_error
from tests.speech.engines import ScriptBackend, ToneTTS

SIZE = ["--size", "32x24", "--steps", "2"]


@pytest.fixture
def sd(tiny_pipeline: Callable[[str], Path]) -> list[str]:
    return ["--renderer", str(tiny_pipeline("stable_diffusion")), "--device", "cpu"]


@pytest.fixture
def moving(tiny_pipeline: Callable[[str], Path]) -> list[str]:
    return ["--renderer", str(tiny_pipeline("animate_diff")), "--device", "cpu"]


@pytest.fixture
def voice(monkeypatch: pytest.MonkeyPatch) -> ToneTTS:
    made = ToneTTS()
    for module in ("tts", "narrate"):
        monkeypatch.setattr(f"polymodal.speech.{module}.load_tts", lambda name: made)
    return made


def test_draw(sd: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.png"
    assert main(["draw", "a red circle", "-o", str(file), *sd, *SIZE, "--seed", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said.pop("seconds") > 0 and said.pop("renderer") == sd[1] and f"wrote {file}" in err
    assert said == {
        "prompt": "a red circle", "negative_prompt": "", "width": 32, "height": 24, "steps": 2, "seed": 3,
        "output": str(file),
    }  # fmt: skip
    with Image.open(file) as image:
        assert image.size == (32, 24) and image.format == "PNG"
        first = np.asarray(image)
    for seed, same in (("3", True), ("4", False)):
        again = tmp_path / f"{seed}.png"
        assert main(["draw", "a red circle", "-o", str(again), *sd, *SIZE, "--seed", seed]) == 0
        assert np.array_equal(np.asarray(Image.open(again)), first) is same
    assert capsys.readouterr().out == ""
    for ending, format in (("jpg", "JPEG"), ("webp", "WEBP")):
        other = tmp_path / f"other.{ending}"
        flags = ["--image", str(file), "--strength", "0.5", "--steps", "4", "--negative-prompt", "blur"]
        assert main(["draw", "the same at night", "-o", str(other), *sd, *flags]) == 0
        assert Image.open(other).format == format and Image.open(other).size == (32, 24)


def test_draw_what_a_model_wrote(
    sd: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ScriptBackend(['{"prompt": "a red disc", "steps": 1, "width": 64, "height": 64}'])
    asked: list[str] = []
    monkeypatch.setattr("polymodal.cli.draw.load", lambda name: asked.append(name) or model)
    flags = ["--rewrite", "some/model", "--steps", "2", "--json"]
    assert main(["draw", "my wish", "-o", str(tmp_path / "a.png"), *sd, *flags]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["prompt"], said["steps"], said["width"]) == ("a red disc", 2, 64)  # the flag goes before
    assert asked == ["some/model"] and "drawing: a red disc" in err
    assert model.asked[0][0][0].text.startswith("my wish")


def test_animate(moving: list[str], voice: ToneTTS, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.mp4"
    assert main(["animate", "it moves", "-o", str(file), *moving, *SIZE, "--frames", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["frames"], said["fps"], said["lasts"], said["width"], said["height"]) == (4, 8, 0.5, 32, 24)
    info = probe(file)
    assert (info.frames, info.height, info.width, info.audio) == (4, 24, 32, False)
    webm = tmp_path / "out.webm"
    flags = ["--frames", "4", "--fps", "4", "--say", "x" * 80]
    assert main(["animate", "it moves", "-o", str(webm), *moving, *SIZE, *flags]) == 0
    assert probe(webm).duration == pytest.approx(1, abs=0.01) and voice.said == ["x" * 80]
    heard = open_audio(webm, video=True)
    assert heard.seconds == pytest.approx(1, abs=0.05) and np.abs(heard.samples[4000:12000]).mean() > 0.2


def test_narrated_slides(voice: ToneTTS, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("red", "blue"):
        Image.new("RGB", (64, 48), name).save(tmp_path / f"{name}.png")
        files.append(str(tmp_path / f"{name}.png"))
    file = tmp_path / "talk.mp4"
    flags = ["--say", "This is red. This is blue.", "-o", str(file), "--json"]
    assert main(["animate", "--slides", *files, *flags]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["slides"] == 2 and said["starts"][0] == 0 < said["starts"][1] < said["lasts"]
    assert voice.said == ["This is red.", "This is blue."] and f"wrote {file}" in err
    assert probe(file).audio and probe(file).duration == pytest.approx(said["lasts"], abs=0.11)


def test_drawing_amiss(
    sd: list[str], moving: list[str], voice: ToneTTS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    out, image, clip = ["-o", str(tmp_path / "out.png")], str(tmp_path / "a.png"), ["-o", str(tmp_path / "out.mp4")]
    cases: list[tuple[list[str], str]] = [
        (["draw", "x", *out, "--steps", "4"], "steps says nothing"),
        (["draw", "x", "-o", str(tmp_path / "absent" / "a.png"), *sd], "folder is not there"),
        (["draw", "x", "-o", str(tmp_path), *sd], "is a folder"),
        (["draw", "x", "-o", str(tmp_path / "out.bmp"), *sd], ".png"),
        (["draw", " ", *out, *sd], "prompt is empty"),
        (["draw", "x" * 100_000, *out, *sd], "10000"),
        (["draw", "x", *out, *sd, "--size", "0x0"], "width"),
        (["draw", "x", *out, *sd, "--size", "100x96"], "multiple of 8"),
        (["draw", "x", *out, *sd, "--size", "large"], "512x384"),
        (["draw", "x", *out, *sd, "--steps", "0"], "steps"),
        (["draw", "x", *out, *sd, "--guidance", "nan"], "guidance"),
        (["draw", "x", *out, *sd, "--seed", "-1"], "seed"),
        (["draw", "x", *out, *sd, "--strength", "0.5"], "--image"),
        (["draw", "x", *out, *sd, "--image", image, "--strength", "2"], "strength"),
        (["draw", "x", *out, *sd, "--image", str(tmp_path / "text.png")], "text.png"),
        (["draw", "x", *out, "--renderer", str(tmp_path)], "model_index.json"),
        (["draw", "x", *out, "--renderer", str(tmp_path / "absent")], "no such folder"),
        (["draw", "x", *out, *moving], "polymodal animate"),
        (["draw", "x", *out, "--renderer", "openai:x"], "OPENAI_API_KEY"),
        (["animate", "x", *clip, *sd], "polymodal draw"),
        (["animate", "x", *clip], "makes image, not video"),
        (["animate", *clip, *moving], "--slides"),
        (["animate", "x", "-o", str(tmp_path / "out.mkv"), *moving], ".webm"),
        (["animate", "x", "-o", str(tmp_path / "out.gif"), *moving, "--say", "Hi."], "no sound"),
        (["animate", "x", *clip, *moving, "--frames", "0"], "frames"),
        (["animate", "x", *clip, *moving, "--fps", "0"], "fps"),
        (["animate", *clip, "--slides", image], "--say"),
        (["animate", "x", *clip, "--slides", image, "--say", "Hi."], "leave prompt out"),
        (["animate", *clip, "--slides", image, "--say", "Hi.", "Ho."], "2 texts for 1 slides"),
        (["animate", *clip, "--slides", str(tmp_path / "text.png"), "--say", "Hi."], "text.png"),
        (["animate", *clip, "--slides", image, "--say", "..."], "nothing to speak"),
    ]
    for argv, words in cases:
        expect_error(argv, capsys, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "text.png"]


def test_an_endpoint_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.backends.conftest import running
    from tests.backends.test_openai import sends
    from tests.backends.test_openai_images import PIXELS, drawn

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running() as server:
        server.plays(sends(drawn()))
        for flags in (["--renderer", server.url], ["--renderer", "openai:tiny", "--base-url", server.url]):
            assert main(["draw", "x", "-o", str(tmp_path / "a.png"), *flags]) == 0
            assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), PIXELS)
    capsys.readouterr()


def test_the_default_is_at_one_place(
    sd: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("polymodal.backends.DEFAULT_RENDERER", sd[1])
    assert main(["draw", "x", "-o", str(tmp_path / "a.png"), *SIZE]) == 0
    assert Image.open(tmp_path / "a.png").size == (32, 24)
    arguments: Any = capsys.readouterr()
    assert arguments.out == ""

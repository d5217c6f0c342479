"""Narrated slides: what is seen when, and what is heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polymodal.errors import ConfigError, DataError, MediaError
from polymodal.media.audio import open_audio
from polymodal.media.video import probe, sample_frames
from polymodal.speech.narrate import FPS, PAUSE, narrate
from tests.speech.engines import LetterTTS, ToneTTS

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture
def slides(tmp_path: Path) -> list[Path]:
    for name, colour in COLOURS.items():
        Image.new("RGB", (65, 48), colour).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in COLOURS]


def seen(file: Path) -> list[str]:
    """The slide that each frame shows."""
    frames = sample_frames(file, fps=FPS).array
    means = frames[:, 12:36, 16:48].mean(axis=(1, 2))
    return [min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum()) for mean in means]


def runs(names: list[str]) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for name in names:
        found = [*found[:-1], (name, found[-1][1] + 1)] if found and found[-1][0] == name else [*found, (name, 1)]
    return found


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
def test_each_slide_is_seen_while_its_words_are_heard(ending: str, slides: list[Path], tmp_path: Path) -> None:
    voice, file = ToneTTS(), tmp_path / f"talk{ending}"
    texts = ["x" * 40, "y" * 120, "z" * 80]  # a letter takes an eightieth of a second
    said = narrate(slides, texts, file, voice)
    lengths = [len(text) / 80 + PAUSE for text in texts]
    assert said.starts == pytest.approx((0, lengths[0], lengths[0] + lengths[1]), abs=0.001)
    assert len(said.sound) / said.sample_rate == pytest.approx(sum(lengths), abs=0.001)
    shown = runs(seen(file))
    assert [name for name, _ in shown] == ["red", "green", "blue"]
    assert [count / FPS for _, count in shown] == pytest.approx(lengths, abs=0.11)
    info = probe(file)
    assert (info.height, info.width, info.audio) == (48, 64, True)  # even sides
    heard = open_audio(file, sample_rate=8000, video=True).samples
    length = min(len(heard), len(said.sound))
    assert np.corrcoef(heard[:length], said.sound[:length])[0, 1] > 0.98


def test_one_text_is_spread_over_the_slides(slides: list[Path], tmp_path: Path) -> None:
    sentences = ["One one.", "Two two two.", "Three.", "Four four four four.", "Five.", "Six six six six six six."]
    voice = LetterTTS()
    said = narrate(slides, " ".join(sentences), tmp_path / "a.mp4", voice)
    assert voice.said == sentences
    lengths = [len(first) / 80 + len(second) / 80 + PAUSE for first, second in zip(sentences[::2], sentences[1::2])]
    assert said.starts == pytest.approx((0, lengths[0], lengths[0] + lengths[1]), abs=0.001)
    narrate(slides, "Only one sentence for them all.", tmp_path / "b.mp4", voice)
    counts = [count for _, count in runs(seen(tmp_path / "b.mp4"))]
    assert len(counts) == 3 and max(counts) - min(counts) <= 1
    said = narrate(slides, "Short. " + "Long " * 30 + "one.", tmp_path / "c.mp4", LetterTTS())
    assert len(said.starts) == 3 and said.starts[1] == pytest.approx(6 / 80 + PAUSE, abs=0.001)


def test_slides_of_other_shapes_are_fitted(tmp_path: Path, slides: list[Path]) -> None:
    tall = Image.new("RGB", (50, 200), (30, 200, 30))
    huge = Image.new("RGB", (2561, 1280), (220, 30, 30))
    narrate([huge, tall, np_blue()], ["Yes.", "No.", "So."], tmp_path / "a.mp4", LetterTTS())
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == (640, 1280)
    frame = sample_frames(tmp_path / "a.mp4", times=[0.5]).array[0]
    assert frame[:, :300].max() < 40 and frame[320, 640, 1] > 150  # black beside it


def np_blue() -> Any:
    return Image.new("RGB", (64, 32), (30, 30, 220))


def test_what_cannot_be_narrated(slides: list[Path], tmp_path: Path) -> None:
    voice, file = LetterTTS(), tmp_path / "a.mp4"
    for given, text, path, error, words in (
        ([], "Hi.", file, ConfigError, "no slide"),
        (slides, ["A.", "B."], file, ConfigError, "2 texts for 3 slides"),
        (slides, [], file, ConfigError, "0 texts"),
        (slides, "Hi.", tmp_path / "a.gif", ConfigError, "no sound"),
        (slides, "Hi.", tmp_path / "a.avi", ConfigError, "ends in"),
        (slides, "...", file, DataError, "nothing to speak"),
        (slides, "", file, DataError, "nothing to speak"),
        (slides, ["A.", "?", "C."], file, DataError, "nothing to speak"),
        ([*slides, tmp_path / "absent.png"], "Hi.", file, MediaError, "absent.png"),
    ):
        with pytest.raises(error, match=words):
            narrate(given, text, path, voice)  # type: ignore[arg-type]
    assert not file.exists()

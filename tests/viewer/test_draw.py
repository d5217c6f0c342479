"""Drawings of videos and sounds: the frames and windows that the model is given, where they stand, when they are."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.cli.inspect import show
from polymodal.config import AudioConfig, ImageConfig, LLMConfig, ModelConfig, VideoConfig, VisionConfig
from polymodal.errors import ConfigError
from polymodal.media.audio import open_audio
from polymodal.media.video import sample_frames
from polymodal.media_plan import AudioWindow, Size, VideoPlan
from polymodal.messages import Audio, Image, Video, user
from polymodal.processing.processor import Processor
from polymodal.viewer.draw import EMPTY, PALETTE, draw_media, draw_video
from polymodal.viewer.view import view_sample
from tests.modeling.test_vlm_senses import clip, tone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture
def processor(byte_tokenizer: PreTrainedTokenizerFast) -> Processor:
    config = ModelConfig(
        vision=VisionConfig(vision_tower="none", type="clip"),
        image=ImageConfig(tile_size=(28, 28), image_mean=(0.5,) * 3, image_std=(0.5,) * 3),
        video=VideoConfig(num_frames=4),
        audio=AudioConfig(audio_tower="none"),
        llm=LLMConfig(model_name_or_path="none"),
    )
    return Processor(config, byte_tokenizer, Size(4, 4), 500, window=AudioWindow(80, 100, 16))


def strong(drawing: PILImage.Image) -> int:
    """Pixels that are neither paper nor ink."""
    pixels = np.asarray(drawing).astype(int)
    return int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum())


def test_frames_are_drawn_in_their_order(processor: Processor, tmp_path: Path) -> None:
    (sheet,) = draw_media(processor, [user(Video(clip(tmp_path / "a.mp4")), "?")])
    pixels = np.asarray(sheet.convert("L")).astype(int)
    # The clip's bar of light moves from left to right: 144 pixels a frame, 8 between them, 16 around.
    bars = []
    for number in range(4):
        left = 16 + number * 152
        # Below the frame's label; the grid's light lines are the same in every frame.
        columns = pixels[80:150, left + 4 : left + 140].mean(axis=0)
        bars.append(int(columns.argmax()))
    assert bars == sorted(bars) and bars[-1] - bars[0] > 90
    assert strong(sheet) > 100  # the labels


def test_a_long_video_is_drawn_in_part(processor: Processor) -> None:
    plan = processor.plan(PILImage.new("RGB", (28, 28)))
    video = VideoPlan(frame=plan, times=tuple(map(float, range(500))), frames=500, tokens=Size(4, 4), num_tokens=8000)
    tiles = {place: PILImage.new("RGB", (28, 28)) for place in range(0, 500, 2)}
    assert draw_video(video, tiles).height < 10_000


def test_a_sound_is_drawn_window_by_window(processor: Processor, tmp_path: Path) -> None:
    low = user(Audio(tone(tmp_path / "low.wav", 1.5, pitch=200)), "?")
    high = user(Audio(tone(tmp_path / "high.wav", 1.5, pitch=4000)), "?")
    strips = [np.asarray(draw_media(processor, [message])[0]).astype(int) for message in (low, high)]
    assert strips[0].shape == strips[1].shape
    # In the first window's features the low tone's light line lies below the high one's.
    top = 16 + 22 + 56
    places = [strip[top : top + 96, 100:900].sum(axis=2).mean(axis=1).argmax() for strip in strips]
    assert places[0] - places[1] > 40
    # The second window is half as wide, and a wave stands on the ground of each.
    row = 22 + 56 + 96 + 10
    for number, width in ((0, 1120), (1, 560)):
        band = strips[0][16 + number * row + 22 + 2, 16:-16]
        assert int((np.abs(band - np.array(EMPTY)).sum(axis=1) == 0).sum()) <= width
        ground = (band == np.array(EMPTY)).all(axis=1) | (band == np.array(PALETTE[1])).all(axis=1)
        assert int(ground.sum()) == width


def test_a_sound_of_many_windows_and_silence_are_drawn(processor: Processor, tmp_path: Path) -> None:
    (many,) = draw_media(processor, [user(Audio(tone(tmp_path / "long.wav", 45)))])
    assert 3000 < many.height < 4500
    (silence,) = draw_media(processor, [user(Audio(tone(tmp_path / "silence.wav", 0.3, pitch=0)))])
    assert silence.height < 300


def test_everything_of_a_conversation_is_shown(
    processor: Processor, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, sheet = tmp_path / "seen.html", tmp_path / "seen.png"
    video, sound = (
        Video(clip(tmp_path / "a.mkv", sound=True), num_frames=3, audio=True),
        Audio(tone(tmp_path / "a.wav")),
    )
    messages = [user(sound, Image(image_folder / "cat.jpg"), "and", video, "?")]
    show(processor, messages, html=str(page), png=str(sheet), color="never")
    out = capsys.readouterr().out
    assert "⟨audio 1: 4 tokens⟩⟨image 2: 16 tokens⟩and⟨video 3: 48 tokens⟩⟨audio 4: 7 tokens⟩?" in out
    text = page.read_text(encoding="utf-8")
    headings = ["<h2>Audio 1</h2>", "<h2>Image 2</h2>", "<h2>Video 3</h2>", "<h2>Audio 4</h2>"]
    assert [text.count(heading) for heading in headings] == [1] * 4 and text.count("data:image/png;base64,") == 4
    with PILImage.open(sheet) as drawing:
        assert drawing.height > 800
    with pytest.raises(ConfigError, match="nothing of that was given"):
        show(processor, [user("x")], html=None, png=str(sheet), color="never")


def test_what_a_notebook_shows(processor: Processor, tmp_path: Path) -> None:
    frames: Any = sample_frames(clip(tmp_path / "a.mp4"), times=(0.5, 1.25))
    html = frames._repr_html_()
    assert html.count("<img") == 2 and "0.50 s" in html and "1.25 s" in html and "48 × 48" in html
    first = html.split("base64,")[1].split('"')[0]
    with PILImage.open(io.BytesIO(base64.b64decode(first))) as image:
        assert np.abs(np.asarray(image).astype(int) - frames.array[0]).mean() < 20
    sound = open_audio(tone(tmp_path / "a.wav"))
    (tmp_path / "again.wav").write_bytes(base64.b64decode(sound._repr_html_().split("base64,")[1].split('"')[0]))
    assert np.abs(open_audio(tmp_path / "again.wav").samples - sound.samples).max() < 1e-3
    messages = [user(Video(tmp_path / "a.mp4"), "<b>?</b>")]
    sample = processor(messages, pixels=False)
    for drawings in ((), draw_media(processor, messages)):
        view = view_sample(sample, processor.tokenizer, drawings)
        framed = view._repr_html_()
        assert framed.startswith("<iframe srcdoc=") and framed.count("<") == 2  # all of the page is escaped
        assert framed.count("data:image/png") == len(drawings)

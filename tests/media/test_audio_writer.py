"""Sounds written in every form are heard again as they were, faster or slower at the same pitch."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest

from polymodal.errors import ConfigError, MediaError
from polymodal.media.audio import open_audio
from polymodal.media.audio_writer import SOUNDS, encode_sound

RATE = 22_050
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE + 777) / RATE)).astype(np.float32)


def heard(data: bytes, form: str) -> tuple[float, float]:
    """Seconds, and the pitch."""
    if form == "pcm":
        samples, rate = np.frombuffer(data, "<i2") / 32767, 24_000
    else:
        samples, rate = open_audio(data).samples, 16_000
    return len(samples) / rate, float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


@pytest.mark.parametrize("form", SOUNDS)
def test_a_sound_is_heard_again(form: str) -> None:
    for speed in (1.0, 0.3, 2.0):
        seconds, pitch = heard(encode_sound(TONE, RATE, form, speed), form)
        assert abs(seconds - len(TONE) / RATE / speed) < 0.12 and abs(pitch - 440) < 3


def test_what_loses_nothing_loses_nothing() -> None:
    for form in ("wav", "flac"):
        found = open_audio(encode_sound(TONE, RATE, form), sample_rate=RATE)
        assert len(found.samples) == len(TONE) and np.abs(found.samples - TONE).max() < 1e-4
    with wave.open(io.BytesIO(encode_sound(TONE * 9, RATE, "wav"))) as file:
        assert (file.getnframes(), file.getframerate(), file.getnchannels()) == (len(TONE), RATE, 1)
        loudest = np.abs(np.frombuffer(file.readframes(len(TONE)), "<i2").astype(int)).max()
    assert loudest >= 32_766  # cut, not wrapped


def test_a_sound_that_cannot_be_written() -> None:
    for speed in (0.1, 5.0, float("nan")):
        with pytest.raises(ConfigError, match="speed is"):
            encode_sound(TONE, RATE, "wav", speed)
    with pytest.raises(MediaError, match="no sound"):
        encode_sound(TONE[:0], RATE, "mp3")

"""Microphone and loudspeaker, with a stand-in for sounddevice."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from polymodal.errors import ConfigError, PolymodalError
from polymodal.speech import AudioChunk
from polymodal.speech.base import FRAME
from polymodal.speech.microphone import Microphone, play
from tests.speech.engines import RATE, LevelVAD, sound


class Devices:
    """A microphone that hears a sound, all of it at once; a loudspeaker that keeps what it plays."""

    def __init__(self, heard: np.ndarray | None = None) -> None:
        self.heard = np.zeros(0, np.float32) if heard is None else heard
        self.played: list[np.ndarray] = []
        self.log: list[str] = []
        self.slow = 0.0

    def InputStream(self, rate: int, block: int, *, channels: int, dtype: str, callback: Any) -> Any:
        assert (rate, block, channels, dtype) == (RATE, FRAME, 1, "float32")
        for start in range(0, len(self.heard) - FRAME, FRAME):
            callback(self.heard[start : start + FRAME, None], FRAME, None, None)
        return self

    def OutputStream(self, rate: int, *, channels: int, dtype: str) -> Any:
        self.log.append(f"open {rate}")
        return self

    def __enter__(self) -> Devices:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("left")

    def write(self, samples: np.ndarray) -> None:
        time.sleep(self.slow)
        self.played.append(samples[:, 0])

    def start(self) -> None:
        self.log.append("start")

    def stop(self) -> None:
        self.log.append("stop")

    def abort(self) -> None:
        self.log.append("abort")

    def close(self) -> None:
        self.log.append("close")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    found = Devices()
    monkeypatch.setitem(sys.modules, "sounddevice", found)  # type: ignore[arg-type]
    return found


def chunk(length: int, value: float = 0.5) -> AudioChunk:
    return AudioChunk(np.full(length, value, np.float32), 8000, "")


def test_a_question_begins_with_speech_and_ends_with_silence(devices: Devices) -> None:
    devices.heard = sound((3, 0.001), (2, 0.2), (0.3, 0.001), (1, 0.2), (2, 0.001), (1, 0.2))
    with Microphone(LevelVAD()).open() as microphone:
        question = microphone.question()
    assert question.sample_rate == RATE and 4.4 < question.seconds < 5.2  # the pause inside, the next one not
    ((start, end),) = LevelVAD().spans(question.samples)
    assert end - start > 3.3 * RATE and devices.log == ["left"]


def test_a_question_without_end_is_ended(devices: Devices) -> None:
    devices.heard = sound((20, 0.2))
    with Microphone(LevelVAD()).open() as microphone:
        assert 5 <= microphone.question(most=5).seconds < 6.1


def test_speech_during_the_answer_interrupts_it(devices: Devices) -> None:
    for heard, wanted in ((sound((2, 0.001)), False), (sound((1, 0.001), (0.1, 0.2), (0.2, 0.001)), False),
                          (sound((1, 0.001), (0.5, 0.2)), True)):  # fmt: skip
        devices.heard = heard
        with Microphone(LevelVAD()).open() as microphone:
            assert microphone.interrupted() is wanted
    devices.heard = np.zeros(0, np.float32)
    with Microphone(LevelVAD()).open() as microphone:
        assert microphone.interrupted() is False


def test_everything_is_played_in_order(devices: Devices) -> None:
    play(iter([chunk(2000, 0.25), chunk(1000, 0.75)]))
    played = np.concatenate(devices.played)
    assert len(played) == 3000 and (played[:2000] == 0.25).all() and (played[2000:] == 0.75).all()
    assert devices.log == ["open 8000", "start", "stop", "close"] and max(map(len, devices.played)) == 800
    play(iter([]))


def test_the_next_sentence_is_made_while_one_is_played(devices: Devices) -> None:
    devices.slow = 0.05
    made: list[int] = []

    def chunks():
        for _ in range(3):
            made.append(len(devices.played))
            yield chunk(4000)

    play(chunks())
    assert made == [0, 0, 0] or made[2] < 10  # all were made before ten of fifteen blocks were out
    assert len(devices.played) == 15


def test_playing_stops_at_once(devices: Devices) -> None:
    devices.slow = 0.05
    play(iter([chunk(8000 * 60)]), stop=lambda: len(devices.played) >= 3)
    assert len(devices.played) < 10 and devices.log[-2:] == ["abort", "close"]
    threads = threading.active_count()

    def broken():
        yield chunk(8000 * 60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(broken())
    assert threading.active_count() == threads


def test_devices_that_are_not_there(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no default device")

    monkeypatch.setattr(devices, "OutputStream", refuse)
    with pytest.raises(PolymodalError, match=r"no loudspeaker \(no default device\); give --output"):
        play(iter([chunk(100)]))
    monkeypatch.setattr(devices, "InputStream", refuse)
    with pytest.raises(PolymodalError, match="microphone cannot be opened"), Microphone(LevelVAD()).open():
        pass
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ConfigError, match=r"pip install 'polymodal\[microphone\]'"), Microphone(LevelVAD()).open():
        pass

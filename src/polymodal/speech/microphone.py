"""Microphone and loudspeaker, through sounddevice: listening to a question, playing an answer that can be interrupted.

Nothing takes the answer's own sound out of what the microphone hears: where a loudspeaker stands beside it, the answer
interrupts itself, and a headset is needed, or no `stop`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from polymodal.errors import ConfigError, PolymodalError, first_line
from polymodal.media.audio import Sound
from polymodal.speech.base import FRAME, SAMPLE_RATE, VAD, AudioChunk
from polymodal.utils.extras import extra

_HEARD = 8
"""Frames of speech in the last second that begin a question or interrupt an answer; a quarter of a second."""
_SECOND = SAMPLE_RATE // FRAME


def devices() -> Any:
    """The module sounddevice."""
    try:
        return extra("sounddevice", "microphone and loudspeaker need", "polymodal[microphone]")
    except ConfigError as error:  # or PortAudio itself is missing
        other = "apt install libportaudio2; or give --input question.wav and --output answer.wav"
        raise ConfigError(f"{error}, {other}") from None


class Microphone:
    """What the microphone hears, a frame at a time, judged by a VAD."""

    def __init__(self, vad: VAD) -> None:
        self._vad = vad
        self._frames: queue.Queue[np.ndarray] = queue.Queue()
        self._recent: deque[np.ndarray] = deque(maxlen=_SECOND)

    @contextmanager
    def open(self) -> Iterator[Microphone]:
        """Listen during a `with`."""
        module = devices()
        self._frames, self._recent = queue.Queue(), deque(maxlen=_SECOND)
        try:
            stream = module.InputStream(
                SAMPLE_RATE,
                FRAME,
                channels=1,
                dtype="float32",
                callback=lambda data, *_: self._frames.put(data[:, 0].copy()),
            )
        except Exception as error:  # PortAudioError
            raise PolymodalError(f"the microphone cannot be opened ({first_line(error)}); plug one in") from None
        with stream:
            yield self

    def question(self, most: float = 60.0, silence: float = 0.7) -> Sound:
        """Wait for speech; the sound from a second before it to the silence after it."""
        kept: list[np.ndarray] = []
        while True:
            self._recent.append(self._frames.get())
            if kept:
                kept.append(self._recent[-1])
            chances = self._chances()
            if not kept and (chances >= self._vad.threshold).sum() >= _HEARD:
                kept = list(self._recent)
            quiet = round(silence * SAMPLE_RATE / FRAME)
            if kept and ((chances[-quiet:] < self._vad.threshold).all() or len(kept) >= most * SAMPLE_RATE / FRAME):
                return Sound(np.concatenate(kept), SAMPLE_RATE, SAMPLE_RATE, 1)

    def interrupted(self) -> bool:
        """Whether somebody has spoken in the last second."""
        while True:
            try:
                self._recent.append(self._frames.get_nowait())
            except queue.Empty:
                return bool((self._chances() >= self._vad.threshold).sum() >= _HEARD)

    def _chances(self) -> np.ndarray:
        return self._vad.probabilities(np.concatenate(self._recent)) if self._recent else np.zeros(0, np.float32)


def play(chunks: Iterator[AudioChunk], stop: Callable[[], bool] | None = None) -> None:
    """Play an answer while it is made; where `stop` says yes, fall silent at once."""
    waiting: queue.Queue[AudioChunk | None] = queue.Queue()
    silent, failed = threading.Event(), []

    def run() -> None:
        stream: Any = None
        try:
            while (chunk := waiting.get()) is not None and not silent.is_set():
                if stream is None:
                    stream = devices().OutputStream(chunk.sample_rate, channels=1, dtype="float32")
                    stream.start()
                block = chunk.sample_rate // 10
                for start in range(0, len(chunk.samples), block):
                    if silent.is_set():
                        return stream.abort()
                    stream.write(np.ascontiguousarray(chunk.samples[start : start + block, None]))
            if stream is not None:
                stream.stop()  # after the last sound
        except Exception as error:  # PortAudioError, in a thread whose errors nobody sees
            failed.append(error)
        finally:
            if stream is not None:
                stream.close()

    player = threading.Thread(target=run, daemon=True)
    player.start()
    try:
        for chunk in chunks:
            waiting.put(chunk)
            if failed:
                break
        waiting.put(None)
        while player.is_alive() and not (stop is not None and stop()):
            player.join(0.05)
    finally:  # Ctrl-C too
        silent.set()
        waiting.put(None)
        player.join()
    if failed:
        raise PolymodalError(f"there is no loudspeaker ({first_line(failed[0])}); give --output answer.wav")

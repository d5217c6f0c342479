"""Microphone and loudspeaker, through sounddevice: listening to a question, playing an answer that can be interrupted.

Nothing takes the answer's own sound out of what the microphone hears: where a loudspeaker stands beside it, the answer
interrupts itself, and a headset or `barge_in=False` is needed.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from polymodal.errors import ConfigError, PolymodalError, first_line
from polymodal.media.audio import Sound
from polymodal.speech.base import FRAME, SAMPLE_RATE, VAD, AudioChunk

_HEARD = 8
"""Frames of speech in the last second that begin a question or interrupt an answer; a quarter of a second."""
_SECOND = SAMPLE_RATE // FRAME


def devices() -> Any:
    """The module sounddevice."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: PortAudio itself is missing
        raise ConfigError(
            f"the microphone needs sounddevice and PortAudio ({first_line(error)}): pip install 'polymodal[microphone]', "
            "apt install libportaudio2; or give --input question.wav and --output answer.wav"
        ) from None
    return sounddevice


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
            if kept and ((chances[-quiet:] < self._vad.threshold).all() or len(kept) >= most * _SECOND):
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


class Loudspeaker:
    """Plays pieces of sound in a thread, so that the next sentence is made meanwhile."""

    def __init__(self) -> None:
        self._chunks: queue.Queue[AudioChunk | None] = queue.Queue()
        self._stopped = threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()

    def play(self, chunk: AudioChunk) -> None:
        """Play a piece after those before it."""
        self._chunks.put(chunk)

    def playing(self) -> bool:
        """Whether there is something left to play."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Say that no more pieces come."""
        self._chunks.put(None)

    def stop(self) -> None:
        """Fall silent at once."""
        self._stopped.set()
        self.finish()
        self._thread.join()

    def check(self) -> None:
        """Raise what went wrong while playing."""
        if self._failed is not None:
            raise PolymodalError(
                f"the loudspeaker cannot be used ({first_line(self._failed)}); give --output answer.wav"
            )

    def _play(self) -> None:
        stream: Any = None
        try:
            while (chunk := self._chunks.get()) is not None:
                if stream is None:
                    stream = devices().OutputStream(chunk.sample_rate, channels=1, dtype="float32")
                    stream.start()
                block = chunk.sample_rate // 10
                for start in range(0, len(chunk.samples), block):
                    if self._stopped.is_set():
                        stream.abort()
                        return
                    stream.write(np.ascontiguousarray(chunk.samples[start : start + block, None]))
            if stream is not None:
                stream.stop()
        except Exception as error:  # PortAudioError, in a thread that nobody waits for
            self._failed = error
        finally:
            if stream is not None:
                stream.close()

"""The three kinds of engine, what they give, and what all of them need: packages found by name, ONNX, WAV files."""

from __future__ import annotations

import importlib.util
import io
import os
import wave
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from polymodal.errors import CheckpointError, ConfigError, MediaError, first_line
from polymodal.utils.extras import extra

T = TypeVar("T")

SAMPLE_RATE = 16_000
"""Samples a second of everything that is listened to."""
FRAME = 512
"""Samples of the frames that a VAD judges; 32 ms."""
WINDOW = 28.0
"""Seconds that an ASR is given at most at once, unless it says otherwise; Whisper hears 30."""


@dataclass(frozen=True)
class Segment:
    """A piece of a transcript and when it was said."""

    start: float  # Seconds
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said; of silence, an empty text."""

    segments: tuple[Segment, ...]
    language: str | None = None  # Such as "en"; None where the engine does not tell

    @property
    def text(self) -> str:
        """All of it, in one line."""
        return " ".join(" ".join(segment.text for segment in self.segments).split())


@dataclass(frozen=True)
class AudioChunk:
    """A piece of speech, ready to be played."""

    samples: np.ndarray  # float32 [L], -1 to 1
    sample_rate: int  # Samples a second
    text: str  # The sentence that it belongs to

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.sample_rate


class VAD(ABC):
    """Says where speech is: a subclass gives a probability for each frame, and the spans follow from them.

    Attributes:
        threshold: The probability from which a frame is speech; below it by 0.15, speech may end.
        min_speech: Seconds; shorter bursts are none.
        min_silence: Seconds of silence that end a span.
        pad: Seconds kept before and after a span.
    """

    threshold: float = 0.5
    min_speech: float = 0.1
    min_silence: float = 0.5
    pad: float = 0.2

    @abstractmethod
    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """Judge a sound.

        Args:
            samples: float32 [L] at 16 kHz.

        Returns:
            float32 [L / 512, rounded up]: how likely each frame of 512 samples is speech, 0 to 1.
        """

    def spans(self, samples: np.ndarray, longest: float = WINDOW) -> list[tuple[int, int]]:
        """Find the speech in a sound.

        Args:
            samples: float32 [L] at 16 kHz.
            longest: Seconds; a longer span is cut where speech is least likely, in its second half.

        Returns:
            First sample and end of each span, in order; nothing where nobody speaks.
        """
        if not len(samples):
            return []
        chances = self.probabilities(samples)
        found: list[list[int]] = []
        start, quiet = -1, 0
        for frame, chance in enumerate([*chances, *[0.0] * (self._frames(self.min_silence) + 1)]):
            if chance >= self.threshold:
                start, quiet = (frame if start < 0 else start), 0
            elif start >= 0 and (chance < self.threshold - 0.15 or quiet):
                quiet += 1
                if quiet > self._frames(self.min_silence):
                    found.append([start, frame + 1 - quiet])
                    start, quiet = -1, 0
        pad, most = self._frames(self.pad), max(2, self._frames(longest) - 2 * self._frames(self.pad))
        spans: list[tuple[int, int]] = []

        def add(start: int, end: int) -> None:
            before = spans[-1][1] if spans else 0
            spans.append((max(before, start * FRAME), min(end * FRAME, len(samples))))

        for start, end in found:
            if end - start < self._frames(self.min_speech):
                continue
            begin = start - pad
            while end - start > most:
                cut = start + most // 2 + int(np.argmin(chances[start + most // 2 : start + most])) + 1
                add(begin, cut)
                begin = start = cut
            add(begin, end + pad)
        return spans

    def _frames(self, seconds: float) -> int:
        return round(seconds * SAMPLE_RATE / FRAME)


class ASR(ABC):
    """Writes down what is said in a short sound; `transcribe` finds the speech and cuts long ones.

    Attributes:
        name: What the engine is called.
        window: Seconds that it is given at most at once.
    """

    name: str
    window: float = WINDOW

    @abstractmethod
    def listen(self, samples: np.ndarray, language: str | None = None) -> Transcript:
        """Write down one window.

        Args:
            samples: float32 [L] at 16 kHz, no longer than `window`, with speech in it.
            language: The language, such as "en"; found out where None.

        Returns:
            The transcript, its times counted from the window's start.

        Raises:
            ConfigError: The engine does not know the language.
        """


class TTS(ABC):
    """Speaks sentences.

    Attributes:
        name: What the voice is called.
        sample_rate: Samples a second of what it gives.
    """

    name: str
    sample_rate: int

    @abstractmethod
    def synthesize(self, sentence: str) -> Iterator[np.ndarray]:
        """Speak one sentence. Closing the iterator stops the engine.

        Args:
            sentence: Text with something to speak in it, a few hundred characters at most.

        Yields:
            float32 [L] pieces of the sound, in order; one where the engine makes it at once.

        Raises:
            PolymodalError: The engine cannot speak it.
        """


@contextmanager
def closed(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Close an iterator at the end of a `with`, where it can be closed."""
    try:
        yield items
    finally:
        getattr(items, "close", lambda: None)()


def package_folder(package: str, install: str) -> Path:
    """The folder of an installed package of data; none of its code runs."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"{install.split()[-1]} is not installed: {install}")
    return Path(found.submodule_search_locations[0])


def open_onnx(path: Path) -> Any:
    """A session of onnxruntime on the CPU."""
    onnxruntime = extra("onnxruntime", f"{path.name} needs", "polymodal[speech]")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        raise CheckpointError(f"{path}: not a whole ONNX model ({first_line(error)[:160]}); fetch it again") from None


def threads() -> int:
    """Cores to compute with."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def wav_bytes(chunks: Iterable[AudioChunk]) -> bytes:
    """Pack speech as a WAV file of 16 bits.

    Args:
        chunks: Pieces in order, all of one rate.

    Returns:
        The file's bytes.

    Raises:
        MediaError: There is no sound in it, or the rates differ.
    """
    pieces = list(chunks)
    rates = {chunk.sample_rate for chunk in pieces}
    if len(rates) != 1 or not sum(len(chunk.samples) for chunk in pieces):
        raise MediaError("nothing was spoken, so there is no sound to write" if len(rates) < 2 else "two sample rates")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rates.pop())
        for chunk in pieces:
            file.writeframes((np.clip(chunk.samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()

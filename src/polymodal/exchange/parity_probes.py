"""The prompts and pictures on which an exported model is compared with ours; the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.media.image import open_image
from polymodal.messages import Image, Message, Text, assistant, system, user

if TYPE_CHECKING:
    from PIL import Image as PILImage

SHAPES = ((480, 640), (90, 600), (700, 230), (64, 64))
"""Height and width of the pictures that are made here: usual, very wide, tall, and smaller than a tile."""


@dataclass(frozen=True)
class Probe:
    """One conversation.

    Attributes:
        name: What reports call it.
        messages: The conversation; its pictures are open.
    """

    name: str
    messages: tuple[Message, ...]

    @property
    def pictures(self) -> list[PILImage.Image]:
        """The pictures, in order."""
        return [open_image(part.source) for m in self.messages for part in m.media if isinstance(part, Image)]


def make_picture(number: int) -> PILImage.Image:
    """Make a picture of soft coloured blots; the same number gives the same pixels.

    Args:
        number: Which of `SHAPES`.

    Returns:
        The picture.
    """
    import numpy as np
    from PIL import Image as PILImage

    height, width = SHAPES[number]
    # Integers alone, so that no random generator of some version decides.
    rows, columns = np.indices((height // 16 + 2, width // 16 + 2))
    colours = [(rows * a + columns * b + rows * columns * c + number * 37) * 2654435761 for a, b, c in _MIX]
    blots = (np.stack(colours, axis=-1) >> 13) & 0xFF
    picture = PILImage.fromarray(blots.astype(np.uint8))
    return picture.resize((width, height), PILImage.Resampling.BICUBIC)


_MIX = ((7, 13, 3), (11, 5, 1), (3, 17, 5))


def chat_probes() -> list[Probe]:
    """Conversations for a model with a chat template; a model may refuse some, such as a system message."""
    made = [make_picture(number) for number in range(len(SHAPES))]
    return [
        Probe("one picture", (user(Image(made[0]), "What is shown here?"),)),
        Probe("a very wide picture", (user(Image(made[1]), "Describe it in one sentence."),)),
        Probe("a tall picture", (user(Image(made[2]), "How many colours are there? 1, 2, or more than 3?"),)),
        Probe("a small picture after the text", (user("It's small; what might this be?\n", Image(made[3])),)),
        Probe("two pictures", (user(Image(made[0]), Image(made[2]), "What do they have in common?"),)),
        Probe("pictures between texts", (user("First:", Image(made[3]), "second:", Image(made[1]), "Which?"),)),
        Probe("text alone", (user("Write a word that begins with é, or 你好."),)),
        Probe("a system message", (system("Answer briefly."), user(Image(made[0]), "What is it?"))),
        Probe(
            "a second question",
            (user(Image(made[0]), "What is it?"), assistant("Blots of colour."), user("Which colours?")),
        ),
    ]


def picture_probes(pictures: Sequence[Path]) -> list[Probe]:
    """Ask about pictures of one's own.

    Args:
        pictures: Their files.

    Returns:
        One probe each.
    """
    return [Probe(path.name, (user(Image(path), "What is in this picture?"),)) for path in pictures]


def one_picture(probes: Sequence[Probe], *, with_text: bool) -> list[Probe]:
    """Keep what a model can be asked that takes one picture and one text.

    Args:
        probes: Any.
        with_text: Whether it is asked something; False for a model that continues from the picture alone.

    Returns:
        Those of one message with one picture and one text behind it.
    """
    kept = [p for p in probes if len(p.messages) == 1 and [type(part) for part in p.messages[0].parts] == [Image, Text]]
    return kept if with_text else [Probe(p.name, (user(*p.messages[0].media),)) for p in kept]


def hash_probes(probes: Sequence[Probe]) -> str:
    """Hash texts and pixels.

    Args:
        probes: The probes.

    Returns:
        The hex digest of sha256.
    """
    digest = hashlib.sha256()
    for probe in probes:
        for message in probe.messages:
            digest.update(f"\x00{message.role}".encode())
            for part in message.parts:
                digest.update(b"\x01" + part.text.encode() if isinstance(part, Text) else b"\x02")
        for picture in probe.pictures:
            digest.update(f"{picture.size}".encode() + picture.tobytes())
    return digest.hexdigest()

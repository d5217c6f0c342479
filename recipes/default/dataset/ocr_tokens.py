"""Words that OCR reads in an image, put beside it in the prompt: "Reference OCR token: TOTAL, 12.50".

`polymodal generate --ocr` puts them right after the image, LLaVA's training data for TextVQA after the question
(arXiv:2310.03744); rows have either form. Reading every image with rapidocr would take an hour, so most rows have the
plan's own words with errors as rapidocr makes them on such images, and some what it does read in the drawn image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polymodal.media.ocr import read_lines, reference_tokens
from recipes.default.dataset import words
from recipes.default.dataset.plan import IMAGE, Record

# Letters that were taken for each other, or may well be, at this size.
_ALIKE = {
    "O": "0QČ",
    "0": "Oo",
    "o": "06a",
    "I": "l1",
    "l": "I1",
    "1": "lI7",
    "S": "5s",
    "5": "S6",
    "B": "8R",
    "8": "B3",
    "Z": "2",
    "2": "Z7",
    "d": "6cl",
    "g": "pq9",
    "e": "cé",
    "c": "e",
    "r": "n",
    "n": "r",
    "m": "n",
    "E": "FÉ",
    "T": "7",
    "t": "f",
    "f": "t",
    "6": "5b",
    "9": "g",
    "a": "o",
    "u": "v",
    "v": "u",
    "h": "b",
    "w": "vv",
}
_STRAY = ["l", "I", "■", "-", "–", "□", "|", "."]


def simulated(rng: random.Random, lines: Sequence[str], trouble: float = 0.04) -> list[str]:
    """The words of lines with a few errors: letters taken for others, words missed, strays, neighbours swapped."""
    read: list[str] = []
    for word in (word for line in lines for word in line.split()):
        if rng.random() < trouble:
            continue
        letters = [rng.choice(_ALIKE[c]) if c in _ALIKE and rng.random() < trouble / 2 else c for c in word]
        if rng.random() < trouble:
            read.append(rng.choice(_STRAY))
        read.append("".join(letters))
        if len(read) > 1 and rng.random() < trouble / 2:
            read[-2:] = read[:-3:-1]
    return read


def read_image(engine: Callable[[Any], Any], image: Any, thumbs: Path) -> list[str]:
    """The words that rapidocr reads in an image, which is drawn for that."""
    import numpy as np

    return [word for line in read_lines(engine, np.asarray(image.draw(thumbs))) for word in line.text.split()]


def lines_of(image: Any) -> list[str]:
    """What can be read in a planned image: a chart's or a document's lines, a picture's word."""
    card = getattr(image, "card", None)
    return [card.text] if card else list(getattr(image, "lines", ()))


def with_tokens(record: Record, tokens: Sequence[str], *, after_question: bool = False) -> Record:
    """A record about one image with what was read in it: right after the image, or after the first question."""
    if not tokens:
        return record
    said, (first, *rest) = reference_tokens(tokens), record["conversations"]
    question = first["value"].removeprefix(f"{IMAGE}\n")
    if after_question:
        asked, short, _ = question.partition(f"\n{words.SHORT}")
        value = f"{IMAGE}\n{asked}{said}{short}"
    else:
        # One newline beside the placeholder belongs to it.
        value = f"{IMAGE}\n{said}\n{question}"
    return {**record, "conversations": [{**first, "value": value}, *rest], "ocr_tokens": len(tokens)}


def add_tokens(
    rng: random.Random,
    images: Sequence[Any],
    records: Sequence[Record],
    *,
    share: float = 0.35,
    read: int = 0,
    thumbs: Path | None = None,
    after_question: float = 0.4,
) -> list[Record]:
    """Give a share of the records the words that can be read in their image, where there are any.

    Args:
        rng: Draws which records, which form and which errors.
        images: The planned images.
        records: Each about one of them; captions stay as they are.
        share: Of the records that get words.
        read: Of those, how many get what rapidocr reads (a second each) in place of the plan's words with errors.
        thumbs: The cut-outs that drawing may need.
        after_question: Share of records with LLaVA's form.

    Returns:
        The records, in order.

    Raises:
        ConfigError: `read` is not 0 and the extra `ocr` is missing.
    """
    from polymodal.media.ocr import load_engine

    engine = load_engine() if read else None
    planned = {image.file: image for image in images}
    found: list[Record] = []
    for record in records:
        image = planned.get(record.get("image")) if isinstance(record.get("image"), str) else None
        if rng.random() >= share or image is None or record["kinds"] == ["caption"] or not lines_of(image):
            found.append(record)
            continue
        tokens = simulated(rng, lines_of(image))
        late = rng.random() < after_question
        if engine is not None and read > 0:
            tokens, read = read_image(engine, image, thumbs or Path()), read - 1
        found.append(with_tokens(record, tokens, after_question=late))
    return found

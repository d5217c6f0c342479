"""The data: drawn images and made-up text, the same for a seed, in LLaVA's file format.

Tokens are bytes here (the tokenizer has no merges), so a text of n letters is n tokens and lengths are what they are
meant to be. Stage 1 has captions of 8 to 40 tokens. Stage 2 has one to four turns; the length of the text follows a
log-normal with median 120 and sigma 1, cut to 24..900, taken at even quantiles so that few rows show the whole spread,
and three quarters of it are answers. Every row has one image.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((640, 480), (480, 640), (500, 375), (640, 427), (427, 640), (336, 336))
"""Width and height of the images, as they are common in COCO."""


def write_rows(folder: Path, stage: int, count: int, seed: int, scale: float = 1.0) -> None:
    """Draw the images and write `rows.json`.

    Args:
        folder: Where to.
        stage: 1 or 2.
        count: Rows.
        seed: Of images, texts and their order.
        scale: Of images and of texts; below 1 for a smoke test.
    """
    rng = np.random.default_rng([seed, stage])
    folder.mkdir(parents=True, exist_ok=True)
    quantiles = (np.arange(count) + 0.5) / count
    if stage == 1:
        lengths = 8 + 32 * quantiles
    else:
        spread = np.array([NormalDist().inv_cdf(q) for q in quantiles])
        lengths = np.clip(120 * np.exp(spread), 24, 900)
    rows = []
    for number, length in enumerate(rng.permutation(lengths)):
        name = f"{number}.jpg"
        draw_image(rng, scale).save(folder / name, quality=90)
        turns = caption(rng, length * scale) if stage == 1 else conversation(rng, length * scale)
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows for the other systems: `image` a path, `messages` with the placeholder taken out."""
    found = []
    for row in json.loads((folder / "rows.json").read_text(encoding="utf-8")):
        messages = [
            {
                "role": "user" if turn["from"] == "human" else "assistant",
                "content": turn["value"].removeprefix("<image>\n"),
            }
            for turn in row["conversations"]
        ]
        found.append({"image": str(folder / row["image"]), "messages": messages})
    return found


def row_tokens(row: dict[str, Any], stage: int, image_tokens: int) -> tuple[int, int]:
    """Count a row's tokens without a tokenizer; the systems' own counts are held against it.

    Args:
        row: As `read_rows` gives it.
        stage: 1 is written as image, caption, end token; 2 in ChatML.
        image_tokens: Tokens of one image.

    Returns:
        All tokens, and the trained ones: the answers with their end tokens.
    """
    answers = [len(m["content"]) + 1 for m in row["messages"] if m["role"] == "assistant"]
    if stage == 1:
        return image_tokens + sum(answers), sum(answers)
    # <|im_start|> role newline content <|im_end|> newline
    total = sum(1 + len(m["role"]) + 1 + len(m["content"]) + 2 for m in row["messages"])
    return image_tokens + total, sum(answers)


def draw_image(rng: np.random.Generator, scale: float) -> Image.Image:
    """A gradient with a few shapes on it."""
    width, height = (max(16, round(side * scale)) for side in SIZES[rng.integers(len(SIZES))])
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        box = (x, y, x + int(rng.integers(4, width // 2)), y + int(rng.integers(4, height // 2)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    return image


def caption(rng: np.random.Generator, length: float) -> list[dict[str, str]]:
    """One caption; stage 1 asks nothing."""
    return [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": letters(rng, length)}]


def conversation(rng: np.random.Generator, length: float) -> list[dict[str, str]]:
    """Questions and answers; a short text is one turn."""
    count = int(rng.integers(1, 5)) if length > 60 else 1
    turns = []
    for number, share in enumerate(rng.dirichlet(np.full(count, 4.0))):
        question = letters(rng, length * share / 4)
        turns.append({"from": "human", "value": "<image>\n" + question if number == 0 else question})
        turns.append({"from": "gpt", "value": letters(rng, length * share * 3 / 4)})
    return turns


def letters(rng: np.random.Generator, length: float) -> str:
    """Words of random letters, about `length` characters in all."""
    count = max(1, round(length))
    text = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), count)
    # A blank now and then, never at either end, where templates may trim.
    text[[i for i in range(1, count - 1) if i % 6 == 5]] = " "
    return "".join(text)

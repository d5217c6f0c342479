"""The data: drawn images and made-up text, the same for a seed, in LLaVA's file format.

Tokens are bytes here, but for the roles' names, so a text of n letters is n tokens and lengths are what they are meant
to be. Two kinds of rows, both taken at even quantiles so that few rows show the whole spread:

- "llava": as the field has them. Stage 2 is the mix of LLaVA-1.5's 665,298 rows, `MIX` below; stage 1 its 558,128
  captions (94 MB, which leaves some 50 letters for each: about 13 tokens). All lengths, the context of 2,048 included,
  are scaled by this model's tokens of an image over LLaVA's 576, so that images and text, and with them padding, keep
  their proportions: 196 / 576 = 0.34, a context of 697.
- "even": every row has one image. Stage 1 has captions of 8 to 40 tokens; stage 2 one to four turns, whose length
  follows a log-normal with median 120 and sigma 1, cut to 24..900, three quarters of it answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("llava", "even")

SIZES = ((640, 480), (480, 640), (500, 375), (640, 427), (427, 640), (336, 336))
"""Width and height of the images, as they are common in COCO."""

CONTEXT, IMAGE_TOKENS, TURN = 2048, 576, 9
"""LLaVA-1.5's: its context, the tokens of an image, and those that its template adds to a turn."""

SHORTEST_TURN = 12
"""Tokens of a turn of one letter here. Turns that are shorter in proportion become fewer, in as long a row."""


class Source(NamedTuple):
    """Rows of one kind; lengths in LLaVA's tokens."""

    thousands: int  # Of rows
    turns: float
    question: float
    answer: float
    sigma: float  # Of the logarithm of a row's length
    image: bool = True


MIX = {
    # Row counts: table 7 of arXiv:2310.03744. Turns: questions an image of each set, which LLaVA puts into one row
    # (VQAv2 5.4, GQA's balanced questions 13, OCR-VQA 4.8; at most ten regions). Lengths: 1.3 tokens a word of the
    # questions and answers that the sets' papers report, a box 25 tokens, with the prompts that LLaVA adds; of
    # LLaVA-Instruct the sizes of its three files. ShareGPT is what is then left of the mix's 768 MB of text: some
    # 4,400 letters a row, cut to the context.
    "A-OKVQA": Source(66, 1, 50, 1, 0.3),
    "OK-VQA": Source(9, 1, 22, 2, 0.3),
    "TextCaps": Source(22, 1, 60, 15, 0.4),
    "VQAv2": Source(83, 5.4, 9, 2, 0.3),
    "OCR-VQA": Source(80, 4.8, 10, 7, 0.3),
    "detail": Source(23, 1, 12, 125, 0.4),
    "complex reasoning": Source(77, 1, 20, 150, 0.4),
    "GQA": Source(72, 13, 12, 2, 0.3),
    "conversation": Source(58, 4.5, 12, 65, 0.4),
    "RefCOCO": Source(48, 8, 31, 16, 0.3),
    "Visual Genome": Source(86, 10, 31, 16, 0.3),
    "ShareGPT": Source(40, 3, 70, 300, 0.7, image=False),
}
"""Instruction data of LLaVA-1.5, short rows first."""


def write_rows(
    folder: Path, stage: int, count: int, seed: int, kind: str, image_tokens: int, scale: float = 1.0
) -> None:
    """Draw the images and write `rows.json`.

    Args:
        folder: Where to.
        stage: 1 or 2.
        count: Rows.
        seed: Of images, texts and their order.
        kind: One of `KINDS`.
        image_tokens: Tokens of one image; "llava" is scaled by them.
        scale: Of images, and of the texts of "even"; below 1 for a smoke test.
    """
    rng = np.random.default_rng([seed, stage])
    folder.mkdir(parents=True, exist_ok=True)
    quantiles = (np.arange(count) + 0.5) / count
    plans = [(plan_llava if kind == "llava" else plan_even)(rng, stage, q, image_tokens, scale) for q in quantiles]
    rows: list[dict[str, Any]] = []
    for number in rng.permutation(count):
        turns, image = plans[number]
        row: dict[str, Any] = {"id": str(len(rows))}
        if image:
            row["image"] = f"{len(rows)}.jpg"
            draw_image(rng, scale).save(folder / row["image"], quality=90)
        said = []
        for question, answer in turns:
            text = "<image>\n" * (image and not said) + letters(rng, question)
            said += [{"from": "human", "value": text}, {"from": "gpt", "value": letters(rng, max(1, answer))}]
        rows.append({**row, "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


Plan = tuple[list[tuple[float, float]], bool]
"""Letters of each question and answer, and whether there is an image."""


def plan_even(rng: np.random.Generator, stage: int, quantile: float, _image_tokens: int, scale: float) -> Plan:
    """Captions, or conversations of one to four turns; stage 1 asks nothing."""
    if stage == 1:
        return [(0, scale * (8 + 32 * quantile))], True
    length = float(np.clip(120 * np.exp(NormalDist().inv_cdf(quantile)), 24, 900)) * scale
    count = int(rng.integers(1, 5)) if length > 60 else 1
    shares = rng.dirichlet(np.full(count, 4.0))
    return [(max(1, length * share / 4), length * share * 3 / 4) for share in shares], True


def plan_llava(rng: np.random.Generator, stage: int, quantile: float, image_tokens: int, _scale: float) -> Plan:
    """A row of `MIX`: the quantile chooses its source and, within that, its length."""
    scale = image_tokens / IMAGE_TOKENS
    if stage == 1:
        return [(0, 13 * np.exp(0.4 * NormalDist().inv_cdf(quantile)) * scale)], True
    left = quantile * sum(source.thousands for source in MIX.values())
    for source in MIX.values():
        if left < source.thousands:
            break
        left -= source.thousands
    spread = np.exp(source.sigma * NormalDist().inv_cdf(min(max(left / source.thousands, 0.01), 0.99)))
    length = source.turns * (TURN + source.question + source.answer) * spread
    length = scale * min(length, CONTEXT - (IMAGE_TOKENS if source.image else 0))
    count = max(1, min(round(source.turns), int(length / SHORTEST_TURN)))
    text = max(2.0, length / count - (SHORTEST_TURN - 2))
    question = max(1.0, text * source.question / (source.question + source.answer))
    return [(question, max(1.0, text - question))] * count, source.image


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows for the other systems: `image` a path or None, `messages` with the placeholder taken out."""
    found = []
    for row in json.loads((folder / "rows.json").read_text(encoding="utf-8")):
        messages = [
            {
                "role": "user" if turn["from"] == "human" else "assistant",
                "content": turn["value"].removeprefix("<image>\n"),
            }
            for turn in row["conversations"]
        ]
        found.append({"image": str(folder / row["image"]) if "image" in row else None, "messages": messages})
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
    image = image_tokens if row["image"] else 0
    if stage == 1:
        return image + sum(answers), sum(answers)
    # <|im_start|> role newline content <|im_end|> newline
    return image + sum(5 + len(m["content"]) for m in row["messages"]), sum(answers)


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


def letters(rng: np.random.Generator, length: float) -> str:
    """Words of random letters, about `length` characters in all."""
    count = round(length)
    text = rng.choice(list("abcdefghijklmnopqrtuvwxyz"), count)  # no "s": the roles' names stay the only merges
    # A blank now and then, never at either end, where templates may trim.
    text[[i for i in range(1, count - 1) if i % 6 == 5]] = " "
    return "".join(text)

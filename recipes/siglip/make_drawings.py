"""Draw shapes with captions, and a tokenizer of their words: the data of the tiny SigLIP. Nothing is downloaded.

The pipeline beside this file runs it; by hand: python recipes/siglip/make_drawings.py FOLDER
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 214), "yellow": (240, 200, 30)}
SHAPES = ("circle", "square", "triangle")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
SIDE = 64
HELD_OUT = 12
"""Combinations of colour, shape and place that are never trained on."""


def main(folder: Path, each: int = 6) -> None:
    from PIL import Image, ImageDraw

    chance = random.Random(0)
    combinations = list(itertools.product(COLOURS, SHAPES, PLACES))
    chance.shuffle(combinations)
    (folder / "pictures").mkdir(parents=True)
    sets: dict[str, list[dict[str, object]]] = {"train": [], "val": []}
    for number, (colour, shape, place) in enumerate(combinations):
        held_out = number < HELD_OUT
        for copy in range(1 if held_out else each):
            size = chance.randint(16, 26)
            column, row = PLACES[place]
            left = column * SIDE // 2 + chance.randint(2, SIDE // 2 - size - 2)
            top = row * SIDE // 2 + chance.randint(2, SIDE // 2 - size - 2)
            grey = chance.randint(225, 255)
            image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
            draw = ImageDraw.Draw(image)
            box = (left, top, left + size, top + size)
            if shape == "circle":
                draw.ellipse(box, fill=COLOURS[colour])
            elif shape == "square":
                draw.rectangle(box, fill=COLOURS[colour])
            else:
                draw.polygon([(left, box[3]), (left + size // 2, top), (box[2], box[3])], fill=COLOURS[colour])
            name = f"pictures/{number}-{copy}.png"
            image.save(folder / name)
            captions = [f"a {colour} {shape} at the {place}", f"at the {place} is a {colour} {shape}"]
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": captions[0]}]
            record = {"id": f"{number}-{copy}", "image": name, "conversations": turns, "captions": captions}
            sets["val" if held_out else "train"].append(record)
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    _tokenizer().save_pretrained(folder / "tokenizer")


def _tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|end|>", "<|pad|>", "<|unknown|>", "a", "at", "the", "is", *COLOURS, *SHAPES]
    words += sorted({word for place in PLACES for word in place.split()})
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unknown|>"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python make_drawings.py FOLDER")
    main(Path(sys.argv[1]))

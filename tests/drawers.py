"""A tiny world to draw: a cell of one of three colours at one of three places, four codes, and models for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from polymodal.modeling.tokenizers import save_image_tokenizer
from polymodal.modeling.tokenizers.config import PatchCodebookConfig
from polymodal.modeling.tokenizers.patch_codebook import PatchCodebook
from tests.conftest import write_tiny_llm

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PLACES = {"left": 0, "middle": 1, "right": 2}
SIDE, PATCH, CODES = 12, 4, 9
PROMPTS = [f"{colour} {place}" for colour in COLOURS for place in PLACES]


def picture(prompt: str) -> Image.Image:
    """The image that a prompt asks for."""
    colour, place = prompt.split()
    image = Image.new("RGB", (SIDE, SIDE), "white")
    image.paste(COLOURS[colour], (PATCH * PLACES[place], PATCH, PATCH * PLACES[place] + PATCH, 2 * PATCH))
    return image


def codes_of(prompt: str) -> list[int]:
    """Its codes."""
    colour, place = prompt.split()
    codes = [0] * CODES
    codes[3 + PLACES[place]] = 1 + [*COLOURS].index(colour)
    return codes


def codebook() -> PatchCodebook:
    """White and the three colours."""
    made = PatchCodebook(PatchCodebookConfig(codebook_size=4, image_size=SIDE, patch_size=PATCH))
    colours = torch.tensor([(255, 255, 255), *COLOURS.values()]) / 255
    made.codebook.copy_(colours.repeat_interleave(PATCH * PATCH, dim=1))
    return made.eval()


def write_codebook(folder: Path) -> Path:
    """Its folder."""
    save_image_tokenizer(codebook(), folder)
    return folder


def write_rows(folder: Path) -> Path:
    """Rows of LLaVA's form: each prompt and its image, and the other way round, and one of text alone."""
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(PROMPTS):
        picture(prompt).save(folder / f"{number}.png")
        turns = [(prompt, "<image>"), ("<image>\nWhat?", prompt)]
        for kind, (asked, said) in zip(("draw", "tell"), turns, strict=True):
            talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
            rows.append({"id": f"{kind}-{number}", "kind": kind, "image": f"{number}.png", "conversations": talk})
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
    rows.append({"id": "text", "kind": "text", "conversations": talk})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def drawer_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that teaches a random little Llama to draw, and everything it names."""
    write_tiny_llm(folder / "llm", hidden_size=48, intermediate_size=96, max_position_embeddings=160)
    return {
        "name": "draw",
        "init": {
            "model": {
                "llm": {"model_name_or_path": str(folder / "llm")},
                "output": {"image": {"image_tokenizer": str(write_codebook(folder / "codebook"))}},
            }
        },
        "data": {"mix": [{"path": str(write_rows(folder))}]},
        "train": [{"match": "llm.*", "train": True}],
        "optim": {"learning_rate": 4e-3},
        "batch": {"global_size": 19, "micro_size": 19},
        "run": {"epochs": 200, "eval_generations": 0, "precision": "fp32", "save_every": 0, "log_every": 50, "seed": 1},
        "output_dir": str(folder / "run"),
        **changes,
    }

"""Drawn images with captions, a tokenizer of words, and a tiny SigLIP recipe over them as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polymodal.config import parse_config
from polymodal.training.recipes.contrastive import PairRecipe

COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 60, 220), "white": (250, 250, 250)}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `tokenizer/`, 16 images and `data.json`; every image has two captions."""
    from PIL import Image, ImageDraw
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("drawn")
    words = ["<|end|>", "<|pad|>", "<|unk|>", *COLOURS, "top", "bottom", "left", "right", ":"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>"
    )
    tokenizer.save_pretrained(root / "tokenizer")
    records = []
    for colour, rgb in COLOURS.items():
        for place, (column, row) in PLACES.items():
            number = len(records)
            width, height = 36 + 2 * number, 44
            image = Image.new("RGB", (width, height), (0, 0, 0))
            corner = (column * width // 2, row * height // 2)
            box = (*corner, corner[0] + width // 2 - 1, corner[1] + height // 2 - 1)
            ImageDraw.Draw(image).rectangle(box, fill=rgb)
            image.save(root / f"{number}.png")
            captions = [f"{colour} {place}", f"{place}: {colour}"]
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": captions[0]}]
            records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns, "captions": captions})
    (root / "data.json").write_text(json.dumps(records))
    return root


@pytest.fixture
def pair_plain(drawn: Path, tmp_path: Path) -> dict[str, Any]:
    """A tiny SigLIP recipe as plain data, ready to be changed by a test."""
    return {
        "name": "tiny-pairs",
        "objective": {"type": "siglip"},
        "init": {
            "model": {
                "family": "siglip",
                "vision": {**SMALL, "patch_size": 7},
                "text": {**SMALL, "max_position_embeddings": 8},
                "projection_dim": 16,
                "tokenizer": str(drawn / "tokenizer"),
                "image": {
                    "image_aspect_ratio": "squash",
                    "tile_size": [28, 28],
                    "image_mean": [0.5, 0.5, 0.5],
                    "image_std": [0.5, 0.5, 0.5],
                },
            }
        },
        "data": {"mix": [{"path": str(drawn / "data.json")}]},
        "train": [{"match": "*", "train": True}],
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.01},
        "batch": {"global_size": 8},
        "run": {"max_steps": 4, "epochs": 100, "log_every": 1, "save_every": 0, "threads": 1, "precision": "fp32"},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture(scope="session")
def pair_recipe() -> Callable[..., PairRecipe]:
    """Make a recipe of plain data with changes such as `run__max_steps=3` or `augment={...}`."""

    def make(plain: dict[str, Any], **changes: Any) -> PairRecipe:
        merged = json.loads(json.dumps(plain))
        for key, value in changes.items():
            *sections, last = key.split("__")
            here = merged
            for section in sections:
                here = here.setdefault(section, {})
            here[last] = value
        return parse_config(PairRecipe, merged, "recipe")

    return make

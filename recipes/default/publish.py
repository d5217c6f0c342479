"""Put a trained model into the package: half precision, model card kept, size checked.

python recipes/default/publish.py runs/default/stage3/final [src/polymodal/models/default]
python recipes/default/publish.py runs/draw/drawer/final src/polymodal/models/drawer
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from polymodal.checkpoints.model_folder import load_model, save_model

TARGET = Path(__file__).resolve().parents[2] / "src" / "polymodal" / "models" / "default"
CARD = "MODEL_CARD.md"
LARGEST = 50_000_000
"""Bytes that the package may carry."""


def main(source: str, target: str = str(TARGET)) -> None:
    folder = Path(target)
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    loaded = load_model(Path(source))
    whole = (Path(source) / "llm").is_dir()
    if whole:
        loaded.model.llm.half()  # on the disk; it is opened in the type of its configuration
    save_model(
        folder,
        loaded.model,
        loaded.config,
        loaded.tokenizer,
        history=loaded.history,
        llm_trained=whole,
        dtype=torch.float16,
        replace=True,
    )
    if text is not None:
        card.write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    if size > LARGEST:
        sys.exit(f"publish: {size:,} bytes are more than the package may carry ({LARGEST:,})")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: publish.py MODEL_FOLDER [TARGET]")
    main(*sys.argv[1:])

"""Write a trained pair of towers as a folder to hand out: stock SigLIP, half precision, size checked.

python recipes/vit_small/publish.py runs/vit_small/siglip/final TARGET

The folder holds picture tower, text tower, tokenizer and image processor, and loads in `transformers` (`AutoModel`,
`AutoProcessor`) as well as here (`vision_tower: TARGET`, `type: siglip`). Half precision moves no score of a unit
vector by more than the script says; it refuses to write a folder that scores otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from polymodal.evaluation.embedder import NOTES, Embedder, load_embedder
from polymodal.files import atomic_folder
from polymodal.representation.pair import PairBatch
from polymodal.representation.stock import save_processor

LARGEST = 40_000_000
"""Bytes that the package may carry."""
MOST_MOVED = 0.01
"""Cosines between pictures and texts may move by this much."""
TEXTS = ["A cat.", "Three dogs on a red background.", 'The word "stop".', "A house to the left of a tree."]


def main(source: str, target: str) -> None:
    from transformers import SiglipModel

    before = load_embedder(source)
    model = SiglipModel.from_pretrained(source, dtype=torch.float16)
    with atomic_folder(Path(target), replace=True) as folder:
        model.save_pretrained(folder)
        save_processor(folder, "siglip", before.model.tokenizer, before.image)
        notes = Path(source) / NOTES
        if notes.is_file():
            (folder / NOTES).write_bytes(notes.read_bytes())
        moved = float((cosines(before) - cosines(load_embedder(folder))).abs().max())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if moved > MOST_MOVED:
            sys.exit(f"publish: half precision moves a cosine by {moved:.3f}, more than {MOST_MOVED}; nothing written")
        if size > LARGEST:
            sys.exit(f"publish: {size:,} bytes are more than the package may carry ({LARGEST:,}); nothing written")
    print(f"{target}: {size / 1e6:.1f} MB, cosines moved by {moved:.5f} at most")


@torch.no_grad()
def cosines(embedder: Embedder) -> torch.Tensor:
    """Four texts with eight pictures of noise, [8, 4]."""
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, 3, *embedder.image.tile_size), generator=noise, dtype=torch.uint8)
    ids = torch.zeros(8, embedder.model.text_length or 1, dtype=torch.int64)
    seen = embedder.model.embed(PairBatch(ids, ids == 0, torch.arange(8), pixel_values=pixels)).image
    return seen @ embedder.texts(TEXTS).T


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: publish.py MODEL_FOLDER TARGET")
    main(*sys.argv[1:])

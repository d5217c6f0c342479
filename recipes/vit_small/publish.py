"""Put a trained pair of towers into the package: stock SigLIP, half precision, model card kept, size checked.

python recipes/vit_small/publish.py runs/vit_small/siglip/final [src/polymodal/models/vit_small]

The folder holds image tower, text tower, tokenizer and image processor, and loads in `transformers` (`AutoModel`,
`AutoProcessor`) as well as here (`vision_tower: vit_small`, `type: siglip`). Half precision moves no score of a unit
vector by more than the script says; it refuses to write a folder that scores otherwise.

Images are normalised as CLIP's from here on, which the first layer takes up exactly: engines fill the edges of a
image that is not square with CLIP's mean colour, some with no other (llama.cpp), so a model with this tower can be
exported to all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from polymodal.evaluation.embedder import Embedder, load_embedder
from polymodal.modeling.dual_encoders.base import PairBatch
from polymodal.modeling.dual_encoders.clip_siglip import save_processor
from polymodal.modeling.dual_encoders.registry import METADATA_NAME, read_metadata
from polymodal.utils.files import atomic_folder, write_text

TARGET = Path(__file__).resolve().parents[2] / "src" / "polymodal" / "models" / "vit_small"
CARD = "MODEL_CARD.md"
LARGEST = 30_000_000
"""Bytes of it that the package may carry."""
MOST_MOVED = 0.01
"""Cosines between images and texts may move by this much."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = ["A cat.", "Three dogs on a red background.", 'The word "stop".', "A house to the left of a tree."]


def main(source: str, target: str = str(TARGET)) -> None:
    from transformers import SiglipModel

    card = Path(target) / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    before = load_embedder(source)
    model = SiglipModel.from_pretrained(source, dtype=torch.float32)
    renormalise(model.vision_model.embeddings.patch_embedding, before.image.image_mean, before.image.image_std)
    model.half()
    for settings in (model.config, model.config.vision_config, model.config.text_config):
        settings.dtype = torch.float16
    image = before.image.model_copy(update={"image_mean": CLIP_MEAN, "image_std": CLIP_STD})
    with atomic_folder(Path(target), replace=True) as folder:
        model.save_pretrained(folder)
        save_processor(folder, "siglip", before.model.tokenizer, image)
        metadata = read_metadata(Path(source))
        if metadata:
            metadata["image"] = image.model_dump(mode="json")
            write_text(folder / METADATA_NAME, json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
        moved = float((cosines(before) - cosines(load_embedder(folder))).abs().max())
        if text is not None:
            write_text(folder / CARD, text)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if moved > MOST_MOVED:
            sys.exit(f"publish: half precision moves a cosine by {moved:.3f}, more than {MOST_MOVED}; nothing written")
        if size > LARGEST:
            sys.exit(f"publish: {size:,} bytes are more than the package may carry ({LARGEST:,}); nothing written")
    print(f"{target}: {size / 1e6:.1f} MB, cosines moved by {moved:.5f} at most")


@torch.no_grad()
def renormalise(patches: torch.nn.Conv2d, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
    """Change the first layer so that it takes pixels normalised by CLIP's mean and deviation, with the same result."""
    was_mean, was, new_mean, new = (torch.tensor(values) for values in (mean, deviation, CLIP_MEAN, CLIP_STD))
    assert patches.bias is not None and patches.padding in ("valid", (0, 0), 0)
    patches.bias += torch.einsum("oihw,i->o", patches.weight, (new_mean - was_mean) / was)
    patches.weight *= (new / was)[:, None, None]


@torch.no_grad()
def cosines(embedder: Embedder) -> torch.Tensor:
    """Four texts with eight images of noise, [8, 4]."""
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, 3, *embedder.image.tile_size), generator=noise, dtype=torch.uint8)
    ids = torch.zeros(8, embedder.model.text_length or 1, dtype=torch.int64)
    seen = embedder.model.embed(PairBatch(ids, ids == 0, torch.arange(8), pixel_values=pixels)).image
    return seen @ embedder.texts(TEXTS).T


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: publish.py MODEL_FOLDER [TARGET]")
    main(*sys.argv[1:])

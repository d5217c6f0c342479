"""A tokenizer on held-out images: through their codes and back, PSNR, SSIM, and how much of the codebook is used."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from polymodal.metrics.images import code_usage, psnr, ssim
from polymodal.modeling.tokenizers.base import ImageTokenizer
from polymodal.training.process_group import World
from polymodal.training.tokenizer.dataset import ImageDataset
from polymodal.utils.files import make_folder

AT_ONCE = 64
"""Images that go through the tokenizer at once."""
_GAP = 2  # pixels between images of a grid


@torch.no_grad()
def evaluate_tokenizer(tokenizer: ImageTokenizer, dataset: ImageDataset, world: World | None = None) -> dict[str, Any]:
    """Score every image of a dataset; of several processes each takes a share, and all must call it."""
    began, world = time.monotonic(), world or World()
    own = range(world.rank, len(dataset), world.size)
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    scores: list[torch.Tensor] = []  # [n, 3]: PSNR, SSIM, squared error
    for start in range(0, len(own), AT_ONCE):
        pixels = dataset.pixels(own[start : start + AT_ONCE]).to(world.device).float() / 255
        ids = tokenizer.encode(pixels)
        drawn = tokenizer.decode(ids)
        errors = (drawn.double() - pixels.double()).square().flatten(1).mean(dim=1)
        scores.append(torch.stack([psnr(drawn, pixels), ssim(drawn, pixels), errors], dim=1).cpu())
        counts += torch.bincount(ids.flatten().cpu(), minlength=len(counts))
    parts = world.gather((list(own), torch.cat(scores) if scores else torch.zeros(0, 3, dtype=torch.float64), counts))
    whole = torch.zeros(len(dataset), 3, dtype=torch.float64)
    for members, found, _ in parts:
        whole[members] = found
    usage = code_usage(torch.stack([counts for *_, counts in parts]).sum(dim=0))
    sources = {name: {"images": len(span), **_means(whole[span.start : span.stop])} for name, span in dataset.spans}
    return {
        "images": len(dataset),
        **_means(whole),
        "codes": tokenizer.codebook_size,
        "used": round(usage["used"], 4),
        "perplexity": round(usage["perplexity"], 2),
        **({"sources": sources} if len(sources) > 1 else {}),
        "seconds": round(time.monotonic() - began, 2),
    }


def _means(scores: torch.Tensor) -> dict[str, float]:
    """Means over images; the PSNR of the mean squared error weighs bad images more."""
    means = scores.mean(dim=0).tolist()
    pooled = -10 * float(torch.log10(torch.tensor(max(means[2], 1e-10), dtype=torch.float64)))
    return {"psnr": round(means[0], 3), "ssim": round(means[1], 4), "psnr_of_mean_error": round(pooled, 3)}


@torch.no_grad()
def draw_grid(tokenizer: ImageTokenizer, dataset: ImageDataset, count: int, device: torch.device, path: Path) -> None:
    """Save images, evenly spread over a dataset, above what is left of them after their codes."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
    pixels = dataset.pixels(chosen).to(device).float() / 255
    drawn = tokenizer.decode(tokenizer.encode(pixels))
    side = pixels.shape[-1]
    sheet = np.full((2 * side + 3 * _GAP, len(chosen) * (side + _GAP) + _GAP, 3), 128, dtype=np.uint8)
    for row, images in enumerate((pixels, drawn)):
        for column, image in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
            top, left = _GAP + row * (side + _GAP), _GAP + column * (side + _GAP)
            sheet[top : top + side, left : left + side] = image
    make_folder(path.parent)
    Image.fromarray(sheet).save(path)

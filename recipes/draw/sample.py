"""Have a model draw the prompts of a file, for `recipes.draw.judge`; names are judged here, by the nearest true image.

python -m recipes.draw.sample MODEL data/draw/val_shapes.json --output drawn/
python -m recipes.draw.sample MODEL data/draw/val_names.json --output drawn_names/ --encoder default

`drawn/` gets an image for each prompt and `drawn.json`, a list of {file, prompt, plan, background, name}. With
`--encoder`, the vision tower of a model says which of all the file's own images each drawing is nearest to (cosine of
mean features); it is right where that one has the prompt's name. Chance is one in as many names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymodal import load
from polymodal.errors import DataError, PolymodalError
from polymodal.generation.params import GenerationParams, ImageParams
from polymodal.metrics.intervals import mean_interval
from polymodal.utils.files import atomic_folder
from polymodal.utils.progress import progress
from recipes.draw.judge import grid

_BATCH = 50
"""Prompts that are drawn at once."""


def draw_prompts(model: Any, prompts: Sequence[str], params: GenerationParams) -> list[np.ndarray]:
    """An image for each prompt, uint8 [side, side, 3]."""
    drawn: list[np.ndarray] = []
    starts = range(0, len(prompts), _BATCH)
    for start in progress(starts, "drawing", len(starts)):
        for message in model.generate_replies(prompts[start : start + _BATCH], params):
            if isinstance(message, PolymodalError):
                raise message
            drawn.append(np.asarray(message.media[0].source))
    return drawn


def nearest_true(encoder: str, drawn: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> np.ndarray:
    """For each drawing the number of the true image that a model's vision tower finds nearest."""
    import torch
    from PIL import Image

    from polymodal.messages import Image as ImagePart
    from polymodal.messages import user

    model: Any = load(encoder)

    def features(images: Sequence[np.ndarray]) -> torch.Tensor:
        rows = []
        for image in images:
            sample = model.processor([user(ImagePart(Image.fromarray(image)), "?")])
            with torch.inference_mode():
                rows.append(model.model.vision_encoder(sample.pixels[0]).float().mean(dim=1)[0])
        found = torch.stack(rows)
        return torch.nn.functional.normalize(found - found.mean(dim=0), dim=-1)  # what all have in common says nothing

    return (features(drawn) @ features(true).T).argmax(dim=1).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line names; 2 and one line where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.draw.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model that makes images")
    add("rows", type=Path, metavar="FILE", help="rows whose first turn is the prompt")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--guidance", type=float, default=1.0, help="1 for none (default)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest code (default)")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--limit", type=int, metavar="N", help="draw the first N prompts")
    add("--encoder", metavar="MODEL", help="judge names by this model's vision tower")
    add("--grid", type=Path, metavar="PNG", help="save prompts and drawings as an image, with --encoder")
    add("--force", action="store_true", help="replace a folder that is there")
    args = parser.parse_args(argv)
    try:
        print(sample(args))
    except PolymodalError as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2
    return 0


def sample(args: argparse.Namespace) -> str:
    """Draw, write, and judge names; a line or a table."""
    from PIL import Image

    try:
        rows = json.loads(args.rows.read_text(encoding="utf-8"))[: args.limit]
        prompts = [row["conversations"][0]["value"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{args.rows}: no rows of LLaVA's form can be read there ({error})") from error
    image = ImageParams(guidance=args.guidance, temperature=args.temperature, top_p=args.top_p)
    drawn = draw_prompts(
        load(args.model), prompts, GenerationParams(modalities=("image",), image=image, seed=args.seed)
    )
    keep = ("plan", "background", "name", "heldout")
    with atomic_folder(args.output, replace=args.force) as folder:
        about = []
        for number, (row, prompt, pixels) in enumerate(zip(rows, prompts, drawn, strict=True)):
            file = f"{number:05d}.png"
            Image.fromarray(pixels).save(folder / file)
            about.append({"file": file, "prompt": prompt, **{key: row[key] for key in keep if key in row}})
        (folder / "drawn.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if args.encoder is None:
        return f"{args.output}: {len(drawn)} drawings"
    true = [np.asarray(Image.open(args.rows.parent / row["image"]).convert("RGB")) for row in rows]
    names = [row["name"] for row in rows]
    right = np.array([names[found] == name for found, name in zip(nearest_true(args.encoder, drawn, true), names)])
    if args.grid:
        grid(drawn[:24], prompts[:24], right[:24].tolist()).save(args.grid)
    low, high = mean_interval(right.astype(float))
    chance = 1 / len(set(names))
    return (
        f"{args.output}: {len(drawn)} drawings, {right.mean():.1%} ({100 * low:.1f} to {100 * high:.1f}) nearest to "
        f"their own name's image; chance {chance:.1%}, {right.mean() / chance:.1f} times"
    )


if __name__ == "__main__":
    sys.exit(main())

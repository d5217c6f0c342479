"""Draw how one image is cut under the field's three usual rules; needs no model.

python examples/draw_tiles.py examples/pictures/coffee.jpg docs/tiles.jpg [pad | anyres | slice]
"""

from __future__ import annotations

import sys
from typing import Any

from polymodal.config import ImageConfig
from polymodal.media.image import open_image
from polymodal.media_plan import Size, plan_image
from polymodal.processing.image_transform import tile_images
from polymodal.viewer.draw import draw_plan, stack

COMMON: dict[str, Any] = {"tile_size": (336, 336), "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
RULES = {
    # LLaVA-1.5: pad to a square.
    "pad": ImageConfig(image_aspect_ratio="pad", **COMMON),
    # LLaVA-NeXT: the best of five canvases, the padding's tokens taken out again.
    "anyres": ImageConfig(
        image_aspect_ratio="anyres",
        image_grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        mm_patch_merge_type="spatial_unpad",
        **COMMON,
    ),
    # Tiles as large as the image asks for, up to a limit, and a thumbnail.
    "slice": ImageConfig(image_aspect_ratio="slice", max_tiles=6, **COMMON),
}
TOKENS = Size(24, 24)  # 336 pixels in patches of 14


def main(source: str, target: str, *names: str) -> None:
    image = open_image(source)
    drawings = []
    for name in names or RULES:
        plan = plan_image(Size(image.height, image.width), RULES[name], TOKENS)
        print(f"{name}: {plan.num_tiles} tiles, {plan.num_tokens} tokens")
        drawings.append(draw_plan(image, plan, tile_images(image, plan, RULES[name])))
    stack(drawings).save(target, quality=82, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or set(sys.argv[3:]) - set(RULES):
        sys.exit("usage: draw_tiles.py IMAGE OUTPUT [pad | anyres | slice]")
    main(*sys.argv[1:])

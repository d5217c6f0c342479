"""Ask the default model about a photograph, and draw what it saw. Run by `make demo`.

python examples/demo.py [IMAGE] [QUESTION]
"""

from __future__ import annotations

import sys
from pathlib import Path

import polymodal
from polymodal import Image, PolymodalError, user
from polymodal.media.image import open_image
from polymodal.processing.image_transform import tile_images
from polymodal.viewer.draw import draw_plan

HERE = Path(__file__).resolve().parent
SEEN = Path("runs") / "demo" / "seen.png"


def main(image: str = str(HERE / "pictures" / "coffee.jpg"), question: str = "What is this?") -> None:
    model = polymodal.load("default")
    reply = model.generate([user(Image(image), question)])

    processor = model.processor
    shown = open_image(image)
    plan = processor.plan(shown)
    SEEN.parent.mkdir(parents=True, exist_ok=True)
    draw_plan(shown, plan, tile_images(shown, plan, processor.config.image)).save(SEEN)

    usage, timing = reply.usage, reply.timing
    print(f"image     {image}")
    print(f"question  {question}")
    print(f"answer    {reply.text}")
    print(f"tokens    {usage.prompt_tokens} in ({usage.image_tokens} of the image), {usage.completion_tokens} out")
    print(f"time      first token after {timing.first_token_s:.2f} s, then {timing.tokens_per_s or 0:.1f} tokens/s")
    print(f"seen      {SEEN} shows the image as the model saw it")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except PolymodalError as error:
        sys.exit(f"demo: {error}")

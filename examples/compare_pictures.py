"""Compare three images in one prompt, with any vision-language model that takes several.

python examples/compare_pictures.py HuggingFaceTB/SmolVLM-256M-Instruct [IMAGE IMAGE IMAGE]

The model may be "default", a folder, a hub id, or openai:MODEL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polymodal
from polymodal import GenerationParams, Image, user

IMAGES = Path(__file__).resolve().parent / "pictures"
QUESTION = "What do these three pictures have in common, and what is different?"


def main(model: str = "default", *images: str) -> None:
    shown = images or tuple(str(IMAGES / name) for name in ("cat.jpg", "coffee.jpg", "rocket.jpg"))
    message = user(*(Image(image) for image in shown), QUESTION)
    reply = polymodal.load(model).generate([message], GenerationParams(max_new_tokens=128))
    print(reply.text)
    print(f"[{len(shown)} images: {reply.usage.image_tokens} of {reply.usage.prompt_tokens} prompt tokens]")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except polymodal.PolymodalError as error:
        sys.exit(f"compare_pictures: {error}")

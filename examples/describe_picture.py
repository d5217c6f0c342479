"""Describe an image with any vision-language model, LLaVA-NeXT for one.

python examples/describe_picture.py llava-hf/llava-v1.6-mistral-7b-hf [IMAGE] [QUESTION]

The model may be "default", a folder, a hub id, or openai:MODEL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polymodal

IMAGE = Path(__file__).resolve().parent / "pictures" / "coffee.jpg"


def main(model: str = "default", image: str = str(IMAGE), question: str = "What is shown in this image?") -> None:
    print(polymodal.load(model).ask(question, image))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4])
    except polymodal.PolymodalError as error:
        sys.exit(f"describe_picture: {error}")

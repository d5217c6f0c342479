"""How long one answer about one image takes: preparing, encoding, first token, tokens per second.

    python benchmarks/chat_speed.py [MODEL] [IMAGE] [RUNS]

Prints the median and the range over the runs; one run before them warms up. Answers are cut at 32 tokens.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import polymodal  # isort: skip  # before torch, whose threads wait as it says
import torch

from polymodal import GenerationParams, Image, PolymodalError, user

CAT = Path(__file__).resolve().parent.parent / "examples" / "pictures" / "cat.jpg"


def main(name: str = "default", image: str = str(CAT), runs: str = "5") -> None:
    model = polymodal.load(name)
    messages = [user(Image(image), "Describe this picture in detail.")]
    params = GenerationParams(max_new_tokens=32)
    model.generate(messages, params)
    replies = [model.generate(messages, params) for _ in range(int(runs))]
    usage = replies[0].usage
    print(f"model {name} on {model.model.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{usage.prompt_tokens} tokens in ({usage.image_tokens} of the image), {usage.completion_tokens} out")
    for field in asdict(replies[0].timing):
        values = sorted(getattr(reply.timing, field) or 0.0 for reply in replies)
        print(f"  {field:<14}{statistics.median(values):9.4f}   ({values[0]:.4f} to {values[-1]:.4f})")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4])
    except PolymodalError as error:
        sys.exit(f"chat_speed: {error}")

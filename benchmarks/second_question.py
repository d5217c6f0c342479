"""What a second question about the same images or video costs, with and without the last key-value cache.

    python -m benchmarks.second_question [MODEL] [RUNS]

Time to the first token without preparing (decoding, tiling), median and range over the runs; the two ways take turns.
A model that was not made for videos is given their frames side by side, which is enough for a time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image as PILImage

import polymodal
from polymodal import GenerationParams, Image, LocalBackend, PolymodalError, Video, assistant, user
from polymodal.config import VideoConfig

IMAGES = sorted((Path(__file__).resolve().parent.parent / "examples" / "pictures").glob("*.[jp][pn]g"))


def main(name: str = "default", runs: str = "7") -> None:
    model = polymodal.load(name, "cpu")
    if not isinstance(model, LocalBackend):
        raise PolymodalError("this measures models of ours")
    config = model.config.model_copy(update={"video": model.config.video or VideoConfig(max_frames=64)})
    model = LocalBackend(model.model, model.tokenizer, config, model.name)
    print(f"model {name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| question about | prompt tokens | read again | read once | times faster |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        film = write_film(Path(folder) / "film.mp4")
        for what, media in (
            ("one image", [Image(IMAGES[0])]),
            ("8 images", [Image(path) for path in IMAGES[:8]]),
            ("a video of 8 frames", [Video(film, num_frames=8)]),
            ("a video of 32 frames", [Video(film, num_frames=32)]),
        ):
            print(row(model, what, media, int(runs)), flush=True)


def row(model: LocalBackend, what: str, media: list[Image | Video], runs: int) -> str:
    one_token = GenerationParams(max_new_tokens=1)
    first = [user(*media, "What is this?")]
    second = [*first, assistant("A cat."), user("Is there a dog, too?")]
    times: dict[bool, list[float]] = {False: [], True: []}
    tokens: int | None = 0
    for _ in range(runs + 1):
        for model.keeps_last in (False, True):
            model.forget()
            model.generate(first, one_token)
            reply = model.generate(second, one_token)
            times[model.keeps_last].append(1000 * (reply.timing.first_token_s - reply.timing.prepare_s))
            tokens = reply.usage.prompt_tokens
    again, once = (times[keeps][1:] for keeps in (False, True))
    faster = statistics.median(a / b for a, b in zip(again, once, strict=True))
    cells = (f"{statistics.median(each):.0f} ms ({min(each):.0f} to {max(each):.0f})" for each in (again, once))
    return f"| {what} | {tokens} | {' | '.join(cells)} | {faster:.1f} |"


def write_film(path: Path, seconds: int = 20) -> Path:
    """The images one after the other, each for as long."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for number in range(10 * seconds):
            place = number * len(IMAGES) // (10 * seconds)
            with PILImage.open(IMAGES[place]) as image:
                array = np.asarray(image.convert("RGB").resize((320, 240)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except PolymodalError as error:
        sys.exit(f"second_question: {error}")

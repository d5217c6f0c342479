"""A needle in a video, and in many images: recall against length.

    python -m benchmarks.needle [--model default] [--lengths 2 4 8 16 32 64] [--pairs 2] [--output docs]

Of N frames (or images) of one plain scene, one shows a drawn shape besides: the needle, in the first, a middle or the
last frame. Asked is "Is there a star in the video?" Needles come in pairs: each of the two is asked for in the video of
either, so that "yes" is right as often as "no", and whoever goes by the question alone is right in half of the cases.
Beside it the blind control: the same questions about the same number of frames in grey.

Prints a table of right answers by length and place with 95% intervals, recall (needles found) and false alarms, and
draws needle-video.png and needle-images.png. Frames are asked for one by one (`num_frames`), past `video.max_frames` of
the model too; a model that was not made for videos is given their frames side by side.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image as PILImage

import polymodal
from polymodal import GenerationParams, Image, LocalBackend, PolymodalError, Video, user
from polymodal.config import VideoConfig
from polymodal.metrics.intervals import mean_interval
from recipes.default.dataset.sources import draw_shape
from recipes.default.dataset.words import COLOURS, SHORT, phrase

PAIRS = (("star", "heart"), ("triangle", "cross"), ("diamond", "ring"))
PLACES = ("first", "middle", "last")
SIDE, GREY, SHORTEST = 224, (128, 128, 128), GenerationParams(max_new_tokens=6)


@dataclass(frozen=True)
class Case:
    """One question and what came of it."""

    length: int
    place: str  # Of the needle; "blind" where all is grey
    there: bool  # Whether the needle that is asked for is the one that is shown
    said: str

    @property
    def right(self) -> bool:
        """Whether the first word of the answer is the right one."""
        return self.said.lower().lstrip().startswith("yes" if self.there else "no")


def frame(shape: str | None, colour: str, seed: int) -> PILImage.Image:
    """The plain scene: a small square at the bottom; and the needle, where there is one."""
    image = PILImage.new("RGB", (SIDE, SIDE), (225, 232, 240))
    for name, hue, size, x, y in (("square", "brown", 50, 87, 165), (shape, colour, 120, 30 + seed % 44, 18)):
        if name is not None:
            drawn = draw_shape(name, hue).resize((size, size))
            image.paste(drawn, (x, y), drawn)
    return image


def write_clip(frames: Sequence[PILImage.Image], path: Path) -> Path:
    """Write frames, four a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIDE, SIDE, "yuv420p", 4_000_000
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image))))
        container.mux(stream.encode())
    return path


def cases(model: LocalBackend, kind: str, length: int, pairs: int, folder: Path) -> Iterator[Case]:
    """Ask about all needles of one length."""
    rng = random.Random(f"{kind}/{length}")
    for number in range(pairs):
        pair, colours = PAIRS[number % len(PAIRS)], rng.sample(["red", "blue", "green", "orange", "purple"], 2)
        assert set(colours) <= COLOURS.keys()
        for place in (*PLACES, "blind"):
            at = {"first": 0, "middle": length // 2, "last": length - 1}.get(place, -1)
            for shown, colour in zip(pair[: 1 if place == "blind" else 2], colours, strict=False):
                seed = rng.randrange(100)
                frames = [frame(shown if at == place_of else None, colour, seed) for place_of in range(length)]
                if place == "blind":
                    frames = [PILImage.new("RGB", (SIDE, SIDE), GREY)] * length
                media: list[Image | Video] = [Image(image) for image in frames]
                if kind == "video":
                    media = [Video(write_clip(frames, folder / "clip.mp4"), num_frames=length)]
                for asked in pair:
                    what = "the video" if kind == "video" else "the pictures"
                    question = user(*media, f"Is there {phrase(asked)} in {what}?\n{SHORT}")
                    said = model.generate([question], SHORTEST).text
                    # In grey the answer is the same whichever needle was meant.
                    for there in (True, False) if place == "blind" else (asked == shown,):
                        yield Case(length, place, there, said)


def shares(found: Sequence[Case]) -> tuple[float, float, float]:
    """The share of right answers, and its 95% interval."""
    right = np.array([case.right for case in found], dtype=float)
    return float(right.mean()), *mean_interval(right)


def table(found: Sequence[Case], lengths: Sequence[int]) -> str:
    """Right answers by length and place, recall and false alarms."""
    head = ("length", *PLACES, "all", "95%", "recall", "false alarms", "blind")
    lines = [f"| {' | '.join(head)} |", f"|{'--:|' * len(head)}"]
    for length in lengths:
        here = [case for case in found if case.length == length]
        seen = [case for case in here if case.place != "blind"]
        mean, low, high = shares(seen)
        by_place = [shares([case for case in seen if case.place == place])[0] for place in PLACES]
        recall = np.mean([case.right for case in seen if case.there])
        alarms = 1 - np.mean([case.right for case in seen if not case.there])
        blind = shares([case for case in here if case.place == "blind"])[0]
        cells = [*(f"{share:.0%}" for share in (*by_place, mean)), f"{low:.0%} to {high:.0%}"]
        cells += [f"{share:.0%}" for share in (recall, alarms, blind)]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Sequence[Case], lengths: Sequence[int], title: str, path: Path) -> None:
    """Right answers against length, with the interval, each place, and the blind control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    groups = [[case for case in found if case.length == length] for length in lengths]
    seen = [shares([case for case in group if case.place != "blind"]) for group in groups]
    axes.plot(lengths, [mean for mean, *_ in seen], color="black", marker="o", label="all places")
    axes.fill_between(lengths, [low for _, low, _ in seen], [high for *_, high in seen], color="black", alpha=0.1)
    for place in (*PLACES, "blind"):
        line = [shares([case for case in group if case.place == place])[0] for group in groups]
        axes.plot(lengths, line, linestyle="--" if place == "blind" else ":", marker=".", label=place)
    axes.set(xscale="log", xticks=lengths, xticklabels=lengths, ylim=(0, 1.03), title=title)
    axes.set(xlabel="frames" if "video" in title else "images", ylabel="right answers (chance 50%)")
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def open_model(name: str, most: int) -> LocalBackend:
    """A model of ours, its videos and context as long as is asked for."""
    model = polymodal.load(name, "cpu")
    if not isinstance(model, LocalBackend):
        raise PolymodalError("this asks models of ours")
    video = (model.config.video or VideoConfig()).model_copy(update={"max_frames": most, "max_tokens": None})
    if (temporal := model.model.temporal_encoder) is not None:
        temporal.max_frames = max(most, temporal.max_frames)
    config = model.config.model_copy(update={"video": video})
    return LocalBackend(model.model, model.tokenizer, config, model.name)


def main(argv: Sequence[str] | None = None) -> None:
    """Ask, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--pairs", type=int, default=2, help="pairs of needles of each length: 16 questions each")
    parser.add_argument("--kinds", nargs="+", choices=("video", "images"), default=["video", "images"])
    parser.add_argument("--output", type=Path, default=Path("docs"), help="the folder of the two drawings")
    args = parser.parse_args(argv)
    model = open_model(args.model, max(args.lengths))
    for kind in args.kinds:
        found: list[Case] = []
        with tempfile.TemporaryDirectory() as folder:
            for length in args.lengths:
                found += cases(model, kind, length, args.pairs, Path(folder))
                print(f"needle: {kind}, {length} done", file=sys.stderr, flush=True)
        title = "A needle in a video" if kind == "video" else "A needle in many images"
        print(f"\n{title}: {args.model}, {16 * args.pairs} questions of each length\n\n{table(found, args.lengths)}")
        plot(found, args.lengths, title, args.output / f"needle-{kind}.png")


if __name__ == "__main__":
    try:
        main()
    except PolymodalError as error:
        sys.exit(f"needle: {error}")

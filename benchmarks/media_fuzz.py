"""Damaged videos and images by the thousand: each must give frames or one clear line, in bounded time and memory.

    python -m benchmarks.media_fuzz [--minutes 30] [--seed 0] [--seconds 20] [--megabytes 1500] [--keep FOLDER]

Small files of many kinds are made first. Each round damages one (cut off, bits flipped, fields set to extremes, parts
moved) and reads it in a process of its own. Counted as a failure: a crash, an exception other than `PolymodalError`, a
message of several lines, a run longer than `--seconds`, or more than `--megabytes` of memory. Such files are kept.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import multiprocessing.connection
import random
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image as PILImage

from polymodal import PolymodalError
from polymodal.media.image import FORMATS, open_image
from polymodal.media.video import probe, sample_frames

VIDEOS = {
    "mp4": ("libx264", "mp4", {"g": "12", "bf": "2"}, {}),
    "mp4-fragments": ("libx264", "mp4", {"g": "12"}, {"movflags": "frag_keyframe+empty_moov"}),
    "hevc": ("libx265", "mp4", {"x265-params": "log-level=none"}, {}),
    "mkv": ("libx264", "matroska", {"g": "12", "bf": "2"}, {}),
    "vp8": ("libvpx", "webm", {"g": "12", "deadline": "realtime"}, {}),
    "vp9": ("libvpx-vp9", "webm", {"g": "12", "deadline": "realtime"}, {}),
    "av1": ("libsvtav1", "mp4", {"g": "12", "preset": "12"}, {}),
    "ts": ("libx264", "mpegts", {"g": "12", "bf": "2"}, {}),
    "ps": ("mpeg2video", "mpeg", {"g": "12", "bf": "2"}, {}),
    "avi": ("mpeg4", "avi", {"g": "12", "bf": "2"}, {}),
    "avi-h264": ("libx264", "avi", {"g": "12", "bf": "2"}, {}),
    "mjpeg": ("mjpeg", "mov", {}, {}),
    "prores": ("prores_ks", "mov", {}, {}),
    "flv": ("libx264", "flv", {"g": "12"}, {}),
    "asf": ("wmv2", "asf", {"g": "12"}, {}),
    "h264": ("libx264", "h264", {"g": "12"}, {}),
    "ivf": ("libvpx-vp9", "ivf", {"deadline": "realtime"}, {}),
    "gif": ("gif", "gif", {}, {}),
    "apng": ("apng", "apng", {}, {}),
}
PIXELS = {"mjpeg": "yuvj420p", "prores": "yuv422p10le", "gif": "rgb8", "apng": "rgba"}


def make_video(kind: str, folder: Path) -> bytes:
    """A second of moving blocks."""
    codec, container_format, options, muxer = VIDEOS[kind]
    rng = np.random.default_rng(0)
    path = folder / kind
    with av.open(str(path), "w", format=container_format, options=muxer) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, PIXELS.get(kind, "yuv420p")
        for _ in range(25):
            blocks = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
            rgb = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def make_image(image_format: str, frames: int) -> bytes:
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)) for _ in range(frames)]
    out = io.BytesIO()
    images[0].save(out, image_format, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))
    return out.getvalue()


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to eight kinds of harm, most of them near the start, where the headers are."""
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        if not broken:
            break
        place = rng.randrange(min(len(broken), rng.choice([100, 1000, 10**9])))
        if rng.random() < 0.2:  # the index of an MP4 or AVI is at the end
            place = len(broken) - 1 - place
        length = rng.choice([1, 2, 4, 8, 100, 1000])
        match rng.randrange(7):
            case 0:
                del broken[rng.randrange(len(broken)) :]
            case 1:
                broken[place] ^= 1 << rng.randrange(8)
            case 2:
                extreme = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
                broken[place : place + length] = bytes([extreme]) * min(length, len(broken) - place)
            case 3:
                broken[place : place + 4] = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]).to_bytes(4, "big")
            case 4:
                del broken[place : place + length]
            case 5:
                broken[place:place] = broken[max(0, place - length) : place]
            case 6:
                broken[place : place + length] = rng.randbytes(min(length, len(broken) - place))
    return bytes(broken)


def read(data: bytes, number: int) -> None:
    """Read a file in one of several ways."""
    ways: list[Callable[[], object]] = [
        lambda: sample_frames(data, 4, max_side=64),
        lambda: sample_frames(data, fps=4, max_frames=16),
        lambda: sample_frames(data, key_frames=True, max_frames=16),
        lambda: sample_frames(data, times=[0.0, 0.5]),
        lambda: (probe(data, count=False), probe(data)),
    ]
    ways[number % len(ways)]()


def child(data: bytes, number: int, image: bool, megabytes: int, pipe: multiprocessing.connection.Connection) -> None:
    """Read one file and say how it went."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
    warnings.simplefilter("ignore")
    try:
        if image:
            open_image(data)
        else:
            read(data, number)
        pipe.send("read")
    except PolymodalError as error:
        pipe.send("one line" if "\n" not in str(error) and len(str(error)) < 500 else f"FAILURE: long line {error}")
    except BaseException as error:
        pipe.send(f"FAILURE: {type(error).__name__}: {error}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.media_fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="the longest that one file may take")
    parser.add_argument("--megabytes", type=int, default=1500, help="the most memory that one file may take")
    parser.add_argument("--keep", type=Path, default=Path("runs/media_fuzz"), help="where files that fail are kept")
    args = parser.parse_args(arguments)
    args.keep.mkdir(parents=True, exist_ok=True)
    good = {kind: make_video(kind, args.keep) for kind in VIDEOS}
    good["webp"] = make_image("WEBP", 5)
    good |= {f"image-{image_format}": make_image(image_format, 1) for image_format in FORMATS}

    context = multiprocessing.get_context("fork")  # the libraries are loaded once, not for each file
    rng, counts, slowest = random.Random(args.seed), Counter[tuple[str, str]](), (0.0, "")
    failures, number, end = 0, 0, time.monotonic() + args.minutes * 60
    while time.monotonic() < end:
        kind = rng.choice(list(good))
        data = damage(good[kind], rng)
        ours, theirs = context.Pipe(duplex=False)
        job = (data, number, kind.startswith("image-"), args.megabytes, theirs)
        process = context.Process(target=child, args=job, daemon=True)
        start = time.monotonic()
        process.start()
        theirs.close()
        try:
            outcome = ours.recv() if ours.poll(args.seconds) else f"FAILURE: over {args.seconds:g} seconds"
        except EOFError:
            process.join()
            outcome = f"FAILURE: crash, status {process.exitcode}"
        process.kill()
        process.join()
        slowest = max(slowest, (time.monotonic() - start, f"{kind} {number}"))
        counts[kind, outcome.partition(":")[0]] += 1
        if outcome.startswith("FAILURE"):
            failures += 1
            kept = args.keep / f"{args.seed}-{number}-{kind}"
            kept.write_bytes(data)
            print(f"{kept}: {outcome}", flush=True)
        number += 1
    for kind in good:
        said = ", ".join(f"{count} {outcome}" for (name, outcome), count in sorted(counts.items()) if name == kind)
        print(f"{kind:<14} {said}")
    print(f"{number} files, {failures} failures; slowest {slowest[0]:.1f} s ({slowest[1]})")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

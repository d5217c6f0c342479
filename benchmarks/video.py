"""Eight frames out of a long video: our seeking, decoding everything, and OpenCV's seek loop where it is installed.

    python -m benchmarks.video [--minutes 10] [--height 720] [--gop 50] [--frames 8] [--runs 3]

Makes the file once (H.264, constant rate, two B-frames, a cheap moving pattern) and keeps it in the temporary folder.
The ways take turns in every run; each ratio is of two times of the same run. Every way ends with RGB arrays, and ours
are compared with those of the full decode, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from polymodal import PolymodalError
from polymodal.media.video import sample_frames

RATE = 25
PATTERNS = 40


def make_video(path: Path, minutes: float, height: int, gop: int) -> None:
    """Write an H.264 file whose frames repeat a few patterns; the pts says which frame is which."""
    width = height * 16 // 9 // 2 * 2
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), dtype=np.uint8)
    still = np.kron(coarse, np.ones((40, 40, 1), np.uint8))[:height, :width]
    patterns = []
    for shift in range(PATTERNS):
        rgb = np.ascontiguousarray(np.roll(still, 8 * shift, axis=1))
        patterns.append(av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p"))
    work = path.with_suffix(f".{os.getpid()}.mp4")
    with av.open(str(work), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "g": str(gop), "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(minutes * 60 * RATE)):
            frame = patterns[number % PATTERNS]
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    work.replace(path)


def decode_all(path: Path, frames: int) -> np.ndarray:
    """Decode the whole file and keep the wanted frames."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        wanted = np.linspace(0, container.streams.video[0].frames - 1, frames, dtype=int).tolist()
        kept = {
            number: frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(video=0))
            if number in wanted
        }
    return np.stack([kept[number] for number in wanted])


def opencv(path: Path, frames: int) -> np.ndarray:
    """The usual loop: count, set the position, read."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    found = []
    for index in np.linspace(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) - 1, frames, dtype=int).tolist():
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        there, frame = capture.read()
        if there:
            found.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.video", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--gop", type=int, default=50, help="frames from one key frame to the next")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(arguments)
    folder = Path(tempfile.gettempdir()) / "polymodal-benchmarks"
    folder.mkdir(exist_ok=True)
    path = folder / f"video-{args.minutes:g}min-{args.height}p-gop{args.gop}.mp4"
    if not path.exists():
        print(f"making {path}", flush=True)
        make_video(path, args.minutes, args.height, args.gop)

    ways: dict[str, Callable[[Path, int], np.ndarray]] = {
        "sample_frames": lambda path, frames: sample_frames(path, frames).array,
        "decode all": decode_all,
    }
    try:
        import cv2

        ways["OpenCV seek loop"] = opencv
        cv2_version = f", OpenCV {cv2.__version__}"
    except ImportError:
        cv2_version = ", no OpenCV here"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.runs):
        results = {}
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way(path, args.frames)
            times[name].append(time.perf_counter() - start)
        print("  ".join(f"{name} {spent[-1]:.2f} s" for name, spent in times.items()), flush=True)
    versions = f"PyAV {av.__version__}{cv2_version}; {os.cpu_count()} cores"
    print(
        f"\n{args.frames} frames of {args.minutes:g} minutes, {args.height}p, {RATE} frames a second, "
        f"a key frame every {args.gop}; {path.stat().st_size / 1e6:.0f} MB; {versions}"
    )
    print("| way | seconds (median, range) | share of decoding all | same frames as decoding all |")
    print("|---|--:|--:|---|")
    for name, spent in times.items():
        share = statistics.median(mine / whole for mine, whole in zip(spent, times["decode all"]))
        same = [np.array_equal(a, b) for a, b in zip(results[name], results["decode all"])]
        apart = np.abs(results[name].astype(int) - results["decode all"]).max()
        equal = "yes" if all(same) and len(same) == args.frames else f"values up to {apart} apart"
        seconds = f"{statistics.median(spent):.2f} ({min(spent):.2f} to {max(spent):.2f})"
        print(f"| {name} | {seconds} | {share:.3f} | {equal} |")


if __name__ == "__main__":
    try:
        main()
    except PolymodalError as error:
        sys.exit(f"benchmarks.video: {error}")

"""What every generated data set needs: its sources measured and split, its pictures drawn, its folder whole or absent.

All data sets of one seed and size hold out the same sources, so that what one of them is judged on is never learned
from another.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import polymodal
from polymodal.errors import DataError, PolymodalError
from recipes.default.dataset import plan as planning
from recipes.default.dataset import scenes, sources
from recipes.default.dataset.scenes import Picture
from recipes.default.dataset.sources import Source

if TYPE_CHECKING:
    from PIL import Image as Images

HELDOUT_SHARE = 0.12
DEMO = Path(polymodal.__file__).with_name("evaluation") / "demo" / "rows.json"
_TRAIN_FONTS = [
    "dejavu/DejaVuSans.ttf",
    "dejavu/DejaVuSans-Bold.ttf",
    "dejavu/DejaVuSerif-Bold.ttf",
    "dejavu/DejaVuSansMono-Bold.ttf",
    "liberation/LiberationSans-Regular.ttf",
    "liberation/LiberationSans-Bold.ttf",
    "liberation/LiberationSerif-Regular.ttf",
    "liberation/LiberationMono-Bold.ttf",
    "liberation/LiberationSansNarrow-Bold.ttf",
]
_HELDOUT_FONTS = [
    "dejavu/DejaVuSansCondensed-Bold.ttf",
    "dejavu/DejaVuSerif.ttf",
    "liberation/LiberationSerif-Bold.ttf",
]
LICENCES = {
    "tuxpaint-stamps-default": "GPL-2",
    "openclipart-png": "public domain",
    "fonts-noto-color-emoji": "OFL-1.1",
    "fonts-dejavu": "Bitstream Vera / public domain",
    "fonts-liberation": "OFL-1.1",
}

T = TypeVar("T")
R = TypeVar("R")


class Drawn(Protocol):
    """A planned image that draws itself."""

    file: str

    def draw(self, thumbs: Path) -> Images.Image:
        """Draw it, RGB, from cut-outs in a folder."""
        ...


@dataclass(frozen=True)
class Packages:
    """Where the picture packages lie.

    Attributes:
        stamps: The `stamps` folder of tuxpaint-stamps-default.
        openclipart: The `png` folder of openclipart-png.
        emoji_font: NotoColorEmoji.ttf.
        fonts: Folder with `dejavu/` and `liberation/`.
    """

    stamps: Path = sources.STAMPS
    openclipart: Path = sources.OPENCLIPART
    emoji_font: Path = sources.EMOJI_FONT
    fonts: Path = sources.FONTS

    @classmethod
    def under(cls, root: Path) -> Packages:
        """The packages as they were unpacked into a folder.

        Args:
            root: `/`, or where `dpkg-deb -x` put them.

        Returns:
            The places.
        """
        return cls(*(root / path.relative_to("/") for path in (cls.stamps, cls.openclipart, cls.emoji_font, cls.fonts)))


@dataclass(frozen=True)
class Gathered:
    """What a data set is made of.

    Attributes:
        sources: The measured sources; their positions are the names of the thumbs. `heldout` says which are held out.
        fonts: For training words.
        heldout_fonts: For held-out words.
        packages: Debian packages used.
    """

    sources: list[Source]
    fonts: list[str]
    heldout_fonts: list[str]
    packages: list[str]


def gather(thumbs: Path, size: planning.Size, seed: int, packages: Packages, workers: int, progress: bool) -> Gathered:
    """Read the packages, cut the pictures out, measure them, and hold a share of them out.

    Args:
        thumbs: An empty folder for the cut-outs.
        size: Of the default data set, which says how many drawings are read.
        seed: Everything follows from it.
        packages: Where the pictures lie.
        workers: Processes; the result does not depend on it.
        progress: Print progress on standard error.

    Returns:
        The sources and the fonts.

    Raises:
        DataError: A package is missing.
    """
    train_fonts, heldout_fonts, used = [""], [""], []
    found = sources.drawn_shapes()
    if not size.shapes_only:
        drawings = [*sources.read_openclipart(packages.openclipart), *sources.read_emoji(packages.emoji_font)]
        random.Random(f"{seed}/some").shuffle(drawings)
        drawings = sorted(drawings[: size.clipart], key=lambda s: s.key)
        found = [*sources.read_stamps(packages.stamps), *drawings, *found]
        train_fonts, heldout_fonts = _fonts(packages.fonts)
        used = list(LICENCES)
    usable = cut_out(found, 0, thumbs, packages.emoji_font, workers, progress)
    split = sources.hold_out(usable, HELDOUT_SHARE, random.Random(f"{seed}/heldout"))
    if not size.shapes_only:
        split = keep_demo_out(split)
    return Gathered(split, train_fonts, heldout_fonts, used)


def cut_out(
    found: list[Source], start: int, thumbs: Path, emoji_font: Path, workers: int, progress: bool
) -> list[Source]:
    """Cut sources out and measure them; those that can be used, whose thumbs are numbered from `start`."""
    work = partial(_measure, thumbs=thumbs, emoji_font=emoji_font)
    measured = over_processes(work, list(enumerate(found, start)), workers, "reading pictures", progress)
    numbers = [i for i, s in enumerate(measured, start) if s is not None]
    for new, old in enumerate(numbers, start):
        if new != old:
            os.replace(thumbs / f"{old}.png", thumbs / f"{new}.png")
    return [s for s in measured if s is not None]


def keep_demo_out(split: list[Source]) -> list[Source]:
    """Hold out what the demo benchmark shows too: with any seed and size, or a guard of later trainings it is not."""
    rows = json.loads(DEMO.read_text(encoding="utf-8")) if DEMO.is_file() else []
    shown = {key for row in rows for key in row["sources"]}
    groups = {s.group for s in split if s.key in shown}
    return [replace(s, heldout=s.heldout or s.group in groups) for s in split]


def draw_pictures(
    pictures: Sequence[Picture | Drawn], thumbs: Path, root: Path, workers: int, progress: bool, quality: int = 90
) -> dict[str, str]:
    """Draw planned pictures into a data set.

    Args:
        pictures: The plans.
        thumbs: The cut-outs.
        root: The data set.
        workers: Processes; the result does not depend on it.
        progress: Print progress on standard error.
        quality: Of the JPEG files.

    Returns:
        File -> SHA-256.
    """
    work = partial(_draw, thumbs=thumbs, root=root, quality=quality)
    digests = over_processes(work, list(pictures), workers, "drawing pictures", progress)
    return {p.file: d for p, d in zip(pictures, digests, strict=True)}


@contextmanager
def new_data_set(output: Path, *, workers: int, force: bool) -> Iterator[tuple[Path, Path]]:
    """Make a data set's folder, which appears whole or not at all.

    Args:
        output: Folder to make; must not exist or be empty unless `force`.
        workers: Processes, checked here.
        force: Replace a folder that is not empty.

    Yields:
        (folder for cut-outs, folder of the data set with an empty `images` in it).

    Raises:
        PolymodalError: The folder is in use, or workers is not positive.
    """
    if workers < 1:
        raise PolymodalError(f"workers must be 1 or more, got {workers}")
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise DataError(f"{output} is not empty; name another folder, or use force to replace it")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        thumbs, root = work / "thumbs", work / "data"
        thumbs.mkdir()
        (root / "images").mkdir(parents=True)
        yield thumbs, root
        if output.is_dir():
            # Moved aside, not deleted: a kill between the two lines loses nothing.
            os.replace(output, work / "before")
        os.replace(root, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def over_processes(work: Callable[[T], R], jobs: list[T], workers: int, label: str, progress: bool) -> list[R]:
    """Run jobs in order over processes, with a line of progress on standard error.

    Args:
        work: Can be pickled.
        jobs: What it is given.
        workers: Processes.
        label: Of the progress.
        progress: Whether to print it.

    Returns:
        The results, in order.
    """

    def watch(results: Iterable[R]) -> list[R]:
        done: list[R] = []
        step = max(1, len(jobs) // 20)
        terminal = sys.stderr.isatty()
        for result in results:
            done.append(result)
            if progress and (len(done) % step == 0 or len(done) == len(jobs)):
                end = "\r" if terminal and len(done) < len(jobs) else "\n"
                if terminal or len(done) % (step * 5) == 0 or len(done) == len(jobs):
                    print(f"{label}: {len(done)}/{len(jobs)}", end=end, file=sys.stderr, flush=True)
        return done

    if workers <= 1 or len(jobs) < 64:
        return watch(map(work, jobs))
    # Unlike multiprocessing.Pool, the executor raises when a worker dies instead of waiting for it.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return watch(pool.map(work, jobs, chunksize=16))


def _measure(job: tuple[int, Source], thumbs: Path, emoji_font: Path | None) -> Source | None:
    return sources.measure(job[1], thumbs / f"{job[0]}.png", emoji_font)


def _draw(picture: Picture | Drawn, thumbs: Path, root: Path, quality: int) -> str:
    target = root / picture.file
    drawn = scenes.draw(picture, thumbs) if isinstance(picture, Picture) else picture.draw(thumbs)
    drawn.save(target, quality=quality)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def _fonts(folder: Path) -> tuple[list[str], list[str]]:
    train = [folder / name for name in _TRAIN_FONTS]
    heldout = [folder / name for name in _HELDOUT_FONTS]
    for path in [*train, *heldout]:
        if not path.is_file():
            package = "fonts-dejavu" if "dejavu" in path.parts else "fonts-liberation"
            raise sources.missing(
                path, f"{package}-core" if package == "fonts-dejavu" and "Condensed" not in path.name else package
            )
    return [str(p) for p in train], [str(p) for p in heldout]


def package_versions(packages: Iterable[str]) -> dict[str, dict[str, str]]:
    """Ask dpkg which versions of the packages are installed.

    Args:
        packages: Their names.

    Returns:
        Version and licence by name.
    """
    found: dict[str, dict[str, str]] = {}
    for package in packages:
        try:
            asked = subprocess.run(
                ["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True, check=False, timeout=20
            )
            version = asked.stdout.strip() if asked.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            version = ""
        found[package] = {"version": version or "unknown (not installed as a package)", "licence": LICENCES[package]}
    return found

"""`polymodal data build default`: make the default model's training and validation data from free pictures.

The pictures come from Debian packages on the user's machine (Tux Paint stamps, GPL-2; Open Clip Art, public domain;
Noto Color Emoji, OFL), cut out and laid on plain, graded or textured grounds, with captions and questions whose answers
are known from the plan. `tiny` needs no package: it draws shapes. Everything follows from the seed; the number of
processes changes nothing. The folder appears whole or not at all.
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
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from polymodal.data.default import plan as planning
from polymodal.data.default import scenes, sources
from polymodal.data.default.scenes import Picture
from polymodal.data.default.sources import Source
from polymodal.errors import DataError, PolymodalError, unknown_name

HELDOUT_SHARE = 0.12
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
_LICENCES = {
    "tuxpaint-stamps-default": "GPL-2",
    "openclipart-png": "public domain",
    "fonts-noto-color-emoji": "OFL-1.1",
    "fonts-dejavu": "Bitstream Vera / public domain",
    "fonts-liberation": "OFL-1.1",
}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class BuildReport:
    """What was built."""

    output: Path
    seed: int
    size: str
    records: dict[str, int]  # file -> records
    pictures: int
    turns: dict[str, dict[str, int]] = field(default_factory=dict)  # file -> kind -> turns
    sources: dict[str, int] = field(default_factory=dict)  # origin -> cut-outs used for training

    def __str__(self) -> str:
        """One line of counts."""
        counts = ", ".join(f"{n} {name.removesuffix('.json')}" for name, n in self.records.items())
        return f"{self.output}: {self.pictures} pictures, {counts} (seed {self.seed}, size {self.size})"


def _map(work: Callable[[T], R], jobs: list[T], workers: int, label: str, progress: bool) -> list[R]:
    """Run jobs in order over processes, with a line of progress on standard error."""

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


def _draw(picture: Picture, thumbs: Path, root: Path) -> str:
    target = root / picture.file
    scenes.draw(picture, thumbs).save(target, quality=90)
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


def _versions(packages: Iterable[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for package in packages:
        try:
            asked = subprocess.run(
                ["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True, check=False, timeout=20
            )
            version = asked.stdout.strip() if asked.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            version = ""
        found[package] = {"version": version or "unknown (not installed as a package)", "licence": _LICENCES[package]}
    return found


def build_default(
    output: Path,
    *,
    seed: int = 0,
    size: str = "full",
    stamps: Path | None = None,
    openclipart: Path | None = None,
    emoji_font: Path | None = None,
    fonts: Path | None = None,
    workers: int = 2,
    progress: bool = True,
    force: bool = False,
) -> BuildReport:
    """Build the default data set.

    Args:
        output: Folder to make; must not exist or be empty unless `force`.
        seed: Everything follows from it.
        size: full (what the default recipe trains on), small (a smoke run) or tiny (drawn shapes, needs no package).
        stamps: The `stamps` folder of tuxpaint-stamps-default; None for where Debian installs it.
        openclipart: The `png` folder of openclipart-png; None for where Debian installs it.
        emoji_font: NotoColorEmoji.ttf; None for where Debian installs it.
        fonts: Folder with `dejavu/` and `liberation/`; None for where Debian installs them.
        workers: Processes; the result does not depend on it.
        progress: Print progress on standard error.
        force: Replace a folder that is not empty.

    Returns:
        The counts.

    Raises:
        PolymodalError: Unknown size, folder in use, or a picture package that is missing.
    """
    output = Path(output)
    if size not in planning.SIZES:
        raise unknown_name("size", size, planning.SIZES)
    if workers < 1:
        raise PolymodalError(f"workers must be 1 or more, got {workers}")
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise DataError(f"{output} is not empty; name another folder, or use force to replace it")
    wanted = planning.SIZES[size]
    packages: list[str] = []
    train_fonts, heldout_fonts = [""], [""]
    found = sources.drawn_shapes()
    if not wanted.shapes_only:
        emoji_font = emoji_font or sources.EMOJI_FONT
        drawings = [*sources.read_openclipart(openclipart or sources.OPENCLIPART), *sources.read_emoji(emoji_font)]
        random.Random(f"{seed}/some").shuffle(drawings)
        drawings = sorted(drawings[: wanted.clipart], key=lambda s: s.key)
        found = [*sources.read_stamps(stamps or sources.STAMPS), *drawings, *found]
        train_fonts, heldout_fonts = _fonts(fonts or sources.FONTS)
        packages = list(_LICENCES)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        thumbs, root = work / "thumbs", work / "data"
        thumbs.mkdir()
        (root / "images").mkdir(parents=True)
        measured = _map(
            partial(_measure, thumbs=thumbs, emoji_font=emoji_font),
            list(enumerate(found)),
            workers,
            "reading pictures",
            progress,
        )
        # A source that cannot be used keeps its place, so that the thumbs' numbers stay right.
        usable = [s for s in measured if s is not None]
        numbers = [i for i, s in enumerate(measured) if s is not None]
        for new, old in enumerate(numbers):
            if new != old:
                os.replace(thumbs / f"{old}.png", thumbs / f"{new}.png")
        split = sources.hold_out(usable, HELDOUT_SHARE, random.Random(f"{seed}/heldout"))
        plan = planning.compose(split, train_fonts, heldout_fonts, seed, wanted)
        digests = _map(partial(_draw, thumbs=thumbs, root=root), plan.pictures, workers, "drawing pictures", progress)
        hashes = {p.file: d for p, d in zip(plan.pictures, digests, strict=True)}
        for name, records in plan.files.items():
            text = json.dumps(records, ensure_ascii=False, indent=0) + "\n"
            (root / name).write_text(text, encoding="utf-8")
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        report = _report(output, seed, size, plan, split)
        about: dict[str, Any] = {
            "seed": seed,
            "size": size,
            "records": report.records,
            "pictures": report.pictures,
            "turns": report.turns,
            "sources": report.sources,
            "packages": _versions(packages),
            "fonts": [Path(f).name for f in train_fonts if f],
            "heldout_fonts": [Path(f).name for f in heldout_fonts if f],
            **plan.notes,
            "sha256": hashes,
        }
        (root / "build.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if output.is_dir():
            # Moved aside, not deleted: a kill between the two lines loses nothing.
            os.replace(output, work / "before")
        os.replace(root, output)
        return report
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _report(output: Path, seed: int, size: str, plan: planning.Plan, split: list[Source]) -> BuildReport:
    turns = {
        name: dict(sorted(Counter(kind for r in records for kind in r["kinds"]).items()))
        for name, records in plan.files.items()
    }
    heldout = set(plan.notes["heldout_sources"])
    used = Counter(s.origin for s in split if s.key not in heldout)
    counts = {name: len(records) for name, records in plan.files.items()}
    return BuildReport(output, seed, size, counts, len(plan.pictures), turns, dict(sorted(used.items())))

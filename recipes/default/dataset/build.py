"""`python -m recipes.default.dataset default`: the default model's training and validation data.

The pictures come from Debian packages on the user's machine (Tux Paint stamps, GPL-2; Open Clip Art, public domain;
Noto Color Emoji, OFL), cut out and laid on plain, graded or textured grounds, with captions and questions whose answers
are known from the plan. `tiny` needs no package: it draws shapes. Everything follows from the seed; the number of
processes changes nothing. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.errors import unknown_name
from recipes.default.dataset import plan as planning
from recipes.default.dataset import questions, rich, sources, studio, words
from recipes.default.dataset.generate import Packages, draw_pictures, gather, new_data_set, package_versions
from recipes.default.dataset.sources import Source


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
    wanted = planning.SIZES[size]
    places = Packages(
        stamps or sources.STAMPS,
        openclipart or sources.OPENCLIPART,
        emoji_font or sources.EMOJI_FONT,
        fonts or sources.FONTS,
    )
    with new_data_set(output, workers=workers, force=force) as (thumbs, root):
        made = gather(thumbs, wanted, seed, places, workers, progress)
        plan = planning.compose(made.sources, made.fonts, made.heldout_fonts, seed, wanted)
        say_where(plan, studio.looks(thumbs, made.sources))
        hashes = draw_pictures(plan.pictures, thumbs, root, workers, progress)
        for name, records in plan.files.items():
            text = json.dumps(records, ensure_ascii=False, indent=0) + "\n"
            (root / name).write_text(text, encoding="utf-8")
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        report = _report(output, seed, size, plan, made.sources)
        about: dict[str, Any] = {
            "seed": seed,
            "size": size,
            "records": report.records,
            "pictures": report.pictures,
            "turns": report.turns,
            "sources": report.sources,
            "packages": package_versions(made.packages),
            "fonts": [Path(f).name for f in made.fonts if f],
            "heldout_fonts": [Path(f).name for f in made.heldout_fonts if f],
            **plan.notes,
            "sha256": hashes,
        }
        (root / "build.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return report


def say_where(plan: planning.Plan, looks: list[studio.Look]) -> None:
    """Add `places` to the captions: what lies where, with plain colours, and what is written in quotation marks."""
    for record in plan.files["stage1.json"]:
        scene = plan.scenes[record["image"]]
        found = rich.places(scene, looks)
        if scene.picture.card:
            record["places"] = [(f'"{scene.picture.card.text}"', *box) for _, *box in found]
        else:
            named = [words.phrase(s.noun, s.colour or "") if s.noun else questions.named_as(s) for s in scene.objects]
            named *= len(found) if len(named) == 1 else 1  # several of one kind
            record["places"] = [(name, *box) for name, (_, *box) in zip(named, found, strict=True)]


def _report(output: Path, seed: int, size: str, plan: planning.Plan, split: list[Source]) -> BuildReport:
    turns = {
        name: dict(sorted(Counter(kind for r in records for kind in r["kinds"]).items()))
        for name, records in plan.files.items()
    }
    heldout = set(plan.notes["heldout_sources"])
    used = Counter(s.origin for s in split if s.key not in heldout)
    counts = {name: len(records) for name, records in plan.files.items()}
    return BuildReport(output, seed, size, counts, len(plan.pictures), turns, dict(sorted(used.items())))

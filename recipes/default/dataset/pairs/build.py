"""`python -m recipes.default.dataset pairs`: pictures with captions for contrastive training, and what judges it.

Written beside each other: `train.json` (each record has all its true captions in `captions`), `train_words.json` (the
same of written words), three files of held-out pairs for retrieval, no caption of which fits two pictures of its file
(`val.json`: drawings that training never shows; `val_known.json`: new pictures of those that it does; `val_words.json`:
written words), `classes.json` (zero-shot tasks over held-out pictures) and `build.json` (what was used, hashes).
The pictures come from the packages of `python -m recipes.default.dataset default`, and the same ones are held out.
Everything follows from the seed; the number of processes changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal.errors import unknown_name
from recipes.default.dataset import plan as default_plan
from recipes.default.dataset.generate import Packages, draw_pictures, gather, new_data_set, package_versions
from recipes.default.dataset.pairs import plan as planning


@dataclass(frozen=True)
class PairsReport:
    """What was built.

    Attributes:
        output: The folder.
        seed: What it was built from.
        size: full, small or tiny.
        train: Training pairs, written words included.
        held_out: Pairs for retrieval, of each file.
        zero_shot: Pictures of each zero-shot task, and classes to choose from.
        layouts: Training pairs of each layout.
    """

    output: Path
    seed: int
    size: str
    train: int
    held_out: dict[str, int]
    zero_shot: dict[str, tuple[int, int]]
    layouts: dict[str, int]

    def __str__(self) -> str:
        """One line of counts."""
        tasks = ", ".join(f"{name} {n} of {c} classes" for name, (n, c) in self.zero_shot.items())
        held = ", ".join(f"{count} {name}" for name, count in self.held_out.items())
        return (
            f"{self.output}: {self.train} training pairs, held out for retrieval {held}, zero-shot {tasks} "
            f"(seed {self.seed}, size {self.size})"
        )


def build_pairs(
    output: Path,
    *,
    seed: int = 0,
    size: str = "full",
    packages: Packages | None = None,
    languages: Sequence[str] = (),
    workers: int = 2,
    progress: bool = True,
    force: bool = False,
) -> PairsReport:
    """Build the pairs.

    Args:
        output: Folder to make; must not exist or be empty unless `force`.
        seed: Everything follows from it; give the default data set's, so that the same pictures are held out.
        size: full (what the small towers are trained on), small (a smoke run) or tiny (drawn shapes, no package).
        packages: Where the picture packages lie; None for where Debian installs them.
        languages: Codes such as "de" or "zh_CN": 30% of the stamps' training pairs are in one of them.
        workers: Processes; the result does not depend on it.
        progress: Print progress on standard error.
        force: Replace a folder that is not empty.

    Returns:
        The counts.

    Raises:
        PolymodalError: Unknown size or language, folder in use, or a picture package that is missing.
    """
    output = Path(output)
    if size not in planning.SIZES:
        raise unknown_name("size", size, planning.SIZES)
    with new_data_set(output, workers=workers, force=force) as (thumbs, root):
        made = gather(thumbs, default_plan.SIZES[size], seed, packages or Packages(), workers, progress)
        plan = planning.compose(made, seed, size, tuple(languages))
        hashes = draw_pictures(plan.pictures, thumbs, root, workers, progress)
        for name, content in plan.files.items():
            text = json.dumps(content, ensure_ascii=False, indent=0) + "\n"
            (root / name).write_text(text, encoding="utf-8")
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        report = _report(output, seed, size, plan)
        about: dict[str, Any] = {
            "seed": seed,
            "size": size,
            "languages": list(languages),
            "train": report.train,
            "held_out": report.held_out,
            "zero_shot": report.zero_shot,
            "layouts": report.layouts,
            "packages": package_versions(made.packages),
            **plan.notes,
            "sha256": hashes,
        }
        (root / "build.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return report


def _report(output: Path, seed: int, size: str, plan: planning.PairPlan) -> PairsReport:
    train = plan.files["train.json"] + plan.files["train_words.json"]
    held_out = {
        name: len(plan.files[file])
        for name, file in (("new", "val.json"), ("known", "val_known.json"), ("words", "val_words.json"))
    }
    tasks = {t["name"]: (len(t["pictures"]), len(t["classes"])) for t in plan.files["classes.json"]["tasks"]}
    layouts = dict(sorted(Counter(record["layout"] for record in train).items()))
    return PairsReport(output, seed, size, len(train), held_out, tasks, layouts)

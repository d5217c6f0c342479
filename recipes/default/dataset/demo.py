"""`python -m recipes.default.dataset demo`: the small benchmark that ships in the package.

Questions of every kind about drawings that the default model's training never shows, made only of what may be given
away: Open Clip Art, Noto emoji, drawn shapes and rendered words, no stamps. Everything follows from the seed.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

from polymodal.errors import unknown_name
from recipes.default.dataset import plan as planning
from recipes.default.dataset import words
from recipes.default.dataset.generate import Packages, draw_pictures, gather, new_data_set
from recipes.default.dataset.plan import Composer, Record

PER_KIND = {"full": 20, "tiny": 3}
QUALITY = 85
_UNFIT = re.compile(
    # Another copy of the drawing is in training under another name: as a stamp, or in another colour.
    r"fruit/(cherries|strawberry)$|balloon-green-aj|"
    # Looked at by eye: the name is wrong or vague, ...
    r"dolphin_01$|lamp_sergio|lampada_da_cantiere|yellow-scroll|brush_roller|telescope_01|rock_RPSWB|pancakes?(_bw)?$|"
    # ... or the measured colour is, ...
    r"emoji:1f402|emoji:1f3f0|mug_toh|fancy_folder_01|cello_ganson|pear_simple_bw|eye_nicu|"
    # ... or one drawing shows several, and "how many" has two answers; ...
    r"emoji:1f4da|emoji:1f9e4|Pinguino3|maracas|rubber_ducks|"
    # ... or it bears a mark or a long caption.
    r"baby_tux|old_truck_indana"
)
_ZH_ASKED = ("图中是什么？", "图片里有什么？")
_ZH_MEASURES = {
    **{"animal": "只", "vehicle": "辆", "plant": "朵", "tree": "棵", "book": "本", "umbrella": "把", "hat": "顶"},
    **{"cow": "头", "elephant": "头", "banana": "根", "house": "座"},
}


def build_demo(
    output: Path,
    *,
    seed: int = 0,
    size: str = "full",
    packages: Packages | None = None,
    workers: int = 2,
    progress: bool = True,
    force: bool = False,
) -> str:
    """Build `rows.json` and its images into a folder, of which a README.md stays; returns a line of counts.

    Stamps are read all the same: only then are the drawings held out that the default dataset holds out.
    """
    output = Path(output)
    if size not in PER_KIND:
        raise unknown_name("size", size, PER_KIND)
    wanted = replace(planning.SIZES[size], per_kind=PER_KIND[size])
    with new_data_set(output, workers=workers, force=force) as (thumbs, root):
        made = gather(thumbs, wanted, seed, packages or Packages(), workers, progress)
        # What may not be shown is as good as trained on; what a "no" may mention is what training shows, as ever.
        shown = [
            replace(s, heldout=s.heldout and s.origin != "stamps" and not _UNFIT.search(s.key)) for s in made.sources
        ]
        make = Composer(random.Random(f"{seed}/demo"), shown, made.heldout_fonts, heldout=True, prefix="", suffix="jpg")
        records = planning.heldout_questions(make, wanted, planning.world_of(made.sources), distinct=True)
        records += _chinese_captions(make, wanted.per_kind)
        draw_pictures(make.pictures, thumbs, root, workers, progress, QUALITY)
        rows = [{**record, "id": record["id"].replace("val-", "demo-")} for record in records]
        for row in rows:
            del row["prompt"], row["kinds"]
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (root / "rows.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        if (output / "README.md").is_file():
            shutil.copy(output / "README.md", root)
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(row["kind"] for row in rows).items())
    return f"{output}: {len(make.pictures)} images, {len(rows)} questions: {counts} (seed {seed})"


def _chinese_captions(make: Composer, count: int) -> list[Record]:
    """Chinese captions, of drawings before shapes; the accepted answer is their content words."""
    known = [i for i in make.nouned if make.sources[i].origin == "shapes" or make.sources[i].noun in words.ZH_NOUNS]
    make.rng.shuffle(known)
    known.sort(key=lambda i: make.sources[i].origin == "shapes")
    records: list[Record] = []
    for index in known[:count]:
        source = make.sources[index]
        noun = source.noun or ""
        if source.origin == "shapes":
            caption, content = source.zh or "", words.ZH_COLOURS[source.colour or ""] + words.ZH_SHAPES[noun]
        else:
            content = words.ZH_NOUNS[noun]
            caption = f"一{_ZH_MEASURES.get(noun) or _ZH_MEASURES.get(source.category or '', '个')}{content}。"
        turns = [(make.rng.choice(_ZH_ASKED), caption)]
        name, more = f"val-caption_zh-{len(records):03d}", {"kind": "caption_zh", "prompt": turns[0][0]}
        records.append(planning.record_of(name, [make.single(index)], turns, ["caption_zh"], answers=[content], **more))
    return records

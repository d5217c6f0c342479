"""`python -m recipes.default.dataset more`: what the default model is trained on beside the first data set.

More sources (icons in several styles, flags, photographs, cards, all drawings), natural scenes, charts, documents, more
words. Nothing of it is judged: what the first data set, the demo and the judges hold out is held out here. Each caption
says in `places` what lies where, which the warm start of the projector learns.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polymodal.errors import unknown_name
from recipes.default.dataset import (
    chart_questions,
    charts,
    document_questions,
    documents,
    drawn,
    grounds,
    judges,
    more,
    natural,
    ocr_tokens,
    photos,
    plan,
    rich,
    sees,
    studio,
    words,
)  # fmt: skip
from recipes.default.dataset.generate import Packages, cut_out, draw_pictures, gather, new_data_set, over_processes
from recipes.default.dataset.studio import Studio, View

Place = tuple[str, float, float, float, float]
Record = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much of each sort."""

    views: dict[str, int]  # captions: views of every training cut-out, by origin
    scenes: int  # captions of several things
    texts: int
    papers: int  # captions of charts, and of documents
    talks: int  # conversations about scenes
    paper_talks: int  # conversations about charts, and about documents
    judged: int  # held-out questions about charts, and about documents


SIZES = {
    "full": Size(
        {"stamps": 6, "openclipart": 3, "emoji": 2, "shapes": 2, "icons": 2, "flags": 1, "photos": 10, "cards": 3,
         "openclipart2": 3},
        7000, 7000, 1500, 9000, 1200, 100,
    ),
    "tiny": Size({"shapes": 1}, 6, 4, 4, 20, 6, 0),
}  # fmt: skip


def build_more(
    output: Path, *, packages: Path, npm: Path, seed: int = 0, size: str = "full", workers: int = 2,
    progress: bool = True, force: bool = False,
) -> str:  # fmt: skip
    """Build captions, talks, held-out charts and documents, and their images; returns the counts."""
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    wanted, first = SIZES[size], plan.SIZES[size]
    with new_data_set(output, workers=workers, force=force) as (thumbs, root):
        made = gather(thumbs, first, seed, Packages.under(packages), workers, progress)
        held = 0 if first.shapes_only else first.photos
        sources, _ = plan.choose_photos(made.sources, held, random.Random(f"{seed}/photos"))
        backs: list[grounds.Photo] = []
        if not first.shapes_only:
            places = more.Places.under(packages, npm)
            found = more.read(places, sources)
            new_ones = cut_out(found, len(sources), thumbs, Packages.emoji_font, workers, progress)
            cuts = [thumbs / f"{i}.png" for i in range(len(sources) + len(new_ones))]
            kept = judges.judged(places.gcompris, places.openclipart)
            jobs = [(s.key, cut) for s, cut in zip(new_ones, cuts[len(sources) :], strict=True)]
            out = over_processes(partial(is_judged, left_out=kept), jobs, workers, "comparing images", progress)
            sources = [*sources, *more.split(sources, new_ones, cuts, out, seed)]
            backs = grounds.shrink(photos.backgrounds(packages), thumbs)
        looks = studio.looks(thumbs, sources)
        zh = {**words.zh_nouns(), **words.ZH_NOUNS, **{s.noun: s.zh_noun for s in sources if s.noun and s.zh_noun}}
        world = plan.world_of(sources)

        def new(name: str) -> Studio:
            rng = random.Random(f"{seed}/more/{name}")
            return Studio(rng, sources, made.fonts, backs, looks, f"{name}_", unwritten=kept_words())

        captions, talks = new("cap"), new("talk")
        files: dict[str, list[Record]] = {
            "captions.json": rich.captions(captions, wanted.views, wanted.scenes, wanted.texts, zh)[0],
            "talks.json": rich.conversations(talks, wanted.talks, world, zh)[0],
        }
        where = {v.picture.file: spots(v) for v in [*captions.views, *talks.views]}
        images: list[Any] = [*captions.pictures, *talks.pictures]
        for kind, paper in (("charts", chart_questions), ("documents", document_questions)):
            rng = random.Random(f"{seed}/more/{kind}")
            for file, (papers, records) in {
                "captions.json": paper.captions(rng, made.fonts, wanted.papers),
                "talks.json": paper.compose(rng, made.fonts, wanted.paper_talks),
                f"val_{kind}.json": paper.heldout(rng, made.heldout_fonts, wanted.judged),
            }.items():
                if file == "talks.json":
                    records = ocr_tokens.add_tokens(rng, papers, records)
                files.setdefault(file, []).extend(records)
                images += papers
                where |= {image.file: marks(image.places, image.lines) for image in papers}
        hashes = draw_pictures(images, thumbs, root, workers, progress)
        for name, records in files.items():
            if not name.startswith("val_"):
                random.Random(f"{seed}/more/{name}").shuffle(records)
                for record in records:
                    if isinstance(record["image"], str):
                        record["places"] = where[record["image"]]
            text = json.dumps(records, ensure_ascii=False, indent=0) + "\n"
            (root / name).write_text(text, encoding="utf-8")
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        used = Counter(s.origin for s in sources if not s.heldout)
        about = {"seed": seed, "size": size, "sources": dict(sorted(used.items())), "sha256": hashes}
        (root / "build.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{len(records)} {name.removesuffix('.json')}" for name, records in files.items())
    return f"{output}: {len(images)} images, {counts} (seed {seed}, size {size})"


def kept_words() -> frozenset[str]:
    """Words that only held-out charts and documents show."""
    texts = [*charts.LABELS.values(), charts.TITLES, *documents.WORDS.values()]
    return frozenset(part.lower() for text in texts for word in drawn.split(text, True) for part in word.split())


def is_judged(job: tuple[str, Path], left_out: list[judges.LeftOut]) -> bool:
    """Whether a cut-out is one of the images that the model is judged by."""
    from PIL import Image

    key, file = job
    with Image.open(file) as opened:
        whole = opened.convert("RGBA").getchannel("A").getextrema()[0] == 255
        image = opened.convert("RGB")
    # A cut-out framed as the judged ones were before they were hashed.
    image = image if whole else sees.on_white(file)
    return judges.is_judged(key.replace("openclipart2:", "openclipart:"), image, left_out)


def spots(view: View) -> list[Place]:
    """What is where in a scene, each thing with its colour where that is plain; what is written in quotation marks."""
    found: list[Place] = [(words.phrase(s.noun, s.colour or ""), *s.box) for s in view.spots]
    return found + [(f'"{" ".join(s.lines)}"', *natural.sheet_box(s)) for s in view.picture.sheets]


def marks(places: Sequence[Place], lines: Sequence[str]) -> list[Place]:
    """What is where on a chart or document, what can be read in quotation marks."""
    written = {word for line in lines for word in (line, *line.split())}
    return [(f'"{text}"' if text in written else text, *box) for text, *box in places]  # type: ignore[misc]

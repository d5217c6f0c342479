"""Noises, animals and instruments to be named: where they come from, how they are cut, what is asked.

From the packages tuxpaint-stamps-default (GPL-2) and gcompris-qt-data (GPL-3, Free Art License), which are trained on
and never shipped, and a few made here. A name that has several recordings keeps some of them for validation; of a long
recording the end is kept; some names are kept whole, for questions that need no name ("music or an animal?").
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from polymodal.media.audio import open_audio
from recipes.default.dataset import words
from recipes.default.dataset.questions import QA, capital
from recipes.default.dataset.senses.media import RATE, loudest, roughen, write_sound
from recipes.default.dataset.senses.rcc import read_rcc
from recipes.default.dataset.sources import caption_noun, missing

GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
KEPT = 0.3
"""Of a long recording, the share at its end that training never hears."""
LONG = 4.5
"""Seconds from which a recording is long."""
CATEGORIES = {"animal": "an animal", "instrument": "music", "thing": "a noise", "speech": "a voice"}

_NOISES = {
    "LRBark": "dog", "LRTrain": "train", "LRRain": "rain", "LRStartAndStopCarEngine": "car", "LRBuddhist_gong": "gong",
    "LRRing": "bell", "LRApplauses": "applause", "LRHeart_beat": "heartbeat", "LRDoor_Open": "door",
    "LRFireballs": "fire", "LRFrogsInPond": "frog", "guitar_": "guitar",
}  # fmt: skip
_INSTRUMENTS = {"flute_traversiere": "flute", "snare_drum": "drum", "drum_kit": "drum", "bongo": "drum",
                "timpani": "drum", "electric_guitar": "electric guitar"}  # fmt: skip
_STAMPS = {"animals": "animal", "hobbies/music": "instrument", "household": "thing"}
_SAID = {"rain": "rain", "applause": "applause", "fire": "fire", "music": "music", "noise": "noise"}  # no article
_ALSO = {"car": ("engine", "motor"), "gong": ("bell",), "bell": ("ring",), "applause": ("clapping",),
         "heartbeat": ("heart",), "beep": ("tone",), "drum": ("drums", "drum kit", "drums and cymbals"),
         "electric guitar": ("guitar",), "train": ("locomotive",), "noise": ("hiss",)}  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """One recording and what it is of."""

    key: str
    name: str
    category: str  # of CATEGORIES
    path: str  # a file; where `entry`, a resource file; "" for a sound made here
    entry: str = ""
    heldout: str = ""  # "", file or name


@dataclass(frozen=True)
class Cut:
    """The plan of one sound file: cuts of recordings, one after the other; of none, near silence."""

    file: str
    seed: int
    parts: tuple[Recording, ...]
    seconds: float
    heldout: bool  # from the kept ends of the long ones


def made_here() -> list[Recording]:
    """What needs no package."""
    return [Recording(f"made:{n}", n, "thing", "") for n in ("beep", "siren", "noise", "ticking")]


def read_recordings(stamps: Path, gcompris: Path) -> list[Recording]:
    """Every recording with a plain name, in name order."""
    found = made_here()
    for file in sorted(stamps.rglob("*.ogg")):
        name = file.relative_to(stamps).with_suffix("").as_posix()
        category = next((kind for start, kind in _STAMPS.items() if name.startswith(start)), None)
        text = file.with_suffix(".txt")
        if category is None or "_desc" in name or not text.is_file():
            continue
        caption = (text.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[0]
        if noun := caption_noun(caption):
            found.append(Recording(f"stamps:{name}", noun, category, str(file)))
    if len(found) < 10:
        raise missing(stamps, "tuxpaint-stamps-default")
    for pack, category in (
        ("instruments", "instrument"),
        ("explore_farm_animals", "animal"),
        ("memory-sound", "thing"),
    ):
        path = gcompris / f"{pack}.rcc"
        if not path.is_file():
            raise missing(path, "gcompris-qt-data")
        for entry in sorted(read_rcc(path)):
            stem = Path(entry).stem
            if not entry.endswith(".ogg"):
                continue
            name = _INSTRUMENTS.get(stem, stem.replace("_", " ").removesuffix("s") if category == "animal" else stem)
            kind = category
            if pack == "memory-sound":
                name = next((name for start, name in _NOISES.items() if stem.startswith(start)), "")
                kind = {"dog": "animal", "frog": "animal", "guitar": "instrument"}.get(name, "thing")
            if name:
                found.append(Recording(f"gcompris:{stem}", name, kind, str(path), entry))
    return found


def hold_out(recordings: list[Recording], rng: random.Random) -> list[Recording]:
    """Keep a third of the recordings of names that have several, and one in eight of the other names whole."""
    by_name: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_name.setdefault(recording.name, []).append(recording)
    kept: dict[str, str] = {}
    lone = sorted(n for n, of in by_name.items() if len(of) == 1 and of[0].category in ("animal", "instrument"))
    kept.update(dict.fromkeys((by_name[n][0].key for n in rng.sample(lone, len(lone) // 8)), "name"))
    for name in sorted(by_name):
        if len(of := by_name[name]) > 1:
            kept.update(dict.fromkeys((r.key for r in rng.sample(of, max(1, len(of) // 3))), "file"))
    return [replace(r, heldout=kept.get(r.key, "")) for r in recordings]


@lru_cache(maxsize=8)
def _resources(path: str) -> dict[str, bytes]:
    return read_rcc(Path(path))


@lru_cache(maxsize=256)
def samples_of(recording: Recording) -> np.ndarray:
    """A whole recording, without the silence around it: float32 [L] at RATE."""
    if not recording.path:
        return _made(recording.name)
    source = _resources(recording.path)[recording.entry] if recording.entry else Path(recording.path)
    samples = open_audio(source, sample_rate=RATE, max_seconds=60).samples
    loud = np.flatnonzero(np.abs(samples) > 0.03 * max(1e-4, float(np.abs(samples).max())))
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def _made(name: str) -> np.ndarray:
    time = np.arange(6 * RATE) / RATE
    if name == "noise":
        return (0.3 * np.random.default_rng(0).standard_normal(len(time))).astype(np.float32)
    if name == "siren":
        return np.sin(2 * np.pi * np.cumsum(800 + 300 * np.sin(2 * np.pi * 0.5 * time)) / RATE).astype(np.float32)
    if name == "ticking":
        return (np.exp(-((time % 0.5) * 200)) * np.sin(2 * np.pi * 1800 * time)).astype(np.float32)
    return (np.sin(2 * np.pi * 880 * time) * ((time % 0.6) < 0.3)).astype(np.float32)  # beep


def draw_cut(cut: Cut, root: Path) -> str:
    """Write a cut's file; returns its SHA-256."""
    rng, pieces = random.Random(cut.seed), []
    if not cut.parts:  # nothing to be heard
        hiss = np.random.default_rng(cut.seed).standard_normal(round(cut.seconds * RATE))
        write_sound(root / cut.file, hiss * 10 ** rng.uniform(-4, -2.5))
        return hashlib.sha256((root / cut.file).read_bytes()).hexdigest()
    for part in cut.parts:
        samples = samples_of(part)
        if part.category != "speech" and len(samples) > LONG * RATE:
            border = round(len(samples) * (1 - KEPT))
            samples = samples[border:] if cut.heldout and not part.heldout else samples[:border]
        piece = loudest(samples, cut.seconds, rng.random())
        pieces.append(piece / max(1e-4, float(np.abs(piece).max())))
        pieces.append(np.zeros(RATE // 5, np.float32))
    write_sound(root / cut.file, roughen(np.concatenate(pieces[:-1]), cut.seed, bend=0.1))
    return hashlib.sha256((root / cut.file).read_bytes()).hexdigest()


def is_long(recording: Recording) -> bool:
    """Whether the recording's end is kept for validation."""
    return len(samples_of(recording)) > LONG * RATE


def _named(recording: Recording) -> str:
    return _SAID.get(recording.name) or words.phrase(recording.name)


def names(recording: Recording) -> tuple[str, ...]:
    """Every right name."""
    known = words.accepted(recording.name) if recording.name in words.first_lexicon() else [recording.name]
    plain = [re.sub(r"^(an?|the) ", "", n) for n in known]
    return tuple(dict.fromkeys([recording.name, *plain, *_ALSO.get(recording.name, ())]))


def ask_name(rng: random.Random, recording: Recording) -> QA:
    """What it is."""
    forms = ["What do you hear?", "What is this sound?", "What makes this sound?"]
    forms += {"animal": ["What animal is this?", "Which animal do you hear?", "What animal makes this sound?"] * 2,
              "instrument": ["What instrument is playing?", "Which instrument do you hear?"] * 3}.get(
                  recording.category, [])  # fmt: skip
    return QA("sound_name", rng.choice(forms), words.sentence(_named(recording)), capital(recording.name),
              names(recording))  # fmt: skip


def ask_category(rng: random.Random, category: str) -> QA:
    """Whether it is a voice, music, an animal or a noise."""
    other = rng.choice([c for c in CATEGORIES if c != category])
    right, wrong = CATEGORIES[category], CATEGORIES[other]
    question = f"Is this {' or '.join(rng.sample([right, wrong], 2))}?"
    bare = right.split()[-1]
    return QA("sound_category", question, words.sentence(right), capital(bare), (bare, right))


def ask_nothing(rng: random.Random) -> QA:
    """What silence is asked."""
    if rng.random() < 0.5:
        return QA("sound_name", "What do you hear?", "I hear nothing.", "Nothing", ("nothing", "silence"))
    return QA("sound_name", "What is said?", "Nothing is said.", "Nothing", ("nothing", "nothing is said"))


def ask_exists(rng: random.Random, recording: Recording, others: Iterable[str]) -> QA:
    """Whether a thing is heard, yes as often as no."""
    yes = rng.random() < 0.5
    name = recording.name
    if not yes:
        pool = [n for n in others if not _alike(n, name)]
        name = rng.choice(pool)
    said = _SAID.get(name) or words.phrase(name)
    long = f"Yes, it is {said}." if yes else "No."
    return QA("sound_exists", f"Do you hear {said}?", long, "Yes" if yes else "No", ("yes",) if yes else ("no",))


def _alike(first: str, second: str) -> bool:
    known = words.first_lexicon()
    return first == second or (first in known and second in known and words.related(first, second))


def ask_order(rng: random.Random, first: Recording, second: Recording) -> QA:
    """Which of two comes first."""
    target, when = rng.choice([(first, "first"), (second, "last")])
    pair = " or ".join(rng.sample([_named(first), _named(second)], 2))
    question = rng.choice([f"What do you hear {when}?", f"What comes {when}, {pair}?"])
    return QA("sound_order", question, words.sentence(_named(target)), capital(target.name), names(target))


def pair_of(rng: random.Random, pool: list[Recording]) -> tuple[Recording, Recording]:
    """Two that nobody mixes up."""
    for _ in range(200):
        first, second = rng.sample(pool, 2)
        if first.category != second.category and not _alike(first.name, second.name):
            return first, second
    raise AssertionError("no two sounds to tell apart in the pool")


def spoken_names(stamps: Path) -> list[tuple[Recording, str]]:
    """The names of animals as people spoke them for the stamps, of one word."""
    found = []
    for file in sorted(stamps.rglob("*_desc.ogg")):
        text = file.with_name(file.name.replace("_desc.ogg", ".txt"))
        caption = (text.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[0] if text.is_file() else ""
        said = re.sub(r"^(an?|the) ", "", caption.strip().rstrip(".").lower())
        if said.isalpha():
            key = f"stamps:{file.relative_to(stamps).with_suffix('').as_posix()}"
            found.append((Recording(key, said, "speech", str(file)), said))
    return found

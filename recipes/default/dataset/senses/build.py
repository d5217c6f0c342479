"""`python -m recipes.default.dataset senses`: short clips, speech and sounds with questions, and images again.

The folder holds `train.json` (everything, shuffled; also one file a sense, `train_video.json`, ... and
`train_image.json`, fresh questions of the kinds of stage 2, so that nothing is forgotten) and `val_video.json`,
`val_speech.json`, `val_sound.json`: held-out things, held-out sentences said by held-out voices, held-out recordings.
The things held out are those of `default` with the same seed. A row has its media in `video`, `audio` and `image`;
`transcript` says what is said in its sounds.
`tiny` needs no package but espeak-ng: it draws shapes and hears beeps.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from polymodal.errors import unknown_name
from recipes.default.dataset import plan as planning
from recipes.default.dataset import questions, words
from recipes.default.dataset.generate import Packages, draw_pictures, gather, new_data_set, over_processes
from recipes.default.dataset.plan import Composer, Record
from recipes.default.dataset.questions import QA
from recipes.default.dataset.senses import clips, sounds, speech
from recipes.default.dataset.senses.clips import Clip
from recipes.default.dataset.senses.media import choose_voice
from recipes.default.dataset.senses.sounds import Cut, Recording
from recipes.default.dataset.senses.speech import Library

Media = dict[str, list[str]]


@dataclass(frozen=True)
class Size:
    """How many rows of each sort a size has."""

    clips: int
    talks: int  # images asked about aloud
    repeats: int
    words: int
    facts: int
    questions: int  # is it a question
    sounds: int
    replay: int  # images asked about in writing
    per_kind: int  # validation questions of each kind


SIZES = {
    "full": Size(3600, 1000, 1900, 450, 400, 250, 1500, 1500, 100),
    "small": Size(40, 20, 30, 10, 10, 10, 40, 20, 6),
    "tiny": Size(8, 4, 4, 4, 4, 4, 12, 4, 2),
}
_TALKS = {
    "single": ["name", "name", "exists", "color", "category"],
    "side": ["position", "name", "exists"],
    "beside": ["position", "position", "exists"],
    "above": ["position", "position", "exists"],
    "counted": ["count", "count", "name", "color"],
    "color": ["color", "name", "exists"],
}
_TALK_SHARES = {"single": 0.4, "side": 0.1, "beside": 0.13, "above": 0.07, "counted": 0.18, "color": 0.12}
SPOKEN = ("name", "exists", "count", "color", "position", "category")
# How many different answers a kind of validation question has at least: none may be more frequent than their share.
_ANSWERS = {"direction": 4, "moving": 2, "growth": 2, "coming": 2, "count": 4, "exists": 2, "position": 6,
            "is_question": 2, "sound_exists": 2, "sound_category": 4, "color": 6, "change": 6}  # fmt: skip


@dataclass
class Made:
    """Rows and the media that they need."""

    files: dict[str, list[Record]]
    clips: list[Clip]
    libraries: list[Library]
    cuts: list[Cut]
    pictures: list[planning.Picture]


def build_senses(
    output: Path,
    *,
    seed: int = 0,
    size: str = "full",
    packages: Packages | None = None,
    gcompris: Path = sounds.GCOMPRIS,
    workers: int = 2,
    progress: bool = True,
    force: bool = False,
) -> str:
    """Build the senses' data into a folder that appears whole; returns a line of counts."""
    output = Path(output)
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    places = packages or Packages()
    with new_data_set(output, workers=workers, force=force) as (thumbs, root):
        for folder in ("clips", "sounds"):
            (root / folder).mkdir()
        images = planning.SIZES[size]
        found = gather(thumbs, images, seed, places, workers, progress)
        photos = 0 if images.shapes_only else images.photos
        split, _ = planning.choose_photos(found.sources, photos, random.Random(f"{seed}/photos"))
        recordings, spoken_names = sounds.made_here(), []
        if not images.shapes_only:
            recordings = sounds.read_recordings(places.stamps, gcompris)
            spoken_names = sounds.spoken_names(places.stamps)
        recordings = sounds.hold_out(recordings, random.Random(f"{seed}/recordings"))
        made = Made({}, [], [], [], [])

        def composer(name: str, *, heldout: bool) -> Composer:
            fonts = found.heldout_fonts if heldout else found.fonts
            prefix = name + "_"
            return Composer(random.Random(f"{seed}/{name}"), split, fonts, heldout=heldout, prefix=prefix, suffix="jpg")

        world = planning.world_of(split)
        for heldout in (False, True):
            start = "val" if heldout else "train"
            sense = _Sense(SIZES[size], made, world, heldout, tiny=images.shapes_only)
            made.files[f"{start}_video.json"] = sense.video(composer(f"{start}_video", heldout=heldout))
            made.files[f"{start}_speech.json"] = sense.speech(
                composer(f"{start}_speech", heldout=heldout), spoken_names
            )
            made.files[f"{start}_sound.json"] = sense.sound(random.Random(f"{seed}/{start}_sound"), recordings)
        made.files["train_image.json"] = _replay(composer("train_image", heldout=False), SIZES[size], world, made)
        together = [r for name, rows in made.files.items() if name.startswith("train_") for r in rows]
        random.Random(f"{seed}/order").shuffle(together)
        made.files["train.json"] = together

        hashes = draw_pictures(made.pictures, thumbs, root, workers, progress)
        said = [(file, *key) for library in made.libraries for key, file in library.said.items()]
        work: list[tuple[Callable[[Any], str], list[Any], str]] = [
            (partial(clips.draw_clip, thumbs=thumbs, root=root), made.clips, "drawing clips"),
            (partial(speech.record_speech, root=root), said, "speaking"),
            (partial(sounds.draw_cut, root=root), made.cuts, "cutting sounds"),
        ]
        for draw, jobs, label in work:
            digests = over_processes(draw, jobs, workers, label, progress)
            hashes.update((j[0] if isinstance(j, tuple) else j.file, d) for j, d in zip(jobs, digests, strict=True))
        for name, rows in made.files.items():
            text = json.dumps(rows, ensure_ascii=False, indent=0) + "\n"
            (root / name).write_text(text, encoding="utf-8")
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        about = {
            "seed": seed,
            "size": size,
            "kinds": {name: kinds_of(rows) for name, rows in made.files.items()},
            "heldout_recordings": {r.key: r.heldout for r in recordings if r.heldout},
            "sha256": hashes,
        }
        (root / "build.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{len(rows)} {name.removesuffix('.json')}" for name, rows in made.files.items())
    media = f"{len(made.clips)} clips, {len(said) + len(made.cuts)} sounds, {len(made.pictures)} images"
    return f"{output}: {media}; {counts} (seed {seed}, size {size})"


def kinds_of(rows: list[Record]) -> dict[str, dict[str, float]]:
    """Questions of each kind, and how often its most frequent answer is right."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        said = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        for kind, answer in zip(row["kinds"], said, strict=True):
            found.setdefault(kind, Counter())[answer.rstrip(".").lower()] += 1
    return {
        kind: {"questions": answers.total(), "most frequent": round(max(answers.values()) / answers.total(), 3)}
        for kind, answers in sorted(found.items())
    }


def row_of(name: str, media: Media, turns: list[tuple[str, str]], kinds: list[str], source: str, **more: Any) -> Record:
    """One row; the turns' texts hold the placeholders of the media."""
    conversation = []
    for asked, answered in turns:
        conversation += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    row: Record = {"id": name}
    row |= {kind: files[0] if len(files) == 1 else files for kind, files in media.items() if files}
    row["conversations"] = conversation
    row["kind"] = kinds[0] if len(set(kinds)) == 1 else "mixed"
    return row | {"kinds": kinds, "source": source} | more


def judged(name: str, media: Media, marks: str, qa: QA, written: str, source: str, **more: Any) -> Record:
    """A validation row of one question with its accepted answers; `written` is what is asked in writing."""
    whole = qa.kind in ("caption", "repeat") or (qa.kind == "fact" and qa.short == qa.long)
    prompt = written if whole else f"{written}\n{words.SHORT}".lstrip()
    reply = qa.long if whole else qa.short
    asked = f"{marks}\n{prompt}" if prompt else marks
    return row_of(name, media, [(asked, reply)], [qa.kind], source, prompt=prompt, answers=list(qa.accepted), **more)


class _Sense:
    """Plans one side of the split."""

    def __init__(self, size: Size, made: Made, world: questions.World, heldout: bool, *, tiny: bool) -> None:
        self.size, self.made, self.world, self.heldout = size, made, world, heldout
        self.start = "val" if heldout else "train"
        self.voice = partial(choose_voice, heldout=heldout, piper=not tiny)

    def video(self, make: Composer) -> list[Record]:
        """Rows about clips."""
        rng, rows = make.rng, []

        def add(clip: Clip, asked: list[QA]) -> None:
            self.made.clips.append(clip)
            more = {"sources": [s.key for s in clip.sources]}
            media: Media = {"video": [clip.file]}
            name = f"{self.start}-video-{len(rows):05d}"
            if self.heldout:
                rows.append(judged(name, media, "<video>", asked[0], asked[0].question, "video", **more))
                return
            turns = [questions.turn(rng, qa) for qa in asked]
            turns[0] = (f"<video>\n{turns[0][0]}", turns[0][1])
            rows.append(row_of(name, media, turns, [qa.kind for qa in asked], "video", **more))

        def file() -> str:
            return f"clips/{self.start}{len(self.made.clips):05d}.mp4"

        if self.heldout:
            for kind in (*clips.KINDS, "name", "color"):
                layout = kind if kind in clips.KINDS else "direction"

                def draw(layout: str = layout, kind: str = kind) -> tuple[Clip, QA] | None:
                    clip = clips.compose_clip(make, layout, file())
                    qa = next((q for q in clip.asked if q.kind == kind), None)
                    return None if qa is None else (clip, qa)

                for clip, qa in self._balanced(kind, draw, rng):
                    # Planned before those ahead of it were kept, so the name is given again.
                    add(replace(clip, file=file()), [qa])
            return rows
        for kind, share in clips.SHARES.items():
            for _ in range(max(1, round(share * self.size.clips))):
                clip = clips.compose_clip(make, kind, file())
                first, *others = clip.asked
                asked = rng.sample(others, min(len(others), rng.choice([2, 2, 3])))
                # Mostly first: after a description there is nothing left to see.
                asked.insert(0 if rng.random() < 0.7 else rng.randint(0, len(asked)), first)
                add(clip, asked)
        rng.shuffle(rows)
        return rows

    def _balanced(self, kind: str, draw: Callable[[], Any], rng: random.Random) -> list[Any]:
        """Draw until there are enough, of no answer too many; the last of what is drawn is the question."""
        kept: list[Any] = []
        taken: Counter[str] = Counter()
        most = -(-self.size.per_kind // _ANSWERS.get(kind, 10))
        for _ in range(self.size.per_kind * 60):
            if len(kept) == self.size.per_kind:
                break
            drawn = draw()
            if drawn is not None and taken[drawn[-1].accepted[0]] < most:
                taken[drawn[-1].accepted[0]] += 1
                kept.append(drawn)
        return kept

    def speech(self, make: Composer, spoken_names: list[tuple[Recording, str]]) -> list[Record]:
        """Rows about what is said: images asked about aloud, repeating, words, facts, whether it is a question."""
        rng, rows = make.rng, []
        library = Library(f"{self.start}_said")
        self.made.libraries.append(library)

        def name() -> str:
            return f"{self.start}-speech-{len(rows):05d}"

        def voiced(text: str) -> tuple[str, dict[str, str]]:
            voice = self.voice(rng)
            return library.file(text, voice), {"voice": f"{voice.engine} {voice.name}", "transcript": text}

        def listen(qa: QA, text: str, written: str) -> None:
            file, more = voiced(text)
            if self.heldout:
                rows.append(judged(name(), {"audio": [file]}, "<audio>", qa, written, "speech", **more))
                return
            asked, answer = questions.turn(rng, replace(qa, question=written))
            if qa.kind in ("repeat", "fact") and (qa.kind == "repeat" or qa.short == qa.long):
                asked, answer = written, qa.long
            asked = f"<audio>\n{asked.strip()}".rstrip()
            rows.append(row_of(name(), {"audio": [file]}, [(asked, answer)], [qa.kind], "speech", **more))

        self._talks(make, rows, voiced, name)
        size, few = self.size, self.size.per_kind
        for _ in range(few if self.heldout else size.repeats):
            text = self._own(lambda: speech.sentence(rng))
            listen(qa := speech.ask_repeat(rng, text), text, qa.question)
        for _ in range(few if self.heldout else size.words):
            word = rng.choice(speech.vocabulary())
            listen(qa := speech.ask_word(rng, word), word, qa.question)
        known = [qa for qa in speech.facts() if self._mine(qa.question) and not (self.heldout and qa.short == qa.long)]
        for _ in range(few if self.heldout else size.facts):
            qa = rng.choice(known)
            listen(qa, qa.question, "")
        for number in range(few if self.heldout else size.questions):
            text = ""
            while text.endswith("?") != (number % 2 == 0) or not text:
                text = self._own(lambda: speech.sentence(rng))
            listen(qa := speech.ask_question(rng, text), text, qa.question)
        for recording, text in spoken_names:
            if self._mine(text):
                cut = Cut(
                    f"sounds/{self.start}{len(self.made.cuts):05d}.flac", rng.getrandbits(32), (recording,), 15, False
                )
                self.made.cuts.append(cut)
                qa, media = speech.ask_word(rng, text), {"audio": [cut.file]}
                row = judged(name(), media, "<audio>", qa, qa.question, "speech", voice="human", transcript=text)
                rows.append(row if self.heldout else {k: row[k] for k in row if k not in ("prompt", "answers")})
        if not self.heldout:
            rng.shuffle(rows)
        return rows

    def _mine(self, text: str) -> bool:
        """Whether a text is of this side: one in eight is held out, by its own hash."""
        return (hashlib.sha256(text.lower().encode()).digest()[0] < 32) == self.heldout

    def _own(self, draw: Callable[[], str]) -> str:
        while not self._mine(text := draw()):
            pass
        return text

    def _talks(self, make: Composer, rows: list[Record], voiced: Callable[[str], Any], name: Callable[[], str]) -> None:
        rng = make.rng
        if self.heldout:
            for kind in SPOKEN:

                def draw(kind: str = kind) -> tuple[questions.Scene, QA] | None:
                    mark = len(make.pictures)
                    scene = make.make(rng.choice(planning.VAL_LAYOUTS[kind]))
                    del make.pictures[mark:]
                    qa = questions.ASK[kind](rng, scene, self.world)
                    return None if qa is None else (scene, qa)

                for scene, qa in self._balanced(kind, draw, rng):
                    scene.picture.file = make.file()
                    make.add(scene)
                    file, more = voiced(qa.question)
                    media: Media = {"image": [scene.picture.file], "audio": [file]}
                    more["sources"] = [o.key for o in scene.objects]
                    row = judged(name(), media, "<image>\n<audio>", qa, "", "speech", **more)
                    row["kind"], row["kinds"] = f"spoken_{kind}", [f"spoken_{kind}"]
                    rows.append(row)
        else:
            layouts = [n for n, share in _TALK_SHARES.items() for _ in range(max(1, round(share * self.size.talks)))]
            for layout in layouts:
                scene = make.make(layout)
                turns, kinds, files, said = [], [], [], []
                for kind in rng.sample(_TALKS[layout], rng.choice([1, 2, 2, 3])):
                    qa = questions.ASK[kind](rng, scene, self.world)
                    if qa is None or f"spoken_{kind}" in kinds:
                        continue
                    asked, answer = questions.turn(rng, qa)
                    written = asked.removeprefix(qa.question)
                    files.append(voiced(qa.question)[0])
                    said.append(qa.question)
                    turns.append((("<image>\n" if not turns else "") + "<audio>" + written, answer))
                    kinds.append(f"spoken_{kind}")
                if turns:
                    media = {"image": [scene.picture.file], "audio": files}
                    sources = [o.key for o in scene.objects]
                    rows.append(row_of(name(), media, turns, kinds, "speech", sources=sources, transcript=said))
        self.made.pictures += make.pictures

    def sound(self, rng: random.Random, recordings: list[Recording]) -> list[Record]:
        """Rows about noises, animals and music."""
        rows: list[Record] = []
        trained = [r for r in recordings if not r.heldout]
        names = {r.name for r in trained}
        pool = trained
        if self.heldout:
            pool = [r for r in recordings if r.heldout == "file" and r.name in names]
            pool += [r for r in trained if sounds.is_long(r)]
        every = sorted({r.name for r in recordings})

        def pick(of: list[Recording]) -> Recording:
            categories = sorted({r.category for r in of})
            category = rng.choices(categories, [{"animal": 5, "instrument": 4}.get(c, 2) for c in categories])[0]
            name = rng.choice(sorted({r.name for r in of if r.category == category}))
            return rng.choice([r for r in of if r.name == name])

        def add(parts: tuple[Recording, ...], qas: list[QA], file: str = "") -> None:
            new = Cut(f"sounds/{self.start}{len(self.made.cuts):05d}.flac", rng.getrandbits(32), parts,
                      rng.uniform(1.2, 2.8) if len(parts) < 2 else rng.uniform(1, 1.8), self.heldout)  # fmt: skip
            if not file:
                self.made.cuts.append(new)
            media: Media = {"audio": [file or new.file]}
            name, more = f"{self.start}-sound-{len(rows):05d}", {"sources": [r.key for r in parts]}
            if self.heldout:
                how = [r.heldout or "cut" for r in parts]
                rows.append(judged(name, media, "<audio>", qas[0], qas[0].question, "sound", heldout=how, **more))
                return
            turns = [questions.turn(rng, qa) for qa in qas]
            turns[0] = (f"<audio>\n{turns[0][0]}", turns[0][1])
            rows.append(row_of(name, media, turns, [qa.kind for qa in qas], "sound", **more))

        spoken = [file for (text, _), file in self.made.libraries[-1].said.items() if len(text) > 12]
        if self.heldout:
            unheard = [r for r in recordings if r.heldout == "name"] + pool

            def category() -> tuple[Recording | None, str, QA]:
                chosen = rng.choice(list(sounds.CATEGORIES))
                of = [r for r in unheard if r.category == chosen]
                recording = rng.choice(of) if of else None
                file = "" if recording else rng.choice(spoken)
                return recording, file, sounds.ask_category(rng, recording.category if recording else "speech")

            def name_of() -> tuple[Recording, QA]:
                return (recording := pick(pool)), sounds.ask_name(rng, recording)

            def exists() -> tuple[Recording, QA]:
                return (recording := pick(pool)), sounds.ask_exists(rng, recording, every)

            for recording, file, qa in self._balanced("sound_category", category, rng):
                add((recording,) if recording else (), [qa], file)
            for recording, qa in self._balanced("sound_name", name_of, rng):
                add((recording,), [qa])
            for recording, qa in self._balanced("sound_exists", exists, rng):
                add((recording,), [qa])
            if len({r.category for r in pool}) > 1:
                for pair, qa in self._balanced("sound_order", partial(self._order, rng, pool), rng):
                    add(pair, [qa])
            return rows
        for _ in range(self.size.sounds):
            draw = rng.random()
            if draw < 0.03:
                add((), [sounds.ask_nothing(rng)])
            elif draw < 0.1:
                add((), [sounds.ask_category(rng, "speech")], rng.choice(spoken))
            elif draw < 0.22 and len({r.category for r in pool}) > 1:
                pair, qa = self._order(rng, pool)
                add(pair, [qa])
            else:
                recording = pick(pool)
                asked = [sounds.ask_name(rng, recording)] if rng.random() < 0.85 else []
                if rng.random() < 0.3 or not asked:
                    asked.append(sounds.ask_category(rng, recording.category))
                if rng.random() < 0.35:
                    asked.append(sounds.ask_exists(rng, recording, every))
                rng.shuffle(asked)
                add((recording,), asked)
        return rows

    @staticmethod
    def _order(rng: random.Random, pool: list[Recording]) -> tuple[tuple[Recording, Recording], QA]:
        pair = sounds.pair_of(rng, pool)
        return pair, sounds.ask_order(rng, *pair)


def _replay(make: Composer, size: Size, world: questions.World, made: Made) -> list[Record]:
    """Written questions about images, of the kinds of stage 2."""
    rows = planning.stage2(make, replace(planning.SIZES["full"], stage2=size.replay), world)
    for row in rows:
        row["id"] = row["id"].replace("stage2", "train-image")
        row["source"] = "image"
        answer_in_sentences(row)
    made.pictures += make.pictures
    return rows


def answer_in_sentences(row: Record) -> None:
    """Have some of a row's long answers asked for as whole sentences, as answers that are spoken are."""
    rng, turns = random.Random(row["id"]), row["conversations"]
    for asked, answered, kind in zip(turns[::2], turns[1::2], row["kinds"], strict=True):
        said = answered["value"]
        if kind in ("zh", "ocr") or words.SHORT in asked["value"] or said in ("Yes.", "No.") or rng.random() < 0.4:
            continue
        asked["value"] += f"\n{words.SENTENCE}"
        lower = said[:1].lower() + said[1:]
        if kind == "caption":
            answered["value"] = f"The picture shows {lower}"
        elif kind == "name" and ("these" in asked["value"] or "things" in asked["value"]):
            answered["value"] = f"They are {lower}"
        elif kind == "name" or (kind == "position" and said.startswith(("A ", "An "))):
            answered["value"] = f"It is {lower}"

"""The senses' data: rows that our readers read, media that are what the rows say, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from polymodal.data.load import load_records
from polymodal.errors import DataError, PolymodalError
from polymodal.media.audio import open_audio
from polymodal.messages import Audio, Image, Video
from recipes.default.dataset.__main__ import main
from recipes.default.dataset.plan import Composer
from recipes.default.dataset.scenes import Ground
from recipes.default.dataset.senses import clips, rcc, sounds, speech
from recipes.default.dataset.senses.build import build_senses, kinds_of
from recipes.default.dataset.senses.media import RATE, choose_voice, loudest, resample, roughen, write_sound
from recipes.default.dataset.senses.rcc import read_rcc
from recipes.default.dataset.sources import drawn_shapes, measure

SENSES = ("video", "speech", "sound")
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not on this machine")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("senses") / "tiny"
    build_senses(folder, size="tiny", workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    """Shapes alone, whose cut-outs are drawn."""
    thumbs = tmp_path_factory.mktemp("thumbs")
    found = [measure(source, thumbs / f"{i}.png", None) for i, source in enumerate(drawn_shapes())]
    composer = Composer(
        random.Random(3), [s for s in found if s], [""], heldout=False, prefix=str(thumbs), suffix="jpg"
    )
    assert len(composer.sources) == len(found)
    return composer


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


@needs_espeak
def test_same_bytes_every_time(tiny: Path, tmp_path: Path) -> None:
    build_senses(tmp_path / "again", size="tiny", workers=1, progress=False)
    assert digests(tmp_path / "again") == digests(tiny)
    build_senses(tmp_path / "other", size="tiny", seed=1, workers=1, progress=False)
    assert digests(tmp_path / "other")["train.json"] != digests(tiny)["train.json"]


@needs_espeak
def test_rows_are_read_and_their_media_are_there(tiny: Path) -> None:
    seen: Counter[type] = Counter()
    ids: set[str] = set()
    for name in ("train.json", *(f"val_{sense}.json" for sense in SENSES)):
        records = load_records(tiny / name)
        assert len(records) > 3 and not ids & {r.id for r in records}
        ids |= {r.id for r in records}
        for record in records:
            for part in (part for message in record.messages for part in message.media):
                seen[type(part)] += 1
                assert isinstance(part, Audio | Image | Video) and Path(str(part.source)).is_file()
                if isinstance(part, Audio):
                    sound = open_audio(part.source)
                    assert (sound.source_rate, sound.source_channels) == (RATE, 1) and 0.3 < sound.seconds < 8
                elif isinstance(part, Video):
                    with av.open(str(part.source)) as file:
                        frames = list(file.decode(video=0))
                    assert 8 <= len(frames) <= 14 and (frames[0].width, frames[0].height) == (224, 224)
    assert set(seen) == {Audio, Image, Video}
    parts = [r["id"] for sense in (*SENSES, "image") for r in load(tiny, f"train_{sense}.json")]
    assert sorted(parts) == sorted(r["id"] for r in load(tiny, "train.json"))


def transcripts(row: dict[str, Any]) -> list[str]:
    return [row["transcript"]] if isinstance(row["transcript"], str) else row["transcript"]


@needs_espeak
def test_a_row_tells_what_is_said_in_each_of_its_sounds(tiny: Path) -> None:
    for row in load(tiny, "train_speech.json") + load(tiny, "val_speech.json"):
        files = [row["audio"]] if isinstance(row["audio"], str) else row["audio"]
        assert len(transcripts(row)) == len(files) and all(transcripts(row))
        if row["kind"] == "repeat":
            assert transcripts(row) == [row["conversations"][1]["value"]]


@needs_espeak
def test_nothing_held_out_is_trained_on(tiny: Path) -> None:
    def things(start: str) -> set[str]:
        rows = [r for sense in ("video", "speech") for r in load(tiny, f"{start}_{sense}.json")]
        return {key for row in rows for key in row.get("sources", ())}

    assert things("train") and things("val") and not things("train") & things("val")
    voices = {
        start: {r["voice"] for r in load(tiny, f"{start}_speech.json") if "voice" in r} for start in ("train", "val")
    }
    assert voices["val"] and not voices["train"] & voices["val"]
    kinds = ("repeat", "fact", "is_question")
    said = {
        start: {text for r in load(tiny, f"{start}_speech.json") if r["kind"] in kinds for text in transcripts(r)}
        for start in ("train", "val")
    }
    assert said["val"] and said["train"] and not said["val"] & said["train"]
    for sense in SENSES:
        for row in load(tiny, f"val_{sense}.json"):
            assert len(row["conversations"]) == 2
            reply = row["conversations"][1]["value"].lower()
            assert reply in [answer.lower() for answer in row["answers"]]


MAGENTA = Ground("plain", (255, 0, 255), (255, 0, 255), None)


def shown(clip: clips.Clip, folder: Path, thumbs: Path) -> list[np.ndarray]:
    """Where something is drawn, frame by frame, on a ground that no shape has the colour of."""
    (folder / "clips").mkdir(exist_ok=True)
    clips.draw_clip(replace(clip, ground=MAGENTA), thumbs, folder)
    with av.open(str(folder / clip.file)) as file:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]
    assert len(frames) == clip.frames
    return [np.abs(frame - MAGENTA.first).sum(-1) > 120 for frame in frames]


def centre(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(0)  # row, column


@pytest.mark.parametrize("kind", ["direction", "moving", "growth", "coming"])
def test_what_a_clip_says_is_what_it_shows(kind: str, make: Composer, tmp_path: Path) -> None:
    answers = set()
    for _ in range(12):
        clip = clips.compose_clip(make, kind, "clips/a.mp4")
        first, *_, last = shown(clip, tmp_path, Path(make.prefix))
        qa = clip.asked[0]
        answers.add(qa.accepted[0])
        assert qa.kind == kind
        if kind == "coming":
            assert (first.any(), last.any()) == ((False, True) if qa.accepted[0] == "appears" else (True, False))
        elif kind == "growth":
            assert (last.sum() > 4 * first.sum()) == (qa.accepted[0] == "grows")
            assert (first.sum() > 4 * last.sum()) == (qa.accepted[0] == "shrinks")
        else:
            down, right = centre(last) - centre(first)
            if kind == "moving":
                assert (max(abs(down), abs(right)) > 80) == (qa.accepted[0] in ("yes", "moves"))
            else:
                way = {"left": -right, "right": right, "up": -down, "down": down}
                assert way[qa.accepted[0]] > 80
    assert len(answers) == {"direction": 4, "moving": 4}.get(kind, 2)


@pytest.mark.parametrize("kind", clips.KINDS)
def test_no_answer_is_right_much_more_often_than_chance(kind: str, make: Composer) -> None:
    told = Counter(clips.compose_clip(make, kind, "clips/a.mp4").asked[0].accepted[0] for _ in range(400))
    chance = {"direction": 4, "moving": 4, "count": 4, "growth": 2, "coming": 2}.get(kind, 8)
    assert max(told.values()) / 400 < 1 / chance + 0.1


def test_voices_of_validation_are_not_heard_in_training() -> None:
    rng = random.Random(0)
    heard = {side: {choose_voice(rng, heldout=side) for _ in range(2000)} for side in (False, True)}
    names = {side: {voice.name for voice in voices if voice.engine == "espeak"} for side, voices in heard.items()}
    assert len(names[False]) > 20 and len(names[True]) > 3 and not names[False] & names[True]
    assert {voice.engine for voice in heard[True]} == {"espeak", "piper"}
    assert {choose_voice(rng, heldout=False, piper=False).engine for _ in range(20)} == {"espeak"}


def test_sentences_are_many_and_facts_are_right() -> None:
    rng = random.Random(0)
    made = [speech.sentence(rng) for _ in range(2000)]
    assert len(set(made)) > 1800 and all(1 < len(text.split()) < 9 and text[-1] in ".?" for text in made)
    known = {qa.question: qa for qa in speech.facts()}
    assert known["What is seven plus eight?"].accepted == ("fifteen", "15")
    assert known["What is the opposite of near?"].short == "Far"
    assert 400 < len(speech.vocabulary()) < 800
    assert speech.ask_question(rng, "Is it?").short == "Yes" and speech.ask_question(rng, "It is.").short == "No"


def test_sounds_keep_their_pitch_and_are_written_without_loss(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(22_050) / 22_050).astype(np.float32)
    found = resample(tone, 22_050, RATE)
    assert len(found) == RATE and np.argmax(np.abs(np.fft.rfft(found))) == 440
    write_sound(tmp_path / "a.flac", 0.5 * found)
    assert np.abs(open_audio(tmp_path / "a.flac").samples - 0.5 * found).max() < 1e-4
    rough = roughen(found, 1)
    assert np.array_equal(rough, roughen(found, 1)) and not np.array_equal(rough[:1000], roughen(found, 2)[:1000])
    quiet_then_loud = np.concatenate([np.zeros(4 * RATE, np.float32), found])
    assert np.abs(loudest(quiet_then_loud, 1.0, 0.0)).mean() > 0.1


def test_recordings_are_held_out_and_their_ends_kept(tmp_path: Path) -> None:
    ramp = np.linspace(-0.9, 0.9, 6 * RATE).astype(np.float32)
    write_sound(tmp_path / "long.flac", ramp)
    recording = sounds.Recording("a", "dog", "animal", str(tmp_path / "long.flac"))
    assert sounds.is_long(recording)
    (tmp_path / "sounds").mkdir()
    for heldout in (False, True):
        cut = sounds.Cut(f"sounds/{heldout}.flac", 5, (recording,), 1.0, heldout)
        sounds.draw_cut(cut, tmp_path)
    many = [sounds.Recording(f"{name}{i}", name, "animal", "x") for name in ("dog", "cat") for i in range(3)]
    lone = [sounds.Recording(f"lone{i}", f"lone{i}", "instrument", "x") for i in range(16)]
    kept = {r.key: r.heldout for r in sounds.hold_out([*many, *lone], random.Random(0)) if r.heldout}
    assert Counter(kept.values()) == {"file": 2, "name": 2}
    assert {key[:3] for key, how in kept.items() if how == "file"} == {"dog", "cat"}


def resource_file(files: dict[str, bytes], *, packed: Container[str] = ()) -> bytes:
    """A resource file of Qt with one folder, as its compiler lays it out."""
    names = data = b""
    nodes = [struct.pack(">IHII", 0, 2, 1, 1), struct.pack(">IHII", 0, 2, len(files), 2)]

    def name(text: str) -> int:
        nonlocal names
        place = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return place

    name("sounds")
    for file, content in files.items():
        body = struct.pack(">I", len(content)) + zlib.compress(content) if file in packed else content
        nodes.append(struct.pack(">IHHHI", name(file), file in packed, 0, 0, len(data)))
        data += struct.pack(">I", len(body)) + body
    tree = b"".join(node + bytes(8) for node in nodes)
    start = 24
    header = struct.pack(">4sIIIII", b"qres", 3, start, start + len(tree), start + len(tree) + len(data), 0)
    return header + tree + data + names


def test_a_resource_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.ogg": b"OggS" + bytes(50), "text é": b"read me " * 40}
    (tmp_path / "a.rcc").write_bytes(whole := resource_file(files, packed={"text é"}))
    assert read_rcc(tmp_path / "a.rcc") == {f"sounds/{name}": content for name, content in files.items()}
    circle = bytearray(whole)
    circle[24 + 22 + 10 : 24 + 22 + 14] = struct.pack(">I", 0)  # the folder is in itself
    monkeypatch.setattr(rcc, "MOST_BYTES", 1000)
    bomb = resource_file({"a": bytes(1001)}, packed={"a"})
    for bad in (whole[:-20], whole[:30], b"", b"OggS" + whole[4:], bytes(circle), bomb):
        (tmp_path / "bad.rcc").write_bytes(bad)
        with pytest.raises(DataError, match=r"bad\.rcc: damaged, or no resource file"):
            read_rcc(tmp_path / "bad.rcc")


def test_kinds_are_counted() -> None:
    row = {
        "kinds": ["a", "b"],
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Yes."}] * 2,
    }
    assert kinds_of([row, row])["a"] == {"questions": 2, "most frequent": 1.0}


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["senses", "--output", str(tmp_path / "a"), "--packages", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(PolymodalError, match="'tinny'"):
        build_senses(tmp_path / "a", size="tinny")
    with pytest.raises(DataError, match="apt-get install gcompris-qt-data"):
        stamps = tmp_path / "animals"
        stamps.mkdir()
        for number, name in enumerate(["dog", "cat", "cow", "pig", "hen", "owl", "fox"]):
            (stamps / f"{number}.ogg").write_bytes(b"")
            (stamps / f"{number}.txt").write_text(f"A {name}.")
        sounds.read_recordings(tmp_path, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get install espeak-ng"):
        build_senses(tmp_path / "b", size="tiny", workers=1, progress=False)
    assert not (tmp_path / "b").exists()

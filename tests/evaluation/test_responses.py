"""Kept answers: what names them, torn lines, two writers."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from PIL import Image as PILImage

from polymodal.errors import MediaError, PolymodalError
from polymodal.evaluation.responses import Responses
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Document, Image, Message, Video, assistant, system, user

PARAMS = GenerationParams(max_new_tokens=8)

pytestmark = pytest.mark.usefixtures("private_cache")


def test_answers_are_there_again() -> None:
    kept = Responses("m", PARAMS)
    kept.put({"a": "one\u2028line", "b": PolymodalError("failed"), "c": ""})
    assert kept.get("a") == "one\u2028line" and kept.get("b") is None
    again = Responses("m", PARAMS)
    assert (again.get("a"), again.get("b"), again.get("c")) == ("one\u2028line", None, "")
    assert Responses("other", PARAMS).get("a") is None


def test_nothing_is_kept_on_disk_unless_wanted(private_cache: Path) -> None:
    kept = Responses("m", PARAMS, on_disk=False)
    kept.put({"a": "x"})
    assert kept.get("a") == "x" and not private_cache.exists()


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_line_that_was_torn_costs_that_line_alone(cut: int) -> None:
    kept = Responses("m", PARAMS)
    kept.put({"a": "first"})
    kept.put({"b": "second", "c": "third"})
    data = kept.file.read_bytes()
    kept.file.write_bytes(data[: -cut - 1])
    after = Responses("m", PARAMS)
    # The answers of a batch are there together or not at all, so that the rest of a batch is never asked by itself.
    assert (after.get("a"), after.get("b"), after.get("c")) == ("first", None, None)
    after.put({"d": "fourth"})
    assert [Responses("m", PARAMS).get(key) for key in "abcd"] == ["first", None, None, "fourth"]


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe\n", b"[1]\n", b'{"answers": 3}\n', b'{"answers": {"a": 4}}\n', b"[" * 10**5]
)
def test_a_damaged_file_is_read_as_far_as_it_goes(junk: bytes) -> None:
    kept = Responses("m", PARAMS)
    kept.put({"b": "x"})
    kept.file.write_bytes(kept.file.read_bytes() + junk)
    after = Responses("m", PARAMS)
    assert (after.get("a"), after.get("b")) == (None, "x")


def _write(name: str) -> None:
    kept = Responses("m", PARAMS)
    for n in range(40):
        kept.put({f"{name}{n}": name * 5000})


def test_two_runs_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_write, args=(name,)) for name in "xy"]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    kept = Responses("m", PARAMS)
    assert all(kept.get(f"{name}{n}") == name * 5000 for name in "xy" for n in range(40))


def test_what_names_an_answer(tmp_path: Path) -> None:
    PILImage.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "a.png").read_bytes())
    PILImage.new("RGB", (4, 4), "blue").save(tmp_path / "b.png")

    def key(*messages: Message, blind: bool = False, **more: object) -> str:
        return Responses("m", **{"params": PARAMS, "on_disk": False, **more}).key(messages, blind)  # type: ignore[arg-type]

    a = user(Image(tmp_path / "a.png"), "What?")
    same = {
        key(a),
        key(user(Image(str(tmp_path / "same.png")), "What?")),
        key(user(Image((tmp_path / "a.png").read_bytes()), "What?")),
        key(a, rank=3),
    }
    assert len(same) == 1
    others = [
        key(user(Image(tmp_path / "b.png"), "What?")),
        key(user("What?", Image(tmp_path / "a.png"))),
        key(user(Audio(tmp_path / "a.png"), "What?")),
        key(user(Image(PILImage.new("RGB", (4, 4))), "What?")),
        key(user(Image(PILImage.new("RGB", (2, 8))), "What?")),
        key(system("Be short."), a),
        key(a, assistant("x"), user("y")),
        key(a, blind=True),
        key(a, params=GenerationParams(max_new_tokens=9)),
        *(key(user(Video(tmp_path / "a.png", **said), "What?")) for said in ({}, {"start": 1.0}, {"num_frames": 4})),  # type: ignore[arg-type]
        *(key(user(Document(tmp_path / "a.png", **said), "What?")) for said in ({}, {"pages": "1"}, {"text": "ocr"})),  # type: ignore[arg-type]
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_answers_of_a_batch_size_are_its_own() -> None:
    Responses("m", PARAMS, batch=4).put({"a": "x"})
    assert [Responses("m", PARAMS, batch=size).get("a") for size in (4, 1, None)] == ["x", None, None]


def test_a_file_that_changed_is_another_image(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.png"
    keys = set()
    for n, colour in enumerate(("red", "blue")):
        PILImage.new("RGB", (4, 4), colour).save(path)
        os.utime(path, (n, n))
        keys.add(Responses("m", PARAMS).key([user(Image(path))]))
    assert len(keys) == 2


def test_media_that_cannot_be_read(tmp_path: Path) -> None:
    kept = Responses("m", PARAMS)
    for source, said in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "is a directory"),
        ("http://x/y", "remote"),
    ):
        with pytest.raises(MediaError, match=said):
            kept.key([user(Image(source))])


def test_a_cache_that_cannot_be_written_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PolymodalError, match="--no-cache"):
        Responses("m", PARAMS)
    assert Responses("m", PARAMS, on_disk=False).get("a") is None


def test_the_file_is_plain_json_lines() -> None:
    kept = Responses("m", PARAMS)
    kept.put({"a": "1"})
    kept.put({"b": "2"})
    lines = [json.loads(line) for line in kept.file.read_text().splitlines() if line]
    assert lines == [{"answers": {"a": "1"}}, {"answers": {"b": "2"}}]

"""`python -m recipes.default.dataset demo` in its smallest size, which needs no packages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from polymodal.data.load import load_records
from recipes.default.dataset import sources, words
from recipes.default.dataset.__main__ import main
from recipes.default.dataset.generate import DEMO, keep_demo_out
from recipes.default.dataset.plan import KINDS


def build(folder: Path, *flags: str) -> int:
    return main(["demo", "--output", str(folder), "--size", "tiny", "--workers", "1", *flags])


def test_same_bytes_every_time_and_the_readme_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("where it is from")
    assert build(tmp_path / "a") == 2 and "not empty" in capsys.readouterr().err
    assert build(tmp_path / "a", "--force") == 0 and build(tmp_path / "b") == 0
    assert "31 questions" in capsys.readouterr().out
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / x).rglob("*.*")} for x in "ab")
    assert first.pop("README.md") == b"where it is from" and first == second and len(first) > 31


def test_no_kind_asks_about_the_same_twice(tmp_path: Path) -> None:
    assert build(tmp_path / "set") == 0
    rows = json.loads((tmp_path / "set" / "rows.json").read_text(encoding="utf-8"))
    # All are shapes here, and no answer may be frequent.
    assert Counter(row["kind"] for row in rows) == dict.fromkeys([*KINDS, "caption_zh"], 3) | {"category": 1}
    about = [(row["kind"], *(row["sources"] or [row["answers"][-1]])) for row in rows]
    assert len(set(about)) == len(about)
    assert all(row["answers"] and not {"prompt", "kinds"} & row.keys() for row in rows)


def test_a_chinese_caption_says_what_is_drawn(tmp_path: Path) -> None:
    build(tmp_path / "set")
    for record in load_records(tmp_path / "set" / "rows.json"):
        if record.kind == "caption_zh":
            shape, colour = record.extra["sources"][0].removeprefix("shapes:").split("/")
            content = words.ZH_COLOURS[colour] + words.ZH_SHAPES[shape]
            assert record.extra["answers"] == [content]
            assert record.messages[-1].text == f"一个{words.ZH_COLOURS[colour]}的{words.ZH_SHAPES[shape]}。"


def test_what_the_demo_shows_is_held_out_with_any_seed() -> None:
    rows = json.loads(DEMO.read_text(encoding="utf-8"))
    shown = {key for row in rows for key in row["sources"] if key.startswith("shapes:")}
    kept = keep_demo_out(sources.drawn_shapes())  # nothing is held out so far
    assert shown and {s.key for s in kept if s.heldout} == shown


def test_small_is_no_size_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "x"), "--size", "small"]) == 2
    assert "'small'" in capsys.readouterr().err

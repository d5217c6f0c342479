"""Charts and documents of the default data: drawn as planned, answered from the plan, nothing held out drawn."""

from __future__ import annotations

import importlib.util
import json
import pickle
import random
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from polymodal.data.load import load_records
from polymodal.media.ocr import Line
from polymodal.messages import Image, Text, user, with_ocr
from polymodal.processing import document_pages
from recipes.default.dataset import chart_questions, charts, document_questions, documents, drawn, ocr_tokens, words

pytest.importorskip("matplotlib", reason="charts need the extra `train`")
FONTS = [""]  # matplotlib's own
BOTH = pytest.mark.parametrize("made", [chart_questions, document_questions], ids=["charts", "documents"])
KEPT = {chart_questions: charts.LABELS | {"title": charts.TITLES}, document_questions: documents.WORDS}


def turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


@BOTH
def test_everything_follows_from_the_seed(made: ModuleType) -> None:
    images, records = made.compose(random.Random(3), FONTS, 12)
    again, same = made.compose(random.Random(3), FONTS, 12)
    assert records == same and images == again and records != made.compose(random.Random(4), FONTS, 12)[1]
    for image in images[:4]:  # in another process too
        picture = pickle.loads(pickle.dumps(image)).draw(Path())
        assert picture.mode == "RGB" and picture.size == (image.side, image.side)
        assert picture.tobytes() == image.draw(Path()).tobytes()


@BOTH
def test_records_are_conversations_about_one_image(made: ModuleType) -> None:
    images, records = made.compose(random.Random(0), FONTS, 60)
    assert [record["image"] for record in records] == [image.file for image in images]
    for record in records:
        assert 3 <= len(turns(record)) <= 5 and len(record["kinds"]) == len(turns(record))
        assert record["conversations"][0]["value"].startswith("<image>\n") and record["kind"] == made.KIND
        assert all(asked and answer for asked, answer in turns(record))
        assert {*record["kinds"]} <= {made.KIND, "caption", "zh"} and record["source"] == made.KIND
    images, records = made.captions(random.Random(0), FONTS, 5)
    assert [turns(record)[0][0] for record in records] == ["<image>"] * 5 and len({i.file for i in images}) == 5


@BOTH
def test_yes_and_no_tell_nothing(made: ModuleType) -> None:
    said = Counter(
        (question.split("\n")[0].split(" ")[0], answer[:2])
        for record in made.compose(random.Random(5), FONTS, 1500)[1]
        for question, answer in turns(record)
        if answer.startswith(("Yes", "No")) and answer.rstrip(".").split(",")[0] in ("Yes", "No")
    )
    yes, no = (sum(n for (_, answer), n in said.items() if answer == word) for word in ("Ye", "No"))
    assert min(yes, no) > 300 and 0.45 < yes / (yes + no) < 0.55


@BOTH
def test_held_out_words_are_never_drawn_for_training(made: ModuleType) -> None:
    learned = {w.lower() for text in KEPT[made].values() for phrase in drawn.split(text, False) for w in phrase.split()}
    learned |= {word.lower() for word in words.fixes()["written words"]}
    kept = {
        word.lower()
        for name, text in KEPT[made].items()
        if name != "picture"
        for phrase in drawn.split(text, True)
        for word in phrase.split()
    }
    assert kept and not kept & learned
    train, _ = made.compose(random.Random(1), FONTS, 300)
    held, _ = made.heldout(random.Random(1), FONTS)
    assert not kept & {word.lower() for image in train for line in image.lines for word in line.split()}
    assert kept & {word.lower() for image in held for line in image.lines for word in line.split()}
    assert all(image.heldout for image in held) and not any(image.heldout for image in train)


@BOTH
def test_held_out_questions_cover_every_topic_and_no_answer_is_frequent(made: ModuleType) -> None:
    images, records = made.heldout(random.Random(2), FONTS, 100)
    assert len(records) == len(images) == len({record["id"] for record in records}) == 100
    topics = Counter(record["topic"] for record in records)
    assert {*topics} == {*made.TOPICS} and max(topics.values()) - min(topics.values()) <= 1
    answers = Counter(record["conversations"][-1]["value"] for record in records)
    yes, no = answers.pop("Yes"), answers.pop("No")
    assert abs(yes - no) <= 2 and max(answers.values()) <= 10
    for record in records:
        assert record["conversations"][-1]["value"].lower() in [answer.lower() for answer in record["answers"]]
        assert record["prompt"].endswith(words.SHORT)


def test_bars_are_as_high_as_the_answers_say() -> None:
    """Measured in the drawn image, by colour alone."""
    rng, seen = random.Random(7), 0
    while seen < 25:
        chart = charts.plan("a.jpg", rng, FONTS, heldout=False)
        if chart.form != "bar" or chart.one_colour or chart.topic == "color":
            continue
        seen += 1
        pixels = np.asarray(chart.draw(Path())).astype(int)
        high = {}
        for name, shade in zip(chart.colours, chart.shades, strict=True):
            mine = np.abs(pixels - shade).sum(axis=2) < 24
            (column,) = [(a + c) / 2 for thing, a, _, c, _ in chart.places if thing == f"{name} bar"]
            high[name] = int(mine[:, round(column * chart.side)].sum())
        tallest = max(high, key=lambda name: high[name])
        assert chart.colours[chart.values.index(max(chart.values))] == tallest
        asked = chart_questions.ask_end(rng, chart, most=True)
        if asked is not None:
            assert asked.accepted == (chart.labels[chart.colours.index(tallest)],)
        compared = chart_questions.ask_compare(rng, chart)
        for first, second in [(a, b) for a in chart.colours for b in chart.colours if a != b]:
            if compared and f"the {first} bar higher than the {second} bar" in compared.question:
                assert (compared.short == "Yes") == (high[first] > high[second])


def test_bars_end_at_the_number_of_the_axis_that_is_their_value() -> None:
    rng, seen = random.Random(2), 0
    while seen < 20:
        chart = charts.plan("a.jpg", rng, FONTS, heldout=False)
        if chart.form != "bar" or not chart.step:
            continue
        seen += 1
        bars = [place for place in chart.places if place[0].endswith(" bar")]
        ticks = {
            place[0]: (place[2] + place[4]) / 2
            for place in chart.places
            if place[0].isdigit() and place[3] < bars[0][1]
        }
        for bar, value in zip(bars, chart.values, strict=True):
            assert bar[2] == pytest.approx(ticks[str(value)], abs=0.004)
        asked = chart_questions.ask_value(rng, chart)
        assert asked is not None and asked.short in ticks


@BOTH
def test_words_lie_where_places_say(made: ModuleType) -> None:
    for image in made.compose(random.Random(11), FONTS, 40)[0]:
        if getattr(image, "angle", 0.0):
            continue
        pixels = np.asarray(image.draw(Path()).convert("L")).astype(int)
        read = [word for line in image.lines for word in line.split()]
        assert not Counter(read) - Counter(place[0] for place in image.places)
        for word, *sides in image.places:
            assert all(0 <= side <= 1 for side in sides) and sides[0] <= sides[2] and sides[1] <= sides[3]
            left, top, right, bottom = (round(side * image.side) for side in sides)
            if word in read:  # ink on paper
                assert np.ptp(pixels[top : bottom + 1, left : right + 1]) > 60, (image.file, word)


def test_what_was_read_stands_as_the_command_line_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, records = document_questions.compose(random.Random(1), FONTS, 1)
    (record,) = records
    tokens = ["TOTAL", "12.50"]
    images[0].draw(Path()).save(tmp_path / "a.png")
    early = {**ocr_tokens.with_tokens(record, tokens), "image": "a.png"}
    (tmp_path / "a.json").write_text(json.dumps([early]))
    (read,) = load_records(tmp_path / "a.json", tmp_path)
    lines = [Line("TOTAL 12.50", 0.9, [])]
    monkeypatch.setattr(document_pages, "load_engine", lambda: None)
    monkeypatch.setattr(document_pages, "read_lines", lambda engine, pixels: lines)
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    (asked,) = document_pages.expand_documents([user(with_ocr(Image(tmp_path / "a.png")), question)])
    assert "".join(p.text for p in read.messages[0].parts if isinstance(p, Text)) == asked.text
    assert type(read.messages[0].parts[0]) is Image is type(asked.parts[0])
    late = ocr_tokens.with_tokens(record, tokens, after_question=True)["conversations"][0]["value"]
    plain, short, _ = question.partition(f"\n{words.SHORT}")
    assert late == f"<image>\n{plain}\nReference OCR token: TOTAL, 12.50{short}"


@BOTH
def test_a_share_of_the_rows_gets_words_and_captions_stay(made: ModuleType) -> None:
    images, records = made.compose(random.Random(1), FONTS, 400)
    told = ocr_tokens.add_tokens(random.Random(2), images, records, share=0.5)
    assert told == ocr_tokens.add_tokens(random.Random(2), images, records, share=0.5)
    marked = [record for record in told if "Reference OCR token: " in record["conversations"][0]["value"]]
    assert 140 < len(marked) < 230 and all(
        a["conversations"][1:] == b["conversations"][1:] for a, b in zip(records, told)
    )
    images, records = made.captions(random.Random(1), FONTS, 20)
    assert ocr_tokens.add_tokens(random.Random(2), images, records, share=1.0) == records
    right = [word for line in images[0].lines for word in line.split()]
    assert ocr_tokens.simulated(random.Random(0), images[0].lines, trouble=0.0) == right
    assert any(ocr_tokens.simulated(random.Random(seed), images[0].lines, 0.3) != right for seed in range(9))


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="needs the extra `ocr`")
def test_rapidocr_reads_what_is_drawn() -> None:
    images, records = document_questions.compose(random.Random(8), FONTS, 4)
    told = ocr_tokens.add_tokens(random.Random(0), images, records, share=1.0, read=1)
    title = images[0].facts["title"].split()[0]
    assert title in told[0]["conversations"][0]["value"]

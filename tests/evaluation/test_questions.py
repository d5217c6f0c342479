"""Held-out scoring: metrics on hand-made answers, the blind control, failed items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends import load
from polymodal.backends.base import Backend, Reply, Timing, Usage
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError, PolymodalError
from polymodal.evaluation.results import constant_text, summarise, table
from polymodal.evaluation.runner import Run, Settings, in_grey
from polymodal.evaluation.task import Sample
from polymodal.evaluation.tasks.questions import QUESTIONS, ask_records
from polymodal.generation.params import GenerationParams
from polymodal.media.audio import open_audio
from polymodal.media.video import probe
from polymodal.messages import Audio, Document, Image, Message, Video, assistant, user
from polymodal.metrics.intervals import mean_interval
from polymodal.metrics.text import exact_match, mentions, word_recall
from tests.media.makers import clip, tone


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("A sheep.", ["sheep"], 1), ("Sheep", ["ram", "sheep"], 1), ("two boxes", ["two box"], 1), ("Yes", ["no"], 0),
        ("a black sheep", ["sheep"], 0), ("", ["sheep"], 0), ("一只狗。", ["一只狗"], 1), ("glass", ["glas"], 0),
    ],
)  # fmt: skip
def test_exact_match(answer: str, accepted: list[str], score: float) -> None:
    assert exact_match(answer, accepted) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("This is a steam locomotive.", ["locomotive", "train"], 1), ("A train set.", ["train"], 1),
        ("A scar.", ["car"], 0), ("Two sheep and cherries.", ["cherry"], 1), ("polar bear", ["bear polar"], 0),
    ],
)  # fmt: skip
def test_mentions(answer: str, accepted: list[str], score: float) -> None:
    assert mentions(answer, accepted) == score


def test_word_recall_counts_content_words_of_the_best_caption() -> None:
    assert word_recall("There is a red kangaroo.", ["A red kangaroo."]) == 1.0
    assert word_recall("A red dog.", ["A red kangaroo.", "The blue and green wall of a house"]) == 0.5
    assert word_recall("A", ["A"]) == 0.0


def test_interval_covers_the_mean_and_narrows_with_data() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def record(image: PILImage.Image | str, kind: str = "exists", answer: str = "Yes") -> Record:
    messages = (user(Image(image), "Is it red?"), assistant(answer))
    return Record(id="r", messages=messages, kind=kind, source="test", extra={"answers": [answer]})


def test_the_control_sees_grey_of_the_same_size() -> None:
    image = PILImage.new("RGB", (30, 20), (255, 0, 0))
    (blind,) = in_grey([user(Image(image), "What?")])
    part = blind.parts[0]
    assert isinstance(part, Image) and isinstance(part.source, PILImage.Image)
    assert part.source.size == (30, 20) and part.source.getpixel((3, 3)) == (128, 128, 128)
    assert blind.text == "What?"


def test_the_control_sees_grey_pages_and_none_of_their_text(tmp_path: Path) -> None:
    pages = [PILImage.new("RGB", size, "red") for size in ((30, 20), (20, 40))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    (blind,) = in_grey([user(Document(tmp_path / "a.tif", text="ocr"), "What?")])
    images = [part.source for part in blind.media if isinstance(part, Image)]
    assert [(image.size, image.getcolors()) for image in images if isinstance(image, PILImage.Image)] == [
        (size, [(size[0] * size[1], (128, 128, 128))]) for size in ((30, 20), (20, 40))
    ]
    assert blind.text == "Page 1:\n\nPage 2:\nWhat?"


def test_the_control_hears_a_silence_as_long_as_the_piece_that_is_heard(tmp_path: Path) -> None:
    film, sound = clip(tmp_path / "a.mkv", sound=True), tone(tmp_path / "a.wav", 2.0)
    (blind,) = in_grey([user(Audio(sound, start=0.5, end=1.25), Video(film), Video(film, audio=False), "What?")])
    silence, heard, unheard = blind.media
    assert isinstance(silence, Audio) and silence.start is None is silence.end
    assert len(open_audio(silence.source).samples) == 12_000
    # Whether a video's sound is heard is the model's choice where the question does not say.
    assert probe(heard.source).audio and not probe(unheard.source).audio
    assert not open_audio(heard.source, video=True).samples.any()
    mute = clip(tmp_path / "b.mp4")
    (blind,) = in_grey([user(Video(mute))])
    assert not probe(blind.media[0].source).audio


def test_batches_do_not_change_answers_and_grey_images_equal_their_control(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, "cpu")
    rng = np.random.default_rng(0)
    noise = [PILImage.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(3)]
    grey = PILImage.new("RGB", (30, 20), (128, 128, 128))
    records = [record(p) for p in (*noise, grey)]
    alone, together = (ask_records(model, records, batch_size=size).samples for size in (1, 4))
    assert alone == together
    assert alone[3].answer == alone[3].blind


class OneByOne(Backend):
    """A backend that only answers one conversation, and not every one."""

    name = "one by one"

    def stream(self, messages: Sequence[Message], params: GenerationParams | None = None) -> Iterator[Reply]:
        (image,) = messages[0].media
        if isinstance(image.source, str):
            raise PolymodalError("no such thing")
        words = " yes " if image.source.getpixel((0, 0)) == (255, 0, 0) else "no"
        yield Reply(assistant(words), Usage(1, 1, 1), Timing(0, 0, 0, 0, 0), "stop", self.name)


def test_any_backend_is_asked_and_its_failures_are_failed_items() -> None:
    red = PILImage.new("RGB", (4, 4), (255, 0, 0))
    run = ask_records(OneByOne(), [record(red), record("absent.png")])
    assert [(s.answer, s.blind, s.score, s.blind_score) for s in run.samples] == [
        ("yes", "no", 1.0, 0.0), (None, None, 0.0, 0.0)
    ]  # fmt: skip
    assert run.samples[0].error is None and "absent.png" in str(run.samples[1].error)
    row = summarise(QUESTIONS, "", run, Settings())
    assert (row["n"], row["failed"], row["score"]) == (2, 1, 0.5)


def test_a_record_without_answer_is_an_error(tiny_model_folder: Path) -> None:
    broken = Record(id="broken", messages=(user("What?"),), kind="name", source="test", extra={})
    with pytest.raises(DataError, match="broken: a held-out record needs a question and its answer"):
        ask_records(load(tiny_model_folder, "cpu"), [broken])
    call = Message("assistant", (), tool_calls=({"function": {"name": "f", "arguments": {}}},))
    with pytest.raises(DataError, match="broken: its answer is a call, which is no text to be scored"):
        ask_records(load(tiny_model_folder, "cpu"), [replace(broken, messages=(user("What?"), call))])


def sample(kind: str, answer: str | None, accepted: str, score: float = 0.0, blind: float = 0.0) -> Sample:
    metric = {"name": "contains"}.get(kind, "exact")
    return Sample("i", kind, "", (accepted,), metric, {}, {}, answer, None, score, "", blind)


def summary(samples: list[Sample]) -> dict[str, Any]:
    return summarise(QUESTIONS, "", Run(samples, GenerationParams(), 1, None, 0), Settings())


def test_summary_and_table() -> None:
    samples = [
        sample("count", "two", "two", 1, 0), sample("count", "two", "two", 1, 1),
        sample("count", None, "three", 0, 0), sample("count", "two", "two", 1, 0),
    ]  # fmt: skip
    scores = summary(samples)
    (row,) = scores["kinds"]
    assert (row["n"], row["failed"], row["score"], row["blind"], row["majority"]) == (4, 1, 0.75, 0.25, 0.75)
    assert row["margin_interval"][0] <= 0.5 <= row["margin_interval"][1]
    assert "| questions | exact | 4 (1 failed) | 75.0% | " in table([scores])
    assert "| 25.0% | +50.0% (" in table([scores]) and "| 75.0% | 75.0% |" in table([scores])


def test_a_constant_text_that_mentions_much_is_a_control_of_its_own() -> None:
    names = ["cat", "dog", "cow", "cat"]
    (row,) = summary([sample("name", "a cat and a dog", name) for name in names])["kinds"]
    # One answer names the cat; five words have room for all three.
    assert (row["majority"], row["constant"]) == (0.5, 1.0)
    (short,) = summary([sample("name", "a cat", name) for name in names])["kinds"]
    assert short["constant"] == 0.75
    captions = [replace(sample("name", "red", text), metric="word_recall") for text in ("a red house", "the red dog")]
    assert constant_text(captions, 1) == "red"

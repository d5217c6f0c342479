"""The order in which a run asks: what the same images are about stands together, and a batch needs little padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from polymodal.backends import load
from polymodal.evaluation.runner import Settings, in_order, run_task
from polymodal.evaluation.task import Example, Task
from polymodal.messages import Image, user

TASK = Task("colors", "colors of small images", "exact", ("",), lambda _folder, _split: (), max_new_tokens=4)


def test_questions_about_the_same_media_stand_together_and_the_longest_come_first() -> None:
    questions = {"a": ("x", 5), "b": ("y", 9), "c": ("x", 7), "d": ("z", 8), "e": ("y", 1), "f": ("", 2), "g": ("", 3)}
    assert in_order(questions) == ["b", "e", "d", "c", "a", "g", "f"]
    assert in_order(dict(reversed(questions.items()))) == in_order(questions)


@pytest.mark.parametrize("blind", [False, True])
def test_a_run_asks_what_is_about_one_image_in_one_batch(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    images = [PILImage.new("RGB", (40, 30), (60 * i, 200 - 50 * i, 90)) for i in range(4)]
    words = ["one", "and which other", "the third of them"]
    asked = [(image, text) for text in words for image in images]  # all images, again and again
    examples = [Example(str(i), (user(Image(im), text),), ("x",)) for i, (im, text) in enumerate(asked)]
    model: Any = load(tiny_model_folder, "cpu")
    batches: list[tuple[int, int]] = []
    whole = model.generate_batch

    def seen(conversations: Any, params: Any) -> Any:
        batches.append((len(conversations), len({c[0].media[0].source.tobytes() for c in conversations})))
        return whole(conversations, params)

    monkeypatch.setattr(model, "generate_batch", seen)
    found = run_task(model, TASK, examples, Settings(batch_size=6, cached=False, blind=blind))
    assert [images for rows, images in batches if rows == 6] == [2, 2, *([1, 1] if blind else [])]
    alone = run_task(model, TASK, examples, Settings(batch_size=1, cached=False, blind=blind))
    assert [(s.answer, s.blind) for s in found.samples] == [(s.answer, s.blind) for s in alone.samples]

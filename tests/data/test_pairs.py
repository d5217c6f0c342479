"""What the caption of a record is: one definition, for training and for scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polymodal.data.pairs import image_and_captions
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError
from polymodal.evaluation.tasks.retrieval import pairs_of
from polymodal.messages import Audio, Image, assistant, user

IMAGE = Image("a.png")
PAIR = Record("1", (user(IMAGE), assistant(" A cat. ")))
TWO = (*PAIR.messages, user("And?"), assistant("It sleeps."))


def test_the_caption_is_the_one_answer_or_the_list() -> None:
    assert image_and_captions(PAIR) == ("a.png", ("A cat.",))
    given = replace(PAIR, messages=TWO, extra={"captions": ["Cat.", " Pet. ", "Cat."]})
    assert image_and_captions(given) == ("a.png", ("Cat.", "Pet."))
    silent = replace(PAIR, messages=(*TWO[:3], replace(TWO[3], train=False)))
    assert image_and_captions(silent) == ("a.png", ("A cat.",))
    assert pairs_of([PAIR, silent, given]).texts == ("A cat.", "Cat.", "Pet.")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"messages": TWO}, "its caption is its answer, and it has 2 of them; give one, or a list `captions`"),
        ({"messages": PAIR.messages[:1]}, "it has 0 of them"),
        ({"messages": (user("Q"), assistant("A"))}, "a pair has one image, found 0 media"),
        ({"messages": (user(IMAGE, IMAGE), assistant("A"))}, "found 2 media"),
        ({"messages": (user(Audio("a.wav")), assistant("A"))}, "a pair has one image, found 1 media"),
        ({"extra": {"captions": "A cat."}}, "`captions` must be a list of texts"),
        ({"extra": {"captions": []}}, "`captions` must be a list of texts"),
        ({"extra": {"captions": ["A", " "]}}, "the caption is empty"),
    ],
)
def test_what_is_no_pair_is_refused_by_training_and_scores_alike(changes: dict[str, Any], complaint: str) -> None:
    for read in (image_and_captions, lambda record: pairs_of([record])):
        with pytest.raises(DataError, match=f"record 1: .*{complaint}"):
            read(replace(PAIR, **changes))

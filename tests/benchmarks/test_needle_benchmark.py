"""The needle benchmark hides one needle where it says, and asks as often for what is there as for what is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import needle
from polymodal.media.video import sample_frames
from polymodal.messages import Image, Message, Video


def shown(image: Any) -> str | None:
    """The place of the needle's strong colour above the scene's square; None where there is none."""
    above = np.asarray(image).astype(int)[:150]
    return "there" if (above.max(axis=2) - above.min(axis=2) > 90).sum() > 300 else None


class Looker:
    """Says yes to any needle, whichever is asked for, and remembers where it was."""

    def __init__(self) -> None:
        self.places: list[tuple[int, ...]] = []
        self.questions: list[str] = []

    def generate(self, messages: list[Message], _params: Any) -> Any:
        media = messages[0].media
        first = media[0]
        if isinstance(first, Video):
            images: list[Any] = list(sample_frames(first.source, first.num_frames))
        else:
            images = [part.source for part in media if isinstance(part, Image)]
        self.places.append(tuple(place for place, image in enumerate(images) if shown(image)))
        self.questions.append(messages[0].text)
        return SimpleNamespace(text="Yes." if self.places[-1] else "No.")


@pytest.mark.parametrize("kind", ["video", "images"])
def test_one_needle_is_hidden_where_it_is_said_to_be(kind: str, tmp_path: Path) -> None:
    looker: Any = Looker()
    found = list(needle.cases(looker, kind, 5, 2, tmp_path))
    assert len(found) == 2 * 16 and sum(case.there for case in found) == 16
    assert looker.places == [*[(0,)] * 4, *[(2,)] * 4, *[(4,)] * 4, *[()] * 2] * 2
    what = "in the video?" if kind == "video" else "in the pictures?"
    assert all(f" {what}\n" in question for question in looker.questions) and "Is there a star" in looker.questions[0]
    # Who sees that something is there, but not what, is right in half of the cases, and so is who sees grey.
    for group in ("first", "middle", "last", "blind"):
        assert needle.shares([case for case in found if case.place == group])[0] == 0.5
    row = needle.table(found, [5]).splitlines()[-1]
    assert row.startswith("| 5 | 50% | 50% | 50% | 50% |") and row.endswith("| 100% | 100% | 50% |")


def test_a_model_is_asked_past_its_limit_and_drawn(tiny_model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["--model", str(tiny_model_folder), "--lengths", "2", "3", "--pairs", "1", "--kinds", "video"]
    needle.main([*argv, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "A needle in a video" in out and "| 3 |" in out
    assert (tmp_path / "needle-video.png").stat().st_size > 5000

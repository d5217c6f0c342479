"""report.html: one file that loads nothing, whatever stands in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.evaluation.report import LONGEST, SHOWN, spread, write_report
from polymodal.evaluation.results import summarise
from polymodal.evaluation.runner import Run, Settings
from polymodal.evaluation.task import Example, Sample, Task
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, user

TASK = Task("toy", "for tests", "exact", ("val",), lambda _folder, _split: ())


class Page(HTMLParser):
    """What a browser would load, and the text that it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path, samples: list[Sample], examples: list[Example], task: Task = TASK, model: str = "m") -> Page:
    run = Run(samples, GenerationParams(), 4, True, len(samples))
    document = {"model": model, "versions": {"torch": "2"}, "tasks": {"toy": summarise(task, "val", run, Settings())}}
    write_report(folder, document, [("toy", samples, examples)])
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def asked(folder: Path, count: int, size: int = 8) -> tuple[list[Sample], list[Example]]:
    """Half of them right."""
    samples, examples = [], []
    for n in range(count):
        path = folder / f"{n}.png"
        if not path.exists():
            PILImage.new("RGB", (size, size), (n, 0, 0)).save(path)
        examples.append(Example(str(n), (user(Image(path), f"question {n}"),), ("right",)))
        answer = "right" if n % 2 else "left"
        samples.append(
            Sample(str(n), "k", f"<image>question {n}", ("right",), "exact", {}, {}, answer, score=float(n % 2))
        )
    return samples, examples


def test_it_shows_right_and_wrong_answers_and_loads_nothing(tmp_path: Path) -> None:
    found = page(tmp_path, *asked(tmp_path, 6))
    assert len(found.urls) == 6 and all(url.startswith("data:image/jpeg;base64,") for url in found.urls)
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    assert "default-src 'none'" in (tmp_path / "report.html").read_text()
    for text in ("Right", "Wrong", "question 1", "left", "50.0%", "torch", "batch_invariant"):
        assert text in found.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=http://x onerror=y>&\"'\x00\u202e\ud800"
    samples, examples = asked(tmp_path, 2)
    said: dict[str, Any] = {"error": evil, "blind": evil, "blind_score": 0.0}
    samples = [Sample(evil, evil, evil, (evil,), "exact", {}, {}, evil, score=float(n), **said) for n in range(2)]
    found = page(tmp_path, samples, [Example(evil, examples[0].messages)], model=evil)
    assert not {"script"} & set(found.tags) and all(url.startswith("data:") for url in found.urls)
    assert "<script>alert(1)</script>" in found.text and not re.search("[\x00\u202e\ud800]", found.text)


@pytest.mark.parametrize("many", [3, 60])
def test_its_size_is_bounded(many: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    PILImage.fromarray(noise).save(tmp_path / "big.png")
    media = [Image(tmp_path / "big.png")] * many
    long = "word " * 10**5
    samples = [
        Sample(str(n), "", long, (long,), "exact", {}, {}, long, score=float(n % 2), blind=long, blind_score=0.0)
        for n in range(4)
    ]
    found = page(tmp_path, samples, [Example(str(n), (user(*media, "x"),)) for n in range(4)])
    assert (tmp_path / "report.html").stat().st_size < 16 * (4 * 40_000 + 5 * LONGEST)
    assert len(found.urls) == 4 * min(many, 4) and "(500,000 characters)" in found.text


def test_images_that_have_vanished_or_are_none(tmp_path: Path) -> None:
    samples, examples = asked(tmp_path, 6)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"no image")
    found = page(tmp_path, samples, examples)
    assert len(found.urls) == 4 and "question 1" in found.text
    assert len(page(tmp_path, samples, []).urls) == 0  # tasks that keep no questions, such as retrieval


def test_failures_are_shown_as_failures_and_other_tasks_stay_in_the_table(tmp_path: Path) -> None:
    samples, examples = asked(tmp_path, 2)
    samples.append(Sample("f", "k", "p", ("r",), "exact", {}, {}, None, error="no such file", score=0.0))
    examples.append(Example("f", (user("p"),)))
    run = Run(samples, GenerationParams(), 4, True, 3)
    document: dict[str, Any] = {"model": "m", "versions": {}, "tasks": {}}
    document["tasks"] = {"toy": summarise(TASK, "val", run, Settings()), "old": summarise(TASK, "old", run, Settings())}
    write_report(tmp_path, document, [("toy", samples, examples)])
    found = Page((tmp_path / "report.html").read_text())
    assert "failed: no such file" in found.text and "3 (1 failed)" in found.text and "toy old" in found.text


def test_scores_beyond_one_are_shown_as_they_are(tmp_path: Path) -> None:
    samples = [Sample(str(n), "ab"[n], "p", ("r",), "cider", {}, {}, "x", score=7.5 * n) for n in range(2)]
    found = page(tmp_path, samples, [])
    assert "750.0" in found.text
    widths = [float(width) for width in re.findall(r'width:([\d.]+)%"></i>', (tmp_path / "report.html").read_text())]
    assert max(widths) == 100


def test_spread() -> None:
    samples = [Sample(str(n), "", "", (), "", {}, {}, "") for n in range(20)]
    for count in range(21):
        shown = spread(samples[:count], SHOWN)
        assert len(shown) == min(count, SHOWN) == len({sample.id for sample in shown})
    assert [sample.id for sample in spread(samples, 4)] == ["0", "5", "10", "15"]

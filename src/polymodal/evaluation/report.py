"""`report.html`: the scores of a run, how they were taken, and images of right and wrong answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polymodal.errors import PolymodalError
from polymodal.evaluation.results import Json, shown_score, table_cells
from polymodal.evaluation.task import Example, Sample
from polymodal.media.image import open_image
from polymodal.messages import Image
from polymodal.utils.files import write_text
from polymodal.utils.html import data_url, html_page

SHOWN = 8
"""Right answers and wrong answers of a task that are shown."""
IMAGES = 4
"""Images of a question that are shown."""
LONGEST = 2000
"""Characters of a prompt or an answer that are shown."""
_SIZE = (240, 240)
_SETTINGS = ("split", "metric", "variant", "judge", "limit", "decoding", "batch_size", "batch_invariant", "prompt_hash",
             "preprocessing_hash", "template_hash")  # fmt: skip


def write_report(folder: Path, document: Json, done: Sequence[tuple[str, Sequence[Sample], Sequence[Example]]]) -> None:
    """Write the page of a results folder: all its scores, and answers of the tasks of this run."""
    head, rows = table_cells(list(document["tasks"].values()))
    tasks = [_task(name, document["tasks"][name], samples, examples) for name, samples, examples in done]
    page = html_page(
        "evaluation/report.html.jinja",
        **{"model": document["model"], "versions": document["versions"], "head": head, "rows": rows, "tasks": tasks},
    )
    write_text(folder / "report.html", page)


def _task(name: str, document: Json, samples: Sequence[Sample], examples: Sequence[Example]) -> Json:
    asked = {example.id: example for example in examples}
    scored = [sample for sample in samples if sample.score is not None]
    top = max([1.0, *(sample.score or 0.0 for sample in scored)])
    wrong_is_high = document["lower_is_better"]
    right = [sample for sample in scored if ((sample.score or 0.0) >= 0.5) != wrong_is_high]
    wrong = [sample for sample in scored if ((sample.score or 0.0) >= 0.5) == wrong_is_high]
    bars = [
        {"kind": row["kind"], "n": row["n"], "score": 100 * row["score"] / top, "shown": shown_score(document, row),
         "blind": None if row.get("blind") is None else 100 * row["blind"] / top}
        for row in document["kinds"]
    ]  # fmt: skip
    cards = [
        ("Right", [_card(sample, asked.get(sample.id), True) for sample in spread(right, SHOWN)]),
        ("Wrong", [_card(sample, asked.get(sample.id), False) for sample in spread(wrong, SHOWN)]),
    ]
    settings = {key: document[key] for key in _SETTINGS if document.get(key) not in (None, {})}
    return {"name": name, "bars": bars, "cards": cards, "settings": settings}


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Some samples, evenly from the beginning to the end."""
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _card(sample: Sample, example: Example | None, right: bool) -> dict[str, Any]:
    images = []
    parts = [
        part for message in (example.messages if example else ()) for part in message.parts if isinstance(part, Image)
    ]
    for part in parts[:IMAGES]:
        try:
            image = open_image(part.source)
        except PolymodalError:
            continue  # the sample's error says so
        image.thumbnail(_SIZE)
        images.append(data_url(image, "jpeg", quality=80))
    answer = sample.answer if sample.answer is not None else f"failed: {sample.error}"
    references = ", ".join(dict.fromkeys(sample.references))
    said = {"prompt": sample.prompt, "answer": answer, "references": references, "blind": sample.blind}
    shown = {key: text if text is None else _short(text) for key, text in said.items()}
    return {"id": sample.id, **shown, "images": images, "right": right}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"

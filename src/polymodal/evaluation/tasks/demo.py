"""The benchmark that ships: captions, kinds of questions, text, counts, relations and several images, all held out."""

from collections.abc import Iterator
from pathlib import Path

from polymodal.data.load import load_records
from polymodal.evaluation.task import Example, Task
from polymodal.evaluation.tasks.questions import examples_of

FOLDER = Path(__file__).resolve().parent.parent / "demo"


def _read(_folder: Path, _split: str) -> Iterator[Example]:
    yield from examples_of(load_records(FOLDER / "rows.json"))


DEMO = Task(
    name="demo",
    about="220 held-out questions by kind, which come with the package",
    metric="by kind",
    splits=("test",),
    read=_read,
    max_new_tokens=24,
    blind=True,
)

"""Your own questions: any file of conversations whose answers are known is a task.

    polymodal eval MODEL --data rows.json --image-root images --metric vqa_accuracy

The last answer of a record is asked for; what counts as right is its `answers`, or that last answer. Without `--metric`
a record's `kind` chooses: a name has to be mentioned, a caption's words to be there, anything else to be equal. Beside
the model stand an image-blind control (the same model with every image replaced by grey), the majority answer, the
single accepted answer that scores best if given to every question of a kind, and the constant text: words strung
together for the metric's sake, no longer than the model's longest answer.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from polymodal.backends.base import Backend
from polymodal.data.load import load_records
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError, unknown_name
from polymodal.evaluation.runner import Run, Settings, run_task
from polymodal.evaluation.task import ERROR_RATES, Example, Task
from polymodal.metrics import CORPUS_METRICS, METRICS

KIND_METRICS = {
    **dict.fromkeys(("name", "spoken_name", "sound_name", "sees", "mistaken", "unsure", "clear"), "contains"),
    **dict.fromkeys(("caption", "caption_zh", "repeat"), "word_recall"),
}
"""The metric of a kind; `exact` where a kind is not listed."""


def examples_of(records: Iterable[Record], metric: str = "") -> list[Example]:
    """What records ask."""
    examples: dict[str, Example] = {}
    again: Counter[str] = Counter()
    for record in records:  # ids of such files are often an image's, which several conversations share
        example = _example(record, metric)
        while example.id in examples:
            again[record.id] += 1
            example = replace(example, id=f"{record.id}#{again[record.id] + 1}")
        examples[example.id] = example
    return list(examples.values())


def _example(record: Record, metric: str) -> Example:
    if len(record.messages) < 2 or record.messages[-1].role != "assistant":
        raise DataError(f"{record.id}: a held-out record needs a question and its answer")
    if record.messages[-1].tool_calls:
        raise DataError(f"{record.id}: its answer is a call, which is no text to be scored; leave it out")
    accepted = record.extra.get("answers") or [record.messages[-1].text]
    if not isinstance(accepted, list) or not all(isinstance(answer, str) and answer.strip() for answer in accepted):
        raise DataError(f"{record.id}: `answers` must be a list of texts, none of them empty")
    name = metric or KIND_METRICS.get(record.kind, "exact")
    return Example(record.id, record.messages[:-1], tuple(accepted), record.kind, name)


def data_task(data: Path, image_root: Path | None = None, metric: str = "", max_new_tokens: int = 24) -> Task:
    """The task that a data file is."""
    if metric and metric not in METRICS and metric not in CORPUS_METRICS:
        raise unknown_name("metric", metric, [*METRICS, *CORPUS_METRICS])
    return Task(
        name=data.stem,
        about=f"the records of {data}",
        metric=metric or "by kind",
        splits=("",),
        read=lambda _folder, _split: examples_of(load_records(data, image_root), metric),
        max_new_tokens=max_new_tokens,
        lower_is_better=metric in ERROR_RATES,
        needs=(),
        blind=True,
    )


QUESTIONS = Task("questions", "held-out records", "exact", ("",), lambda _folder, _split: (), "", 24, blind=True)


def ask_records(model: Backend, records: Sequence[Record], batch_size: int = 16) -> Run:
    """Ask held-out records, with the image-blind control; nothing is kept."""
    settings = Settings(batch_size=batch_size, blind=True, cached=False)
    return run_task(model, QUESTIONS, examples_of(records), settings)

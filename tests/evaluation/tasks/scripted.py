"""Answers that a test gives, and what comes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polymodal.backends.base import Backend, Reply, Timing, Usage
from polymodal.errors import PolymodalError
from polymodal.evaluation.compare import read_predictions, rescore
from polymodal.evaluation.results import summarise
from polymodal.evaluation.runner import Run, Settings, prompt_text, run_task
from polymodal.evaluation.task import Example, Sample, Task
from polymodal.evaluation.tasks import read_examples
from polymodal.generation.params import GenerationParams
from polymodal.media.source import read_bytes
from polymodal.messages import Image, Message, assistant

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "prompts"


class Says(Backend):
    """Says what a function makes of the conversation; an error is a failure."""

    name = "says"

    def __init__(self, answer: Callable[[Sequence[Message]], str | Exception]) -> None:
        self.answer_to = answer
        self.heard: list[str] = []

    def stream(self, messages: Any, params: GenerationParams | None = None) -> Iterator[Reply]:
        self.heard.append(prompt_text(messages))
        said = self.answer_to(messages)
        if isinstance(said, Exception):
            raise said
        yield Reply(assistant(said), Usage(1, 1, 1), Timing(0, 0, 0, 0, 0), "stop", self.name)


def run_with(task: Task, examples: Sequence[Example], answers: Mapping[str, str | None]) -> Run:
    """Run a task with answers by id; None fails."""
    said = {example.messages: answers[example.id] for example in examples}

    def answer(messages: Sequence[Message]) -> str | Exception:
        text = said[tuple(messages)]
        return PolymodalError("gave up") if text is None else text

    return run_task(Says(answer), task, examples, Settings(cached=False))


def results_of(task: Task, run: Run, split: str = "") -> dict[str, Any]:
    return summarise(task, split or task.splits[0], run, Settings())


def predicted(task: Task, folder: Path, answers: Mapping[str, str], **how: Any) -> dict[str, Any]:
    """Score a file of answers, as `polymodal eval rescore` does."""
    path = folder / "answers.json"
    path.write_text(json.dumps(answers), encoding="utf-8")
    samples: list[Sample] = read_predictions(path, read_examples(task, task.splits[0], folder), task.metric)
    return results_of(task, Run(rescore(samples, **how), GenerationParams(), 1, None, 0))


def plain(examples: Sequence[Example], ids: bool = True) -> list[Any]:
    """All that examples say, images as their bytes, by id."""
    rows = []
    for e in sorted(examples, key=lambda example: example.id):
        images = [read_bytes(p.source) for m in e.messages for p in m.parts if isinstance(p, Image)]  # type: ignore[arg-type]
        rows.append(
            ((e.id if ids else ""), prompt_text(e.messages), images, e.references, e.kind, e.metric, e.options, e.extra)
        )
    return rows


def assert_golden_prompt(task: Task, folder: Path) -> None:
    """The first question, as the benchmark's reference asks it."""
    first = read_examples(task, task.splits[0], folder)[0]
    assert prompt_text(first.messages) + "\n" == (GOLDEN / f"{task.name}.txt").read_text(encoding="utf-8")

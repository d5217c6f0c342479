"""Small sets read in several layouts, and a backend that says what it was told to say about each question."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.mini import open_answers as mini
from polymodal.backends.base import Backend, Reply, Timing, Usage
from polymodal.cli import main
from polymodal.errors import DataError, PolymodalError
from polymodal.evaluation.responses import media_hash
from polymodal.evaluation.results import summarise
from polymodal.evaluation.runner import Settings, prompt_text, run_task
from polymodal.evaluation.task import Example, for_server
from polymodal.evaluation.tasks import TASKS, read_examples
from polymodal.generation.params import GenerationParams
from polymodal.messages import Message, assistant

FORMS = {"official": mini.OFFICIAL, "hub": mini.HUB, "tsv": mini.TSV}
GOLDEN = Path(__file__).parents[2] / "golden" / "prompts"


def read(folder: Path, name: str, split: str, form: str = "official", count: int = 8) -> list[Example]:
    """Write a set into a folder and read it."""
    own = folder / form
    if not own.exists():
        FORMS[form][name.removesuffix("_ocr")](own, count)
    return list(TASKS[name].read(own, split))


def contents(examples: Sequence[Example]) -> list[Any]:
    """All that a question is, but for what only some forms know: groups and types of questions."""
    return [
        (e.id, prompt_text(e.messages), media_hash(e.messages[0].media[0].source), e.references, e.metric, e.options)
        for e in examples
    ]


def check_forms(folder: Path, name: str, split: str, forms: Sequence[str], count: int = 8) -> None:
    """All forms give the same examples; the official files and the hub's parquet the same kinds too."""
    examples = {form: read(folder, name, split, form, count) for form in forms}
    assert len(examples["official"]) == count
    for form in forms:
        assert contents(examples[form]) == contents(examples["official"]), form
        if form == "hub" and name != "nocaps":  # whose hub's table has no domains
            assert [(e.kind, e.extra) for e in examples[form]] == [(e.kind, e.extra) for e in examples["official"]]


def check_prompt(example: Example, name: str) -> None:
    """The prompt is that of the golden file."""
    assert prompt_text(example.messages) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


class Told(Backend):
    """Says what it was told about a question; fails where that is None."""

    name = "told"

    def __init__(self, examples: Sequence[Example], said: Sequence[str | None]) -> None:
        self.said = dict(zip(map(self._key, (e.messages for e in examples)), said, strict=True))

    @staticmethod
    def _key(messages: Sequence[Message]) -> tuple[str, str]:
        return prompt_text(messages), media_hash(messages[0].media[0].source)

    def stream(self, messages: Sequence[Message], params: GenerationParams | None = None) -> Iterator[Reply]:
        said = self.said[self._key(messages)]
        if said is None:
            raise PolymodalError("gave up")
        yield Reply(assistant(said), Usage(1, 1, 1), Timing(0, 0, 0, 0, 0), "stop", self.name)


def score(name: str, split: str, examples: Sequence[Example], said: Sequence[str | None]) -> dict[str, Any]:
    """The figures of answers."""
    settings = Settings(cached=False)
    run = run_task(Told(examples, said), TASKS[name], examples, settings)
    return summarise(TASKS[name], split, run, settings)


def submission(name: str, split: str, folder: Path, said: Sequence[str | None], count: int | None = None) -> bytes:
    """The file that is sent for answers to the first questions of a folder's set, whose name it checks to be alone."""
    task = TASKS[name]
    examples = list(task.read(folder, split))
    asked = examples[: len(said)]
    run = run_task(Told(asked, said), task, asked, Settings(cached=False))
    ids = list(task.server_ids(folder, split)) if task.server_ids else []
    assert task.submit is not None
    (file,) = task.submit(for_server(run.samples, examples, ids), split, folder / "out")
    return file.read_bytes()


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit what a JSON file holds."""
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def check_fault(folder: Path, name: str, split: str, message: str) -> None:
    """Reading a folder gives one line."""
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_examples(TASKS[name], split, folder)
    assert "\n" not in str(caught.value)


def run_command(model: list[str], name: str, split: str, root: Path, output: Path) -> dict[str, Any]:
    """Score a model by the command line, and give what results.json says of the task."""
    argv = ["eval", *model, "--tasks", f"{name}_{split}", "--data-root", str(root), "--output", str(output)]
    assert main([*argv, "--max-new-tokens", "4", "--batch-size", "4"]) == 0
    samples = (output / f"{name}_{split}" / "samples.jsonl").read_text().splitlines()
    document: dict[str, Any] = json.loads((output / "results.json").read_text())["tasks"][f"{name}_{split}"]
    assert document["n"] == len(samples) == 4 and document["failed"] == 0
    (file,) = (path for path in (output / f"{name}_{split}").iterdir() if path.name != "samples.jsonl")
    sent = json.loads(file.read_text())
    assert len(sent) == 4
    answers = [json.loads(line)["answer"] for line in samples]
    return {**document, "sent": sent, "answers": answers}


def says(text: str) -> Callable[[Any], None]:
    """What the server answers to every question."""
    message = {"role": "assistant", "content": text}
    body = {"model": "tiny", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    data = json.dumps(body).encode()

    def action(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return action

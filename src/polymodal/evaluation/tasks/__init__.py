"""The table of benchmarks, and where their files are found."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polymodal.errors import ConfigError, DataError, first_line, unknown_name
from polymodal.evaluation.task import Example, Sample, Task, unique_ids
from polymodal.evaluation.tasks import captions, demo, documents, multiple_choice, speech, video, vqa, yes_no
from polymodal.evaluation.tasks.questions import QUESTIONS

_MODULES = (vqa, documents, captions, multiple_choice, yes_no, video, speech)
TASKS: dict[str, Task] = {task.name: task for task in (demo.DEMO, *(t for module in _MODULES for t in module.TASKS))}
"""Every benchmark by its name. A new one is a `Task` in a module here, and its line."""


def find_task(name: str) -> tuple[Task, str]:
    """A benchmark and its split, as in "mmmu_val"; the first of its splits where none is named."""
    for task in TASKS.values():
        if name == task.name:
            return task, task.splits[0]
        if name.startswith(f"{task.name}_") and (split := name.removeprefix(f"{task.name}_")) in task.splits:
            return task, split
    if close := [task for task in TASKS.values() if name.startswith(f"{task.name}_")]:
        raise ConfigError(f"task {name!r}: {close[0].name} has the splits {', '.join(close[0].splits)}")
    raise unknown_name("task", name, TASKS)


def find_data(task: Task, split: str, data_root: Path | None) -> Path:
    """The folder of a benchmark's files: its own in the data root, or the data root itself; else from the hub."""
    if not task.hub and data_root is None:
        return Path()  # ships with the package
    if data_root is not None:
        if not data_root.is_dir():
            raise DataError(f"--data-root {data_root}: no such folder")
        own = data_root / (task.folder or task.name)
        return own if own.is_dir() else data_root
    from huggingface_hub import snapshot_download

    wanted = task.hub_files.get(split)
    if task.hub_files and wanted is None:
        raise DataError(f"{task.name}: {task.hub} has no split {split}; give --data-root with its official files")
    try:
        return Path(snapshot_download(task.hub, repo_type="dataset", allow_patterns=wanted and list(wanted)))
    except Exception as error:  # the hub's client raises many types
        raise DataError(
            f"{task.name}: {task.hub} cannot be fetched ({first_line(error)[:160]}); give --data-root with its files"
        ) from None


def read_examples(task: Task, split: str, folder: Path) -> list[Example]:
    """What a benchmark asks, each question once."""
    return list(unique_ids(task.read(folder, split), f"{folder}: {task.name}"))


def task_of(path: Path, samples: Sequence[Sample]) -> tuple[Task, str]:
    """The benchmark of a samples.jsonl, by its folder's name; a file of one's own is scored as a mean by kind."""
    name = (path if path.is_dir() else path.parent).name
    try:
        return find_task(name)
    except ConfigError:
        return replace(QUESTIONS, name=name), ""

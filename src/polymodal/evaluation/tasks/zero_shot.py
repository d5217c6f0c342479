"""Zero-shot classification: name an image by the nearest of the classes' prompts, which nothing was trained on.

As CLIP does (Radford et al. 2021, arXiv:2103.00020): each class is written into every prompt template, and a class is
the mean of its prompts' directions. The file says what the classes are and which of them are right for each image;
several may be, since a beagle is rightly called a dog.

    {"templates": ["{}.", "A photo of {}."],
     "tasks": [{"name": "animals", "classes": ["a cat", "a dog"], "images": [{"image": "a.jpg", "labels": [1]}]}]}

With images to learn from under `train`, in the same form, a linear probe and k-NN read the same classes from the image
tower's vectors alone (`--tasks linear-probe`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.errors import DataError
from polymodal.evaluation.embedder import Embedder, Progress
from polymodal.evaluation.files import read_json
from polymodal.evaluation.task import Figures, Sample, Task
from polymodal.messages import Source
from polymodal.metrics.intervals import mean_interval
from polymodal.metrics.linear_probe import Labelled, knn, linear_probe
from polymodal.metrics.retrieval import class_embeddings, zero_shot_chance, zero_shot_ranks
from polymodal.metrics.text import markdown_table, span


@dataclass(frozen=True)
class ZeroShotTask:
    """Images and the classes to choose from."""

    name: str  # For the table
    templates: tuple[str, ...]  # Sentences with `{}` for the class
    classes: tuple[str, ...]  # Names, with their article where the templates want one
    images: tuple[Source, ...]  # Where each image is
    labels: tuple[tuple[int, ...], ...]  # Of each image, the numbers of the classes that are right
    train: tuple[Source, ...] = ()  # Images that a linear probe learns from
    train_labels: tuple[tuple[int, ...], ...] = ()  # The class of each


@dataclass(frozen=True)
class ZeroShotScore:
    """The scores of one task."""

    name: str  # The task's
    images: int  # How many
    classes: int  # How many to choose from
    top1: float  # Share of images whose nearest class is right
    top1_interval: tuple[float, float]  # 95%
    top5: float  # Share with a right class among the nearest five
    top5_interval: tuple[float, float]  # 95%
    chance1: float  # What a random order scores
    chance5: float  # The same for five
    ranks: tuple[float, ...]  # Of each image's first right class


def load_tasks(path: Path, limit: int | None = None) -> list[ZeroShotTask]:
    """Read a file of tasks, as `python -m recipes.default.dataset pairs` writes in `classes.json`."""
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("tasks"), list) or not data["tasks"]:
        raise DataError(f"{path}: expected an object with `tasks`, each with `name`, `classes` and `images`")
    templates = _texts(data.get("templates", ["{}"]), f"{path}: `templates`")
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(f"{path}: template {template!r} must hold {{}} once, where the class goes")
    return [_task(task, templates, path, number, limit) for number, task in enumerate(data["tasks"])]


def zero_shot_scores(
    embedder: Embedder, tasks: Sequence[ZeroShotTask], *, batch_size: int = 32, progress: Progress | None = None
) -> list[ZeroShotScore]:
    """Score a model on tasks; an image or prompt that several of them share is embedded once."""
    images = {str(source): source for task in tasks for source in task.images}
    prompts = list(dict.fromkeys(text for task in tasks for text in _prompts(task)))
    image = embedder.images(list(images.values()), batch_size=batch_size, progress=progress)
    text = embedder.texts(prompts, batch_size=batch_size, progress=progress)
    at = {key: i for i, key in enumerate(images)}
    said = {prompt: i for i, prompt in enumerate(prompts)}
    rows = []
    for task in tasks:
        own = image[[at[str(source)] for source in task.images]]
        written = text[[said[prompt] for prompt in _prompts(task)]].unflatten(0, (len(task.classes), -1))
        labels = torch.zeros(len(own), len(task.classes), dtype=torch.bool)
        for row, right in enumerate(task.labels):
            labels[row, list(right)] = True
        ranks = zero_shot_ranks(own, class_embeddings(written), labels).numpy()
        expected = zero_shot_chance(labels, len(task.classes))
        one, five = ((float(hits.mean()), mean_interval(hits)) for hits in (ranks < 1.0, ranks < 5.0))
        rows.append(
            ZeroShotScore(
                *(task.name, len(own), len(task.classes), *one, *five, expected["top1"], expected["top5"]),
                ranks=tuple(ranks.tolist()),
            )
        )
    return rows


def samples_of(rows: Sequence[ZeroShotScore], tasks: Sequence[ZeroShotTask]) -> list[Sample]:
    """Each image with its right classes, as scored samples."""
    return [
        Sample(f"{task.name} {number}", task.name, "<image>", tuple(task.classes[i] for i in right), ZERO_SHOT.metric,
               {}, {"rank": rank}, f"rank {rank + 1:g}", score=float(rank < 1))
        for row, task in zip(rows, tasks, strict=True)
        for number, (right, rank) in enumerate(zip(task.labels, row.ranks, strict=True))
    ]  # fmt: skip


def _tops(samples: Sequence[Sample]) -> Figures:
    ranks = np.array([sample.extra["rank"] for sample in samples])
    return {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}


ZERO_SHOT = Task(
    "zero-shot", "which class's prompts an image is nearest to", "top1", ("",), lambda _folder, _split: (),
    aggregate=_tops,
)  # fmt: skip


def probe_samples(
    embedder: Embedder, tasks: Sequence[ZeroShotTask], *, batch_size: int = 32, progress: Progress | None = None
) -> list[Sample]:
    """Score a linear probe and k-NN on the images' vectors: whether each finds the class of each image."""
    samples = []
    for task in tasks:
        if not task.train:
            raise DataError(f"task {task.name}: a linear probe learns from images; list some with `labels` as `train`")
        parts = []
        for sources, labels in ((task.train, task.train_labels), (task.images, task.labels)):
            if several := [source for source, right in zip(sources, labels, strict=True) if len(right) > 1]:
                raise DataError(f"task {task.name}: {several[0]!s} has several labels; a linear probe takes one")
            vectors = embedder.images(list(sources), batch_size=batch_size, progress=progress)
            parts.append(Labelled(vectors, torch.tensor([right[0] for right in labels])))
        found = {name: method(parts[0], parts[1]).tolist() for name, method in (("linear", linear_probe), ("knn", knn))}
        samples += [
            Sample(f"{task.name} {i}", task.name, "<image>", (task.classes[right],), PROBE.metric, {},
                   {"knn": float(found["knn"][i])}, "right" if found["linear"][i] else "wrong",
                   score=float(found["linear"][i]))
            for i, (right,) in enumerate(task.labels)
        ]  # fmt: skip
    return samples


def _both(samples: Sequence[Sample]) -> Figures:
    return {
        "linear probe": float(np.mean([sample.score for sample in samples])),
        "k-NN": float(np.mean([sample.extra["knn"] for sample in samples])),
    }


PROBE = Task(
    "linear-probe", "the class that a linear probe reads from the image tower's vectors", "top1", ("",),
    lambda _folder, _split: (), aggregate=_both,
)  # fmt: skip


def table(rows: Sequence[ZeroShotScore]) -> str:
    """The scores as a Markdown table, in percent."""
    head = ("task", "images", "classes", "top 1", "95%", "chance", "top 5", "95%", "chance")
    cells = []
    for row in rows:
        one = (f"{row.top1:.1%}", span(row.top1_interval), f"{row.chance1:.1%}")
        five = (f"{row.top5:.1%}", span(row.top5_interval), f"{row.chance5:.1%}")
        cells.append((row.name, row.images, row.classes, *one, *five))
    return markdown_table(head, cells)


def _prompts(task: ZeroShotTask) -> list[str]:
    """All prompts, the templates of one class after the other; each begins with a capital letter as captions do."""
    filled = [template.replace("{}", name) for name in task.classes for template in task.templates]
    return [text[:1].upper() + text[1:] for text in filled]


def _task(task: Any, templates: tuple[str, ...], path: Path, number: int, limit: int | None) -> ZeroShotTask:
    where = f"{path}: tasks[{number}]"
    if not isinstance(task, dict):
        raise DataError(f"{where}: expected an object with `name`, `classes` and `images`")
    classes = _texts(task.get("classes"), f"{where}: `classes`")
    shown = task.get("images", task.get("pictures"))  # the second is the name of earlier versions
    if not isinstance(shown, list) or not shown:
        raise DataError(f"{where}: `images` must be a list with one at least")
    asked = _labelled(shown[:limit], len(classes), path, f"{where}: images")
    learnt = task.get("train", [])
    if not isinstance(learnt, list):
        raise DataError(f"{where}: `train` must be a list of images with their `labels`")
    train = _labelled(learnt, len(classes), path, f"{where}: train")
    return ZeroShotTask(str(task.get("name", number)), templates, classes, *asked, *train)


def _labelled(
    shown: Sequence[Any], classes: int, path: Path, where: str
) -> tuple[tuple[Source, ...], tuple[tuple[int, ...], ...]]:
    """Images of a list, and the numbers of their right classes."""
    images: list[Source] = []
    labels: list[tuple[int, ...]] = []
    for place, entry in enumerate(shown):
        at = f"{where}[{place}]"
        name, right = (entry.get("image"), entry.get("labels")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name:
            raise DataError(f"{at}: `image` must be a path")
        root = path.resolve().parent
        file = Path(os.path.normpath(root / name))  # links in the folder are followed, as in training data
        if not file.is_relative_to(root):
            raise DataError(f"{at}: {name!r} leaves the folder of {path.name}; images must lie inside it")
        if not isinstance(right, list) or not right or not all(type(i) is int for i in right):
            raise DataError(f"{at}: `labels` must list the numbers of the right classes")
        if min(right) < 0 or max(right) >= classes:
            raise DataError(f"{at}: labels {right}, but classes are numbered 0 to {classes - 1}")
        images.append(file)
        labels.append(tuple(right))
    return tuple(images), tuple(labels)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{where} must be a list of texts with one at least")
    return tuple(value)

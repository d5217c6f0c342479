"""POPE and MME: questions whose answer is yes or no. Prompts as published for LLaVA-1.5 (arXiv:2310.03744)."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation.files import Row, file_in, find_file, find_images, need_file, read_lines, rows_in, text_lines
from polymodal.evaluation.task import Example, Figures, Sample, Task, ask, by
from polymodal.evaluation.tasks.vqa import SHORT
from polymodal.metrics.yes_no import COGNITION, PERCEPTION, mme_totals, pope_aggregate

POPE_KINDS = ("random", "popular", "adversarial")


def _pope_official(folder: Path, _path: Path) -> Iterator[Row]:
    """Its three files, of which one was found."""
    for kind in POPE_KINDS:
        rows = list(read_lines(need_file(folder, f"coco_pope_{kind}.json")))
        for row in rows:
            row.update(image_source=row.get("image"), category=kind)
        yield from find_images(folder, rows)


def _read_pope(folder: Path, _split: str) -> Iterator[Example]:
    official = [(f"coco_pope_{kind}.json", partial(_pope_official, folder)) for kind in POPE_KINDS]
    for row in rows_in(folder, *official, "test-*.parquet", "Full/*.parquet", "POPE.tsv"):
        messages = ask(f"{row.text('text', 'question')}\n{SHORT}", *row.images())
        right = (_label(row, "label", "answer"),)
        name = row.text("question_id", "index", "id")
        image = row.text("image_source", default="") or name
        for kind in row.text("category").split(","):
            stem = image.removesuffix(".jpg")
            yield Example(f"{kind.strip()}/{name}", messages, right, kind.strip(), extra={"image": stem})


def _label(row: Row, *names: str) -> str:
    """The right answer of a row."""
    label = row.text(*names)
    if label.strip().rstrip(".").lower() not in ("yes", "no"):
        raise DataError(f"{row.where}: the right answer is {label!r:.60}, expected yes or no")
    return label


def _pope_figures(samples: Sequence[Sample]) -> Figures:
    """LLaVA's mean of three F1, then each kind's own figures."""
    kinds = {
        kind: pope_aggregate(
            [s.answer for s in own], [s.references[0] for s in own], variant=own[0].options.get("variant", "official")
        )
        for kind, own in by(samples, lambda s: s.kind).items()
    }
    names = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    shown = {f"{kind} {name}": figures[name] for kind, figures in kinds.items() for name in names}
    return {"mean_f1": sum(figures["f1"] for figures in kinds.values()) / len(kinds), **shown}


POPE = Task(
    name="pope",
    about="is an object in the image, in three kinds of absent ones; LLaVA's prompt, the official script",
    metric="pope",
    splits=("test",),
    read=_read_pope,
    hub="lmms-lab-encoder/POPE",
    hub_files={"test": ["data/test-*"]},
    aggregate=_pope_figures,
    group="image",
)


def _mme_rows(folder: Path) -> Iterator[Row]:
    """Of a TSV a task, img, question and answer without a head, or of a text beside each image; else of tables."""
    found = False
    for task in PERCEPTION + COGNITION:
        home = next((path for path in sorted(folder.rglob(task)) if path.is_dir()), folder / task)
        table = find_file(folder, f"{task}.txt")
        for path in [table] if table else sorted(home.rglob("*.txt")):
            found = True
            images = sorted(path.parent.glob(f"{path.stem}.*")) + sorted(home.glob(f"images/{path.stem}.*"))
            own = next((image.name for image in images if image.suffix != ".txt"), path.stem)
            for number, line in text_lines(path):
                cells = line.split("\t") if table else [own, *line.split("\t")]
                if len(cells) < 3:
                    raise DataError(f"{path}: line {number} is not an image, a question and an answer between tabs")
                name, question, answer = cells[:3]
                row = {"category": task, "name": name, "question": question, "answer": answer}
                image = file_in(home, f"images/{name}", name)
                yield Row({**row, "image": image}, f"{path}: line {number}")
    if not found:
        yield from rows_in(folder, "test-*.parquet", "MME.tsv")


def _read_mme(folder: Path, _split: str) -> Iterator[Example]:
    asked: dict[str, int] = {}
    for row in _mme_rows(folder):
        task = row.text("category")
        if task not in PERCEPTION + COGNITION:
            raise DataError(
                f"{row.where}: `category` is {task!r:.60}, none of MME's {len(PERCEPTION + COGNITION)} tasks"
            )
        image = f"{task}/{Path(row.text('name', 'image_path', 'question_id')).name}"
        asked[image] = asked.get(image, 0) + 1
        text = row.text("question").replace(" Please answer yes or no.", "").strip() + f"\n{SHORT}"
        yield Example(
            *(f"{image}#{asked[image]}", ask(text, *row.images()), (_label(row, "answer"),), task),
            extra={"image": image},
        )
    if odd := [image for image, count in asked.items() if count != 2]:
        raise DataError(f"{folder}: {odd[0]} has {asked[odd[0]]} questions; MME has two to each image")


def _mme_figures(samples: Sequence[Sample]) -> Figures:
    """Perception and cognition, then the tasks."""
    return mme_totals((s.kind, s.extra["image"], s.score or 0.0) for s in samples)


MME = Task(
    name="mme",
    about="two yes/no questions an image in 14 tasks; LLaVA's prompt, the official script",
    metric="mme",
    splits=("test",),
    read=_read_mme,
    hub="lmms-lab-encoder/MME",
    hub_files={"test": ["data/test-*"]},
    aggregate=_mme_figures,
    group="image",
    unit=1.0,
)

TASKS = (POPE, MME)

"""DocVQA, InfographicVQA, ChartQA and OCRBench: what pages, infographics and charts say.

Prompts are those that LLaVA's figures on them are taken with (lmms-eval's), greedy decoding. The answers of the test
splits of DocVQA and InfographicVQA are secret: no score, only the submission, in which what was not asked or failed is
empty. A failure scores nothing.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation.files import Row, find_images, json_rows, rows_in
from polymodal.evaluation.task import Example, Figures, Sample, Task, ask, json_file, means_by
from polymodal.evaluation.tasks.vqa import HUB_SPLITS, SHORT

ONE_WORD = "Answer the question with a single word."


# The two of the Robust Reading Competition: what they ask about, the official files, the key of the image's name there,
# the hub's configuration and VLMEvalKit's name.
_INFOGRAPHICS = ("infographicsVQA_{}_v1.0_withQT.json", "infographicsVQA_{}_v1.0.json", "infographicVQA_{}_v1.0.json")
_RRC = {
    "docvqa": ("scanned pages", ("{}_v1.0_withQT.json", "{}_v1.0.json"), "image", "DocVQA", "DocVQA"),
    "infographicvqa": ("infographics", _INFOGRAPHICS, "image_local_name", "InfographicVQA", "InfoVQA"),
}


def _rrc_official(folder: Path, image: str, path: Path) -> Sequence[Row]:
    return find_images(folder, json_rows(path, "data"), image)


def _read_rrc(task: str, folder: Path, split: str) -> Iterator[Example]:
    _, names, image, config, tsv = _RRC[task]
    official = [(name.format(split), partial(_rrc_official, folder, image)) for name in names]
    parquet = f"{HUB_SPLITS[split]}-*.parquet"
    for row in rows_in(folder, *official, f"{config}/{parquet}", parquet, f"{tsv}_{split.upper()}.tsv"):
        keys = ("question_types", "answer_type", "operation/reasoning")
        yield Example(
            id=row.id("questionId", "index"),
            messages=ask(f"{row.value(str, 'question')}\n{SHORT}", row.image()),
            references=row.texts("answers", "answer", secret=split == "test"),
            extra={"types": [name for key in keys for name in row.texts(key, secret=True)]},  # which may be several
        )


def _rrc_task(name: str) -> Task:
    about, _, _, config, _ = _RRC[name]
    return Task(
        name=name,
        about=f"questions about {about}: LLaVA's prompt, ANLS",
        metric="anls",
        splits=tuple(HUB_SPLITS),
        read=partial(_read_rrc, name),
        hub="lmms-lab-encoder/DocVQA",
        hub_files={split: [f"{config}/{hub}-*"] for split, hub in HUB_SPLITS.items()},
        max_new_tokens=32,
        details=means_by("types"),
        submit=json_file(
            f"{name}_{{split}}_submission.json",
            lambda samples: [{"questionId": int(s.id), "answer": s.answer or ""} for s in samples],
        ),
    )


def _chartqa_official(folder: Path, split: str, path: Path) -> Iterator[Row]:
    """Its two files, of which the first was found."""
    for half in ("human", "augmented"):
        rows = json_rows(path.with_name(f"{split}_{half}.json"))
        for row in find_images(folder, rows, "imgname"):
            row["type"] = half
            yield row


def _read_chartqa(folder: Path, split: str) -> Iterator[Example]:
    official = f"{split}_human.json", partial(_chartqa_official, folder, split)
    count = {"human": 0, "augmented": 0}
    for row in rows_in(folder, official, f"{split}-*.parquet", f"ChartQA_{split.upper()}.tsv"):
        half = row.value(str, "type", "split").removeprefix("test_").removesuffix("_test")
        if half not in count:
            raise DataError(f"{row.where}: is of {half!r:.60}, expected human or augmented")
        count[half] += 1
        yield Example(
            id=f"{half}-{count[half]}",  # they have no ids
            messages=ask(f"{row.value(str, 'query', 'question')}\n{ONE_WORD}", row.image()),
            references=(row.value(str, "label", "answer"),),
            kind=half,
        )


def _chartqa_figures(samples: Sequence[Sample]) -> Figures:
    """The mean of the two halves, as it is reported, and each."""
    halves = means_by("kind")(samples)
    return {"score": sum(halves.values()) / max(1, len(halves)), **halves}


CHARTQA = Task(
    name="chartqa",
    about="questions about charts: lmms-eval's prompt, relaxed accuracy, the mean of human and augmented",
    metric="chartqa_relaxed",
    splits=("test", "val"),
    read=_read_chartqa,
    hub="lmms-lab-encoder/ChartQA",
    hub_files={"test": ["data/test-*"]},
    aggregate=_chartqa_figures,
)

_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_DATASETS = {"Handwritten Mathematical Expression Recognition": "HME100k"}


def _ocrbench_official(folder: Path, path: Path) -> Iterator[Row]:
    for row in find_images(folder, json_rows(path), "image_path"):
        answers = row.get("answers")
        row["answers"] = [answers] if isinstance(answers, str) else answers
        yield row


def _read_ocrbench(folder: Path, _split: str) -> Iterator[Example]:
    official = "OCRBench.json", partial(_ocrbench_official, folder)
    for number, row in enumerate(rows_in(folder, official, "test-*.parquet", "OCRBench.tsv")):
        kind = row.value(str, "type", "question_type", "category")
        dataset = row.get(row.named("dataset_name", "dataset"), _DATASETS.get(kind))
        yield Example(
            id=str(number),  # the hub's have no ids
            messages=ask(row.value(str, "question").strip(), row.image()),
            references=row.texts("answers", "answer"),
            kind=kind,
            options={"dataset": dataset} if dataset == "HME100k" else {},  # which is scored otherwise
        )


def _ocrbench_figures(samples: Sequence[Sample]) -> Figures:
    """What each group adds to the share of right answers: out of 1000 when printed, as the paper's."""
    figures: Figures = {}
    for sample in samples:
        name = "Text Recognition" if sample.kind in _RECOGNITION else sample.kind
        figures[name] = figures.get(name, 0.0) + (sample.score or 0.0) / len(samples)
    return figures


OCRBENCH = Task(
    name="ocrbench",
    about="reading text of ten kinds: the question alone, out of 1000",
    metric="ocrbench",
    splits=("test",),
    read=_read_ocrbench,
    hub="echo840/OCRBench",
    max_new_tokens=128,
    details=_ocrbench_figures,
    unit=1000,
)

TASKS = (*map(_rrc_task, _RRC), CHARTQA, OCRBENCH)

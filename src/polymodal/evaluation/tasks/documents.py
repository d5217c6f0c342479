"""DocVQA, InfographicVQA, ChartQA and OCRBench: what pages, infographics and charts say.

Prompts are those that LLaVA's figures on them are taken with (lmms-eval's), greedy decoding. The answers of the test
splits of DocVQA and InfographicVQA are secret: no score, only the submission, in which what was not asked or failed is
empty. A failure scores nothing.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation import official
from polymodal.evaluation.files import Row
from polymodal.evaluation.task import Example, Figures, Sample, Task, ask, json_file, means_by
from polymodal.evaluation.tasks.vqa import SHORT

ONE_WORD = "Answer the question with a single word."
_HUB = {"val": "validation", "test": "test"}


# The two of the Robust Reading Competition: what they ask about, the official files, the key of the image's name there,
# the hub's configuration and VLMEvalKit's name.
_INFOGRAPHICS = ("infographicsVQA_{}_v1.0_withQT.json", "infographicsVQA_{}_v1.0.json", "infographicVQA_{}_v1.0.json")
_RRC = {
    "docvqa": ("scanned pages", ("{}_v1.0_withQT.json", "{}_v1.0.json"), "image", "DocVQA", "DocVQA"),
    "infographicvqa": ("infographics", _INFOGRAPHICS, "image_local_name", "InfographicVQA", "InfoVQA"),
}


def _rrc_official(folder: Path, image: str, path: Path) -> list[Row]:
    return official.with_images(folder, path, official.json_list(path, "data"), image)


def _rrc(task: str, folder: Path, split: str) -> Iterator[Example]:
    _, names, image, config, tsv = _RRC[task]
    forms = {name.format(split): partial(_rrc_official, folder, image) for name in names}
    parquet = f"{_HUB[split]}-*.parquet"
    for where, row in official.rows_in(folder, forms, f"{config}/{parquet}", parquet, f"{tsv}_{split.upper()}.tsv"):
        keys = ("question_types", "answer_type", "operation/reasoning")
        types = [name for key in keys for name in official.texts_of(row, where, key, secret=True)]
        yield Example(
            id=official.id_of(row, where, "questionId", "index"),
            messages=ask(f"{official.text_of(row, where, 'question')}\n{SHORT}", official.image_of(row, where)),
            references=official.texts_of(row, where, "answers", "answer", secret=split == "test"),
            extra={"types": types},  # a question may be of several
        )


def _rrc_task(name: str) -> Task:
    about, _, _, config, _ = _RRC[name]
    return Task(
        name=name,
        about=f"questions about {about}: LLaVA's prompt, ANLS",
        metric="anls",
        splits=tuple(_HUB),
        read=partial(_rrc, name),
        hub="lmms-lab-encoder/DocVQA",
        hub_files={split: [f"{config}/{hub}-*"] for split, hub in _HUB.items()},
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
        file = path.with_name(f"{split}_{half}.json")
        rows = official.with_images(folder, file, official.json_list(file), "imgname")
        yield from ({**row, "type": half, official.WHERE: f"{file}: row {n}"} for n, row in enumerate(rows))


def _chartqa(folder: Path, split: str) -> Iterator[Example]:
    forms = {f"{split}_human.json": partial(_chartqa_official, folder, split)}
    count = {"human": 0, "augmented": 0}
    for where, row in official.rows_in(folder, forms, f"{split}-*.parquet", f"ChartQA_{split.upper()}.tsv"):
        half = official.text_of(row, where, "type", "split").removeprefix("test_").removesuffix("_test")
        if half not in count:
            raise DataError(f"{where}: is of {half!r:.60}, expected human or augmented")
        count[half] += 1
        yield Example(
            id=f"{half}-{count[half]}",  # they have no ids
            messages=ask(
                f"{official.text_of(row, where, 'query', 'question')}\n{ONE_WORD}", official.image_of(row, where)
            ),
            references=(official.text_of(row, where, "label", "answer"),),
            kind=half,
        )


def _mean_of_halves(samples: Sequence[Sample]) -> Figures:
    """The mean of the two halves, as it is reported, and each."""
    halves = means_by("kind")(samples)
    return {"score": sum(halves.values()) / max(1, len(halves)), **halves}


_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_DATASETS = {"Handwritten Mathematical Expression Recognition": "HME100k"}


def _ocrbench_official(folder: Path, path: Path) -> list[Row]:
    rows = official.with_images(folder, path, official.json_list(path), "image_path")
    return [{**row, "answers": [a] if isinstance(a := row.get("answers"), str) else a} for row in rows]


def _ocrbench(folder: Path, _split: str) -> Iterator[Example]:
    forms = {"OCRBench.json": partial(_ocrbench_official, folder)}
    for number, (where, row) in enumerate(official.rows_in(folder, forms, "test-*.parquet", "OCRBench.tsv")):
        kind = official.text_of(row, where, "type", "question_type", "category")
        dataset = row.get(official.named(row, "dataset_name", "dataset"), _DATASETS.get(kind))
        yield Example(
            id=str(number),  # the hub's have no ids
            messages=ask(official.text_of(row, where, "question").strip(), official.image_of(row, where)),
            references=official.texts_of(row, where, "answers", "answer"),
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


TASKS = (
    *map(_rrc_task, _RRC),
    Task(
        name="chartqa",
        about="questions about charts: lmms-eval's prompt, relaxed accuracy, the mean of human and augmented",
        metric="chartqa_relaxed",
        splits=("test", "val"),
        read=_chartqa,
        hub="lmms-lab-encoder/ChartQA",
        hub_files={"test": ["data/test-*"]},
        aggregate=_mean_of_halves,
    ),
    Task(
        name="ocrbench",
        about="reading text of ten kinds: the question alone, out of 1000",
        metric="ocrbench",
        splits=("test",),
        read=_ocrbench,
        hub="echo840/OCRBench",
        max_new_tokens=128,
        details=_ocrbench_figures,
        unit=1000,
    ),
)

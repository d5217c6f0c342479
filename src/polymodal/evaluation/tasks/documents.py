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
from polymodal.evaluation.files import Row, ask, field
from polymodal.evaluation.task import Example, Figures, Sample, Task
from polymodal.evaluation.tasks.vqa import SHORT

ONE_WORD = "\nAnswer the question with a single word."
_HUB = {"val": "validation", "test": "test"}


# The two of the Robust Reading Competition: what they ask about, the official files, the key of the image's name there,
# the hub's configuration and VLMEvalKit's name.
_INFOGRAPHICS = ("infographicsVQA_{}_v1.0_withQT.json", "infographicsVQA_{}_v1.0.json", "infographicVQA_{}_v1.0.json")
_RRC = {
    "docvqa": ("scanned pages", ("{}_v1.0_withQT.json", "{}_v1.0.json"), "image", "DocVQA", "DocVQA"),
    "infographicvqa": ("infographics", _INFOGRAPHICS, "image_local_name", "InfographicVQA", "InfoVQA"),
}


def _rrc_official(folder: Path, image: str, path: Path) -> list[Row]:
    return official.with_images(
        folder, path, [{**row, "image": row.get(image)} for row in official.json_list(path, "data")]
    )


def _rrc(task: str, folder: Path, split: str) -> Iterator[Example]:
    _, names, image, config, tsv = _RRC[task]
    forms = {name.format(split): partial(_rrc_official, folder, image) for name in names}
    parquet = f"{_HUB[split]}-*.parquet"
    for where, row in official.rows_in(folder, forms, f"{config}/{parquet}", parquet, f"{tsv}_{split.upper()}.tsv"):
        keys = ("question_types", "answer_type", "operation/reasoning")
        types = [name for key in keys for name in official.texts_of(row, key, where, secret=True)]
        yield Example(
            id=official.id_of(row, where, "questionId", "index"),
            messages=ask(field(row, "question", where, str) + SHORT, official.image_of(row, where)),
            references=official.texts_of(row, "answer" if "index" in row else "answers", where, secret=split == "test"),
            extra={"types": types},  # a question may be of several
        )


def _rrc_task(name: str) -> Task:
    about, _, _, config, _ = _RRC[name]
    return Task(
        name=name,
        about=f"questions about {about}: LLaVA's prompt, ANLS",
        metric="anls",
        splits=tuple(_HUB),
        read=official.each_once(partial(_rrc, name)),
        hub="lmms-lab-encoder/DocVQA",
        hub_files={split: [f"{config}/{hub}-*"] for split, hub in _HUB.items()},
        max_new_tokens=32,
        details=official.means_by("types"),
        submit=official.json_array(
            f"{name}_{{split}}_submission.json", lambda s: {"questionId": int(s.id), "answer": s.answer or ""}
        ),
    )


def _chartqa_official(folder: Path, split: str, path: Path) -> Iterator[Row]:
    """Its two files, of which the first was found."""
    names = {"imgname": "image", "query": "question", "label": "answer"}
    for half in ("human", "augmented"):
        file = path.with_name(f"{split}_{half}.json")
        rows = [{names.get(key, key): value for key, value in row.items()} for row in official.json_list(file)]
        yield from ({**row, "type": half} for row in official.with_images(folder, file, rows))


@official.each_once
def _chartqa(folder: Path, split: str) -> Iterator[Example]:
    forms = {f"{split}_human.json": partial(_chartqa_official, folder, split)}
    count = {"human": 0, "augmented": 0}
    for where, row in official.rows_in(folder, forms, f"{split}-*.parquet", f"ChartQA_{split.upper()}.tsv"):
        key = "type" if "type" in row else "split"
        half = field(row, key, where, str).removeprefix("test_").removesuffix("_test")
        if half not in count:
            raise DataError(f"{where}: `{key}` is {row[key]!r:.60}, expected human or augmented")
        count[half] += 1
        yield Example(
            id=f"{half}-{count[half]}",  # they have no ids
            messages=ask(field(row, "question", where, str) + ONE_WORD, official.image_of(row, where)),
            references=(field(row, "answer", where, str),),
            kind=half,
        )


def _mean_of_halves(samples: Sequence[Sample]) -> Figures:
    """The mean of the two halves, as it is reported, and each."""
    halves = official.means_by("kind")(samples)
    return {"score": sum(halves.values()) / max(1, len(halves)), **halves}


_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_FORMULAS = "Handwritten Mathematical Expression Recognition"


def _ocrbench_official(folder: Path, path: Path) -> list[Row]:
    names = {"dataset_name": "dataset", "type": "question_type", "answers": "answer", "image_path": "image"}
    rows = [{names.get(key, key): value for key, value in row.items()} for row in official.json_list(path)]
    for row in rows:
        row["answer"] = [row["answer"]] if isinstance(row.get("answer"), str) else row.get("answer")
    return official.with_images(folder, path, rows)


@official.each_once
def _ocrbench(folder: Path, _split: str) -> Iterator[Example]:
    forms = {"OCRBench.json": partial(_ocrbench_official, folder)}
    for number, (where, row) in enumerate(official.rows_in(folder, forms, "test-*.parquet", "OCRBench.tsv")):
        kind = field(row, "category" if "category" in row else "question_type", where, str)
        formula = row.get("dataset", "HME100k" if kind == _FORMULAS else "") == "HME100k"
        yield Example(
            id=str(number),  # the hub's have no ids
            messages=ask(field(row, "question", where, str).strip(), official.image_of(row, where)),
            references=official.texts_of(row, "answer", where),
            kind=kind,
            options={"dataset": "HME100k"} if formula else {},
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

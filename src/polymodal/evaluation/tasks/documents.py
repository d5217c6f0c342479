"""DocVQA, InfographicVQA, ChartQA and OCRBench: what pages, infographics and charts say.

Prompts are those that LLaVA's figures on them are taken with (lmms-eval's), greedy decoding. The answers of the test
splits of DocVQA and InfographicVQA are secret: no score, only the submission, in which what was not asked or failed is
empty. A failure scores nothing.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation import files
from polymodal.evaluation.task import Example, Figures, Sample, Task, each_once, mean_score, means_by
from polymodal.evaluation.tasks.vqa import SHORT

ONE_WORD = "\nAnswer the question with a single word."
_HUB = {"val": "validation", "test": "test"}


def _rrc_official(folder: Path, image: str, path: Path) -> list[files.Row]:
    return files.with_images(folder, path, [{**row, "image": row.get(image)} for row in files.json_list(path, "data")])


def _rrc(names: Sequence[str], image: str, config: str, tsv: str, folder: Path, split: str) -> Iterator[Example]:
    """The two of the Robust Reading Competition; a question may be of several types."""
    official = {name.format(split): partial(_rrc_official, folder, image) for name in names}
    parquet = f"{_HUB[split]}-*.parquet"
    for where, row in files.rows_in(folder, official, f"{config}/{parquet}", parquet, f"{tsv}_{split.upper()}.tsv"):
        types = [*(row.get("question_types") or row.get("answer_type") or ()), *(row.get("operation/reasoning") or ())]
        yield Example(
            id=files.id_of(row, where, "questionId", "index"),
            messages=files.ask(files.field(row, "question", where, str) + SHORT, files.image_of(row, where)),
            references=files.texts_of(row, "answer" if "index" in row else "answers", where, secret=split == "test"),
            extra={"types": types},
        )


def _rrc_task(name: str, about: str, names: Sequence[str], image: str, config: str, tsv: str) -> Task:
    return Task(
        name=name,
        about=f"{about}: LLaVA's prompt, ANLS",
        metric="anls",
        splits=tuple(_HUB),
        read=each_once(partial(_rrc, names, image, config, tsv)),
        hub="lmms-lab-encoder/DocVQA",
        hub_files={split: [f"{config}/{hub}-*"] for split, hub in _HUB.items()},
        max_new_tokens=32,
        aggregate=means_by("types"),
        submit=files.json_array(
            f"{name}_{{split}}_submission.json", lambda s: {"questionId": int(s.id), "answer": s.answer or ""}
        ),
    )


def _chartqa_official(folder: Path, split: str, path: Path) -> Iterator[files.Row]:
    """Its two files, of which the first was found."""
    names = {"imgname": "image", "query": "question", "label": "answer"}
    for half in ("human", "augmented"):
        file = path.with_name(f"{split}_{half}.json")
        rows = [{names.get(key, key): value for key, value in row.items()} for row in files.json_list(file)]
        yield from ({**row, "type": half} for row in files.with_images(folder, file, rows))


@each_once
def _chartqa(folder: Path, split: str) -> Iterator[Example]:
    official = {f"{split}_human.json": partial(_chartqa_official, folder, split)}
    count = {"human": 0, "augmented": 0}
    for where, row in files.rows_in(folder, official, f"{split}-*.parquet", f"ChartQA_{split.upper()}.tsv"):
        key = "type" if "type" in row else "split"
        half = files.field(row, key, where, str).removeprefix("test_").removesuffix("_test")
        if half not in count:
            raise DataError(f"{where}: `{key}` is {row[key]!r:.60}, expected human or augmented")
        count[half] += 1
        yield Example(
            id=f"{half}-{count[half]}",  # they have no ids
            messages=files.ask(files.field(row, "question", where, str) + ONE_WORD, files.image_of(row, where)),
            references=(files.field(row, "answer", where, str),),
            kind=half,
        )


def _mean_of_halves(samples: Sequence[Sample]) -> Figures:
    """The mean of the two halves, as it is reported, and each."""
    halves = {key: value for key, value in means_by("kind")(samples).items() if key != "score"}
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


def _ocrbench_official(folder: Path, path: Path) -> list[files.Row]:
    names = {"dataset_name": "dataset", "type": "question_type", "answers": "answer", "image_path": "image"}
    rows = [{names.get(key, key): value for key, value in row.items()} for row in files.json_list(path)]
    for row in rows:
        row["answer"] = [row["answer"]] if isinstance(row.get("answer"), str) else row.get("answer")
    return files.with_images(folder, path, rows)


@each_once
def _ocrbench(folder: Path, _split: str) -> Iterator[Example]:
    official = {"OCRBench.json": partial(_ocrbench_official, folder)}
    for number, (where, row) in enumerate(files.rows_in(folder, official, "test-*.parquet", "OCRBench.tsv")):
        kind = files.field(row, "category" if "category" in row else "question_type", where, str)
        formula = row.get("dataset", "HME100k" if kind == _FORMULAS else "") == "HME100k"
        yield Example(
            id=str(number),  # the hub's have no ids
            messages=files.ask(files.field(row, "question", where, str).strip(), files.image_of(row, where)),
            references=files.texts_of(row, "answer", where),
            kind=kind,
            options={"dataset": "HME100k"} if formula else {},
        )


def _ocrbench_figures(samples: Sequence[Sample]) -> Figures:
    """The share of right answers, and what each group adds to it: out of 1000 when printed, as the paper's."""
    figures = mean_score(samples)
    for sample in samples:
        name = "Text Recognition" if sample.kind in _RECOGNITION else sample.kind
        figures[name] = figures.get(name, 0.0) + (sample.score or 0.0) / len(samples)
    return figures


_INFOGRAPHICS = ("infographicsVQA_{}_v1.0_withQT.json", "infographicsVQA_{}_v1.0.json", "infographicVQA_{}_v1.0.json")

TASKS = (
    _rrc_task(
        *("docvqa", "questions about scanned pages"),
        *(("{}_v1.0_withQT.json", "{}_v1.0.json"), "image", "DocVQA", "DocVQA"),
    ),
    _rrc_task(
        *("infographicvqa", "questions about infographics"),
        *(_INFOGRAPHICS, "image_local_name", "InfographicVQA", "InfoVQA"),
    ),
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
        aggregate=_ocrbench_figures,
        unit=1000,
    ),
)

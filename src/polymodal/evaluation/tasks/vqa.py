"""VQAv2, GQA and TextVQA: short answers about photographs. Prompts as published for LLaVA-1.5 (arXiv:2310.03744).

Questions that were not asked or failed have an empty answer in the submissions, as LLaVA's have; a failure scores
nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from polymodal.evaluation import official
from polymodal.evaluation.files import Row, field, need_file, parquet_rows, read_json
from polymodal.evaluation.task import Example, Task, ask, json_file, means_by
from polymodal.metrics.vqa import normalize_answer

SHORT = "Answer the question using a single word or phrase."

# Of a split: the questions' name, that of their images, and the split on the hub. The answers of all but "val" are
# secret: no score, only the submission.
_VQAV2 = {
    "val": ("val2014", "val2014", "validation"),
    "testdev": ("test-dev2015", "test2015", "testdev"),
    "test": ("test2015", "test2015", "test"),
}


def _vqav2_official(folder: Path, split: str, path: Path) -> list[Row]:
    rows = official.json_list(path, "questions")
    for number, row in enumerate(rows):
        image = int(official.id_of(row, f"{path}: row {number}", "image_id"))
        row["image"] = f"COCO_{_VQAV2[split][1]}_{image:012d}.jpg"
    if split == "val":
        noted = need_file(folder, "v2_mscoco_val2014_annotations.json")
        annotation = official.keyed(noted, official.json_list(noted, "annotations"), "question_id")
        rows = [{**annotation(row.get("question_id")), **row} for row in rows]
    return official.with_images(folder, path, rows)


def _vqav2(folder: Path, split: str) -> Iterator[Example]:
    name, _, hub = _VQAV2[split]
    forms = {f"v2_OpenEnded_mscoco_{name}_questions.json": partial(_vqav2_official, folder, split)}
    for where, row in official.rows_in(folder, forms, f"{hub}-*.parquet"):
        open_ = split == "val" or row.get("answers")
        noted = field(row, "answers", where, list) if open_ else []
        yield Example(
            id=official.id_of(row, where, "question_id"),
            messages=ask(f"{official.text_of(row, where, 'question')}\n{SHORT}", official.image_of(row, where)),
            references=tuple(official.text_of(answer, where, "answer") for answer in noted),
            kind=official.text_of(row, where, "answer_type") if open_ else "",
            extra={"image": official.id_of(row, where, "image_id")},
        )


def _vqav2_ids(folder: Path, split: str) -> Iterator[str]:
    """The server wants all of test2015, in the phase of test-dev too."""
    name, _, hub = _VQAV2["test" if split == "testdev" else split]
    forms = {f"v2_OpenEnded_mscoco_{name}_questions.json": partial(official.json_list, key="questions")}
    return (official.id_of(*each[::-1], "question_id") for each in official.rows_in(folder, forms, f"{hub}-*.parquet"))


VQAV2 = Task(
    name="vqav2",
    about="short answers about photographs: LLaVA's prompt, the official VQA accuracy",
    metric="vqa_accuracy",
    splits=tuple(_VQAV2),
    read=_vqav2,
    hub="lmms-lab-encoder/VQAv2",
    hub_files={"val": ["data/validation-*"], "testdev": ["data/testdev-*", "data/test-*"], "test": ["data/test-*"]},
    details=means_by("kind"),
    group="image",
    submit=json_file(  # LLaVA normalizes what it sends as M4C does
        "vqav2_{split}_submission.json",
        lambda samples: [
            {"question_id": int(s.id), "answer": normalize_answer(s.answer or "", "m4c")} for s in samples
        ],
    ),
    server_ids=_vqav2_ids,
)


def _gqa_official(folder: Path, path: Path) -> list[Row]:
    rows = []
    for name, value in official.object_of(read_json(path), f"{path}: the file").items():
        where = f"{path}: question {name}"
        row = official.object_of(value, where)
        image = f"{official.text_of(row, where, 'imageId')}.jpg"
        rows.append({**row, "id": name, "image": image, official.WHERE: where})
    return official.with_images(folder, path, rows)


def _gqa_parquet(folder: Path, split: str, path: Path) -> Iterator[Row]:
    """Its images are in another table."""
    shown = official.rows_in(folder, {}, f"{split}_balanced_images/*.parquet")
    images = {field(row, "id", where, str): official.image_of(row, where) for where, row in shown}
    return ({**row, "image": images.get(row.get("imageId", ""))} for row in parquet_rows(path))


def _gqa(folder: Path, split: str) -> Iterator[Example]:
    forms: dict[str, Callable[[Path], Iterable[Row]]] = {
        f"{split}_balanced_questions.json": partial(_gqa_official, folder),
        f"{split}_balanced_instructions/*.parquet": partial(_gqa_parquet, folder, split),
    }
    for where, row in official.rows_in(folder, forms, *["GQA_TestDev_Balanced.tsv"] * (split == "testdev")):
        types = official.object_of(row.get("types") or {}, f"{where}: `types`")
        structure = types.get("structural") or ""
        # Questions that are not balanced are answered for the submission, and not scored.
        balanced = row.get("isBalanced", True)
        yield Example(
            id=official.text_of(row, where, "id", "index"),
            messages=ask(f"{official.text_of(row, where, 'question')}\n{SHORT}", official.image_of(row, where)),
            references=(official.text_of(row, where, "answer"),) if balanced else (),
            kind=structure and ("open" if structure == "query" else "binary"),
            extra={
                **({"image": row["imageId"]} if "imageId" in row else {}),
                **{"structural": structure, "semantic": types.get("semantic") or ""},
            },
        )


GQA = Task(
    name="gqa",
    about="short answers about relations in photographs: LLaVA's prompt and conversion, exact match",
    metric="gqa",
    splits=("testdev", "val"),
    read=_gqa,
    hub="lmms-lab-encoder/GQA",
    hub_files={split: [f"{split}_balanced_*/*"] for split in ("testdev", "val")},
    details=means_by("kind", "structural", "semantic"),
    group="image",
    submit=json_file(
        "{split}_balanced_predictions.json",
        lambda samples: [{"questionId": s.id, "prediction": (s.answer or "").rstrip(".").lower()} for s in samples],
    ),
)

_TEXTVQA = {"val": "validation", "test": "test"}


def _textvqa_official(folder: Path, split: str, ocr: bool, path: Path) -> list[Row]:
    rows = official.json_list(path, "data")
    for number, row in enumerate(rows):
        row["image"] = f"{field(row, 'image_id', f'{path}: row {number}', str)}.jpg"
    if ocr:
        seen = need_file(folder, f"TextVQA_Rosetta_OCR_v0.2_{split}.json")
        words = official.keyed(seen, official.json_list(seen, "data"), "image_id")
        rows = [{**row, "ocr_tokens": words(row["image_id"]).get("ocr_tokens")} for row in rows]
    return official.with_images(folder, path, rows)


def _textvqa(ocr: bool, folder: Path, split: str) -> Iterator[Example]:
    forms = {f"TextVQA_0.5.1_{split}.json": partial(_textvqa_official, folder, split, ocr)}
    tables = f"{_TEXTVQA[split]}-*.parquet", f"TextVQA_{split.upper()}.tsv"
    for where, row in official.rows_in(folder, forms, *tables):
        question = official.text_of(row, where, "question")
        question = question[:1].upper() + question[1:]  # as in LLaVA's file
        if ocr:
            tokens = field(row, "ocr_tokens", where, list)
            question += f"\nReference OCR token: {', '.join(map(str, tokens))}"
        yield Example(
            id=official.id_of(row, where, "question_id", "index"),
            messages=ask(f"{question}\n{SHORT}", official.image_of(row, where)),
            references=official.texts_of(row, where, "answers", "answer", secret=split == "test"),
            extra={"image": row["image_id"]} if "image_id" in row else {},
        )


def _textvqa_task(name: str, about: str, ocr: bool) -> Task:
    return Task(
        name=name,
        about=f"{about}: LLaVA's prompt, M4C's accuracy",
        metric="textvqa_accuracy",
        splits=tuple(_TEXTVQA),
        read=partial(_textvqa, ocr),
        hub="lmms-lab-encoder/textvqa",
        hub_files={split: [f"data/{hub}-*"] for split, hub in _TEXTVQA.items()},
        group="image",
        submit=json_file(
            "textvqa_{split}_submission.json",
            lambda samples: [{"question_id": int(s.id), "answer": s.answer or ""} for s in samples],
        ),
        folder="textvqa",
    )


TASKS = (
    VQAV2,
    GQA,
    _textvqa_task("textvqa", "text in photographs, without OCR tokens, as LLaVA-1.6 is reported", ocr=False),
    _textvqa_task("textvqa_ocr", "the same with Rosetta's OCR tokens, as LLaVA-1.5 is reported", ocr=True),
)

"""VQAv2, GQA and TextVQA: short answers about photographs. Prompts as published for LLaVA-1.5 (arXiv:2310.03744).

Questions that were not asked or failed have an empty answer in the submissions, as LLaVA's have; a failure scores
nothing.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from polymodal.evaluation.files import (
    Row,
    field,
    find_images,
    json_rows,
    keyed,
    need_file,
    parquet_rows,
    read_json,
    rows_in,
)
from polymodal.evaluation.task import Example, Task, ask, json_file, means_by
from polymodal.media.ocr import reference_tokens
from polymodal.metrics.vqa import normalize_answer

SHORT = "Answer the question using a single word or phrase."
HUB_SPLITS = {"val": "validation", "test": "test"}

# Of a split: the questions' name, that of their images, and the split on the hub. The answers of all but "val" are
# secret: no score, only the submission.
_VQAV2 = {
    "val": ("val2014", "val2014", "validation"),
    "testdev": ("test-dev2015", "test2015", "testdev"),
    "test": ("test2015", "test2015", "test"),
}


def _vqav2_official(folder: Path, split: str, path: Path) -> Sequence[Row]:
    rows = json_rows(path, "questions")
    for row in rows:
        row["image"] = f"COCO_{_VQAV2[split][1]}_{int(row.id('image_id')):012d}.jpg"
    if split == "val":
        note = keyed(need_file(folder, "v2_mscoco_val2014_annotations.json"), "annotations", "question_id")
        for row in rows:
            row.update({**note(row.get("question_id")), **row})
    return find_images(folder, rows)


def _read_vqav2(folder: Path, split: str) -> Iterator[Example]:
    name, _, hub = _VQAV2[split]
    official = f"v2_OpenEnded_mscoco_{name}_questions.json", partial(_vqav2_official, folder, split)
    for row in rows_in(folder, official, f"{hub}-*.parquet"):
        known = split == "val" or row.get("answers")
        noted = row.value(list, "answers") if known else []
        yield Example(
            id=row.id("question_id"),
            messages=ask(f"{row.value(str, 'question')}\n{SHORT}", row.image()),
            references=tuple(field(answer, "answer", row.where, str) for answer in noted),
            kind=row.value(str, "answer_type") if known else "",
            extra={"image": row.id("image_id")},
        )


def _vqav2_ids(folder: Path, split: str) -> Iterator[str]:
    """The server wants all of test2015, in the phase of test-dev too."""
    name, _, hub = _VQAV2["test" if split == "testdev" else split]
    official = f"v2_OpenEnded_mscoco_{name}_questions.json", partial(json_rows, key="questions")
    return (row.id("question_id") for row in rows_in(folder, official, f"{hub}-*.parquet"))


VQAV2 = Task(
    name="vqav2",
    about="short answers about photographs: LLaVA's prompt, the official VQA accuracy",
    metric="vqa_accuracy",
    splits=tuple(_VQAV2),
    read=_read_vqav2,
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


def _gqa_official(folder: Path, path: Path) -> Sequence[Row]:
    questions = Row(read_json(path), f"{path}: the file")
    rows = [Row(value, f"{path}: question {name}") for name, value in questions.items()]
    for name, row in zip(questions, rows):
        row.update(id=name, image=f"{row.value(str, 'imageId')}.jpg")
    return find_images(folder, rows)


def _gqa_parquet(folder: Path, split: str, path: Path) -> Iterator[Row]:
    """Its images are in another table."""
    images = {row.value(str, "id"): row.image() for row in rows_in(folder, f"{split}_balanced_images/*.parquet")}
    for row in parquet_rows(path):
        row["image"] = images.get(row.get("imageId", ""))
        yield row


def _read_gqa(folder: Path, split: str) -> Iterator[Example]:
    official = f"{split}_balanced_questions.json", partial(_gqa_official, folder)
    hub = f"{split}_balanced_instructions/*.parquet", partial(_gqa_parquet, folder, split)
    for row in rows_in(folder, official, hub, *["GQA_TestDev_Balanced.tsv"] * (split == "testdev")):
        types = Row(row.get("types") or {}, f"{row.where}: `types`")
        structure = types.get("structural") or ""
        # Questions that are not balanced are answered for the submission, and not scored.
        balanced = row.get("isBalanced", True)
        yield Example(
            id=row.value(str, "id", "index"),
            messages=ask(f"{row.value(str, 'question')}\n{SHORT}", row.image()),
            references=(row.value(str, "answer"),) if balanced else (),
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
    read=_read_gqa,
    hub="lmms-lab-encoder/GQA",
    hub_files={split: [f"{split}_balanced_*/*"] for split in ("testdev", "val")},
    details=means_by("kind", "structural", "semantic"),
    group="image",
    submit=json_file(
        "{split}_balanced_predictions.json",
        lambda samples: [{"questionId": s.id, "prediction": (s.answer or "").rstrip(".").lower()} for s in samples],
    ),
)


def _textvqa_official(folder: Path, split: str, ocr: bool, path: Path) -> Sequence[Row]:
    rows = json_rows(path, "data")
    for row in rows:
        row["image"] = f"{row.value(str, 'image_id')}.jpg"
    if ocr:
        words = keyed(need_file(folder, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"), "data", "image_id")
        for row in rows:
            row["ocr_tokens"] = words(row["image_id"]).get("ocr_tokens")
    return find_images(folder, rows)


def _read_textvqa(ocr: bool, folder: Path, split: str) -> Iterator[Example]:
    official = f"TextVQA_0.5.1_{split}.json", partial(_textvqa_official, folder, split, ocr)
    for row in rows_in(folder, official, f"{HUB_SPLITS[split]}-*.parquet", f"TextVQA_{split.upper()}.tsv"):
        question = row.value(str, "question")
        question = question[:1].upper() + question[1:]  # as in LLaVA's file
        if ocr:
            question += reference_tokens(map(str, row.value(list, "ocr_tokens")))
        yield Example(
            id=row.id("question_id", "index"),
            messages=ask(f"{question}\n{SHORT}", row.image()),
            references=row.texts("answers", "answer", secret=split == "test"),
            extra={"image": row["image_id"]} if "image_id" in row else {},
        )


def _textvqa_task(name: str, about: str, ocr: bool) -> Task:
    return Task(
        name=name,
        about=f"{about}: LLaVA's prompt, M4C's accuracy",
        metric="textvqa_accuracy",
        splits=tuple(HUB_SPLITS),
        read=partial(_read_textvqa, ocr),
        hub="lmms-lab-encoder/textvqa",
        hub_files={split: [f"data/{hub}-*"] for split, hub in HUB_SPLITS.items()},
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

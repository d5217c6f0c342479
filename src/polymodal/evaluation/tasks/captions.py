"""Captions of COCO and NoCaps against several of people's: CIDEr-D, with BLEU-4 and ROUGE-L.

The prompt is lmms-eval's, and none for models that caption unasked (BLIP, GIT); greedy, where papers often search with
beams. CIDEr weighs words by the references of what is scored: a part of a set (`--limit`) does not compare with the
whole, so look at n. A failure is an empty caption. NoCaps' test split is secret: no score, only the results file.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation.files import Form, Row, field, find_images, json_rows, rows_in
from polymodal.evaluation.task import Example, Figures, Sample, Submit, Task, ask, json_file
from polymodal.metrics.captions import caption_scores, cider

PROMPT = "Provide a one-sentence caption for the provided image."
_NOCAPS = {"val": ("nocaps_val_4500_captions.json", "validation"), "test": ("nocaps_test_image_info.json", "test")}
_DOMAINS = ("in-domain", "near-domain", "out-domain")


def _karpathy_official(folder: Path, path: Path) -> Sequence[Row]:
    """Karpathy's test split: 5,000 images of val2014."""
    rows = [row for row in json_rows(path, "images") if row.value(str, "split") == "test"]
    for row in rows:
        row["captions"] = [field(said, "raw", row.where, str) for said in row.value(list, "sentences")]
    return find_images(folder, rows, "filename")


def _coco_official(folder: Path, path: Path, secret: bool = False) -> Sequence[Row]:
    """COCO's form, which is NoCaps' too."""
    captions: dict[str, list[str]] = defaultdict(list)
    for note in [] if secret else json_rows(path, "annotations", each="annotation"):
        captions[note.id("image_id")].append(note.value(str, "caption"))
    rows = json_rows(path, "images")
    for row in rows:
        row["captions"] = captions.pop(row.id("id"), [])
    return find_images(folder, rows, "file_name")


def _caption_example(row: Row, secret: bool = False) -> Example:
    return Example(
        id=row.id("image_id", "cocoid", "id", "index"),
        messages=ask(PROMPT, row.image()),
        references=row.texts("captions", "annotations_captions", "answer", secret=secret),
        kind=row.text("domain", default=""),
    )


def _read_coco(folder: Path, split: str) -> Iterator[Example]:
    forms: list[Form] = [(f"captions_{split}.json", partial(_coco_official, folder)), "val-*.parquet"]
    forms += ["COCO_VAL.tsv"] * (split == "val2017")
    karpathy = "dataset_coco.json", partial(_karpathy_official, folder)
    for row in rows_in(folder, *([karpathy] if split == "karpathy" else forms)):
        if "question_id" in row:  # of the hub, the name of the image: COCO_val2014_000000391895.jpg
            name = row.value(str, "question_id")
            if ("val2014" in name) != (split == "val2014"):
                raise DataError(f"{row.where}: {name:.60} is no image of {split}")
            row["image_id"] = name.partition(".")[0].rpartition("_")[2]
        yield _caption_example(row)


def _read_nocaps(folder: Path, split: str) -> Iterator[Example]:
    name, hub = _NOCAPS[split]
    secret = split == "test"
    for row in rows_in(folder, (name, partial(_coco_official, folder, secret=secret)), f"{hub}-*.parquet"):
        yield _caption_example(row, secret)


def _caption_figures(samples: Sequence[Sample]) -> Figures:
    """BLEU-4, ROUGE-L and each domain's CIDEr-D, whose words weigh as in that domain alone."""
    said, gold = [sample.answer or "" for sample in samples], [sample.references for sample in samples]
    variant = str(samples[0].options.get("variant", "official"))
    scores = caption_scores(said, gold, variant=variant)
    figures = {"bleu_4": scores["bleu_4"], "rouge_l": scores["rouge_l"]}
    for domain in _DOMAINS:
        if own := [number for number, sample in enumerate(samples) if sample.kind == domain]:
            scored = cider([said[i] for i in own], [gold[i] for i in own], variant=variant)
            figures[domain] = sum(scored) / len(own)
    return figures


def _results(name: str) -> Submit:
    return json_file(name, lambda samples: [{"image_id": int(s.id), "caption": s.answer or ""} for s in samples])


COCO_CAPTION = Task(
    name="coco_caption",
    about="captions of COCO's images: lmms-eval's prompt, CIDEr; karpathy is the test split of papers",
    metric="cider",
    splits=("karpathy", "val2014", "val2017"),
    read=_read_coco,
    hub="lmms-lab-encoder/COCO-Caption",
    hub_files={"val2014": ["data/val-*"]},
    max_new_tokens=64,
    captions=True,
    details=_caption_figures,
    submit=_results("captions_{split}_polymodal_results.json"),
)

NOCAPS = Task(
    name="nocaps",
    about="captions of objects that COCO lacks: lmms-eval's prompt, CIDEr",
    metric="cider",
    splits=tuple(_NOCAPS),
    read=_read_nocaps,
    hub="lmms-lab-encoder/NoCaps",
    hub_files={split: [f"data/{hub}-*"] for split, (_, hub) in _NOCAPS.items()},
    max_new_tokens=64,
    captions=True,
    details=_caption_figures,
    submit=_results("nocaps_{split}_results.json"),
)

TASKS = (COCO_CAPTION, NOCAPS)

"""Captions of COCO and NoCaps against several of people's: CIDEr-D, with BLEU-4 and ROUGE-L.

The prompt is lmms-eval's; greedy, where papers on captioning often search with beams. CIDEr weighs words by the
references of what is scored: a part of a set (`--limit`) does not compare with the whole, so look at n. A failure is an
empty caption. NoCaps' test split is secret: no score, only the results file.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation import official
from polymodal.evaluation.files import Row, field
from polymodal.evaluation.task import Example, Figures, Sample, Submit, Task, ask, json_file
from polymodal.metrics.captions import caption_scores, cider

PROMPT = "Provide a one-sentence caption for the provided image."
_NOCAPS = {"val": ("nocaps_val_4500_captions.json", "validation"), "test": ("nocaps_test_image_info.json", "test")}
_DOMAINS = ("in-domain", "near-domain", "out-domain")


def _karpathy(folder: Path, path: Path) -> list[Row]:
    """Karpathy's test split: 5,000 images of val2014."""
    rows = []
    for number, row in enumerate(official.json_list(path, "images")):
        where = f"{path}: row {number}"
        if official.text_of(row, where, "split") == "test":
            said = [official.text_of(sentence, where, "raw") for sentence in field(row, "sentences", where, list)]
            rows.append({**row, "captions": said})
    return official.with_images(folder, path, rows, "filename")


def _official(folder: Path, path: Path, secret: bool = False) -> list[Row]:
    """COCO's form, which is NoCaps' too."""
    captions: dict[str, list[str]] = defaultdict(list)
    for number, note in enumerate([] if secret else official.json_list(path, "annotations")):
        where = f"{path}: annotation {number}"
        captions[official.id_of(note, where, "image_id")].append(official.text_of(note, where, "caption"))
    rows = []
    for number, row in enumerate(official.json_list(path, "images")):
        own = captions.pop(official.id_of(row, f"{path}: row {number}", "id"), [])
        rows.append({**row, "captions": own})
    return official.with_images(folder, path, rows, "file_name")


def _example(where: str, row: Row, secret: bool = False) -> Example:
    return Example(
        id=official.id_of(row, where, "image_id", "cocoid", "id", "index"),
        messages=ask(PROMPT, official.image_of(row, where)),
        references=official.texts_of(row, where, "captions", "annotations_captions", "answer", secret=secret),
        kind=official.text_of(row, where, "domain") if "domain" in row else "",
    )


def _coco(folder: Path, split: str) -> Iterator[Example]:
    if split == "karpathy":
        rows = official.rows_in(folder, {"dataset_coco.json": partial(_karpathy, folder)})
    else:
        forms = {f"captions_{split}.json": partial(_official, folder)}
        rows = official.rows_in(folder, forms, "val-*.parquet", *["COCO_VAL.tsv"] * (split == "val2017"))
    for where, row in rows:
        if "question_id" in row:  # of the hub, the name of the image: COCO_val2014_000000391895.jpg
            name = official.text_of(row, where, "question_id")
            if ("val2014" in name) != (split == "val2014"):
                raise DataError(f"{where}: {name:.60} is no image of {split}")
            row["image_id"] = name.partition(".")[0].rpartition("_")[2]
        yield _example(where, row)


def _nocaps(folder: Path, split: str) -> Iterator[Example]:
    name, hub = _NOCAPS[split]
    secret = split == "test"
    forms = {name: partial(_official, folder, secret=secret)}
    for where, row in official.rows_in(folder, forms, f"{hub}-*.parquet"):
        yield _example(where, row, secret)


def _figures(samples: Sequence[Sample]) -> Figures:
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


TASKS = (
    Task(
        name="coco_caption",
        about="captions of COCO's images: lmms-eval's prompt, CIDEr; karpathy is the test split of papers",
        metric="cider",
        splits=("karpathy", "val2014", "val2017"),
        read=_coco,
        hub="lmms-lab-encoder/COCO-Caption",
        hub_files={"val2014": ["data/val-*"]},
        max_new_tokens=64,
        details=_figures,
        submit=_results("captions_{split}_polymodal_results.json"),
    ),
    Task(
        name="nocaps",
        about="captions of objects that COCO lacks: lmms-eval's prompt, CIDEr",
        metric="cider",
        splits=tuple(_NOCAPS),
        read=_nocaps,
        hub="lmms-lab-encoder/NoCaps",
        hub_files={split: [f"data/{hub}-*"] for split, (_, hub) in _NOCAPS.items()},
        max_new_tokens=64,
        details=_figures,
        submit=_results("nocaps_{split}_results.json"),
    ),
)

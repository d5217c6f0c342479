"""Benchmarks with open answers: VQAv2, GQA, TextVQA, DocVQA, InfographicVQA, ChartQA, OCRBench, COCO and NoCaps.

`OFFICIAL` writes a set in its official layout. `HUB` and `TSV` write the same questions as parquet in the layout of the
Hugging Face dataset and as VLMEvalKit's TSV. The test splits of VQAv2, DocVQA, InfographicVQA, TextVQA and NoCaps keep
their answers secret here too.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from benchmarks.evaluation.mini import SIZE, Scene, scenes

Row = dict[str, Any]
WORDS = ("OPEN", "BAKERY", "1984", "Taxi", "EXIT 12", "Cafe Rio", "NO PARKING", "7-UP", "SALE", "Lot 5")
TEXT_TYPES = {
    "IIIT5K": "Regular Text Recognition",
    "CTW1500": "Irregular Text Recognition",
    "WordArt": "Artistic Text Recognition",
    "IAM": "Handwriting Recognition",
    "ORAND": "Digit String Recognition",
    "NonSemanticText": "Non-Semantic Text Recognition",
    "TextVQA": "Scene Text-centric VQA",
    "docVQA": "Doc-oriented VQA",
    "FUNSD": "Key Information Extraction",
    "HME100k": "Handwritten Mathematical Expression Recognition",
}


def file_of(image: PILImage.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def page(*lines: str) -> PILImage.Image:
    image = PILImage.new("RGB", (SIZE * 2, 40 + 34 * len(lines)), (252, 252, 250))
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((16, 18 + 34 * number), line, (20, 20, 20), ImageFont.load_default(22))
    return image


def chart(values: list[int]) -> PILImage.Image:
    image = PILImage.new("RGB", (SIZE * 2, SIZE * 2), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for number, value in enumerate(values):
        x = 40 + 90 * number
        draw.rectangle((x, 280 - 2 * value, x + 50, 280), fill=(44, 90, 200))
        draw.text((x + 8, 286), "ABC"[number], (0, 0, 0), ImageFont.load_default(20))
        draw.text((x + 8, 256 - 2 * value), str(value), (0, 0, 0), ImageFont.load_default(20))
    return image


def save(path: Path, data: bytes | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def question_of(scene: Scene, number: int) -> tuple[str, str, str, str]:
    """A question about a scene, its answer, VQAv2's type of the answer and of the question."""
    if number % 3 == 0:
        asked = scene.color if number % 2 else "purple"
        return f"Is there a {asked} {scene.shape}?", "yes" if number % 2 else "no", "yes/no", "is there a"
    if number % 3 == 1:
        return f"How many {scene.shape}s are there?", str(scene.count), "number", "how many"
    return f"What color is the {scene.shape}?", scene.color, "other", "what color is the"


# The rows of the hub's datasets, with the image's name in the official set as `name`. `image` is the file's bytes.


def vqav2_rows(count: int, split: str = "val") -> Iterator[Row]:
    images = {"val": "val2014"}.get(split, "test2015")
    for number in range(count):
        image_id = 393225 + 7 * (number // 2) + (split != "val")
        scene = scenes(count, seed=1 + (split != "val"))[number // 2]
        question, answer, answer_type, question_type = question_of(scene, number)
        said = [answer] * 7 + [answer.capitalize()] + ["maybe", "can't tell"]
        answers = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(said, 1)]
        secret: Row = {"question_type": None, "multiple_choice_answer": None, "answers": None, "answer_type": None}
        open_: Row = {"question_type": question_type, "multiple_choice_answer": answer, "answers": answers}
        yield {
            **({**open_, "answer_type": answer_type} if split == "val" else secret),
            "image_id": image_id,
            "question_id": image_id * 1000 + number % 2,
            "question": question,
            "image": file_of(scene.image),
            "name": f"{images}/COCO_{images}_{image_id:012d}.jpg",
        }


def vqav2(folder: Path, count: int) -> None:
    about = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    for split, name in (("val", "val2014"), ("testdev", "test-dev2015"), ("test", "test2015")):
        rows = list(vqav2_rows(count, split))
        asked = [{key: row[key] for key in ("image_id", "question", "question_id")} for row in rows]
        if split == "testdev":  # a part of test2015
            asked = asked[: max(1, count // 2)]
        head = {**about, "data_subtype": name}
        save(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {**head, "questions": asked})
        if split == "val":
            keys = ("question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id")
            noted = [{key: row[key] for key in keys} for row in rows]
            save(folder / f"v2_mscoco_{name}_annotations.json", {**head, "annotations": noted})
        for row in rows:
            save(folder / row["name"], row["image"])


def gqa_rows(count: int) -> Iterator[Row]:
    for number, scene in enumerate(scenes(count, seed=3)):
        question, answer, _, _ = question_of(scene, 3 * number + (0, 2)[number % 2])
        structural = "verify" if number % 2 == 0 else "query"
        yield {
            "id": f"2020{number:05d}",
            "imageId": f"n{161313 + number}",
            "question": question,
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "isBalanced": True,
            "groups": {"global": "color", "local": f"{number}-{scene.shape}"},
            "entailed": "",
            "equivalent": f"2020{number:05d}",
            "types": {"structural": structural, "semantic": "attr", "detailed": "existAttrC"},
            "annotations": {"question": [], "answer": [], "fullAnswer": []},
            "semantic": [{"operation": "select", "argument": scene.shape, "dependencies": []}],
            "semanticStr": f"select: {scene.shape}",
            "image": file_of(scene.image),
            "name": f"images/n{161313 + number}.jpg",
        }


def gqa(folder: Path, count: int) -> None:
    questions = {}
    for row in gqa_rows(count):
        save(folder / row["name"], row["image"])
        questions[row["id"]] = {key: row[key] for key in row if key not in ("id", "image", "name")}
    save(folder / "testdev_balanced_questions.json", questions)


def textvqa_rows(count: int, split: str = "val") -> Iterator[Row]:
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        image_id = f"{0x003A8AE2EF43B901 + number:016x}"
        yield {
            "image_id": image_id,
            "question_id": 34602 + number,
            "question": "what does the sign say?" if number % 2 else "What is written here in Capitals?",
            "question_tokens": ["what", "does", "the", "sign", "say"],
            "image_width": SIZE * 2,
            "image_height": 74,
            "flickr_original_url": "https://example.org/o.jpg",
            "flickr_300k_url": "https://example.org/z.jpg",
            "answers": [word.lower()] * 8 + [word, "unanswerable"] if split == "val" else [""] * 10,
            "image_classes": ["Billboard"],
            "set_name": split,
            "ocr_tokens": word.split() if number % 4 != 3 else [],
            "image": file_of(page(word)),
            "name": f"{'train' if split == 'val' else 'test'}_images/{image_id}.jpg",
        }


def textvqa(folder: Path, count: int) -> None:
    for split in ("val", "test"):
        rows = list(textvqa_rows(count, split))
        hidden = {"image", "name", "ocr_tokens", *(["answers"] if split == "test" else [])}
        asked = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
        save(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "dataset_version": "0.5.1", "data": asked})
        seen = [{"image_id": row["image_id"], "ocr_tokens": row["ocr_tokens"], "ocr_info": []} for row in rows]
        save(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"data": seen})
        for row in rows:
            save(folder / row["name"], row["image"])


def docvqa_rows(count: int, split: str = "val") -> Iterator[Row]:
    for number in range(count):
        total, name = 12 + 7 * number, ("Miller", "Ortega", "Chen")[number % 3]
        asks_total = number % 2 == 0
        yield {
            "questionId": str(49153 + number + 10_000 * (split == "test")),
            "question": "What is the total?" if asks_total else "Who signed the letter?",
            "question_types": None if split == "test" else ["table/list", "form"] if asks_total else ["handwritten"],
            "docId": 14465 + number,
            "ucsf_document_id": f"xnbl{number:04d}",
            "ucsf_document_page_no": "1",
            "answers": None if split == "test" else [str(total), f"{total}.00"] if asks_total else [name],
            "data_split": split,
            "image": file_of(page("INVOICE", f"Total: {total}", f"Signed: {name}"), "PNG"),
            "name": f"documents/xnbl{number:04d}_1.png",
        }


def docvqa(folder: Path, count: int) -> None:
    for split in ("val", "test"):
        data = []
        for row in docvqa_rows(count, split):
            save(folder / "spdocvqa_images" / row["name"].partition("/")[2], row["image"])  # as the server packs them
            shown = {key: value for key, value in row.items() if key != "name" and value is not None}
            data.append({**shown, "questionId": int(row["questionId"]), "image": row["name"]})
        name = "val_v1.0_withQT.json" if split == "val" else "test_v1.0.json"
        head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": split}
        save(folder / name, {**head, "data": data})


def infographicvqa_rows(count: int, split: str = "val") -> Iterator[Row]:
    for number in range(count):
        share = 11 + 5 * number
        yield {
            "questionId": str(98313 + number),
            "question": "What percentage of people like tea?",
            "answers": None if split == "test" else [f"{share}%", str(share)],
            "answer_type": None if split == "test" else ["single span"],
            "image_url": "https://example.org/infographic.jpeg",
            "operation/reasoning": None if split == "test" else ["counting"] if number % 2 else [],
            "ocr": "{}",
            "data_split": split,
            "image": file_of(page("TEA OR COFFEE?", f"Tea: {share}%", f"Coffee: {100 - share}%")),
            "name": f"{37000 + number}.jpeg",
        }


def infographicvqa(folder: Path, count: int) -> None:
    for split in ("val", "test"):
        data = []
        for row in infographicvqa_rows(count, split):
            save(folder / "infographicsvqa_images" / row["name"], row["image"])
            shown = {k: v for k, v in row.items() if k not in ("name", "image", "ocr") and v is not None}
            names = {"image_local_name": row["name"], "ocr_output_file": f"{Path(row['name']).stem}.json"}
            data.append({**shown, "questionId": int(row["questionId"]), **names})
        name = "infographicsVQA_val_v1.0_withQT.json" if split == "val" else "infographicsVQA_test_v1.0.json"
        head = {"dataset_name": "infographicVQA", "dataset_version": "1.0", "dataset_split": split}
        save(folder / name, {**head, "data": data})


def chartqa_rows(count: int) -> Iterator[Row]:
    for number in range(count):
        values = [20 + 3 * number, 55, 90]
        human = number < (count + 1) // 2
        yield {
            "type": "human_test" if human else "augmented_test",
            "question": "What is the value of A?" if human else "Which bar is the highest?",
            "answer": str(values[0]) if human else "C",
            "image": file_of(chart(values), "PNG"),
            "name": f"{'two_col' if human else 'multi_col'}_{10_000 + number}.png",
        }


def chartqa(folder: Path, count: int) -> None:
    for half in ("human", "augmented"):
        rows = [row for row in chartqa_rows(count) if row["type"] == f"{half}_test"]
        asked = [{"imgname": row["name"], "query": row["question"], "label": row["answer"]} for row in rows]
        save(folder / "ChartQA Dataset" / "test" / f"test_{half}.json", asked)
        for row in rows:
            save(folder / "ChartQA Dataset" / "test" / "png" / row["name"], row["image"])


def ocrbench_rows(count: int) -> Iterator[Row]:
    for number in range(count):
        dataset, kind = list(TEXT_TYPES.items())[number % len(TEXT_TYPES)]
        word = "x + 1 = 3" if dataset == "HME100k" else WORDS[number % len(WORDS)]
        yield {
            "dataset": dataset,
            "question": "what is written in the image?",
            "question_type": kind,
            "answer": [word],
            "image": file_of(page(word)),
            "name": f"{dataset}/{number}.jpg",
        }


def ocrbench(folder: Path, count: int) -> None:
    data = []
    for number, row in enumerate(ocrbench_rows(count)):
        save(folder / "OCRBench_Images" / row["name"], row["image"])
        answers = row["answer"] if number % 2 else row["answer"][0]  # the file has both
        named = {"dataset_name": row["dataset"], "type": row["question_type"], "image_path": row["name"]}
        data.append({**named, "question": row["question"], "answers": answers, "id": number})
    save(folder / "OCRBench.json", data)


def _captions(scene: Scene) -> list[str]:
    return [
        scene.caption.capitalize() + ".",
        f"A drawing of {scene.caption} on white.",
        f"There {'is' if scene.count == 1 else 'are'} {scene.caption} in this image.",
        f"{scene.color.capitalize()} {scene.shape}s, drawn by a computer.",
        f"An image that shows {scene.caption}.",
    ]


def coco_caption_rows(count: int, split: str = "val2014") -> Iterator[Row]:
    for number, scene in enumerate(scenes(count, seed=5)):
        image_id = 391895 + number
        name = f"COCO_val2014_{image_id:012d}.jpg" if split == "val2014" else f"{image_id:012d}.jpg"
        yield {
            "question_id": name,
            "question": "Please carefully observe the image and come up with a caption for the image.",
            "answer": _captions(scene),
            "id": image_id,
            "license": 3,
            "file_name": name,
            "coco_url": f"https://example.org/{name}",
            "height": SIZE,
            "width": SIZE,
            "date_captured": "2013-11-14 11:18:45",
            "image": file_of(scene.image),
            "name": f"{split}/{name}",
        }


def coco_caption(folder: Path, count: int) -> None:
    for split in ("val2014", "val2017"):
        images, notes, karpathy = [], [], []
        for number, row in enumerate(coco_caption_rows(count, split)):
            save(folder / row["name"], row["image"])
            keys = ("license", "file_name", "coco_url", "height", "width", "date_captured", "id")
            images.append({key: row[key] for key in keys})
            notes += [
                {"image_id": row["id"], "id": 100 * number + i, "caption": c} for i, c in enumerate(row["answer"])
            ]
            said = [{"raw": c, "tokens": c.lower().strip(".").split(), "imgid": number} for c in row["answer"]]
            place = {"filepath": split, "filename": row["file_name"], "imgid": number, "cocoid": row["id"]}
            karpathy.append({**place, "split": "test" if number % 2 == 0 else "val", "sentences": said})
        save(folder / f"captions_{split}.json", {"info": {}, "licenses": [], "images": images, "annotations": notes})
        if split == "val2014":
            save(folder / "dataset_coco.json", {"dataset": "coco", "images": karpathy})


def nocaps_rows(count: int, split: str = "val") -> Iterator[Row]:
    for number, scene in enumerate(scenes(count, seed=6)):
        name = f"{0x0013EA2087020901 + number:016x}"
        yield {
            "image_coco_url": f"https://example.org/{name}.jpg",
            "image_date_captured": "2018-11-06 11:04:33",
            "image_file_name": f"{name}.jpg",
            "image_height": SIZE,
            "image_width": SIZE,
            "image_id": number,
            "image_license": 0,
            "image_open_images_id": name,
            "annotations_ids": [10 * number + i for i in range(5)] if split == "val" else None,
            "annotations_captions": _captions(scene) if split == "val" else None,
            "image": file_of(scene.image),
            "name": f"{split}/{name}.jpg",
            "domain": ("in-domain", "near-domain", "out-domain")[number % 3],
        }


def nocaps(folder: Path, count: int) -> None:
    for split in ("val", "test"):
        images, notes = [], []
        for row in nocaps_rows(count, split):
            save(folder / row["name"], row["image"])
            keys = ("coco_url", "date_captured", "file_name", "height", "width", "id", "license", "open_images_id")
            images.append({**{key: row[f"image_{key}"] for key in keys}, "domain": row["domain"]})
            said = zip(row["annotations_ids"] or [], row["annotations_captions"] or [])
            notes += [{"image_id": row["image_id"], "id": i, "caption": c} for i, c in said]
        name = "nocaps_val_4500_captions.json" if split == "val" else "nocaps_test_image_info.json"
        save(folder / name, {"info": {}, "licenses": [], "images": images, **({"annotations": notes} if notes else {})})


OFFICIAL: dict[str, Callable[[Path, int], None]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "docvqa": docvqa,
    "infographicvqa": infographicvqa,
    "chartqa": chartqa,
    "ocrbench": ocrbench,
    "coco_caption": coco_caption,
    "nocaps": nocaps,
}


def write_parquet(path: Path, rows: list[Row], *left_out: str) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    left_out = ("name", *left_out)
    shown = [{key: value for key, value in row.items() if key not in left_out} for row in rows]
    for row, whole in zip(shown, rows):
        if "image" in row:
            row["image"] = {"bytes": row["image"], "path": Path(whole["name"]).name}
    parquet.write_table(pyarrow.Table.from_pylist(shown), path, row_group_size=3)


def _vqav2_hub(folder: Path, count: int) -> None:
    for split, rows in (("val", vqav2_rows(count)), ("test", vqav2_rows(count, "test"))):
        write_parquet(folder / "data" / f"{_SPLIT[split]}-00000-of-00001.parquet", list(rows))
    part = list(vqav2_rows(count, "testdev"))[: max(1, count // 2)]
    write_parquet(folder / "data" / "testdev-00000-of-00001.parquet", part)


def _gqa_hub(folder: Path, count: int) -> None:
    rows = list(gqa_rows(count))
    write_parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows, "image")
    images = [{"id": row["imageId"], "image": row["image"], "name": row["name"]} for row in rows]
    write_parquet(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)


_SPLIT = {"val": "validation", "test": "test"}


def _hub(rows: Callable[..., Iterator[Row]], where: str, *left_out: str) -> Callable[[Path, int], None]:
    def write(folder: Path, count: int) -> None:
        for split, name in _SPLIT.items():
            for part, half in enumerate((slice(None, count // 2), slice(count // 2, None))):  # two shards
                file = folder / where / f"{name}-{part:05d}-of-00002.parquet"
                write_parquet(file, list(rows(count, split))[half], *left_out)

    return write


def _hub_single(rows: Callable[[int], Iterator[Row]], name: str) -> Callable[[Path, int], None]:
    return lambda folder, count: write_parquet(folder / "data" / f"{name}-00000-of-00001.parquet", list(rows(count)))


HUB: dict[str, Callable[[Path, int], None]] = {
    "vqav2": _vqav2_hub,
    "gqa": _gqa_hub,
    "textvqa": _hub(textvqa_rows, "data"),
    "docvqa": _hub(docvqa_rows, "DocVQA"),
    "infographicvqa": _hub(infographicvqa_rows, "InfographicVQA"),
    "chartqa": _hub_single(chartqa_rows, "test"),
    "ocrbench": _hub_single(ocrbench_rows, "test"),
    "coco_caption": _hub_single(coco_caption_rows, "val"),
    "nocaps": _hub(nocaps_rows, "data", "domain"),
}
"""As `huggingface_hub.snapshot_download` leaves them."""


def _tsv(name: str, rows: Callable[[int], Iterator[Row]], key: str = "", **columns: str) -> Callable[[Path, int], None]:
    """Write a TSV; `columns` are the columns of the rows that it has, and their names there."""

    def write(folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        seen: dict[bytes, str] = {}
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            head = ["index", "image", *columns.values()]
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(head)
            for number, row in enumerate(rows(count)):
                index = str(row[key]) if key else str(number)
                image = seen.setdefault(row["image"], index)  # the index of an earlier row with the same image
                cell = base64.b64encode(row["image"]).decode() if image == index else image
                writer.writerow([index, cell, *(row[column] for column in columns)])

    return write


def _chartqa_tsv_rows(count: int) -> Iterator[Row]:
    for row in chartqa_rows(count):
        yield {**row, "type": "_".join(reversed(row["type"].split("_")))}


TSV: dict[str, Callable[[Path, int], None]] = {
    "gqa": _tsv("GQA_TestDev_Balanced.tsv", gqa_rows, "id", question="question", answer="answer"),
    "textvqa": _tsv("TextVQA_VAL.tsv", textvqa_rows, "question_id", question="question", answers="answer"),
    "docvqa": _tsv("DocVQA_VAL.tsv", docvqa_rows, "questionId", question="question", answers="answer"),
    "infographicvqa": _tsv("InfoVQA_VAL.tsv", infographicvqa_rows, "questionId", question="question", answers="answer"),
    "chartqa": _tsv("ChartQA_TEST.tsv", _chartqa_tsv_rows, question="question", answer="answer", type="split"),
    "ocrbench": _tsv("OCRBench.tsv", ocrbench_rows, question="question", answer="answer", question_type="category"),
    "coco_caption": _tsv("COCO_VAL.tsv", lambda count: coco_caption_rows(count, "val2017"), "id", answer="answer"),
}
"""As VLMEvalKit keeps them; it has neither VQAv2 nor NoCaps."""

"""Small sets of the benchmarks with options or with yes and no, in their official layouts and in two other forms.

A set is made of rows as the Hugging Face dataset has them, images as PNG; `parquet` and `tsv` write the same rows as
`snapshot_download` and VLMEvalKit leave them. Sets of videos and sounds hold questions alone.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluation.mini import COLORS, SHAPES, Scene, scenes

Row = dict[str, Any]
SUBJECTS = ("Art", "Accounting", "Biology", "Computer_Science")
ARTICLE = ("the image shows", "there is", "one sees")


def png(scene: Scene) -> bytes:
    file = io.BytesIO()
    scene.image.save(file, "PNG")
    return file.getvalue()


def save(path: Path, data: bytes | str | Any) -> None:
    """Write a file: bytes and texts as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(data, bytes):
        data = (data if isinstance(data, str) else json.dumps(data, indent=1)).encode()
    path.write_bytes(data)


def parquet(path: Path, rows: Sequence[Row]) -> None:
    """Rows as `datasets` writes them: bytes become images, lists of bytes lists of them."""
    import pyarrow
    import pyarrow.parquet

    def cell(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], bytes):
            return [cell(each) for each in value]
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([{key: cell(value) for key, value in row.items()} for row in rows])
    pyarrow.parquet.write_table(table, path, row_group_size=3)


def tsv(path: Path, rows: Sequence[Row]) -> None:
    """Rows as VLMEvalKit has them: images in base64, lists as their text; what is missing is an empty cell."""

    def cell(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], bytes):
            return str([cell(each) for each in value])
        return base64.b64encode(value).decode() if isinstance(value, bytes) else "" if value is None else value

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)


def lettered(options: Sequence[str]) -> dict[str, str | None]:
    """Options in the columns A to D."""
    return {letter: options[i] if i < len(options) else None for i, letter in enumerate("ABCD")}


def quiz(count: int, seed: int = 0) -> Iterator[tuple[int, Scene, list[str], int]]:
    """Scenes with what might be in them, and which of it is."""
    chance = random.Random(seed)
    for number, scene in enumerate(scenes(count, seed)):
        wrong = [f"{n} {c} {s}s" for n in ("two", "three") for c in COLORS for s in SHAPES]
        options = [scene.caption, *chance.sample([text for text in wrong if text != scene.caption], 3)]
        options = options[: 4 - number % 2]  # every other question has three
        chance.shuffle(options)
        yield number, scene, options, options.index(scene.caption)


def mmmu_rows(count: int) -> list[Row]:
    rows = []
    for number, scene, options, right in quiz(count):
        is_open = number % 4 == 3
        question = "How many shapes are in <image 1>?" if is_open else "What does <image 1> show?"
        two = number % 4 == 2  # one question has two images
        rows.append(
            {
                "id": f"validation_{SUBJECTS[number // 2 % 4]}_{number + 1}",
                "question": f"{question} It is drawn again in <image 2>." if two else question,
                "options": "[]" if is_open else str(options),
                "explanation": "",
                **{f"image_{n}": png(scene) if n == 1 or (n == 2 and two) else None for n in range(1, 8)},
                "img_type": "['Diagrams']",
                "answer": str(scene.count) if is_open else "ABCD"[right],
                "topic_difficulty": "Easy",
                "question_type": "open" if is_open else "multiple-choice",
                "subfield": "Shapes",
            }
        )
    return rows


def write_mmmu(folder: Path, count: int) -> None:
    """A parquet file a subject, and the file of answers of the official evaluation."""
    rows = mmmu_rows(count)
    for subject in dict.fromkeys(row["id"].split("_", 1)[1].rpartition("_")[0] for row in rows):
        own = [row for row in rows if f"_{subject}_" in row["id"]]
        parquet(folder / subject / "validation-00000-of-00001.parquet", own)
    forms = {"open": "short-answer"}
    save(
        folder / "answer_dict_val.json",
        {r["id"]: {"question_type": forms.get(r["question_type"], r["question_type"]), "ground_truth": r["answer"]}
         for r in rows},
    )  # fmt: skip


def mmbench_rows(count: int) -> list[Row]:
    """Every question in as many orders as it has options, a million apart."""
    rows = []
    for number, scene, options, right in quiz(count):
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": number + turn * 1_000_000,
                    "question": "What does the image show?",
                    "hint": "Count the shapes." if number % 2 else None,
                    **lettered(turned),
                    "answer": "ABCD"[(right - turn) % len(options)],
                    "category": ("object_localization", "attribute_recognition")[number // 2 % 2],
                    "image": png(scene),
                    "source": "mini",
                    "l2-category": "finegrained_perception",
                    "comment": None,
                    "split": "dev",
                }
            )
    return sorted(rows, key=lambda row: row["index"])


def write_mmbench(folder: Path, count: int) -> None:
    tsv(folder / "MMBench_DEV_EN.tsv", mmbench_rows(count))


def scienceqa_rows(count: int) -> list[Row]:
    return [
        {
            "image": png(scene) if number % 3 != 2 else None,
            "question": "What does the image show?" if number % 3 != 2 else f"Which of these is {options[right]}?",
            "choices": options,
            "answer": right,
            "hint": "" if number % 2 else "Look at the shapes  and count them.",
            "task": "closed choice",
            "grade": f"grade{number % 12 + 1}",
            "subject": ("natural science", "social science")[number % 2],
            "topic": "shapes",
            "category": "Shapes",
            "skill": "Name shapes",
            "lecture": "",
            "solution": "",
        }
        for number, scene, options, right in quiz(count)
    ]


def write_scienceqa(folder: Path, count: int) -> None:
    problems = {}
    for pid, row in enumerate(scienceqa_rows(count)):
        image = row.pop("image")
        if image:
            save(folder / "test" / str(pid) / "image.png", image)
        problems[str(pid)] = {**row, "image": "image.png" if image else None, "split": "test"}
    save(folder / "problems.json", problems)
    save(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def aokvqa_rows(count: int) -> list[Row]:
    return [
        {
            "image": png(scene),
            "question_id": f"mini{number:018d}",
            "question": "What is drawn here?",
            "choices": options,
            "correct_choice_idx": right,
            "direct_answers": str([scene.shape] * 7 + ["shape"] * 2 + ["thing"]),
            "difficult_direct_answer": number % 4 == 3,
            "rationales": [scene.caption] * 3,
        }
        for number, scene, options, right in quiz(count)
    ]


def write_aokvqa(folder: Path, count: int) -> None:
    data = []
    for number, row in enumerate(aokvqa_rows(count)):
        save(folder / "val2017" / f"{number:012d}.jpg", row.pop("image"))
        answers = json.loads(row["direct_answers"].replace("'", '"'))
        data.append({"split": "val", "image_id": number, **row, "direct_answers": answers})
    save(folder / "aokvqa_v1p0_val.json", data)


def mmstar_rows(count: int) -> list[Row]:
    return [
        {
            "index": number,
            "question": "What does the image show?\nOptions: "
            + ", ".join(f"{letter}: {text}" for letter, text in zip("ABCD", options, strict=False)),
            "image": png(scene),
            "answer": "ABCD"[right],
            "category": ("coarse perception", "instance reasoning")[number % 2],
            "l2_category": ("image scene and topic", "single-instance reasoning")[number % 2],
            "meta_info": {"source": "mini", "split": "val", "image_path": f"images/{number}.jpg"},
        }
        for number, scene, options, right in quiz(count)
    ]


def write_mmstar(folder: Path, count: int) -> None:
    parquet(folder / "mmstar.parquet", mmstar_rows(count))


def pope_rows(count: int) -> list[Row]:
    """For each kind as many questions, half of them about what is there."""
    rows = []
    for kind in ("random", "popular", "adversarial"):
        for number, scene in enumerate(scenes(count)):
            asked = scene.shape if number % 2 == 0 else next(shape for shape in SHAPES if shape != scene.shape)
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(number + 1),
                    "question": f"Is there a {asked} in the image?",
                    "answer": "no" if number % 2 else "yes",
                    "image_source": f"COCO_val2014_{number:012d}",
                    "image": png(scene),
                    "category": kind,
                }
            )
    return rows


def write_pope(folder: Path, count: int) -> None:
    rows = pope_rows(count)
    for kind in dict.fromkeys(row["category"] for row in rows):
        lines = []
        for row in rows:
            if row["category"] == kind:
                name = f"{row['image_source']}.jpg"
                save(folder / "val2014" / name, row["image"])
                number = int(row["question_id"])
                lines.append({"question_id": number, "image": name, "text": row["question"], "label": row["answer"]})
        save(folder / f"coco_pope_{kind}.json", "".join(json.dumps(line) + "\n" for line in lines))


def mme_rows(count: int) -> list[Row]:
    """Two questions an image."""
    rows = []
    for number, scene in enumerate(scenes((count + 1) // 2)):
        task = ("existence", "color", "code_reasoning")[number % 3]
        other = next(color for color in COLORS if color != scene.color)
        for color, answer in ((scene.color, "Yes"), (other, "No")):
            rows.append(
                {
                    "question_id": f"{task}/{number:04d}.png",
                    "image": png(scene),
                    "question": f"Is there a {color} {scene.shape} in this image? Please answer yes or no.",
                    "answer": answer,
                    "category": task,
                }
            )
    return rows


def write_mme(folder: Path, count: int) -> None:
    """As the release has it: a text beside each image."""
    for row in mme_rows(count):
        image = folder / row["question_id"]
        save(image, row["image"])
        with image.with_suffix(".txt").open("a", encoding="utf-8") as file:
            file.write(f"{row['question']}\t{row['answer']}\n")


def videomme_rows(count: int) -> list[Row]:
    """Three questions a video."""
    return [
        {
            "video_id": f"{number // 3 + 1:03d}",
            "duration": ("short", "medium", "long")[number // 3 % 3],
            "domain": "Knowledge",
            "sub_category": "Geography",
            "url": f"https://www.youtube.com/watch?v=mini{number // 3}",
            "videoID": f"mini{number // 3}",
            "question_id": f"{number // 3 + 1:03d}-{number % 3 + 1}",
            "task_type": "Counting Problem",
            "question": "What is to be seen at the end?",
            "options": [f"{letter}. {text}." for letter, text in zip("ABCD", options, strict=False)],
            "answer": "ABCD"[right],
        }
        for number, _, options, right in quiz(count)
    ]


def write_videomme(folder: Path, count: int) -> None:
    """The template for answers of the official evaluation."""
    own = ("question_id", "task_type", "question", "options", "answer")
    videos: dict[str, Row] = {}
    for row in videomme_rows(count):
        video = videos.setdefault(row["video_id"], {**{k: v for k, v in row.items() if k not in own}, "questions": []})
        video["questions"].append({**{key: row[key] for key in own}, "response": ""})
    save(folder / "output_test_template.json", list(videos.values()))


def mvbench_rows(count: int) -> list[Row]:
    return [
        {
            "task_type": ("Action Sequence", "Fine-grained Action")[number % 2],
            "video": f"mini{number}.mp4",
            "question": "What happens first?",
            "candidates": options,
            "answer": options[right],
            **({"start": 0.5, "end": 4.0} if number % 2 == 0 else {}),
        }
        for number, _, options, right in quiz(count)
    ]


def write_mvbench(folder: Path, count: int) -> None:
    rows = mvbench_rows(count)
    for name, kind in (("action_sequence", "Action Sequence"), ("fine_grained_action", "Fine-grained Action")):
        own = [{k: v for k, v in row.items() if k != "task_type"} for row in rows if row["task_type"] == kind]
        save(folder / "json" / f"{name}.json", own)


def librispeech_rows(count: int) -> list[Row]:
    return [
        {"id": f"61-{70000 + number // 4}-{number % 4:04d}", "text": f"{ARTICLE[number % 3]} {scene.caption}".upper()}
        for number, scene in enumerate(scenes(count))
    ]


def write_librispeech(folder: Path, count: int) -> None:
    chapters: dict[str, list[str]] = {}
    for row in librispeech_rows(count):
        chapters.setdefault(row["id"].split("-")[1], []).append(f"{row['id']} {row['text']}\n")
    for chapter, lines in chapters.items():
        save(folder / "LibriSpeech" / "test-clean" / "61" / chapter / f"61-{chapter}.trans.txt", "".join(lines))


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "mmmu": write_mmmu,
    "mmbench": write_mmbench,
    "scienceqa": write_scienceqa,
    "aokvqa": write_aokvqa,
    "mmstar": write_mmstar,
    "pope": write_pope,
    "mme": write_mme,
    "videomme": write_videomme,
    "mvbench": write_mvbench,
    "librispeech": write_librispeech,
}

"""Answers and scores of `polymodal eval` beside those of lmms-eval, item by item, on generated questions.

    python -m benchmarks.evaluation.beside_lmms_eval [--items 200] [--folder DIR] [--models default llava idefics3]

Needs lmms-eval and `integrations/lmms_eval` installed beside polymodal. Both read the same PNG files and the same
questions: VQA with ten annotators, and POPE's yes or no. lmms-eval's scorers are those of its own vqav2 and pope tasks.
The tiny seeded LLaVA is also run by lmms-eval's own class `llava_hf` (which wants a module `decord`), one question at a
time, with nothing of ours in it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.evaluation.mini import COLORS, SHAPES, Scene, scenes

PROMPT = "\nAnswer the question using a single word or phrase."
TASKS = {"vqa": ("vqa_accuracy", "exact_match", 16), "pope": ("pope", "pope_accuracy", 128)}
"""A task's metric here, its metric there, and the longest answer of lmms-eval's vqav2 and pope."""
UTILS = """
from PIL import Image
from lmms_eval.tasks.pope.utils import *
from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text, vqav2_process_results_val


def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
YAML = """
task: scenes_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.{text}
doc_to_target: answer
process_results: !function utils.{process}
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0}}
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: {prompt}}}}}
"""
THEIRS = {
    "vqa": {"text": "vqav2_doc_to_text", "process": "vqav2_process_results_val", "aggregation": "mean"},
    "pope": {
        "text": "pope_doc_to_text", "process": "pope_process_results",
        "aggregation": "!function utils.pope_aggregate_accuracy",
    },
}  # fmt: skip


def vqa_item(scene: Scene, chance: random.Random) -> tuple[str, str, list[str]]:
    """A question, its answer and those of ten annotators, who differ in words, case and marks."""
    number = ("one", "two", "three")[scene.count - 1]
    question, answer, others = chance.choice(
        [
            ("What color are the shapes?", scene.color, [f"{scene.color.title()}.", f"the {scene.color}", "bright"]),
            ("How many shapes are there?", number, [str(scene.count), f"{number} shapes", "many"]),
            ("What shape is to be seen?", scene.shape, [f"a {scene.shape}", f"{scene.shape}s", f"{scene.shape}!"]),
        ]
    )
    return question, answer, [chance.choice([answer, answer, *others]) for _ in range(10)]


def pope_item(scene: Scene, chance: random.Random) -> tuple[str, str, list[str]]:
    """Whether there is something, half of the time what is there."""
    there = chance.random() < 0.5
    color, shape = (scene.color, scene.shape) if there else (chance.choice(list(COLORS)), chance.choice(SHAPES))
    answer = "yes" if (color, shape) == (scene.color, scene.shape) else "no"
    return f"Is there a {color} {shape} in the image?", answer, [answer]


def write_items(folder: Path, items: int) -> None:
    """The images, and each task's questions in both forms."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = scenes(items)
    for number, scene in enumerate(drawn):
        scene.image.save(folder / f"{number}.png")
    (folder / "utils.py").write_text(UTILS)
    for name, make in (("vqa", vqa_item), ("pope", pope_item)):
        chance, docs, rows = random.Random(1), [], []
        for number, scene in enumerate(drawn):
            question, answer, said = make(scene, chance)
            annotators = [{"answer": text, "answer_id": i} for i, text in enumerate(said)]
            image = str(folder / f"{number}.png")
            docs.append({"question_id": number, "image": image, "question": question, "answer": answer})
            docs[-1] |= {"answers": annotators} if name == "vqa" else {}
            content = [{"type": "image", "image": image}, {"type": "text", "text": question + PROMPT}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            rows.append({"id": str(number), "messages": turns, "answers": said})
        (folder / f"{name}.json").write_text(json.dumps(docs))
        (folder / f"{name}-rows.json").write_text(json.dumps(rows))
        _, metric, tokens = TASKS[name]
        values = {"data": folder / f"{name}.json", "tokens": tokens, "metric": metric, "prompt": json.dumps(PROMPT)}
        (folder / f"scenes_{name}.yaml").write_text(YAML.format(name=name, **values, **THEIRS[name]))


def _run(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)
    if done.returncode or "Error during evaluation" in done.stdout + done.stderr:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


Found = dict[str, list[tuple[str, float]]]
"""A task to the answer and the score of each item."""


def ours(model: str, folder: Path) -> Found:
    """What `polymodal eval` finds."""
    found = {}
    for name, (metric, _, tokens) in TASKS.items():
        out = folder / f"ours-{Path(model).name}"
        what = ["--data", folder / f"{name}-rows.json", "--metric", metric, "--variant", "lmms_eval", "--output", out]
        how = ["--max-new-tokens", tokens, "--no-blind", "--no-cache", "--device", "cpu"]
        _run("polymodal", "eval", model, *what, *how)
        lines = (out / f"{name}-rows" / "samples.jsonl").read_text().splitlines()
        found[name] = [(row["answer"], row["score"]) for row in map(json.loads, lines)]
    return found


def theirs(kind: str, args: str, folder: Path, batch: int) -> Found:
    """What lmms-eval finds, with our adapter or with its own class."""
    out = folder / f"theirs-{kind}-{Path(args.split(',')[0]).name}"
    tasks = ",".join(f"scenes_{name}" for name in TASKS)
    _run(
        *("lmms_eval", "--model", kind, "--model_args", args, "--tasks", tasks, "--include_path", folder),
        *("--batch_size", batch, "--log_samples", "--output_path", out),
    )
    found: Found = {}
    for name, (_, metric, _) in TASKS.items():
        file = max(out.rglob(f"*samples_scenes_{name}.jsonl"), key=lambda path: path.stat().st_mtime)
        rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        scores = [row[metric] for row in rows]
        given = [row["filtered_resps"] for row in rows]  # a text, or a list of one
        said = [(text if isinstance(text, str) else text[0]).strip() for text in given]
        found[name] = [(a, s["score"] if isinstance(s, dict) else s) for a, s in zip(said, scores, strict=True)]
    return found


def compare(one: Found, other: Found, what: str, shown: int = 3) -> None:
    """Print how many answers and scores are equal, the means, and what differs."""
    for name in TASKS:
        pairs = list(zip(one[name], other[name], strict=True))
        differ = [(i, a, b) for i, (a, b) in enumerate(pairs) if a[0] != b[0] or abs(a[1] - b[1]) > 1e-9]
        same = [sum(a[0] == b[0] for a, b in pairs), sum(abs(a[1] - b[1]) < 1e-9 for a, b in pairs)]
        means = [100 * sum(score for _, score in found[name]) / len(pairs) for found in (one, other)]
        print(
            f"{what:<44}{name:<6}answers {same[0]:>3} of {len(pairs)}, scores {same[1]:>3} of {len(pairs)}; "
            f"{means[0]:.4f} and {means[1]:.4f}; {len({a[0] for a, _ in pairs})} different answers",
            flush=True,
        )
        for index, a, b in differ[:shown]:
            print(f"    item {index}: {a[0]!r} ({a[1]:.3f}) beside {b[0]!r} ({b[1]:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/beside-lmms-eval"))
    parser.add_argument("--models", nargs="*", default=["default", "llava", "idefics3"])
    args = parser.parse_args()
    folder = args.folder.resolve()
    write_items(folder, args.items)
    from importlib.metadata import version

    from benchmarks.evaluation.models import FAMILIES, write_model

    print(f"lmms-eval {version('lmms_eval')}, transformers {version('transformers')}, {args.items} items a task")
    for model in args.models:
        path = str(write_model(model, folder / model, "tiny", ends=2.5)) if model in FAMILIES else model
        found = ours(path, folder)
        adapted = theirs("polymodal", f"pretrained={path},device=cpu", folder, 16)
        compare(found, adapted, f"{model}: lmms-eval with our adapter")
        if model == "llava":
            own = theirs("llava_hf", f"pretrained={path},device=cpu,device_map=cpu,dtype=float32", folder, 1)
            compare(found, own, f"{model}: lmms-eval with its own class")


if __name__ == "__main__":
    main()

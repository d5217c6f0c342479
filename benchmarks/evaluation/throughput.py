"""Items per second of `polymodal eval` beside asking one item at a time, on the same model and items.

    python -m benchmarks.evaluation.throughput [--images 16] [--each 5] [--runs 3] [--models llava idefics3 default]

For a model of transformers ("llava", "idefics3": seeded weights of a small shape) the other side is what a harness with
batches of one does, such as lmms-eval's llava_hf: transformers' own class and processor, `generate` for each item. For
any other model it is `run_task` with batches of one. Turns are interleaved, since other programs disturb both sides
alike then; a ratio is taken within a turn, of wall time and of this process's CPU time, which other programs disturb
least. Answers are compared, and for a model of ours it is printed where the CPU time of a batch goes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import polymodal
from benchmarks.evaluation.mini import COLORS, SHAPES, scenes
from benchmarks.evaluation.models import FAMILIES, write_model
from polymodal.backends.base import ModelBackend
from polymodal.backends.local import LocalBackend
from polymodal.evaluation.runner import Settings, run_task
from polymodal.evaluation.task import Example, Task
from polymodal.messages import Image, user

WIDTHS = (15, 15, 24, 24)
PROMPT = "\nAnswer the question using a single word or phrase."
TASK = Task("throughput", "generated scenes", "exact", ("",), lambda _folder, _split: (), max_new_tokens=16)


def questions(images: int, each: int, seed: int = 0) -> list[Example]:
    """Questions about generated scenes, some about each; in no order, as benchmarks have them."""
    chance, made = random.Random(seed), []
    for number, scene in enumerate(scenes(images, seed)):
        asked = ["What color are the shapes?", "How many shapes are there?", "What shape is to be seen?"]
        asked += [f"Is there a {color} {shape} in the image?" for color in COLORS for shape in SHAPES]
        for place, question in enumerate(chance.sample(asked, each)):
            messages = (user(Image(scene.image), question + PROMPT),)
            made.append(Example(f"{number}-{place}", messages, (scene.caption,), metric="exact"))
    chance.shuffle(made)
    return made


class OneByOne:
    """transformers' own class and processor, one question at a time."""

    def __init__(self, folder: Path) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = self.processor.tokenizer
        self.ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        answers = []
        for example in examples:
            image, text = example.messages[0].parts
            content = [{"type": "image", "image": image.source}, {"type": "text", "text": text.text}]  # type: ignore[union-attr]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            inputs = self.processor(images=[image.source], text=prompt, return_tensors="pt")  # type: ignore[union-attr]
            with torch.inference_mode():
                made = self.model.generate(
                    **inputs, **self.ends, do_sample=False, num_beams=1, max_new_tokens=TASK.max_new_tokens
                )
            said = made[:, inputs["input_ids"].shape[1] :]
            answers.append(self.processor.batch_decode(said, skip_special_tokens=True)[0].strip())
        return answers


def evaluated(model: ModelBackend[Any], examples: Sequence[Example], batch_size: int | None) -> list[str]:
    """The answers of `run_task`, none of them kept."""
    found = run_task(model, TASK, examples, Settings(batch_size=batch_size, cached=False))
    return [f"failed: {s.error}" if s.answer is None else s.answer for s in found.samples]


@dataclass
class Result:
    """Seconds of each turn, and what was said."""

    fast: list[tuple[float, float]]  # `run_task`, batch size auto; wall and CPU
    slow: list[tuple[float, float]]  # One at a time
    equal: int  # Items with the same answer
    tokens: float  # Made for an item, on average
    differ: list[tuple[str, str]]  # The answers that do
    where: str  # Shares of the CPU time

    def ratios(self, clock: int) -> str:
        """How many times as fast, turn by turn."""
        each = sorted(slow[clock] / fast[clock] for fast, slow in zip(self.fast, self.slow, strict=True))
        return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def measure(name: str, folder: Path, examples: Sequence[Example], runs: int) -> Result:
    """Ask a model both ways, in turns; one question of each warms up."""
    model = polymodal.load(folder if name in FAMILIES else name, "cpu")
    assert isinstance(model, ModelBackend)
    sides: list[Callable[[Sequence[Example]], list[str]]] = [lambda asked: evaluated(model, asked, None)]
    sides.append(OneByOne(folder) if name in FAMILIES else lambda asked: evaluated(model, asked, 1))
    seconds: list[list[tuple[float, float]]] = [[], []]
    answers: list[list[str]] = [side(examples[:1]) for side in sides]
    for _ in range(runs):
        for place, side in enumerate(sides):
            begin, cpu = time.perf_counter(), time.process_time()
            answers[place] = side(examples)
            seconds[place].append((time.perf_counter() - begin, time.process_time() - cpu))
    differ = [(ours, theirs) for ours, theirs in zip(*answers, strict=True) if ours != theirs]
    tokens = statistics.mean(len(model.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in answers[0])
    return Result(*seconds, len(examples) - len(differ), tokens, differ, shares(model, examples))


def shares(model: ModelBackend[Any], examples: Sequence[Example]) -> str:
    """Where a batched run of a model of ours spends its CPU time; nothing for other models."""
    if not isinstance(model, LocalBackend):
        return ""
    spent: dict[str, float] = {}

    def timed(name: Callable[..., str], inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[name(**kwargs)] = spent.get(name(**kwargs), 0.0) + time.process_time() - begin

        return call

    wrapped = {
        (model, "prepare"): lambda **_: "preparing",
        (model.model, "encode_images"): lambda **_: "images",
        (model.model.llm, "forward"): lambda **given: "prompts" if "inputs_embeds" in given else "answers",
    }
    for (owner, method), name in wrapped.items():
        setattr(owner, method, timed(name, getattr(owner, method)))
    begin = time.process_time()
    evaluated(model, examples, None)
    whole = time.process_time() - begin
    for owner, method in wrapped:
        delattr(owner, method)
    spent["other"] = whole - sum(spent.values())
    return ", ".join(f"{name} {100 * seconds / whole:.0f}%" for name, seconds in spent.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--each", type=int, nargs="*", default=[5, 1], help="questions about an image")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shape", default="small", help="of the models of transformers: tiny, small, smollm2-135m")
    parser.add_argument("--models", nargs="*", default=["llava", "idefics3", "default"])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.runs} turns, medians (range)")
    titles = ("items", "tokens", "auto, items/s", "alone, items/s", "ratio", "ratio of CPU time")
    print(f"{'':<22}{titles[0]:>6}{titles[1]:>8}" + "".join(f"{title:>{w}}" for title, w in zip(titles[2:], WIDTHS)))
    with tempfile.TemporaryDirectory() as work:
        for name in args.models:
            folder = Path(work) / name
            if name in FAMILIES:
                write_model(name, folder, args.shape)
            for each in args.each:
                examples = questions(args.images, each)
                found = measure(name, folder, examples, args.runs)
                rates = [len(examples) / statistics.median(w for w, _ in side) for side in (found.fast, found.slow)]
                cells = [*(f"{rate:.2f}" for rate in rates), found.ratios(0), found.ratios(1)]
                print(
                    f"{f'{name}, {each} an image':<22}{len(examples):>6}{found.tokens:>8.1f}"
                    + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS))
                    + f"  equal answers: {found.equal}",
                    flush=True,
                )
                if found.where:
                    print(f"    {found.where}")
                for ours, theirs in found.differ[:3]:
                    print(f"    {ours!r} beside {theirs!r}")


if __name__ == "__main__":
    main()

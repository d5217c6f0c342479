"""The look at held-out data between steps: loss by kind and by source, and a few answers beside what was expected.

It changes nothing in the run: a run with evaluations ends bit for bit as one without. Scores of tasks are another
matter (`polymodal eval`); this is to see early that something goes wrong. Without held-out data the finished model
still answers a few questions of its training data, marked as such, so that the report has something to show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polymodal.errors import ConfigError, PolymodalError
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.media.image import open_image
from polymodal.messages import Image
from polymodal.processing.collate import collate
from polymodal.training.reporting.loss_by_kind import Tally, means, merge
from polymodal.training.sft.packing import plan_micro
from polymodal.training.sft.task import Feed, make_eval_feed
from polymodal.utils.threads import ahead

if TYPE_CHECKING:
    from polymodal.data.readers.conversations import Record
    from polymodal.modeling.vlm import MultimodalLM
    from polymodal.training.distributed import Engine
    from polymodal.training.process_group import World
    from polymodal.training.recipes.sft import Recipe

NEW_TOKENS = 48
"""Length of an answer at most."""

SEARCHED = 512
"""Records among which the shown ones are chosen."""

IMAGE_SIDE = 320
"""Pixels of the longer side of the images kept for the report."""


@dataclass(frozen=True)
class Evaluation:
    """Call it with an engine and a step."""

    feed: Feed  # The held-out data, or the training data
    held_out: bool  # Which of the two
    shown: tuple[int, ...]  # Indices of the records whose first question is answered
    recipe: Recipe  # For batch sizes
    folder: Path  # Where images are kept

    def __call__(self, engine: Engine, step: int) -> dict[str, Any]:
        """Evaluate; every process must call it."""
        began = time.monotonic()
        engine.inner.eval()
        line: dict[str, Any] = {"step": step, "data": "held-out" if self.held_out else "training"}
        if self.held_out:
            line |= held_out_loss(engine, self.feed, self.recipe)
        line["answers"] = self._answers(engine) if self.shown else []
        line["seconds"] = round(time.monotonic() - began, 2)
        return line

    def _answers(self, engine: Engine) -> list[dict[str, Any]]:
        """Answer the first question of each shown record."""
        processor, tokenizer = self.feed.processor, self.feed.processor.tokenizer
        stop_ids = processor.template.stop_ids
        answers, prompts = [], []
        for index in self.shown:
            record = self.feed.prepared.records[index]
            entry = describe(record)
            try:
                prompts.append(processor(_question(record), add_generation_prompt=True, id=record.id))
                entry["images"] = _keep_images(record, index, self.folder, engine.world)
            except PolymodalError as error:  # an image that went away
                entry["error"] = str(error)
            answers.append(entry)
        if not prompts:
            return answers
        params = GenerationParams(max_new_tokens=NEW_TOKENS)
        batch = collate(prompts, processor.pad_id, side="left")
        with engine.whole_for_generation() as model:
            made = generate_ids(model, batch, params, stop_ids, len(tokenizer))
        texts = iter(made)
        for entry in answers:
            if "error" not in entry:
                ids = [i for i in next(texts) if i not in stop_ids]
                entry["answer"] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        return answers


def make_evaluation(recipe: Recipe, model: MultimodalLM, feed: Feed, output_dir: Path) -> Evaluation | None:
    """Prepare what is evaluated."""
    held_out = make_eval_feed(recipe, model, feed, output_dir)
    if held_out is None and recipe.run.eval_every:
        raise ConfigError("run.eval_every: name held-out files in data.eval, or set it to 0")
    if held_out is None and not recipe.run.eval_generations:
        return None
    used = held_out or feed
    shown = choose_shown(used, recipe.run.eval_generations, recipe.run.seed)
    return Evaluation(used, held_out is not None, shown, recipe, output_dir / "eval")


@torch.no_grad()
def held_out_loss(engine: Engine, feed: Feed, recipe: Recipe) -> dict[str, Any]:
    """The loss per trained token over all held-out data, shared among processes."""
    world, prepared = engine.world, feed.prepared
    everything = np.arange(len(prepared.lengths))
    parts = np.array_split(everything, max(1, len(everything) // recipe.batch.global_size))
    plan = [
        indices
        for part in parts
        for indices in plan_micro(part, prepared.lengths, recipe.batch, world.rank, world.size)
    ]
    tally = Tally()
    for batch, kinds, sources in ahead(feed.named_batch, plan, recipe.run.workers):
        out = engine.score(batch.to(world.device))
        assert out.losses is not None
        tally.add(out.losses, kinds, sources)
    tally.fold()
    both = world.gather((tally.kinds, tally.sources))
    kinds_sums, source_sums = merge(part[0] for part in both), merge(part[1] for part in both)
    loss, tokens = (sum(column) for column in zip(*kinds_sums.values(), strict=True))
    return {
        "loss": loss / tokens,
        "tokens": round(tokens),
        "loss_by_kind": means(kinds_sums),
        "loss_by_source": means(source_sums),
    }


def choose_shown(feed: Feed, count: int, seed: int) -> tuple[int, ...]:
    """Choose records to show: one of each kind in turn, with images where the kind has some."""
    records, samples = feed.prepared.records, feed.prepared.samples
    order = np.random.default_rng([seed, len(samples)]).permutation(len(samples))[:SEARCHED].tolist()
    by_kind: dict[str, list[int]] = {}
    for index in sorted(order, key=lambda i: not samples[i].media_keys):  # stable: the drawn order stays
        if _question(records[index]):
            by_kind.setdefault(records[index].kind, []).append(index)
    chosen: list[int] = []
    while len(chosen) < count and any(by_kind.values()):
        for kind in sorted(by_kind):
            if by_kind[kind] and len(chosen) < count:
                chosen.append(by_kind[kind].pop(0))
    return tuple(chosen)


def describe(record: Record) -> dict[str, Any]:
    """What was asked and expected, as plain data."""
    question = _question(record)
    return {
        "id": record.id,
        "kind": record.kind,
        "source": record.source,
        "question": question[-1].text.strip() if question else "",
        "expected": record.messages[len(question)].text.strip(),
    }


def _question(record: Record) -> list[Any]:
    """The messages before the first answer."""
    first = next((n for n, message in enumerate(record.messages) if message.role == "assistant"), 0)
    return list(record.messages[:first])


def _keep_images(record: Record, index: int, folder: Path, world: World) -> list[str]:
    """Write small copies of a question's images, once; returns their names within the run's folder."""
    names = []
    media = [part for message in _question(record) for part in message.media if isinstance(part, Image)]
    for number, part in enumerate(media):
        path = folder / f"{index}-{number}.jpg"
        names.append(f"{folder.name}/{path.name}")
        if world.is_main and not path.is_file():
            folder.mkdir(exist_ok=True)
            image = open_image(part.source).convert("RGB")
            image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
            work = path.with_suffix(".tmp")
            image.save(work, "JPEG", quality=85)
            work.replace(path)
    return names

"""Evaluation between steps: held-out loss by kind and by source, and a few answers beside what was expected.

It changes nothing in the run: a run with evaluations ends bit for bit as one without. Scores of tasks are another
matter (`polymodal eval`); this is to see early that something goes wrong. Without held-out data the finished model
still answers a few questions of its training data, marked as such, so that the report has something to show.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.data.readers.conversations import Record
from polymodal.errors import ConfigError, PolymodalError
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import decode_ids
from polymodal.media.source import describe as name_of
from polymodal.media.thumbnail import thumbnail
from polymodal.messages import Audio
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import collate
from polymodal.training.distributed import Engine
from polymodal.training.process_group import World
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import LossByKind, means, merge
from polymodal.training.sft.dataset import SFTDataset, prepare
from polymodal.training.sft.packing import plan_micro
from polymodal.training.task import read_mix
from polymodal.utils.progress import log, progress
from polymodal.utils.threads import ahead

NEW_TOKENS = 48
"""Length of an answer at most."""

SEARCHED = 512
"""Records among which the shown ones are chosen."""

IMAGE_SIDE = 320
"""Pixels of the longer side of the images kept for the report."""


@dataclass(frozen=True)
class Evaluation:
    """Call it with an engine and a step."""

    dataset: SFTDataset  # The held-out data, or the training data
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
            line |= held_out_loss(engine, self.dataset, self.recipe)
        line["answers"] = self._answers(engine) if self.shown else []
        line["seconds"] = round(time.monotonic() - began, 2)
        return line

    def _answers(self, engine: Engine) -> list[dict[str, Any]]:
        """Answer the first question of each shown record."""
        processor, tokenizer = self.dataset.processor, self.dataset.processor.tokenizer
        stop_ids = processor.template.stop_ids
        answers, prompts = [], []
        for index in self.shown:
            record = self.dataset.prepared.records[index]
            entry = describe(record)
            try:
                prompt = processor(_question(record), add_generation_prompt=True, id=record.id)
                entry |= _keep_media(record, index, self.folder, engine.world)
                prompts.append(prompt)
            except (PolymodalError, OSError) as error:  # an image that went away, a full disk
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
                entry["answer"] = decode_ids(tokenizer, ids).strip()
        return answers


def make_evaluation(recipe: Recipe, model: MultimodalLM, dataset: SFTDataset, output_dir: Path) -> Evaluation | None:
    """Prepare what is evaluated: the held-out files, as the training data were prepared."""
    run, held_out = recipe.run, bool(recipe.data.eval)
    if held_out:
        data = recipe.data.model_copy(update={"mix": recipe.data.eval})
        mix, skipped = read_mix(data, run.seed), output_dir / "skipped_eval.jsonl"
        prepared = prepare(mix, dataset.processor, data, progress, run.workers, skipped)
        dataset = replace(dataset, prepared=prepared).fill_store(model, run.workers, "held-out records")
    elif run.eval_every:
        raise ConfigError("run.eval_every: name held-out files in data.eval, or set it to 0")
    elif not run.eval_generations:
        return None
    shown = choose_shown(dataset, run.eval_generations, run.seed)
    return Evaluation(dataset, held_out, shown, recipe, output_dir / "eval")


@torch.no_grad()
def held_out_loss(engine: Engine, dataset: SFTDataset, recipe: Recipe) -> dict[str, Any]:
    """The loss per trained token over all held-out data, shared among processes."""
    world, lengths = engine.world, dataset.prepared.lengths
    everything = np.arange(len(lengths))
    plan = [
        micro
        for indices in np.array_split(everything, max(1, len(everything) // recipe.batch.global_size))
        for micro in plan_micro(indices, lengths, recipe.batch, world.rank, world.size)
    ]
    own = LossByKind()
    for batch, kinds, sources, names, _ in ahead(dataset.named_batch, plan, recipe.run.workers):
        with engine.autocast():  # the model itself, not DDP's wrapper, and touched in every process
            out = engine.inner(**batch.to(world.device).inputs(), touch_media=world.size > 1)
        own.add(out.losses, kinds, sources, names)
    own.fold()
    if broken := own.not_finite():
        log(f"held-out loss: not finite of {broken[0]}, and of {len(broken) - 1} more")
    everyone = world.gather((own.kinds, own.sources))
    kind_sums, source_sums = merge(sums for sums, _ in everyone), merge(sums for _, sums in everyone)
    loss, tokens = (sum(column) for column in zip(*kind_sums.values(), strict=True))
    return {
        "loss": loss / tokens,
        "tokens": round(tokens),
        "loss_by_kind": means(kind_sums),
        "loss_by_source": means(source_sums),
    }


def choose_shown(dataset: SFTDataset, count: int, seed: int) -> tuple[int, ...]:
    """Choose records to show: one of each kind in turn, with images where the kind has some."""
    records, samples = dataset.prepared.records, dataset.prepared.samples
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


def _keep_media(record: Record, index: int, folder: Path, world: World) -> dict[str, list[str]]:
    """Write small images of what a question shows, once: their names within the run's folder, and those of sounds."""
    found: dict[str, list[str]] = {"images": [], "sounds": []}
    for number, part in enumerate(part for message in _question(record) for part in message.media):
        if isinstance(part, Audio):
            found["sounds"].append(name_of(part.source).rpartition("/")[2])
            continue
        path = folder / f"{index}-{number}.jpg"
        found["images"].append(f"{folder.name}/{path.name}")
        if world.is_main and not path.is_file() and (image := thumbnail(part, IMAGE_SIDE)) is not None:
            folder.mkdir(exist_ok=True)
            work = path.with_suffix(".tmp")
            image.save(work, "JPEG", quality=85)
            work.replace(path)
    return found if found["sounds"] else {"images": found["images"]}

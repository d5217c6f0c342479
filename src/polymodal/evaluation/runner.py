"""Asking a model the questions of a task: in batches of like length, each question once, and once more about grey.

Questions are sorted by length, so that a batch needs little padding, and batches are the same however often a run was
cut off; each batch's answers are kept as they come (`evaluation.responses`). An endpoint is asked several questions at
the same time instead. Under torchrun each process asks its share, and the first one scores.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image as PILImage

from polymodal.backends.base import Answer, Backend, ModelBackend
from polymodal.errors import DataError, PolymodalError
from polymodal.evaluation.responses import Responses
from polymodal.evaluation.task import Example, Sample, Task, score_one, score_samples
from polymodal.generation.params import GenerationParams
from polymodal.media.image import open_image
from polymodal.messages import Image, Message, Text
from polymodal.metrics import CORPUS_METRICS
from polymodal.utils.progress import Meter, log

GREY = (128, 128, 128)
AUTO_BATCH = 16
"""The first batch size of "auto"; it is halved where memory runs out."""
PROBED = 2
"""Questions of a batch that are asked alone too, to see that a batch changes nothing."""

PATIENCE = 20
"""Failures at the beginning after which a run ends."""


@dataclass(frozen=True)
class Settings:
    """How a task is run."""

    batch_size: int | None = None  # Questions at a time; None starts with 16 and halves it where memory runs out
    blind: bool = False  # Ask everything again about grey images of the same size
    limit: int | None = None  # Only the first examples of each kind
    max_new_tokens: int | None = None  # The longest answer; the task's where None
    options: dict[str, Any] | None = None  # For every scorer, such as `variant`
    cached: bool = True  # Keep answers, and take those that were kept


@dataclass
class Run:
    """The scored answers of a task."""

    samples: list[Sample]  # One for each example, in order
    params: GenerationParams  # How the answers were decoded
    batch_size: int  # Questions at a time; 1 for models that are asked one by one
    batch_invariant: bool | None  # Whether answers in a batch equal those asked alone; None where nobody looked
    asked: int  # Questions that the model was asked; the others' answers had been kept


def limited(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first examples of each kind, or all of them."""
    if limit is None:
        return list(examples)
    seen: dict[str, int] = {}
    kept = []
    for example in examples:
        seen[example.kind] = seen.get(example.kind, 0) + 1
        if seen[example.kind] <= limit:
            kept.append(example)
    return kept


def run_task(model: Backend, task: Task, examples: Sequence[Example], settings: Settings = Settings()) -> Run:
    """Ask and score."""
    examples = [replace(e, metric=e.metric or task.metric) for e in limited(examples, settings.limit)]
    if not examples:
        raise DataError(f"{task.name}: there is nothing to ask; the data hold no questions")
    params = GenerationParams(max_new_tokens=settings.max_new_tokens or task.max_new_tokens)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    asker = _Asker(model, params, settings, rank)
    passes = (False, True) if settings.blind else (False,)
    meter = Meter(task.name, len(passes) * len(range(rank, len(examples), world)), unit="answers")
    score = _RunningScore(examples, settings.options or {})
    given: list[list[Answer]] = []
    try:
        for blind in passes:
            share: dict[int, Answer] = {}
            for index, answer in asker.answers(list(enumerate(examples))[rank::world], blind):
                share[index] = answer
                _stop_early(task.name, share, len(examples))
                meter.advance(1, score.after(index, answer) if not blind else "")
            answers = _gathered(share, world)
            given.append([answers[index] for index in range(len(examples))])
    finally:
        meter.close()
    seen, control = given[0], given[1] if settings.blind else [None] * len(examples)
    keys = (asker.keys.get(index, "") for index in range(len(examples)))
    samples = [_sample(*row) for row in zip(examples, seen, control, keys)]
    samples = score_samples(samples, **(settings.options or {}))
    return Run(samples, params, asker.size, asker.invariant, asker.asked)


def _stop_early(name: str, share: dict[int, Answer], total: int) -> None:
    """Raise where nothing but failures came back so far: hours of them would say no more."""
    if len(share) == PATIENCE < total and all(isinstance(answer, PolymodalError) for answer in share.values()):
        first = next(iter(share.values()))
        raise DataError(f"{name}: the first {PATIENCE} questions all failed, so the rest is not asked: {first}")


class _Asker:
    """Asks a model, and keeps what it says."""

    def __init__(self, model: Backend, params: GenerationParams, settings: Settings, rank: int) -> None:
        self.model, self.params = model, params
        self.kept = Responses(model.fingerprint(), params, rank, settings.cached)
        self.batches = isinstance(model, ModelBackend)
        self.size = (settings.batch_size or AUTO_BATCH) if self.batches else 1
        self.adapts = settings.batch_size is None
        self.keys: dict[int, str] = {}
        looked = self.kept.get(f"{self.size} at a time")
        self.invariant = None if looked is None else looked == "True"
        self.asked = 0

    def answers(self, examples: Sequence[tuple[int, Example]], blind: bool) -> Iterator[tuple[int, Answer]]:
        """Answer examples, as the answers come; those with the same question and media are asked once."""
        same: dict[str, list[int]] = {}
        messages: dict[str, tuple[Message, ...]] = {}
        for index, example in examples:
            try:
                key = self.kept.key(example.messages, blind and _sees(example.messages))
            except PolymodalError as error:
                yield index, error
                continue
            if not blind:
                self.keys[index] = key
            same.setdefault(key, []).append(index)
            messages[key] = example.messages
        order = sorted(messages, key=lambda key: (-_length(messages[key]), key))
        ask = self._one_by_one if not self.batches else self._in_batches
        for key, answer in ask(order, messages, blind):
            for index in same[key]:
                yield index, answer

    def _one_by_one(
        self, order: Sequence[str], messages: dict[str, tuple[Message, ...]], blind: bool
    ) -> Iterator[tuple[str, Answer]]:
        """Ask several at the same time, one a thread."""
        stopped = threading.Event()

        def ask(key: str) -> Answer:
            if stopped.is_set():
                return PolymodalError("was not asked")
            shown = _shown(messages[key], blind)
            answer = shown if isinstance(shown, PolymodalError) else self.model.answer(shown, self.params)
            self.kept.put({key: answer})
            return answer

        missing = [key for key in order if self.kept.get(key) is None]
        yield from ((key, answer) for key in order if (answer := self.kept.get(key)) is not None)
        self.asked += len(missing)
        with ThreadPoolExecutor(self.model.concurrent) as pool:
            futures: dict[Future[Answer], str] = {pool.submit(ask, key): key for key in missing}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:  # Ctrl-C: what has not begun is not sent
                stopped.set()

    def _in_batches(
        self, order: Sequence[str], messages: dict[str, tuple[Message, ...]], blind: bool
    ) -> Iterator[tuple[str, Answer]]:
        start = 0
        while start < len(order):
            chunk = order[start : start + self.size]
            missing = [key for key in chunk if self.kept.get(key) is None]
            try:
                found = self._batch(missing, messages, blind) if missing else {}
            except RuntimeError as error:
                if not self.adapts or self.size == 1 or "out of memory" not in str(error).lower():
                    raise
                self.size = max(1, self.size // 2)
                log(f"memory ran out; going on with batches of {self.size}")
                continue
            self.kept.put(found)
            start += len(chunk)
            for key in chunk:
                yield key, found[key] if key in found else self.kept.get(key) or ""

    def _batch(self, keys: Sequence[str], messages: dict[str, tuple[Message, ...]], blind: bool) -> dict[str, Answer]:
        shown = {key: _shown(messages[key], blind) for key in keys}
        asked = {key: turns for key, turns in shown.items() if not isinstance(turns, PolymodalError)}
        answers = dict(zip(asked, self.model.generate_batch(list(asked.values()), self.params), strict=True))
        probe = f"{self.size} at a time"
        if self.invariant is None and len(asked) > 1:
            alone = {key: self.model.generate_batch([asked[key]], self.params)[0] for key in list(asked)[-PROBED:]}
            self.invariant = all(str(alone[key]) == str(answers[key]) for key in alone)
            self.kept.put({probe: str(self.invariant)})
            if not self.invariant:
                log("a question asked alone is answered otherwise than in a batch; see --batch-size 1")
        self.asked += len(asked)
        return {**{key: turns for key, turns in shown.items() if isinstance(turns, PolymodalError)}, **answers}


class _RunningScore:
    """The mean score of the answers so far, for the progress bar."""

    def __init__(self, examples: Sequence[Example], options: dict[str, Any]) -> None:
        self.examples, self.options = examples, options
        self.total, self.count = 0.0, 0

    def after(self, index: int, answer: Answer) -> str:
        """The score with one more answer."""
        example = self.examples[index]
        if not example.references or example.metric in CORPUS_METRICS:
            return ""
        self.total += score_one(example, answer if isinstance(answer, str) else None, self.options)
        self.count += 1
        return f"{example.metric} {self.total / self.count:.3f}"


def _sample(example: Example, answer: Answer, blind: Answer | None, key: str) -> Sample:
    failed = next((a for a in (answer, blind) if isinstance(a, PolymodalError)), None)
    said, control = (a if isinstance(a, str) else None for a in (answer, blind))
    return Sample(
        *(example.id, example.kind, prompt_text(example.messages), example.references, example.metric),
        *(example.options, example.extra, said),
        error=None if failed is None else str(failed),
        blind=control,
        key=key,
    )


def prompt_text(messages: Sequence[Message]) -> str:
    """A conversation for a person: roles where there are several, and media as `<image>`."""
    texts = [
        "".join(part.text if isinstance(part, Text) else f"<{type(part).__name__.lower()}>" for part in message.parts)
        for message in messages
    ]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"[{message.role}] {text}" for message, text in zip(messages, texts, strict=True))


def _sees(messages: Sequence[Message]) -> bool:
    """Whether there is anything that the control would hide."""
    return any(isinstance(part, Image) for message in messages for part in message.parts)


def _length(messages: Sequence[Message]) -> int:
    """A guess of a prompt's length, for sorting: a medium counts as a thousand characters."""
    return sum(len(message.text) + 1000 * len(message.media) for message in messages)


def _shown(messages: Sequence[Message], blind: bool) -> list[Message] | PolymodalError:
    """What the model is asked; an image that cannot be read fails the control as it fails the question itself."""
    if not blind:
        return list(messages)
    try:
        return in_grey(messages)
    except PolymodalError as error:
        return error


def in_grey(messages: Sequence[Message]) -> list[Message]:
    """Hide the images of a conversation."""
    blind = []
    for message in messages:
        parts = [
            Image(PILImage.new("RGB", open_image(part.source).size, GREY)) if isinstance(part, Image) else part
            for part in message.parts
        ]
        blind.append(replace(message, parts=tuple(parts)))
    return blind


def is_first() -> bool:
    """Whether this process scores and writes."""
    return os.environ.get("RANK", "0") == "0"


def _gathered(share: dict[int, Answer], world: int) -> dict[int, Answer]:
    """The answers of all processes."""
    if world == 1:
        return share
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, share)
    return {index: answer for each in shares for index, answer in each.items()}

"""Asking a model the questions of a task: in batches of like length, each question once, and once more about grey.

Questions about the same media stand together, so that a batch reads them once, and are sorted by length, so that it
needs little padding; batches are the same however often a run was cut off, and each batch's answers are kept as they
come (`evaluation.responses`). An endpoint is asked several questions at the same time instead. Under torchrun each
process asks its share, and the first one scores.
"""

import atexit
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import Any

from PIL import Image as PILImage

from polymodal.backends.base import Answer, Backend
from polymodal.errors import ConfigError, DataError, EndpointError, PolymodalError
from polymodal.evaluation.responses import Responses, turns_of
from polymodal.evaluation.task import Example, Sample, Task, check_scorers, in_variant, score_one, score_samples
from polymodal.generation.params import GenerationParams
from polymodal.media.blank import GREY, grey_video, silence
from polymodal.media.image import open_image
from polymodal.messages import Audio, Image, Message, Part, Text, Video
from polymodal.metrics import CORPUS_METRICS
from polymodal.processing.document_pages import expand_documents, unread
from polymodal.utils.progress import Meter, log

AUTO_BATCH = 16
"""The first batch size of "auto"; it is halved where memory runs out."""
PROBED = 2
"""Questions of a batch that are asked alone too, to see that a batch changes nothing."""

PATIENCE = 20
"""Failures after which a run ends: without any answer before them, or of a server that is gone."""
NO_MEMORY = "memory ran out; give fewer or smaller images"


@dataclass(frozen=True)
class Settings:
    """How a task is run."""

    batch_size: int | None = None  # Questions at a time; None starts with 16 and halves it where memory runs out
    blind: bool = False  # Ask everything again about grey images and frames of the same size, and silence
    limit: int | None = None  # Only the first examples of each kind
    max_new_tokens: int | None = None  # The longest answer; the task's where None
    variant: str | None = None  # Score as another harness does, where the metric has it
    cached: bool = True  # Keep answers, and take those that were kept


@dataclass
class Run:
    """The scored answers of a task."""

    samples: list[Sample]  # One for each example, in order
    params: GenerationParams  # How the answers were decoded
    batch_size: int  # Questions at a time; 1 for models that are asked one by one
    batch_invariant: bool | None  # Whether answers in a batch equal those asked alone; None where nobody looked
    asked: int  # Questions that this process asked the model; the others' answers had been kept


def limited(examples: Sequence[Example], limit: int | None, group: str = "") -> list[Example]:
    """The first examples of each kind, or all of them; what is scored together stays together and counts as one."""
    if limit is None:
        return list(examples)
    seen: dict[str, set[str]] = {}
    kept = []
    for number, example in enumerate(examples):
        groups = seen.setdefault(example.kind, set())
        name = repr(example.extra.get(group, number))
        if name in groups or len(groups) < limit:
            groups.add(name)
            kept.append(example)
    return kept


def check_needs(model: Backend, task: Task) -> None:
    """Raise where a model cannot take what a task asks about."""
    if lacking := [medium for medium in task.needs if medium not in model.takes]:
        raise ConfigError(
            f"{task.name}: asks about {' and '.join(lacking)}, which {model.name} cannot take; score answers that were "
            f"made elsewhere with `polymodal eval rescore FILE --tasks {task.name}`"
        )


def prepared(task: Task, examples: Sequence[Example], settings: Settings = Settings()) -> list[Example]:
    """The examples that a run asks; raises where they cannot be scored, which needs no model."""
    kept = [replace(e, metric=e.metric or task.metric) for e in limited(examples, settings.limit, task.group)]
    if not kept:
        raise DataError(f"{task.name}: there is nothing to ask; the data hold no questions")
    check_scorers(kept, task.name)
    return in_variant(kept, settings.variant)


def run_task(model: Backend, task: Task, examples: Sequence[Example], settings: Settings = Settings()) -> Run:
    """Ask and score."""
    examples = prepared(task, examples, settings)
    if task.captions and model.captions:
        examples = [replace(e, messages=tuple(replace(m, parts=m.media) for m in e.messages)) for e in examples]
    params = GenerationParams(max_new_tokens=settings.max_new_tokens or task.max_new_tokens)
    passes = (False, True) if settings.blind else (False,)
    rank, world = processes()
    asker = _Asker(model, params, settings, task.name)
    meter = Meter(task.name, len(passes) * len(range(rank, len(examples), world)), unit="answers")
    score = _RunningScore(examples)
    given: list[dict[int, Answer]] = [{} for _ in passes]
    failed = None
    try:
        for blind, found in zip(passes, given):
            with closing(asker.answers(examples, blind)) as answers:
                for index, answer in answers:
                    found[index] = answer
                    meter.advance(1, score.after(index, answer) if not blind else "")
    except PolymodalError as error:  # the other processes wait for this one's answers
        failed = error
    finally:
        meter.close()
    given = _gathered(given, failed, world)
    control = given[1] if len(passes) > 1 else {}
    samples = [_sample(e, given[0][i], control.get(i), asker.keys.get(i, "")) for i, e in enumerate(examples)]
    return Run(score_samples(samples), params, asker.size, asker.invariant, asker.asked)


class _Asker:
    """Asks a model, and keeps what it says."""

    def __init__(self, model: Backend, params: GenerationParams, settings: Settings, name: str) -> None:
        self.model, self.params, self.name = model, params, name
        self.batches = model.concurrent is None and type(model).generate_batch is not Backend.generate_batch
        self.rank, self.world = processes()
        batch = settings.batch_size if self.batches else None
        self.kept = Responses(model.fingerprint(), params, batch, self.rank, settings.cached)
        self.size = self.dealt = (batch or AUTO_BATCH) if self.batches else 1  # a process takes whole batches
        self.adapts = batch is None
        self.keys: dict[int, str] = {}
        self.asked = 0
        self._answered = self._gone = self._failed = 0

    def answers(self, examples: Sequence[Example], blind: bool) -> Generator[tuple[int, Answer]]:
        """Answer this process's share as answers come; those with the same question and media are asked once."""
        same: dict[str, list[int]] = {}
        messages: dict[str, tuple[Message, ...]] = {}
        media: dict[str, str] = {}
        for index, example in enumerate(examples):
            try:
                turns = turns_of(example.messages)
            except PolymodalError as error:
                if index % self.world == self.rank:
                    yield index, error
                continue
            key = self.kept.key(example.messages, blind and _sees(example.messages), turns)
            media[key] = str([part for _, parts in turns for part in parts if isinstance(part, list)])
            if not blind:
                self.keys[index] = key
            same.setdefault(key, []).append(index)
            messages[key] = example.messages
        order = in_order({key: (media[key], _length(turns)) for key, turns in messages.items()})
        block = min(self.dealt, max(1, len(order) // self.world))
        order = [key for place, key in enumerate(order) if place // block % self.world == self.rank]
        self._answered = sum(self.kept.get(key) is not None for key in order)
        self._failed = self._gone = 0
        last: Answer = ""
        with closing((self._in_batches if self.batches else self._one_by_one)(order, messages, blind)) as found:
            for key, last in found:
                for index in same[key]:
                    yield index, last
                self._watch(last)
        if order and not self._answered and isinstance(last, EndpointError):
            raise EndpointError(f"{self.name}: no question was answered: {last}")

    def _watch(self, answer: Answer) -> None:
        """Raise where no answer is to be expected: hours of failures would say no more."""
        failed = isinstance(answer, PolymodalError)
        self._answered += not failed
        self._failed += failed
        self._gone = self._gone + 1 if isinstance(answer, PolymodalError) and answer.code == "unreachable" else 0
        if self._gone == PATIENCE:
            kept = "answers are kept, and the same command goes on when it is back"
            raise EndpointError(f"{self.name}: {PATIENCE} questions in a row reached no server ({kept}): {answer}")
        if self._failed == PATIENCE and not self._answered:
            raise DataError(f"{self.name}: the first {PATIENCE} questions all failed, so it ends here: {answer}")

    def _one_by_one(
        self, order: Sequence[str], messages: dict[str, tuple[Message, ...]], blind: bool
    ) -> Generator[tuple[str, Answer]]:
        """Ask several at the same time, one a thread."""

        def ask(key: str) -> Answer:
            shown = _shown(messages[key], blind)
            try:
                answer = shown if isinstance(shown, PolymodalError) else self.model.answer(shown, self.params)
            except (RuntimeError, MemoryError) as error:
                if not _ran_out(error):
                    raise
                answer = PolymodalError(NO_MEMORY)
            self.kept.put({key: answer})
            return answer

        missing = [key for key in order if self.kept.get(key) is None]
        yield from ((key, answer) for key in order if (answer := self.kept.get(key)) is not None)
        threads = self.model.concurrent or 1
        with ThreadPoolExecutor(threads) as pool:  # after Ctrl-C what is under way is waited for, and kept
            left = iter(missing)
            pending: dict[Future[Answer], str] = {}
            while True:
                # No more than can be asked at once is handed out, so that nothing is sent once a run has ended.
                pending.update({pool.submit(ask, key): key for key in islice(left, threads - len(pending))})
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    self.asked += 1
                    yield pending.pop(future), future.result()

    def _in_batches(
        self, order: Sequence[str], messages: dict[str, tuple[Message, ...]], blind: bool
    ) -> Generator[tuple[str, Answer]]:
        # A run that goes on begins with the batch size that it had come down to, so that its batches are the same.
        name = self.kept.name(["batch size", self.rank, sorted(messages)])
        if self.adapts:
            self.size = int(self.kept.get(name) or self.size)
        start = 0
        while start < len(order):
            chunk = order[start : start + self.size]
            missing = [key for key in chunk if self.kept.get(key) is None]
            try:
                found: dict[str, Answer] | None = self._batch(missing, messages, blind) if missing else {}
            except (RuntimeError, MemoryError) as error:
                if not _ran_out(error):
                    raise
                if self.size > 1 and not self.adapts:
                    problem = f"memory ran out with --batch-size {self.size}; give a smaller one, or auto"
                    raise PolymodalError(f"{self.name}: {problem}") from error
                found = None
            if found is None and self.size > 1:
                self.size //= 2
                self.kept.put({name: str(self.size)})
                log(f"memory ran out; going on with batches of {self.size}")
                if torch := sys.modules.get("torch"):
                    torch.cuda.empty_cache()
                continue
            found = found if found is not None else dict.fromkeys(missing, PolymodalError(NO_MEMORY))
            self.kept.put(found)
            start += len(chunk)
            for key in chunk:
                yield key, found[key] if key in found else self.kept.get(key) or ""

    @property
    def invariant(self) -> bool | None:
        """Whether answers in batches of this size equal those asked alone; None where nobody has looked."""
        looked = self.kept.get(self._probe())
        return None if looked is None else looked == "True"

    def _probe(self) -> str:
        return self.kept.name(["alone and among", self.size])

    def _batch(self, keys: Sequence[str], messages: dict[str, tuple[Message, ...]], blind: bool) -> dict[str, Answer]:
        shown = {key: _shown(messages[key], blind) for key in keys}
        asked = {key: turns for key, turns in shown.items() if not isinstance(turns, PolymodalError)}
        answers = dict(zip(asked, self.model.generate_batch(list(asked.values()), self.params), strict=True))
        if self.invariant is None and len(asked) > 1:
            alone = {key: self.model.generate_batch([asked[key]], self.params)[0] for key in list(asked)[-PROBED:]}
            same = all(str(alone[key]) == str(answers[key]) for key in alone)
            self.kept.put({self._probe(): str(same)})
            if not same:
                log("a question asked alone is answered otherwise than in a batch; see --batch-size 1")
        self.asked += len(asked)
        return {**{key: turns for key, turns in shown.items() if isinstance(turns, PolymodalError)}, **answers}


def _ran_out(error: Exception) -> bool:
    """Whether memory ran out, in the words of CUDA, of PyTorch's CPU allocator, or of Python."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


class _RunningScore:
    """The mean score of the answers so far, for the progress bar."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.total, self.count = 0.0, 0

    def after(self, index: int, answer: Answer) -> str:
        """The score with one more answer."""
        example = self.examples[index]
        if not example.references or example.metric in CORPUS_METRICS:
            return ""
        self.total += score_one(example, answer if isinstance(answer, str) else None)
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
    return any(message.media for message in messages)


def _length(messages: Sequence[Message]) -> int:
    """A guess of a prompt's length, for sorting: a medium counts as a thousand characters."""
    return sum(len(message.text) + 1000 * len(message.media) for message in messages)


def in_order(questions: Mapping[str, tuple[str, int]]) -> list[str]:
    """Order questions, given their media and length: those about the same media together, the longest first."""
    longest: dict[str, int] = {}
    for seen, length in questions.values():
        longest[seen] = max(length, longest.get(seen, 0))
    return sorted(questions, key=lambda key: (-longest[questions[key][0]], questions[key][0], -questions[key][1], key))


def _shown(messages: Sequence[Message], blind: bool) -> list[Message] | PolymodalError:
    """What the model is asked; an image that cannot be read fails the control as it fails the question itself."""
    if not blind:
        return list(messages)
    try:
        return in_grey(messages)
    except PolymodalError as error:
        return error


def in_grey(messages: Sequence[Message]) -> list[Message]:
    """Hide the media of a conversation: grey images, frames and pages as large and as many, and silence as long."""
    return [
        replace(message, parts=tuple(map(_hidden, message.parts))) for message in expand_documents(unread(messages))
    ]


def _hidden(part: Part) -> Part:
    match part:
        case Image(source):
            return Image(PILImage.new("RGB", open_image(source).size, GREY))
        case Video(source):
            return replace(part, source=grey_video(source, part.audio))
        case Audio(source):
            return replace(part, source=silence(source, (part.start, part.end)), start=None, end=None)
    return part


def processes() -> tuple[int, int]:
    """This process's number and how many there are; torchrun says so."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), world) if world > 1 else (0, 1)


def _gathered(given: list[dict[int, Answer]], failed: PolymodalError | None, world: int) -> list[dict[int, Answer]]:
    """The answers of all processes, pass by pass; raises in each where one of them failed."""
    if world == 1:
        if failed is not None:
            raise failed
        return given
    import torch.distributed as dist

    if not dist.is_initialized():  # as long as the slowest process needs, which may be hours behind the first
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, (given, failed))
    for _, error in shares:
        if error is not None:
            raise error
    return [{i: answer for share, _ in shares for i, answer in share[number].items()} for number in range(len(given))]

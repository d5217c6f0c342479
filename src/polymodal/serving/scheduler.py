"""Whose turn it is, behind a bounded queue: first come, first served.

A model of ours makes several answers at once: one thread goes from step to step (`generation.batching`), rows join and
leave between them, and what a request brings is decoded in threads beside, in order. Any other backend answers one
conversation at a time, or as many as it likes. `submit` gives a `Job`, whose events come one by one and which can be
cancelled at any time; nobody else knows how it is answered.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

from polymodal.backends.base import Backend, RawPrompt, StreamEvent
from polymodal.backends.local import LocalBackend
from polymodal.backends.reply import Answering
from polymodal.errors import CheckpointError, EndpointError, PolymodalError
from polymodal.generation.batching import Batcher, Row
from polymodal.generation.params import GenerationParams
from polymodal.messages import Message
from polymodal.serving.errors import RequestError, as_request_error

LOG = logging.getLogger(__name__)

AHEAD = 2
"""Requests whose media are decoded before it is their turn, each in a thread of its own."""
MEGABYTE = 2**20


class Job:
    """A request on its way: its answers' events, in order."""

    def __init__(
        self,
        messages: Sequence[Message] | RawPrompt,
        choices: Sequence[GenerationParams],
        timeout: float,
        leave: Callable[["Job"], None],
        salt: str = "",
    ) -> None:
        self.messages, self.choices, self.salt = messages, choices, salt
        self.started = 0.0
        self.begun, self.left = time.perf_counter(), len(choices)  # when it came; answers that are not done
        self.prepared: Future[Any] | None = None  # What the model reads
        self.watch: Callable[[int, StreamEvent], None] = lambda index, event: None
        self.cancelled, self.outcome = threading.Event(), "cancelled"
        self._leave = leave
        self._deadline = time.monotonic() + timeout
        self._loop = asyncio.get_running_loop()
        # Holds no more than the tokens that a request may ask for.
        self._events: asyncio.Queue[tuple[int, StreamEvent] | BaseException | None] = asyncio.Queue()

    async def next(self, patience: float = math.inf) -> tuple[int, StreamEvent] | None:
        """The next event and the answer that it is of; None at the end, TimeoutError where patience ends first."""
        left = self._deadline - time.monotonic()
        try:
            event = await asyncio.wait_for(self._events.get(), max(0.0, min(left, patience)))
        except TimeoutError:
            if patience < left:
                raise
            self.outcome = "timeout"
            self.cancel()
            raise RequestError(
                "the answer took too long; ask for fewer tokens or give less", status=503, code="timeout"
            ) from None
        if isinstance(event, BaseException):
            raise event
        return event

    def cancel(self) -> None:
        """Stop the work at the model's next step, or before it begins; of a job that is done nothing happens."""
        self.cancelled.set()
        self._leave(self)

    def put(self, event: tuple[int, StreamEvent] | BaseException | None) -> None:
        """Hand an event over, from the thread that works."""
        if isinstance(event, tuple):
            self.watch(*event)
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the server has been stopped, and its loop is closed
            self.cancelled.set()


class Scheduler:
    """Answers jobs in the order in which they came; a model of ours up to `streams` answers at once."""

    def __init__(
        self,
        backend: Backend,
        queue: int = 16,
        timeout: float = 600.0,
        streams: int = 4,
        prefix_mb: int = 512,
        media_mb: int = 256,
    ) -> None:
        self.backend = backend
        self.size = queue
        self.timeout = timeout  # Seconds of a request, waiting included
        self.watch: Any = None  # `Watch`, where metrics are kept
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._rows: dict[Row, tuple[Job, int, Answering]] = {}
        self._begun: deque[tuple[Job, int]] = deque()  # Answers whose turn comes before that of jobs that wait
        self._moved = time.monotonic()
        self._usual = 1.0  # seconds of a request, as they were lately
        self._closed = False
        self._change = threading.Condition()
        make = getattr(backend, "batcher", None)
        self.batcher: Batcher | None = make and make(streams, prefix_mb * MEGABYTE, media_mb * MEGABYTE)
        self.width = streams if self.batcher else backend.concurrent or 1
        work, count = (self._batch, 1) if self.batcher else (self._work, self.width)
        # Daemons, so that a step that never ends does not keep the process.
        self._threads = [threading.Thread(target=work, name="generation", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def sizes(self) -> tuple[int, int]:
        """Requests that are being answered, and those that wait."""
        return len(self._running), len(self._waiting)

    def check_room(self) -> None:
        """Refuse another request where too many wait."""
        with self._change:
            if self._closed:
                raise RequestError("the server is stopping", status=503, code="stopping", retry=5)
            if len(self._waiting) >= self.size:
                retry = min(120, math.ceil(self._usual * (1 + len(self._waiting) / self.width)))
                raise RequestError("too many requests wait; try again", status=429, code="queue_full", retry=retry)

    def submit(
        self, messages: Sequence[Message] | RawPrompt, choices: Sequence[GenerationParams], salt: str = ""
    ) -> Job:
        """Put a request at the end of the queue; what is kept of it serves only others with the same salt."""
        self.check_room()
        job = Job(messages, choices, self.timeout, self._leave, salt)
        if self.watch is not None:
            job.watch = self.watch.begin(job)
        with self._change:
            if not self._waiting and not self._running:
                self._moved = time.monotonic()
            self._waiting.append(job)
            self._change.notify()
        return job

    def stalled(self, seconds: float) -> bool:
        """Whether a request is being answered, or made ready, and no step has been taken for so long."""
        return bool(self._running or self._waiting) and time.monotonic() - self._moved > seconds

    def close(self, patience: float = 5.0) -> None:
        """Stop what is left, and wait a little for the step that is being taken."""
        with self._change:
            self._closed = True
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._change.notify_all()
        for job in left:
            job.cancel()
        for thread in self._threads:
            thread.join(patience)

    def _leave(self, job: Job) -> None:
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell(job, job.outcome)
            self._change.notify()

    def _tell(self, job: Job, outcome: str) -> None:
        if self.watch is not None:
            self.watch.end(job, outcome)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.popleft()
                self._begin(job)
            self._answer(job)
            del job

    def _begin(self, job: Job) -> None:
        self._running.append(job)
        job.started = self._moved = time.monotonic()

    def _answer(self, job: Job) -> None:
        """Answer a job from beginning to end."""
        try:
            for index, params in enumerate(job.choices):
                given: Any = job.messages
                events: Any = self.backend.respond(given, params)
                with closing(events):
                    for event in events:
                        self._moved = time.monotonic()
                        if job.cancelled.is_set():
                            return self._end(job)
                        job.put((index, event))
        except BaseException as error:  # tokenizers panic with what is no Exception; a request fails alone
            return self._end(job, error)
        self._end(job)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """A job is over; who waits for it is told last, and finds it counted."""
        with self._change:
            self._running.remove(job)
        self._usual += 0.3 * (time.monotonic() - job.started - self._usual)
        told = None if error is None else as_request_error(error)
        outcome = "done" if told is None else told.reason or f"status_{told.status}"
        self._tell(job, job.outcome if job.cancelled.is_set() else outcome)
        if error is not None:
            self._fail(job, error)
        job.put(None)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, PolymodalError) or isinstance(error, CheckpointError | EndpointError):
            LOG.error("%s: %s", type(error).__name__, error, exc_info=LOG.isEnabledFor(logging.DEBUG))
            if (forget := getattr(self.backend, "forget", None)) is not None:
                forget()  # what a model keeps of earlier requests, which may be what there is no memory for
        told = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
        job.put(told.with_traceback(None))  # whose frames hold the tensors

    # What follows is of a model of ours, whose answers are made together, and of one thread.

    def _batch(self) -> None:
        """Go from step to step."""
        pool = ThreadPoolExecutor(AHEAD, "prepare")
        while not self._closed:
            with self._change:
                self._change.wait_for(lambda: self._rows or self._begun or self._closed or self._prepare_ahead(pool))
                job = self._next(pool)
            try:
                if job is not None and _together(job):
                    self._begun.extend((job, index) for index in range(len(job.choices)))
                elif job is not None:  # by steps that are not the batch's
                    if hasattr(self.backend, "salt"):
                        self.backend.salt = job.salt
                    self._answer(job)
                self._step()
            except BaseException as error:  # which should not be
                self._drop_all(error)
            self._moved = time.monotonic()
            del job
        pool.shutdown(wait=False, cancel_futures=True)
        self._drop_all()

    def _next(self, pool: ThreadPoolExecutor) -> Job | None:
        """The job whose turn it is, where there is room for it."""
        assert self.batcher is not None
        ready = self._prepare_ahead(pool)
        if self._closed or self._begun or not ready or not self.batcher.free:
            return None
        self._begin(job := self._waiting.popleft())
        self._prepare_ahead(pool)
        return job

    def _prepare_ahead(self, pool: ThreadPoolExecutor) -> bool:
        """Have the next jobs made ready; whether the first one is."""
        for job in list(self._waiting)[:AHEAD]:
            if job.prepared is None:
                job.prepared = pool.submit(self._prepare, job)
                job.prepared.add_done_callback(self._notify)
        first = self._waiting[0].prepared if self._waiting else None
        return first is not None and first.done()

    def _prepare(self, job: Job) -> Any:
        backend: Any = self.backend
        return backend.prepare(job.messages, job.choices[0].max_new_tokens) if _together(job) else None

    def _notify(self, _: Any) -> None:
        with self._change:
            self._change.notify()

    def _step(self) -> None:
        assert self.batcher is not None
        for job in self._jobs():
            if job.cancelled.is_set():
                self._drop(job)
        if self._begun and self.batcher.free:
            self._join(*self._begun.popleft())
        for row, event in self.batcher.step() if self._rows else ():
            self._moved = time.monotonic()
            if row in self._rows:  # its job has not failed by another of its answers
                self._take(row, event)

    def _join(self, job: Job, index: int) -> None:
        """Let the next answer join those that are made."""
        backend, params = cast(LocalBackend, self.backend), job.choices[index]
        try:
            assert job.prepared is not None and self.batcher is not None
            inputs = job.prepared.result()
            if index == len(job.choices) - 1:
                job.prepared = None  # pixels are freed when they have been encoded
            row = backend.row(inputs, params, job.salt)
            light = replace(inputs, pixels=None, sounds=None)
            prompt = job.messages if isinstance(job.messages, RawPrompt) else None
            answering = Answering(backend, light, params, row.sampler, job.begun, prompt)
            del inputs
            self.batcher.add(row)
            self._rows[row] = job, index, answering
        except BaseException as error:
            self._drop(job, error)

    def _take(self, row: Row, event: int | BaseException) -> None:
        """Go on with an answer by an id, or end it."""
        assert self.batcher is not None
        job, index, answering = self._rows[row]
        try:
            if isinstance(event, BaseException):
                del self._rows[row]
                raise event
            for told in answering.push(event, row.encode_s):
                job.put((index, told))
            if answering.stopped or row.full:
                del self._rows[row]
                self.batcher.drop(row)
                for told in answering.end(row.cached):
                    job.put((index, told))
                job.left -= 1
                if not job.left:
                    self._end(job)
        except BaseException as error:
            self._drop(job, error)

    def _jobs(self) -> list[Job]:
        running, begun = [job for job, _, _ in self._rows.values()], [job for job, _ in self._begun]
        return list(dict.fromkeys([*running, *begun]))

    def _drop(self, job: Job, error: BaseException | None = None) -> None:
        """End a job before its answers have."""
        assert self.batcher is not None
        for row in [row for row, (other, *_) in self._rows.items() if other is job]:
            del self._rows[row]
            self.batcher.drop(row)
        self._begun = deque(one for one in self._begun if one[0] is not job)
        self._end(job, error)

    def _drop_all(self, error: BaseException | None = None) -> None:
        for job in self._jobs():
            self._drop(job, error)


def _together(job: Job) -> bool:
    """Whether a job's answers are texts, which are made with others."""
    return all(params.modalities == ("text",) for params in job.choices)

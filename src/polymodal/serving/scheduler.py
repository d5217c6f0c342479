"""Whose turn it is: one generation at a time, in a thread of its own, behind a bounded queue.

The seam for a scheduler that batches: `submit` gives a `Job`, whose events come one by one and which can be cancelled
at any time; nobody else knows how it is answered.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from polymodal.backends.base import Backend, RawPrompt, StreamEvent
from polymodal.errors import CheckpointError, EndpointError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Message
from polymodal.serving.errors import RequestError

LOG = logging.getLogger(__name__)


class Job:
    """A request on its way: its answers' events, in order."""

    def __init__(
        self,
        messages: Sequence[Message] | RawPrompt,
        choices: Sequence[GenerationParams],
        timeout: float,
        leave: Callable[["Job"], None],
    ) -> None:
        self.messages, self.choices = messages, choices
        self.cancelled = threading.Event()
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
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the server has been stopped, and its loop is closed
            self.cancelled.set()


class Scheduler:
    """Answers jobs in the order in which they came."""

    def __init__(self, backend: Backend, queue: int = 16, timeout: float = 600.0) -> None:
        self.backend = backend
        self.size = queue
        self.timeout = timeout  # Seconds of a request, waiting included
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._moved = time.monotonic()
        self._usual = 1.0  # seconds of a request, as they were lately
        self._closed = False
        self._change = threading.Condition()
        # A daemon, so that a step that never ends does not keep the process.
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def check_room(self) -> None:
        """Refuse another request where too many wait."""
        with self._change:
            if self._closed:
                raise RequestError("the server is stopping", status=503, code="stopping", retry=5)
            if len(self._waiting) >= self.size:
                retry = min(120, math.ceil(self._usual * (1 + len(self._waiting))))
                raise RequestError("too many requests wait; try again", status=429, code="queue_full", retry=retry)

    def submit(self, messages: Sequence[Message] | RawPrompt, choices: Sequence[GenerationParams]) -> Job:
        """Put a request at the end of the queue."""
        self.check_room()
        job = Job(messages, choices, self.timeout, self._leave)
        with self._change:
            self._waiting.append(job)
            self._change.notify()
        return job

    def stalled(self, seconds: float) -> bool:
        """Whether a request is being answered, and the model has not taken a step for so long."""
        return self._running is not None and time.monotonic() - self._moved > seconds

    def close(self, patience: float = 5.0) -> None:
        """Stop what is left, and wait a little for the step that is being taken."""
        with self._change:
            self._closed = True
            left = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._change.notify()
        for job in left:
            job.cancel()
        self._thread.join(patience)

    def _leave(self, job: Job) -> None:
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)

    def _work(self) -> None:
        while True:
            with self._change:
                self._running = None
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                begin = self._moved = time.monotonic()
            try:
                self._answer(job)
            except BaseException as error:  # tokenizers panic with what is no Exception; a request fails alone
                self._fail(job, error)
            job.put(None)
            self._usual += 0.3 * (time.monotonic() - begin - self._usual)
            del job

    def _answer(self, job: Job) -> None:
        for index, params in enumerate(job.choices):
            given: Any = job.messages
            events: Any = self.backend.respond(given, params)
            with closing(events):
                for event in events:
                    self._moved = time.monotonic()
                    if job.cancelled.is_set():
                        return
                    job.put((index, event))

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, PolymodalError) or isinstance(error, CheckpointError | EndpointError):
            LOG.error("%s: %s", type(error).__name__, error, exc_info=LOG.isEnabledFor(logging.DEBUG))
        told = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
        job.put(told.with_traceback(None))  # whose frames hold the tensors
        if (forget := getattr(self.backend, "forget", None)) is not None:
            forget()  # what a model keeps of a request that failed

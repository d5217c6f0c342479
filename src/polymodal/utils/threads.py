"""Map in threads, in order, a bounded number of items ahead: what decoding images needs, and no more."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Progress(Protocol):
    """Wraps an iterable with a progress bar."""

    def __call__(self, items: Iterable[T], label: str, total: int) -> Iterable[T]:
        """Yield the items; show label, count, rate and time left."""
        ...


def quiet(items: Iterable[T], label: str, total: int) -> Iterable[T]:
    """A `Progress` that shows nothing."""
    return items


def ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int, depth: int | None = None
) -> Generator[R, None, None]:
    """Map in threads, in order, a bounded number of items ahead."""
    depth = depth or 4 * workers
    pool = ThreadPoolExecutor(workers)
    queue: deque[Future[R]] = deque()
    try:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) >= depth:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

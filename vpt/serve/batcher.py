"""Batches of jobs that many threads submit one by one, run on a thread of their own.

The first job waits at most `max_wait_ms` for others. While a batch runs, the next one fills, so that under load no job
waits for the clock.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class QueueFull(Exception):  # noqa: N818  # named like queue.Full
    """Not enough places are left; try again later."""


@dataclass
class Totals:
    """Counts since the start of a batcher."""

    jobs: int = 0
    batches: int = 0
    failed_batches: int = 0


@dataclass(frozen=True)
class _Waiting(Generic[Job, Result]):
    job: Job
    group: Hashable
    since: float  # seconds of time.monotonic
    future: "Future[Result]" = field(default_factory=Future)


class Batcher(Generic[Job, Result]):
    """Runs jobs in batches, on one thread.

    Example:
        >>> batcher = Batcher(lambda numbers: [2 * number for number in numbers])
        >>> with batcher.places(3):
        ...     [future.result() for future in batcher.submit([1, 2, 3])]
        [2, 4, 6]
        >>> batcher.close()
    """

    def __init__(
        self,
        run: Callable[[list[Job]], Sequence[Result | Exception]],  # an error fails its job; a raised one, all
        *,
        group: Callable[[Job], Hashable] = lambda job: None,  # only jobs of the same group share a batch
        max_batch: int = 32,  # most jobs in a batch
        max_wait_ms: float = 5.0,  # how long a job may wait for others, not counting earlier batches
        max_queue: int = 256,  # places for jobs; a job holds one from before it is created until its result is used
    ) -> None:
        self._run, self._group = run, group
        self._max_batch, self._max_wait, self.max_queue = max_batch, max_wait_ms / 1000, max_queue
        self.taken = 0  # places
        self._queue: list[_Waiting[Job, Result]] = []
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._is_closed = False
        self._changed = threading.Condition()
        self.totals = Totals()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold places while jobs are created, submitted and awaited; QueueFull if not enough are left."""
        with self._changed:
            if self.taken + count > self.max_queue:
                raise QueueFull(f"{self.taken} of {self.max_queue} places are taken, and {count} are needed")
            self.taken += count
        try:
            yield
        finally:
            with self._changed:
                self.taken -= count

    def submit(self, jobs: Sequence[Job]) -> "list[Future[Result]]":
        """Submit jobs that have places; to cancel a future before its batch removes its job; RuntimeError if closed."""
        now = time.monotonic()
        entries: list[_Waiting[Job, Result]] = [_Waiting(job, self._group(job), now) for job in jobs]
        with self._changed:
            self._refuse_if_closed()
            self._queue += entries
            self._changed.notify()
        return [entry.future for entry in entries]

    def between_batches(self, errand: Callable[[], Result]) -> "Future[Result]":
        """Call a function on the batcher's thread before the next batch, while none runs; RuntimeError if closed."""
        future: Future[Result] = Future()
        with self._changed:
            self._refuse_if_closed()
            self._errands.append((errand, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Accept no more jobs, and return when all accepted ones are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                batch = self._next_batch()
                errands = [self._errands.popleft() for _ in range(len(self._errands))]
                if not batch and not errands:
                    return
            for errand, future in errands:
                _fulfil(future, errand)
            if running := [entry for entry in batch if entry.future.set_running_or_notify_cancel()]:
                self._run_batch(running)

    def _next_batch(self) -> "list[_Waiting[Job, Result]]":
        """Wait for a batch that is full or due and take it; empty if there are errands, or the batcher is closed."""
        while True:
            self._queue = [entry for entry in self._queue if not entry.future.cancelled()]
            if self._errands or (self._is_closed and not self._queue):
                return []
            batch = self._fullest()
            pause = batch[0].since + self._max_wait - time.monotonic() if batch else None
            if batch and (len(batch) == self._max_batch or self._is_closed or (pause is not None and pause <= 0)):
                taken = {id(entry) for entry in batch}
                self._queue = [entry for entry in self._queue if id(entry) not in taken]
                return batch
            self._changed.wait(pause)

    def _fullest(self) -> "list[_Waiting[Job, Result]]":
        """The group of the oldest job, unless it is not due yet and another group is full."""
        groups: dict[Hashable, list[_Waiting[Job, Result]]] = {}
        for entry in self._queue:
            groups.setdefault(entry.group, []).append(entry)
        if not groups:
            return []
        first = next(iter(groups.values()))
        is_due = time.monotonic() - first[0].since >= self._max_wait
        full = next((group for group in groups.values() if len(group) >= self._max_batch), first)
        return (first if is_due else full)[: self._max_batch]

    def _run_batch(self, batch: "list[_Waiting[Job, Result]]") -> None:
        try:
            results: Sequence[Result | Exception] = self._run([entry.job for entry in batch])
            assert len(results) == len(batch)
        except Exception as error:  # later batches must still run
            self.totals.failed_batches += 1
            results = [error] * len(batch)
        self.totals.batches += 1
        self.totals.jobs += len(batch)
        for entry, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise RuntimeError("the batcher is closed")


def _fulfil(future: "Future[Result]", function: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)

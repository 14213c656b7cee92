"""Data loader with processes whose failures are reported with the process and the image.

The loader of torch raises wherever the main process happens to be when a process dies, waits for ever for one that
hangs, and turns the errors of data sets into texts with tracebacks. `WorkerLoader` corrects that; batches are the same.
"""

import atexit
import errno
import multiprocessing.util  # noqa: F401  (its function at exit must be registered before ours)
import os
import re
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import RawArray
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

POLL_S = 1.0
IGNORED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
FATAL = ("SIGSEGV", "SIGBUS", "SIGFPE")
HINTS = {
    "SIGKILL": "often for lack of memory: use fewer num_workers",
    "SIGBUS": "often for lack of space in /dev/shm: enlarge it, or use num_workers=0",
}
UNSENT = 128  # plus the number of an error of the system: exit code of a process that cannot send its batch
_FILES = "cannot open more files", "raise the limit, such as ulimit -n 65536, or use fewer num_workers"
_SHARED = "has no room in shared memory (/dev/shm)", "enlarge it (docker run --shm-size=8g), or use num_workers=0"
LACKS = {errno.EMFILE: _FILES, errno.ENFILE: _FILES, errno.ENOSPC: _SHARED, errno.ENOMEM: _SHARED}


class LoaderError(RuntimeError):
    """A loader process died or hangs; the message names it, the cause and the last image."""


class WorkerLoader(DataLoader[Any]):
    """A `DataLoader` with processes, at least one, which live as long as it, for keys `(epoch, index)`.

    If the data set has `samples.names`, they name images in errors. A missing batch is an error after `timeout_s`
    seconds. The other arguments are those of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        sampler: Sampler[tuple[int, int]],
        num_workers: int,
        collate_fn: Callable[[Any], Any] | None,
        timeout_s: float,
        **options: Any,
    ) -> None:
        self.timeout_s = timeout_s
        self.marks = _Marks(dataset, num_workers)
        super().__init__(
            _WorkerDataset(dataset, collate_fn or default_collate, self.marks),
            batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            timeout=min(POLL_S, timeout_s),
            persistent_workers=True,
            worker_init_fn=start_worker,
            **options,
        )
        self._last: _Batches | None = None

    def __iter__(self) -> Any:
        """The batches of an epoch; also while they are read, a `LoaderError` if a process died or hangs."""
        if self._last is not None and not self._last.is_finished:
            self.end_workers()  # they still work on the epoch that was interrupted
        self._last = _Batches(self._start(), self.marks, self.timeout_s)
        return self._last

    def _start(self) -> Iterator[Any]:
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        except RuntimeError:
            self.end_workers()  # one has died since the last epoch, or did not respond
            return super().__iter__()
        finally:
            if _is_of_torch(signal.getsignal(signal.SIGCHLD)) and not _is_of_torch(handler):
                signal.signal(signal.SIGCHLD, handler)  # it would raise in the middle of a step or a save

    def end_workers(self) -> None:
        """Kill the processes; the next epoch starts new ones."""
        if self._last is not None:
            self._last.end()
        self._last = self._iterator = None


class _Batches(Iterator[Any]):
    """The batches of an epoch, up to the first error of a process."""

    def __init__(self, batches: Any, marks: "_Marks", timeout_s: float) -> None:
        self.batches, self.marks, self.timeout_s, self.is_finished = batches, marks, timeout_s, False
        self.workers: Sequence[BaseProcess] = batches._workers
        _workers.update(self.workers)

    def __next__(self) -> Any:
        start = time.monotonic()
        while True:
            try:
                batch = next(self.batches)
                break
            except StopIteration:
                self.is_finished = True
                raise
            except (RuntimeError, OSError, EOFError) as error:  # also raised if a batch is only late
                reason = self._reason(error, time.monotonic() - start)
            if reason is not None:
                self.end()
                raise LoaderError(reason)  # in no variable: a frame that holds its error would hold the loader, too
        if isinstance(batch, _Failure):
            self.end()
            raise batch.error()
        return batch

    def end(self) -> None:
        """Kill the processes: they only read."""
        self.is_finished, batches, self.batches = False, self.batches, iter(())
        for worker in self.workers:
            worker.kill()
        if isinstance(batches, _BaseDataLoaderIter):
            # Otherwise it could be garbage-collected in a process that was forked meanwhile.
            batches._shutdown_workers()  # type: ignore[attr-defined]

    def _reason(self, error: Exception, waited_s: float) -> str | None:
        """Why there is no batch; None if it is only late."""
        if not isinstance(error, RuntimeError):  # a process that sends no batch is about to die
            closed = wait([worker.sentinel for worker in self.workers], timeout=POLL_S)
            for worker in self.workers:
                if worker.sentinel in closed:
                    worker.join(POLL_S)  # its pipe is closed before it exits
        dead = [number for number, worker in enumerate(self.workers) if worker.exitcode is not None]
        if dead:
            return self.marks.describe(dead[0], self.workers[dead[0]], _ending(self.workers[dead[0]]))
        if (lack := LACKS.get(_errno_of(error))) is not None:
            return f"the main process {lack[0]}, so that it gets no batch; {lack[1]}"
        if "timed out" not in str(error):
            return " ".join(str(error).split()) or f"the loader processes sent no batch: {type(error).__name__}"
        if waited_s < self.timeout_s:
            return None
        busy = [number for number in range(len(self.workers)) if self.marks.is_busy(number)] or [0]
        ending = f"sent no batch for {self.timeout_s:g} s", "increase timeout_s, or use num_workers=0"
        return self.marks.describe(busy[0], self.workers[busy[0]], ending)


class _Marks:
    """The image that each process reads, in shared memory."""

    def __init__(self, dataset: Any, num_workers: int) -> None:
        self.names: Sequence[str] = getattr(getattr(dataset, "samples", None), "names", ())
        self.num_workers = num_workers
        self._last = RawArray("q", [-1] * num_workers)
        self._busy = RawArray("b", num_workers)

    def begin(self, number: int, index: int) -> None:
        self._last[number], self._busy[number] = index, 1

    def end(self, number: int) -> None:
        self._busy[number] = 0

    def is_busy(self, number: int) -> bool:
        return bool(self._busy[number])

    def describe(self, number: int, worker: BaseProcess, ending: tuple[str, str]) -> str:
        """A line on a process: which, what happened, its last image, what to try."""
        index = self._last[number]
        name = "none yet" if index < 0 else self.names[index] if index < len(self.names) else f"number {index}"
        process = f"loader process {number + 1} of {self.num_workers} (pid {worker.pid})"
        return f"{process} {ending[0]}; last image read: {name}; {ending[1]}"


class _WorkerDataset(Dataset[Any]):
    """Returns whole batches inside a process, and errors as objects instead of tracebacks."""

    def __init__(self, dataset: Dataset[Any], collate_fn: Callable[[Any], Any], marks: _Marks) -> None:
        self.dataset, self.collate_fn, self.marks = dataset, collate_fn, marks

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Any:
        number = 0 if (worker := get_worker_info()) is None else worker.id
        try:
            items = []
            for key in keys:
                self.marks.begin(number, key[1])
                items.append(self.dataset[key])
            return self.collate_fn(items)
        except Exception as error:
            if isinstance(error, RuntimeError) and "/torch_" in str(error):  # it gets no shared memory
                _leave(error)
            return _Failure(type(error), str(error), traceback.format_exc())
        finally:
            self.marks.end(number)


@dataclass(frozen=True)
class _Failure:
    """An error to be raised in the main process."""

    error_type: type[Exception]
    message: str
    trace: str

    def error(self) -> Exception:
        """The same error, with the traceback of the process as a note."""
        try:
            error = self.error_type(self.message)
        except TypeError:  # a type that requires more than a message
            error = RuntimeError(f"{self.error_type.__name__}: {self.message}")
        error.add_note(self.trace)
        return error


def start_worker(_: Any) -> None:
    """Use one thread, and ignore the signals that a scheduler sends to all processes: the main process handles them."""
    torch.set_num_threads(1)
    # Otherwise a batch that cannot be sent is dropped with a traceback, and the main process waits for it.
    Queue._on_queue_feeder_error = staticmethod(lambda error, _: _leave(error))  # type: ignore[attr-defined]
    sys.excepthook = lambda _, error, __: _leave(error)  # of the thread that passes the numbers of open files
    for names, action in ((IGNORED, signal.SIG_IGN), (FATAL, signal.SIG_DFL)):  # torch would print on fatal signals
        for name in (name for name in names if hasattr(signal, name)):
            signal.signal(getattr(signal, name), action)


def _leave(error: BaseException) -> NoReturn:
    """End this process with a code that says why it cannot send a batch."""
    if _errno_of(error) not in LACKS:
        traceback.print_exception(error)
    os._exit(UNSENT + _errno_of(error) % 128)


def _errno_of(error: BaseException) -> int:
    """The number of an error of the system, also if torch or multiprocessing only has its text; 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    number = re.search(r"\((\d+)\)$", str(error))
    return int(number[1]) if number else errno.EMFILE if "ancdata" in str(error) else 0


def _identity(batch: Any) -> Any:
    return batch


def _is_of_torch(handler: Any) -> bool:
    return str(getattr(handler, "__module__", "")).startswith("torch.")


def _ending(worker: BaseProcess) -> tuple[str, str]:
    """How a process ended, and what to try."""
    code = worker.exitcode or 0
    if code - UNSENT in LACKS:
        return LACKS[code - UNSENT]
    if code >= 0:
        return f"exited with code {code}", "use num_workers=0 to see why"
    name = signal.Signals(-code).name
    return f"was killed by {name}", HINTS.get(name, "use num_workers=0 to see why")


_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
_main_pid = os.getpid()


@atexit.register
def _kill_workers() -> None:
    """At exit Python would send SIGTERM, which they ignore, and wait for them."""
    for worker in list(_workers) if os.getpid() == _main_pid else ():
        if worker.is_alive():
            worker.kill()

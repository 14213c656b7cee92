"""Signals that end a run at a point from which it can be resumed."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, Self

STOPPED = 75  # EX_TEMPFAIL: the exit code of a command that resumes when it is typed again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """A signal ended the run; not an Exception, so that no handler of errors continues after it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class StopSignal:
    """While entered, one of `SIGNALS` raises `Stopped`: at once, or at the next `check` inside of `deferred`.

    A second signal ends the process at once, with the exit code 128 plus the signal's number. A signal that the process
    ignores, as SIGHUP under `nohup`, stays ignored.

    Example:
        >>> with StopSignal() as stop, stop.deferred():
        ...     signal.raise_signal(signal.SIGTERM)  # nothing yet
        ...     try:
        ...         stop.check()
        ...     except Stopped as error:
        ...         print(error)
        SIGTERM
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal was received."""
        if self.received is not None:
            raise Stopped(self.received)

    def deferred(self) -> AbstractContextManager[None]:
        """A context in which a signal waits for the next `check`."""
        return self._mode(is_deferred=True)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context, inside of `deferred`, in which a signal raises at once, also one that was received before."""
        with self._mode(is_deferred=False):
            self.check()
            yield

    @contextmanager
    def _mode(self, is_deferred: bool) -> Iterator[None]:
        before, self._is_deferred = self._is_deferred, is_deferred
        try:
            yield
        finally:
            self._is_deferred = before

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self._is_deferred:
            raise Stopped(self.received)

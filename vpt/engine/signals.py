"""Signals that ask a run to end: it comes to a point where it can be taken up again, saves, and stops."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

STOPPED = 75  # EX_TEMPFAIL, the exit code of a command that goes on when it is typed again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """The run was asked to end; no Exception, so that nothing that goes on after errors goes on after it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class StopSignal:
    """While entered, one of `SIGNALS` raises `Stopped`: at once, or at the next `check` inside of `patient`.

    A second signal ends the process at once, with 128 and the signal's number, as shells have it.

    Example:
        >>> with StopSignal() as stop, stop.patient():
        ...     signal.raise_signal(signal.SIGTERM)  # nothing yet
        ...     try:
        ...         stop.check()
        ...     except Stopped as error:
        ...         print(error)
        SIGTERM
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)

    @contextmanager
    def patient(self, is_patient: bool = True) -> Iterator[None]:
        """A context in which a signal waits for the next `check`; with False, one inside of it in which it does not."""
        before, self._is_patient = self._is_patient, is_patient
        try:
            if not is_patient:
                self.check()
            yield
        finally:
            self._is_patient = before

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self._is_patient:
            raise Stopped(self.received)

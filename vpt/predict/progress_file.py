"""Progress file of a long command, beside its output: the same command typed again resumes from it.

JSON lines: the first is the command, each further one a batch that is done. A line that was cut, because the process
was killed, is ignored with everything after it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vpt.storage.lock import locked

VERSION = 1
Stamp = tuple[int, int] | None  # bytes, and nanoseconds of the last change; None if there is no such file


@dataclass(frozen=True)
class Entry:
    """One image that is done."""

    name: str  # in the input
    stamp: Stamp  # of its file before it was read, see `stamp_of`
    found: Any  # the predictions, as plain JSON values; None if it cannot be read
    error: str | None = None  # why it cannot be read


class ProgressFile:
    """Entries of one command, whose options that decide the results are plain JSON values.

    Iterate over `entries` before the first `add`, which creates the file.
    """

    def __init__(self, path: Path, command: Mapping[str, Any]) -> None:
        self.path, self.command = path, dict(command)
        self._head = _line({"vpt_progress": VERSION, "command": self.command})
        self._num_whole = 0  # bytes of whole lines
        self._file: BinaryIO | None = None
        self._held = ExitStack()

    def entries(self) -> Iterator[Entry]:
        """The entries that are done already, in order; none if there is no file.

        Raises:
            ValueError: The file is of another command, or not a progress file.
        """
        self._num_whole = 0
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            head = file.readline()
            if not head.endswith(b"\n") and self._head.startswith(head):
                return
            self._check(head)
            self._num_whole = len(head)
            for line in file:
                if (batch := _read_batch(line)) is None:
                    return
                self._num_whole += len(line)
                yield from batch

    def add(self, batch: Sequence[Entry]) -> None:
        """Append a batch that is done; raises LockedError if another process writes to this file."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(self.path.with_name(f".{self.path.name}.lock"), self.path))
            self._file = self._held.enter_context(self.path.open("ab"))
            self._file.truncate(self._num_whole)
            if self._num_whole == 0:
                self._file.write(self._head)
        self._file.write(_line([astuple(entry) for entry in batch]))
        self._file.flush()

    def close(self) -> None:
        """Close the file, to resume from it later."""
        self._file = None
        self._held.close()

    def remove(self) -> None:
        """Delete the file, when the output is complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _check(self, head: bytes) -> None:
        """Refuse the first line of another command, naming what differs."""
        try:
            value = json.loads(head)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or value.get("vpt_progress") != VERSION or "command" not in value:
            raise ValueError(f"{self.path}: not a progress file of this version; delete it, or name another output")
        was, now = dict(value["command"]), self.command
        for key in {**now, **was}:
            if was.get(key) != now.get(key):
                what = f"another command ({key} was {was.get(key)}, now {now.get(key)}); finish that one"
                raise ValueError(f"{self.path}: holds the progress of {what}, delete the file, or name another output")


def stamp_of(path: Path) -> Stamp:
    """Size and time of a file, which change with its content."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _read_batch(line: bytes) -> list[Entry] | None:
    """The entries of a line; None if it was cut."""
    try:
        return [
            Entry(name, None if stamp is None else (stamp[0], stamp[1]), found, error)
            for name, stamp, found, error in json.loads(line if line.endswith(b"\n") else b"")
        ]
    except (TypeError, ValueError, LookupError, RecursionError):
        return None

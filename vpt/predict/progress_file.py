"""What a long command has done so far, in a file beside its output: typed again, the command goes on behind it.

The first line says which command it is, each further one is a batch that is done. A line that was cut, as the process
was killed, counts as never written.
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
    """One picture that is done.

    Args:
        name: What the input calls it.
        stamp: Of its file before it was read, see `stamp_of`.
        found: What was found in it, as plain JSON values; None if it cannot be read.
        error: Why it cannot be read; None if it can.
    """

    name: str
    stamp: Stamp
    found: Any
    error: str | None = None


class Journal:
    """Entries of one command. Go through `entries` before the first `add`.

    Args:
        path: The file; made with the first batch.
        command: All that decides the results, as plain JSON values by name.
    """

    def __init__(self, path: Path, command: Mapping[str, Any]) -> None:
        self.path, self.command = path, dict(command)
        self._num_whole = 0  # bytes of whole lines
        self._file: BinaryIO | None = None
        self._lock = ExitStack()

    def entries(self) -> Iterator[Entry]:
        """What is done already, in the order in which it was done; nothing if there is no file.

        Raises:
            ValueError: The file is the journal of another command, or none.
        """
        self._num_whole = 0
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            head = file.readline()
            if not head.endswith(b"\n") and self._head().startswith(head):
                return
            self._check(head)
            self._num_whole = len(head)
            for line in file:
                batch = _read_batch(line)
                if batch is None:
                    return
                self._num_whole += len(line)
                yield from batch

    def add(self, batch: Sequence[Entry]) -> None:
        """Write a batch that is done, behind the last whole one.

        Raises:
            LockedError: Another process writes to this file.
        """
        if self._file is None:
            self._file = self._open()
        self._file.write(_line([astuple(entry) for entry in batch]))
        self._file.flush()

    def close(self) -> None:
        """Keep the file for the next time."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.close()

    def remove(self) -> None:
        """Delete the file; what it was for is whole."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(self.path.with_name(f".{self.path.name}.lock"), self.path))
        file = self.path.open("ab")
        file.truncate(self._num_whole)
        if self._num_whole == 0:
            file.write(self._head())
        return file

    def _head(self) -> bytes:
        return _line({"vpt_journal": VERSION, "command": self.command})

    def _check(self, head: bytes) -> None:
        """Refuse the first line of another command, saying what differs."""
        value = _parse(head)
        if not isinstance(value, dict) or value.get("vpt_journal") != VERSION or "command" not in value:
            raise ValueError(f"{self.path}: no journal of this version of vpt; delete it, or name another output")
        was, now = dict(value["command"]), self.command
        odd = [key for key in {**now, **was} if was.get(key) != now.get(key)]
        if odd:
            what = f"{odd[0]} was {was.get(odd[0])}, now {now.get(odd[0])}"
            raise ValueError(
                f"{self.path}: holds what another command has done so far ({what}); "
                "finish that one, delete the file, or name another output"
            )


def stamp_of(path: Path) -> Stamp:
    """What changes with a file, as far as that can be told without reading it."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes) -> Any:
    """The value of a whole line; None of one that was cut."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def _read_batch(line: bytes) -> list[Entry] | None:
    """The entries of a line; None if it was cut."""
    try:
        return [
            Entry(name, None if stamp is None else (stamp[0], stamp[1]), found, error)
            for name, stamp, found, error in _parse(line)
        ]
    except (TypeError, ValueError, LookupError):
        return None

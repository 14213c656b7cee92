"""One process at a time: a lock file that says who holds it, and is free as soon as that process has ended."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LockedError(ValueError):
    """Another process holds the lock; the message says which."""


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock file `path`, whose folder must be there, until the context is left or the process ends.

    `what` is the file or folder that it stands for.

    The system forgets the lock of a process that was killed, on whatever machine of a shared disk that was. Where a
    disk has no locks the file alone decides: it is taken over from a process of this machine that is gone. Child
    processes do not hold it. A process that reads the file while it holds the lock loses it, as POSIX has it.

    Raises:
        LockedError: Another process has it.
        OSError: The file cannot be written.
    """
    handle = _acquire(path, what)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(handle)):  # its folder may have got another name
                path.unlink()
        os.close(handle)


def _acquire(path: Path, what: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(handle, what)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has just removed it: the next one is another file


def _lock(handle: int, what: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN) and not _may_live(holder):
            return
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise LockedError(f"{what} is in use by {who}; wait for its end, or stop it") from error


def _holder(handle: int) -> dict[str, str]:
    try:
        return dict(json.loads(os.pread(handle, 4096, 0)))
    except (ValueError, TypeError):
        return {}


def _may_live(holder: dict[str, str]) -> bool:
    """Whether a holder may still be there, as far as this machine can tell."""
    if not holder or holder.get("host") != socket.gethostname():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True

"""Lock files that name the process that holds them."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

RETRY = 0.1  # seconds; the file of a holder that has just ended may still be open here


class LockedError(ValueError):
    """Another process holds the lock; the message names it."""


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock file `path`, in an existing folder, until the context is left or the process ends.

    The system releases the lock of a process that was killed; child processes do not hold it. On a disk without locks
    the content of the file decides: it is taken over from a process of this machine that has ended.

    The lock file is removed at the end; `what` is the file or folder that it protects, for the message.

    Raises:
        LockedError: Another process holds it.
        OSError: The file cannot be written.
    """
    lock = FileLock(path, timeout=RETRY, fallback_to_soft=False)
    own: dict[str, int | str] = {"pid": os.getpid(), "host": socket.gethostname()}
    try:
        lock.acquire()
    except OSError as error:
        holder = _holder(path)
        if isinstance(error, TimeoutError) or _may_live(holder):
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise LockedError(f"{what} is in use by {who}; wait until it ends, or stop it") from error
    try:
        path.write_text(json.dumps(own))
        yield
    finally:
        with suppress(OSError):
            if _holder(path) == own:  # not if the folder was renamed and another process has made a new one
                path.unlink()
        lock.release()


def _holder(path: Path) -> dict[str, int | str]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _may_live(holder: dict[str, int | str]) -> bool:
    """Whether a holder may still run; False only if this machine can rule it out."""
    if not holder or holder.get("host") != socket.gethostname():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time

import pytest

from vpt.storage.lock import LockedError, locked

fork = multiprocessing.get_context("fork")


def hold(path, sender):
    with locked(path, path.parent):
        sender.send("held")
        time.sleep(60)


def try_lock(path):
    """Whether another process gets the lock; what it says if not."""
    receiver, sender = fork.Pipe()

    def child():
        try:
            with locked(path, path.parent):
                sender.send(None)
        except LockedError as error:
            sender.send(str(error))

    process = fork.Process(target=child)
    process.start()
    said = receiver.recv()
    process.join()
    return said


@pytest.fixture
def holder(tmp_path):
    receiver, sender = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path / ".lock", sender))
    process.start()
    assert receiver.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    with pytest.raises(LockedError, match=rf"is in use by process {holder.pid} on {socket.gethostname()}"):
        locked(tmp_path / ".lock", tmp_path).__enter__()
    assert (tmp_path / ".lock").exists()


def test_the_lock_of_a_process_that_was_killed_is_taken_over(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid
    with locked(tmp_path / ".lock", tmp_path):
        said = subprocess.run(["cat", tmp_path / ".lock"], capture_output=True, check=True).stdout
        assert json.loads(said)["pid"] == os.getpid()  # if this process read it itself, it would lose the lock
        assert try_lock(tmp_path / ".lock") is not None


def test_nothing_is_left_when_it_is_given_back(tmp_path):
    with locked(tmp_path / ".lock", tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    assert try_lock(tmp_path / ".lock") is None


def test_a_child_process_does_not_hold_the_lock_of_its_parent(tmp_path):
    start = time.monotonic()
    with locked(tmp_path / ".lock", tmp_path):
        child = fork.Process(target=time.sleep, args=(20,))
        child.start()
    assert try_lock(tmp_path / ".lock") is None
    assert time.monotonic() - start < 15
    child.kill()
    child.join()


@pytest.mark.parametrize(
    ("holder", "is_free"),
    [
        ({"pid": 2**22 + 1, "host": socket.gethostname()}, True),  # no such process
        ({"pid": 1, "host": socket.gethostname()}, False),
        ({"pid": 2**22 + 1, "host": "another"}, False),
        (None, True),
    ],
)
def test_where_a_disk_has_no_locks_the_file_decides(tmp_path, monkeypatch, holder, is_free):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    if holder is not None:
        (tmp_path / ".lock").write_text(json.dumps(holder))
    if is_free:
        with locked(tmp_path / ".lock", tmp_path):
            pass
    else:
        with pytest.raises(LockedError, match=f"process {holder['pid']} on {holder['host']}"):
            locked(tmp_path / ".lock", tmp_path).__enter__()

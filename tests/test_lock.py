"""Lock files: one process at a time, named in the error of the next one."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from vpt.storage.lock import LockedError, locked

HOST = socket.gethostname()
fork = multiprocessing.get_context("fork")


def hold(path, sender, seconds):
    try:
        with locked(path, path.parent):
            sender.send(None)
            time.sleep(seconds)
    except LockedError as error:
        sender.send(str(error))


def start(path, seconds):
    """Another process that takes the lock, and why it was refused."""
    receiver, sender = fork.Pipe()
    process = fork.Process(target=hold, args=(path, sender, seconds))
    process.start()
    return process, receiver.recv()


def refusal(path):
    process, message = start(path, 0)
    process.join()
    return message


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    path = tmp_path / ".lock"
    holder, _ = start(path, 60)
    message = f"{tmp_path} is in use by process {holder.pid} on {HOST}"
    assert refusal(path).startswith(message)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert json.loads(path.read_text())["pid"] == holder.pid
    with locked(path, tmp_path):
        assert json.loads(path.read_text()) == {"pid": os.getpid(), "host": HOST}
        assert refusal(path) is not None
    assert list(tmp_path.iterdir()) == []
    assert refusal(path) is None


def test_a_child_process_does_not_hold_the_lock_of_its_parent(tmp_path):
    def parent(sender):
        with locked(tmp_path / ".lock", tmp_path):
            child = fork.Process(target=time.sleep, args=(60,))
            child.start()
            sender.send(child.pid)
            os.kill(os.getpid(), signal.SIGKILL)

    receiver, sender = fork.Pipe()
    process = fork.Process(target=parent, args=(sender,))
    process.start()
    process.join()
    assert refusal(tmp_path / ".lock") is None
    os.kill(receiver.recv(), signal.SIGKILL)


def test_the_lock_of_a_renamed_folder_is_not_removed_under_its_old_name(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder / ".lock", folder):
        folder.rename(tmp_path / "renamed")
        folder.mkdir()
        process, message = start(folder / ".lock", 60)
        assert message is None
    assert json.loads((folder / ".lock").read_text())["pid"] == process.pid
    process.kill()
    process.join()


@pytest.mark.parametrize(
    ("holder", "is_free"),
    [
        ({"pid": 2**22 + 1, "host": HOST}, True),  # no such process
        ({"pid": 1, "host": HOST}, False),
        ({"pid": 2**22 + 1, "host": "another"}, False),
        (None, True),
    ],
)
def test_where_a_disk_has_no_locks_the_file_decides(tmp_path, monkeypatch, holder, is_free):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / ".lock"
    if holder is not None:
        path.write_text(json.dumps(holder))
    if is_free:
        with locked(path, tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()
    else:
        with pytest.raises(LockedError, match=f"process {holder['pid']} on {holder['host']}"):
            locked(path, tmp_path).__enter__()

"""Loader processes that raise, die or hang, in processes of their own where pytest could not watch them."""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing import resource_sharer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from vpt.data.images import ImageError
from vpt.data.loaders import build_loader
from vpt.data.workers import LoaderError

# Python 3.12 warns when a process with threads forks, and torch has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

NUM = 12
BAD = 7


def misbehave(mode):
    match mode:
        case "raise":
            raise ImageError("a/7.png: broken image")
        case "raise a picky error":
            raise Picky("salt", "pepper")
        case "hang":
            time.sleep(1000)
        case "leave":
            os._exit(3)
        case name:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(1000)


class Album(Dataset):
    """Numbers; reading one of them fails in its mode, which may change while processes live."""

    def __init__(self, mode, bad=BAD):
        self.mode, self.bad = mode, bad
        self.samples = SimpleNamespace(names=[f"a/{i}.png" for i in range(NUM)])
        self.is_bad = multiprocessing.RawArray("b", [1])

    def __len__(self):
        return NUM

    def __getitem__(self, key):
        if key[1] == self.bad and self.is_bad[0]:
            misbehave(self.mode)
        return torch.tensor(key[1]), key[0]


def loader_of(album, num_workers=2, batch_size=2, timeout_s=20.0):
    return build_loader(album, batch_size, shuffle=False, num_workers=num_workers, timeout_s=timeout_s)


def numbers(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [number for images, _ in loader for number in images.tolist()]


def running():
    """Processes that this one has started and that still run, or have not been waited for."""
    return multiprocessing.active_children()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("SIGKILL", r"was killed by SIGKILL; .*lack of memory"),
        ("SIGSEGV", r"was killed by SIGSEGV; .*num_workers=0"),
        ("SIGBUS", r"was killed by SIGBUS; .*/dev/shm"),
        ("leave", r"exited with code 3; .*num_workers=0"),
        ("hang", r"sent no batch for 1\.5 s; .*timeout_s"),
    ],
)
def test_a_process_that_dies_or_hangs_is_named_with_the_cause_and_its_last_image(mode, words, capfd):
    start, loader = time.monotonic(), loader_of(Album(mode), timeout_s=1.5 if mode == "hang" else 20.0)
    with pytest.raises(LoaderError, match=words) as error:
        numbers(loader)
    assert time.monotonic() - start < 10
    assert "loader process 2 of 2 (pid " in str(error.value)
    assert "last image read: a/7.png" in str(error.value)
    assert "\n" not in str(error.value)
    del loader, error
    assert running() == []
    assert capfd.readouterr() == ("", "")


class Scattered(Album):
    """An image of many tensors, each of which takes an open file to be sent."""

    def __getitem__(self, key):
        return [torch.zeros(9) for _ in range(60)]


@pytest.mark.parametrize("lack", ["files", "shared memory"])
def test_a_lack_of_open_files_or_of_shared_memory_is_named_without_waiting(lack, monkeypatch, capfd):
    dataset = Scattered("none")
    if lack == "shared memory":
        monkeypatch.setattr(Scattered, "__getitem__", lambda *_: no_room())
    loader = build_loader(dataset, 2, shuffle=False, num_workers=1, collate_fn=list, timeout_s=20.0)
    limits, start = resource.getrlimit(resource.RLIMIT_NOFILE), time.monotonic()
    try:
        if lack == "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, limits[1]))
        with pytest.raises(LoaderError, match="ulimit" if lack == "files" else "/dev/shm"):
            list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert time.monotonic() - start < 10
    assert capfd.readouterr().err == ""


def no_room():
    raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


def test_a_process_that_is_about_to_die_when_its_batch_is_fetched_is_named_as_well():
    class Fading(Album):
        """Dies as if killed by the kernel: its files are closed some time before it exits."""

        def __getitem__(self, key):
            if key[1] == self.bad:
                time.sleep(0.3)  # for the thread that sends the batch before
                resource_sharer.stop()
                self.is_bad[0] = 0
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(key)

    album = Fading("none")
    batches = iter(loader_of(album))
    while album.is_bad[0]:
        time.sleep(0.01)
    with pytest.raises(LoaderError, match=r"loader process 2 of 2 .* was killed by SIGKILL; .*: a/7\.png; "):
        list(batches)
    assert running() == []


def test_a_slow_batch_within_the_limit_is_waited_for():
    class Slow(Album):
        def __getitem__(self, key):
            time.sleep(1.3 if key[1] == 0 else 0)
            return torch.tensor(key[1]), key[0]

    assert numbers(loader_of(Slow("none"))) == list(range(NUM))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_an_image_is_the_same_one_line_with_and_without_processes(num_workers):
    with pytest.raises(ImageError) as error:
        numbers(loader_of(Album("raise"), num_workers))
    assert str(error.value) == "a/7.png: broken image"
    assert error.value.__cause__ is None
    assert running() == []  # left to the garbage collection they would be waited for, ten seconds each
    if num_workers:
        assert "misbehave" in error.value.__notes__[0]  # where it was raised, for those who look at a traceback


class Picky(Exception):  # noqa: N818
    """Requires two arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_built_from_its_message_keeps_the_message():
    with pytest.raises(RuntimeError) as error:
        numbers(loader_of(Album("raise a picky error")))
    assert str(error.value) == "Picky: salt and pepper"


@pytest.mark.parametrize("mode", ["SIGKILL", "hang", "raise"])
def test_the_next_epoch_after_an_error_starts_anew(mode):
    album = Album(mode)
    loader = loader_of(album, timeout_s=1.0)
    with pytest.raises((LoaderError, ImageError)):
        numbers(loader)
    album.is_bad[0] = 0
    for epoch in (1, 2):
        assert numbers(loader, epoch) == list(range(NUM))


def test_processes_live_through_whole_epochs_and_are_replaced_if_they_are_killed_in_between():
    loader = loader_of(Album("none", bad=-1))
    assert numbers(loader) == list(range(NUM))
    first = set(running())
    assert len(first) == 2
    assert numbers(loader, epoch=1) == list(range(NUM))
    assert set(running()) == first
    for process in first:
        process.kill()
        process.join()
    assert numbers(loader, epoch=2) == list(range(NUM))
    assert not first & set(running())


def test_an_epoch_that_was_left_does_not_leak_into_the_next():
    loader = loader_of(Album("none", bad=-1))
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        images, epochs = next(iter(loader))
        assert (images.tolist(), epochs.tolist()) == ([0, 1], [epoch] * 2)
    assert numbers(loader, epoch=3) == list(range(NUM))
    del loader
    assert running() == []


def test_a_dead_process_is_an_error_when_a_batch_is_requested_and_not_before():
    loader = loader_of(Album("none", bad=-1), num_workers=1, batch_size=1)
    batches = iter(loader)
    next(batches)
    handler = signal.getsignal(signal.SIGCHLD)
    (process,) = running()
    process.kill()
    time.sleep(0.3)  # torch's own handler would raise here
    with pytest.raises(LoaderError, match="SIGKILL"):
        list(batches)
    assert not str(getattr(handler, "__module__", "")).startswith("torch.")


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_other_start_methods_report_the_same(start_method):
    loader = loader_of(ALBUM)
    loader.multiprocessing_context = start_method
    with pytest.raises(LoaderError, match=r"was killed by SIGKILL; last image read: a/7\.png"):
        numbers(loader)


ALBUM = Album("SIGKILL")

SCRIPT = """
import os, signal, sys, time
from tests.test_workers import Album, loader_of
mode = sys.argv[1]
class Slow(Album):
    def __getitem__(self, key):
        time.sleep(0.1)
        return super().__getitem__(key)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda *_: None)
loader = loader_of(Slow("hang", 7 if mode == "hang" else -1), timeout_s=100.0)
batches = iter(loader)
first = next(batches)
print(*(worker.pid for worker in batches.workers), flush=True)
if mode == "signals":
    time.sleep(0.5)
    print(len(list(batches)), flush=True)
elif mode == "wait":
    time.sleep(100)
else:
    time.sleep(1.5 if mode == "hang" else 0)  # by then a process hangs
    raise SystemExit(7)
"""


@contextlib.contextmanager
def started(mode):
    """The script in a session of its own, and the ids of its loader processes."""
    command = [sys.executable, "-c", SCRIPT, mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(is_running, pids)):
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.mark.slow
def test_signals_to_all_processes_leave_the_loader_alone():
    with started("signals") as (process, workers):
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
            os.killpg(process.pid, getattr(signal, name))
        assert process.stdout.readline() == "5\n"
        assert process.wait(20) == 0
        assert wait_for_end(workers, 1)


@pytest.mark.parametrize("mode", ["exit", "hang"])
def test_nothing_hangs_or_is_left_at_exit(mode):
    with started(mode) as (process, workers):
        assert len(workers) == 2
        assert process.wait(20) == 7
        assert wait_for_end(workers, 1)


def test_processes_end_when_the_main_process_is_killed():
    with started("wait") as (process, workers):
        assert all(map(is_running, workers))
        process.kill()
        process.wait()
        assert wait_for_end(workers, 12)

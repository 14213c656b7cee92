"""The batcher, without a model: which jobs share a batch, how long they wait, and what a failure affects."""

import random
import threading
import time
from concurrent.futures import CancelledError, Future

import pytest

from vpt.serve.batcher import Batcher, QueueFull

SLOW = 30.0  # seconds; far longer than anything here takes


class Recorder:
    """Runs and records batches of (group, number), and can be held back."""

    def __init__(self):
        self.batches = []
        self.began, self.may_continue = threading.Event(), threading.Event()
        self.may_continue.set()

    def __call__(self, jobs):
        self.batches.append(jobs)
        self.began.set()
        assert self.may_continue.wait(SLOW)
        return [f"{group} {number}" for group, number in jobs]


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def make(recorder):
    made = []

    def make_batcher(run=recorder, **options):
        made.append(Batcher(run, **{"group": lambda job: job[0], **options}))
        return made[-1]

    yield make_batcher
    recorder.may_continue.set()
    for batcher in made:
        batcher.close()


def hold(recorder, batcher):
    """Let a first batch begin and not end; jobs that come now wait."""
    recorder.may_continue.clear()
    (future,) = batcher.submit([("held", 0)])
    assert recorder.began.wait(SLOW)
    return future


def results(futures):
    return [future.result(SLOW) for future in futures]


def test_jobs_of_many_threads_share_a_batch_and_get_their_own_results(make, recorder):
    batcher = make(max_batch=8, max_wait_ms=10_000)
    found = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: results(batcher.submit([("a", number)]))}))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SLOW)
    assert found == {number: [f"a {number}"] for number in range(8)}
    assert len(recorder.batches) == 1


def test_a_single_job_waits_for_max_wait_ms(make, recorder):
    batcher = make(max_batch=32, max_wait_ms=50)
    begin = time.monotonic()
    (future,) = batcher.submit([("a", 1)])
    future.result(SLOW)
    assert 0.045 <= time.monotonic() - begin < 5


def test_a_full_batch_does_not_wait(make, recorder):
    batcher = make(max_batch=4, max_wait_ms=60_000)
    assert results(batcher.submit([("a", number) for number in range(4)])) == [f"a {number}" for number in range(4)]


@pytest.mark.parametrize(
    ("groups", "max_batch", "max_wait_ms", "batches"),
    [
        pytest.param("a" * 10, 4, 0, ["aaaa", "aaaa", "aa"], id="full batches"),
        pytest.param("abcabcabc", 32, 0, ["aaa", "bbb", "ccc"], id="groups share no batch"),
        pytest.param("abbbbbb", 2, 1, ["a", "bb", "bb", "bb"], id="a due job runs before full batches"),
    ],
)
def test_jobs_that_waited_run_at_once_in_batches_of_a_group(make, recorder, groups, max_batch, max_wait_ms, batches):
    batcher = make(max_batch=max_batch, max_wait_ms=max_wait_ms)
    hold(recorder, batcher)
    futures = batcher.submit([(group, number) for number, group in enumerate(groups)])
    time.sleep(0.02)
    recorder.may_continue.set()
    assert results(futures) == [f"{group} {number}" for number, group in enumerate(groups)]
    assert ["".join(group for group, _ in batch) for batch in recorder.batches[1:]] == batches
    assert all(batch == sorted(batch) for batch in recorder.batches)


def test_a_group_that_is_full_does_not_wait_behind_one_that_is_not(make, recorder):
    batcher = make(max_batch=2, max_wait_ms=60_000)
    lone = batcher.submit([("lone", 0)])
    assert results(batcher.submit([("pair", 1), ("pair", 2)])) == ["pair 1", "pair 2"]
    assert not lone[0].done()


def test_places_are_taken_all_or_none_and_released(make):
    batcher = make(max_queue=3)
    with batcher.places(2):
        with pytest.raises(QueueFull, match="2 of 3 places are taken, and 2 are needed"), batcher.places(2):
            pass
        with batcher.places(1):
            assert batcher.taken == 3
    with pytest.raises(KeyError), batcher.places(3):
        raise KeyError
    assert batcher.taken == 0


def test_a_cancelled_job_is_not_run_unless_it_runs_already(make, recorder):
    batcher = make(max_wait_ms=0)
    running = hold(recorder, batcher)
    kept, dropped = batcher.submit([("a", 1), ("a", 2)])
    assert dropped.cancel()
    assert not running.cancel()
    recorder.may_continue.set()
    assert results([kept]) == ["a 1"]
    with pytest.raises(CancelledError):
        dropped.result()
    assert recorder.batches[1:] == [[("a", 1)]]


def test_an_error_fails_its_batch_only(make):
    def run(jobs):
        if ("bad", 0) in jobs:
            raise RuntimeError("out of memory")
        return jobs

    batcher = make(run, max_batch=2, max_wait_ms=0)
    first, second = batcher.submit([("bad", 0), ("bad", 1)])
    for future in (first, second):
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(SLOW)
    assert results(batcher.submit([("good", 0)])) == [("good", 0)]
    assert (batcher.totals.batches, batcher.totals.failed_batches, batcher.totals.jobs) == (2, 1, 3)


def test_an_error_in_place_of_a_result_fails_its_job_only(make):
    batcher = make(lambda jobs: [KeyError(job[1]) if job[1] == 1 else job for job in jobs], max_batch=3)
    good, bad, other = batcher.submit([("a", 0), ("a", 1), ("a", 2)])
    assert results([good, other]) == [("a", 0), ("a", 2)]
    with pytest.raises(KeyError):
        bad.result(SLOW)
    assert batcher.totals.failed_batches == 0


def test_too_few_results_are_an_error(make):
    batcher = make(lambda jobs: jobs[:-1], max_batch=2)
    for future in batcher.submit([("a", 0), ("a", 1)]):
        with pytest.raises(AssertionError):
            future.result(SLOW)


def test_an_errand_runs_between_batches(make, recorder):
    batcher = make(max_wait_ms=0)
    hold(recorder, batcher)
    waiting = batcher.submit([("a", 1)])
    seen = batcher.between_batches(lambda: (len(recorder.batches), threading.current_thread().name))
    assert not seen.done()
    recorder.may_continue.set()
    results(waiting)
    assert seen.result(SLOW) == (1, "batcher")


def test_an_errand_wakes_a_waiting_batcher_and_returns_its_error(make):
    batcher = make(max_wait_ms=60_000)
    lone = batcher.submit([("a", 1)])
    with pytest.raises(ZeroDivisionError):
        batcher.between_batches(lambda: 1 / 0).result(SLOW)
    assert batcher.between_batches(lambda: 7).result(SLOW) == 7
    assert not lone[0].done()


def test_closing_finishes_accepted_jobs_and_refuses_others(make, recorder):
    batcher = make(max_batch=2, max_wait_ms=60_000)
    hold_batch = batcher.submit([("a", 0), ("a", 1)])
    results(hold_batch)
    recorder.began.clear()
    recorder.may_continue.clear()
    futures = batcher.submit([("a", 2), ("a", 3), ("a", 4), ("b", 5)])
    errand = batcher.between_batches(lambda: "done")
    assert recorder.began.wait(SLOW)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while True:  # until it is closed
        try:
            futures += batcher.submit([("c", 6)])
        except RuntimeError:
            break
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.between_batches(lambda: None)
    recorder.may_continue.set()
    closing.join(SLOW)
    assert not closing.is_alive()
    batcher.close()  # again
    assert all(future.done() for future in futures)
    assert results(futures)[:4] == ["a 2", "a 3", "a 4", "b 5"]
    assert errand.result() == "done"


def test_no_job_of_many_random_threads_is_lost_or_mixed_up(make):
    """Many threads submit, cancel and send errands; every future ends with its own result."""
    sizes = []

    def run(jobs):
        sizes.append(len(jobs))
        assert len({group for group, _ in jobs}) == 1
        return [number for _, number in jobs]

    batcher = make(run, max_batch=5, max_wait_ms=1)
    futures: list[tuple[int, Future]] = []

    def crowd(seed):
        draw = random.Random(seed)
        for number in range(200):
            value = 1000 * seed + number
            (future,) = batcher.submit([(draw.choice("abc"), value)])
            futures.append((value, future))
            if draw.random() < 0.2:
                future.cancel()
            if draw.random() < 0.05:
                batcher.between_batches(lambda: None)

    threads = [threading.Thread(target=crowd, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SLOW)
    batcher.close()
    assert len(futures) == 800
    assert all(future.cancelled() or future.result(0) == value for value, future in futures)
    assert max(sizes) <= 5
    assert batcher.totals.jobs == sum(sizes) == sum(not future.cancelled() for _, future in futures)

"""A run that is killed at any point, any number of times, ends with the same bytes as one that is not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path

import pytest

from tests.helpers import POINTS, SMALL_RUN, attempt_run, fill_disk, kept_files, train_with
from vpt.config.errors import ConfigError
from vpt.engine.checkpoint import NAMES, Checkpoints
from vpt.engine.metrics.classification import ClassificationMetrics

# No leftover of a write that was cut.
KEPT = {"config", "data", "events", "last", "metrics", "previous", "result", "task"}
KILLED = -signal.SIGKILL
NUM_KILLS = int(os.environ.get("VPT_NUM_KILLS", "2"))  # of each of eight configs


def prove(tmp_path, overrides, points, num_kills, seed=0):
    """Compare a run with others that are killed at random points; the kills that it took."""
    draw, kills, num_runs, log = random.Random(seed), [], 0, tmp_path / "log"
    assert attempt_run(log, [*SMALL_RUN, *overrides, f"run.root={tmp_path}/whole"]) == 0
    while True:
        killed = tmp_path / f"killed_{num_runs}"
        is_last = len(kills) >= num_kills
        where = (None, 0) if is_last else (draw.choice(points), draw.randint(1, 9))
        code = attempt_run(log, [*SMALL_RUN, *overrides, f"run.root={killed}"], *where)
        if code == 0:
            assert kept_files(killed) == kept_files(tmp_path / "whole")
            assert {path.name.split(".")[0] for path in (killed / "run").iterdir()} == KEPT
            num_runs += 1
            if is_last:
                return kills
        else:
            assert code == KILLED, log.read_text()
            kills.append(where)


@pytest.fixture
def choices(photos, boxes):
    """Overrides of a run of each type of task."""
    detection = ["dataset=coco", "head.channels=16", "augment=boxes", "backbone.img_size=96", f"dataset.root={boxes}"]
    return {
        "classification": ["dataset=folder", "train.batch_size=4", "prompt.dropout=0.1", f"dataset.root={photos}"],
        "detection": ["train.batch_size=4", *detection],
    }


@pytest.mark.slow
def test_a_run_that_is_killed_several_times_ends_with_the_same_bytes(tmp_path, choices):
    options = ["num_workers=0", "train.ema=0.5", "train.patience=2", *choices["classification"]]
    points = [point for point in POINTS if "boxes" not in point]
    assert len(prove(tmp_path, options, points, num_kills=4)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_type", "foreign"), [("classification", "in validation of boxes"), ("detection", "in validation")]
)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    tmp_path, choices, task_type, foreign, num_workers, accumulation
):
    options = [f"num_workers={num_workers}", f"train.accumulation={accumulation}", "train.ema=0.5", "train.patience=2"]
    points = [point for point in POINTS if point != foreign]
    prove(tmp_path, [*options, *choices[task_type]], points, NUM_KILLS, seed=num_workers + accumulation)


# Signals, as a scheduler sends them.


@pytest.fixture
def start():
    """Start a command; what still runs at the end of the test is killed."""
    started = []

    def begin(folder, *overrides, program=("-m", "vpt.train")):
        command = [sys.executable, *program, "run.root=runs", *SMALL_RUN, "num_workers=2", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(process, text):
    """Read the output of a process until a line has a text."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text!r} was not printed")


def assert_same_as_whole(tmp_path, options, root):
    """The files of the run in a root are those of a run that nothing ended."""
    whole = [*SMALL_RUN, "num_workers=0", *options, f"run.root={tmp_path}/whole"]
    assert attempt_run(tmp_path / "log", whole) == 0
    assert kept_files(tmp_path / root) == kept_files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_ends_the_command_with_75_and_the_same_command_resumes(start, tmp_path, choices, number):
    options = [*choices["classification"], "train.epochs=8"]
    process = start(tmp_path, *options)
    wait_for(process, "epoch 2/8: val")
    begin = time.monotonic()
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert time.monotonic() - begin < 10
    assert process.returncode == 75
    assert f"stopped by {number.name}; type the same command again" in output
    last = json.loads((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()[-1])["step"]
    process = start(tmp_path, *options)
    wait_for(process, f"after step {last}")
    assert process.communicate(timeout=120)
    assert process.returncode == 0
    assert_same_as_whole(tmp_path, options, "runs")


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(start, tmp_path, choices):
    options = [*choices["classification"], "train.epochs=400"]
    process = start(
        tmp_path, *options, program=("-m", "torch.distributed.run", "--nproc_per_node=1", "-m", "vpt.train")
    )
    wait_for(process, "epoch 2/400: val")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1  # torchrun's own
    assert "stopped by SIGTERM" in output
    assert Checkpoints(tmp_path / "runs/run").load().numbers["result"]["steps"] >= 10


@pytest.mark.slow
def test_the_command_that_is_killed_at_any_time_ends_with_the_same_bytes(start, tmp_path, choices):
    """While it imports, reads, trains, evaluates or writes, as time has it; by another process."""
    options, draw = [*choices["classification"], "train.epochs=6"], random.Random(0)
    for _ in range(NUM_KILLS):
        process = start(tmp_path, *options)
        with suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(4, 14))
        process.kill()
    assert start(tmp_path, *options).wait(200) == 0
    assert_same_as_whole(tmp_path, options, "runs")


@pytest.mark.slow
@pytest.mark.parametrize(("option", "code"), [("fresh=true", 75), ("mode=overfit", 128 + signal.SIGTERM)])
def test_a_run_that_cannot_be_resumed_reports_it(start, tmp_path, choices, option, code):
    slow = ["train.epochs=400", "backbone.img_size=256"]  # still at work when the signal comes
    slow += ["optim.prompt_lr=1e-60", "optim.head_lr=1e-60"]  # no step, for float32: a batch is never learned
    process = start(tmp_path, *choices["classification"], *slow, option)
    wait_for(process, "device ")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code
    assert ("but without fresh=true" if code == 75 else "mode=overfit saves nothing") in output


def test_several_processes_of_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node=1"):
        train_with("mode=dry")


@pytest.mark.slow
def test_a_second_command_in_the_same_folder_is_refused_and_the_first_one_continues(start, tmp_path, choices):
    options = [*choices["classification"], "train.epochs=400"]
    first = start(tmp_path, *options)
    wait_for(first, "epoch 1/400: val")
    second = start(tmp_path, *options)
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 2
    assert f"is in use by process {first.pid} on " in output
    assert first.poll() is None
    first.kill()
    first.wait()
    wait_for(start(tmp_path, *options), "resuming ")


# What is on the disk.


def test_data_that_changed_are_refused_and_times_that_changed_are_reported(tmp_path, photos, choices, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    places = [f"dataset.root={tmp_path}/photos", f"run.root={tmp_path}"]
    options = [*SMALL_RUN, *choices["classification"], *places, "cache=off"]
    assert attempt_run(tmp_path / "log", options, "behind a step", 4) == KILLED
    image = tmp_path / "photos/train/rose/0.png"
    image.rename(image.with_name("9.png"))
    with pytest.raises(ConfigError, match=r"images added: 1 \(train/rose/9\.png\); images removed: 1 .*fresh=true"):
        train_with(*options)
    (tmp_path / "run/data.jsonl").rename(tmp_path / "data.jsonl")  # as in version 0.1
    with pytest.raises(ValueError, match=r"images or labels of this run changed .*fresh=true"):
        train_with(*options)
    (tmp_path / "data.jsonl").rename(tmp_path / "run/data.jsonl")
    image.with_name("9.png").rename(image)
    os.utime(image, (0, 0))
    train_with(*options)
    assert "1 image of the same bytes (first train/rose/0.png)" in capsys.readouterr().err


def test_without_a_whole_checkpoint_nothing_is_done(tmp_path, choices):
    options = [*SMALL_RUN, *choices["classification"], f"run.root={tmp_path}"]
    assert attempt_run(tmp_path / "log", options, "behind a step", 6) == KILLED
    for path in (tmp_path / "run" / name for name in NAMES):
        path.write_bytes(path.read_bytes()[:1000])
    (tmp_path / "run/.lock").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="no checkpoint is left: type fresh=true"):
        train_with(*options)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.slow
def test_a_folder_that_was_moved_and_renamed_resumes_to_the_same_bytes(tmp_path, choices):
    options = [*SMALL_RUN, *choices["classification"], "num_workers=0"]
    assert attempt_run(tmp_path / "log", [*options, f"run.root={tmp_path}/a"], "behind a step", 8) == KILLED
    (tmp_path / "b").mkdir()
    (tmp_path / "a/run").rename(tmp_path / "b/other")
    train_with(*options, f"run.root={tmp_path}/b", "run.name=other")
    (tmp_path / "b/other").rename(tmp_path / "b/run")
    assert_same_as_whole(tmp_path, choices["classification"], "b")


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_nothing_but_time(tmp_path, choices, capsys):
    options = [*SMALL_RUN, *choices["classification"], "num_workers=0"]
    assert attempt_run(tmp_path / "log", [*options, f"run.root={tmp_path}/killed"], "behind a step", 8) == KILLED
    last = tmp_path / "killed/run" / NAMES[0]
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    train_with(*options, f"run.root={tmp_path}/killed")
    assert "resuming from previous.checkpoint" in capsys.readouterr().err
    assert_same_as_whole(tmp_path, choices["classification"], "killed")


@pytest.mark.slow
@pytest.mark.parametrize("is_room_made", [True, False])
def test_a_full_disk_does_not_end_a_run_but_is_reported_at_its_end(small_disk, tmp_path, choices, is_room_made, capsys):
    disk = small_disk("2m")
    options = [*SMALL_RUN, *choices["classification"], "num_workers=0", "train.epochs=5"]
    epochs = count(1)

    def fill(evaluator):
        epoch = next(epochs)
        if epoch == 2:
            fill_disk(disk)
        if epoch == 4 and is_room_made:
            (disk / "filler").unlink()
        return compute(evaluator)

    compute = ClassificationMetrics.compute
    ends = nullcontext() if is_room_made else pytest.raises(OSError, match="No space left on device")
    with pytest.MonkeyPatch.context() as patch, ends:
        patch.setattr(ClassificationMetrics, "compute", fill)
        train_with(*options, f"run.root={disk}")
    output, saved = capsys.readouterr(), Checkpoints(disk / "run").load()
    assert "Training continues, and the next checkpoint is tried again" in output.err
    assert "epoch 5/5: val" in output.out
    assert output.err.count("metrics.jsonl of") == 1
    assert saved.numbers["epoch"] == (6 if is_room_made else 2)
    if not is_room_made:
        (disk / "filler").unlink()
        train_with(*options, f"run.root={disk}")
    assert (disk / "run/result.json").exists()
    train_with(*options, f"run.root={tmp_path}/whole")
    assert (disk / "run/task.safetensors").read_bytes() == (tmp_path / "whole/run/task.safetensors").read_bytes()

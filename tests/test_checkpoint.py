import os
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.helpers import fill_disk
from vpt.engine import checkpoint
from vpt.engine.checkpoint import NAMES, Checkpoints

KIB = 1024


def tensors(value):
    return {"tuned/w": torch.full((700,), float(value)), "random/cpu": torch.arange(300, dtype=torch.uint8)}


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, {"data": "a", "backbone": "b"})
    assert checkpoints.load() is None
    for step in (1, 2):
        assert checkpoints.save(tensors(step), {"step": step})
    return checkpoints


def test_the_last_two_states_are_on_the_disk_and_the_last_one_is_read(two, tmp_path):
    saved = two.load()
    assert (saved.path, saved.numbers["step"]) == (two.last, 2)
    assert torch.equal(saved.tensors["tuned/w"], torch.full((700,), 2.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_a_file_that_is_cut_or_has_a_flipped_byte_is_noticed_and_the_previous_one_taken(two, capsys):
    whole = two.last.read_bytes()
    cut = [whole[:size] for size in range(0, len(whole), KIB)]
    flipped = [whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :] for i in range(0, len(whole), 97)]
    for damaged in cut + flipped:
        two.last.write_bytes(damaged)
        assert two.load().numbers["step"] == 1
        assert "resuming from previous.checkpoint" in capsys.readouterr().err


def test_a_damaged_file_never_replaces_a_whole_one_and_when_all_are_damaged_that_is_an_error(two):
    two.last.write_bytes(b"damaged")
    assert two.load().numbers["step"] == 1
    assert two.save(tensors(3), {"step": 3})
    assert two.load().numbers["step"] == 3
    two.last.unlink()
    assert two.load().numbers["step"] == 1
    for path in (two.last, two.previous):
        path.write_bytes(two.previous.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"last\.checkpoint.*previous\.checkpoint"):
        two.load()


@pytest.mark.parametrize("name", ["images or labels", "pictures or labels"])  # the second one in version 0.1
def test_a_state_made_from_other_data_is_refused(tmp_path, name):
    Checkpoints(tmp_path, {name: "a", "backbone": "b"}).save(tensors(1), {"step": 1})
    assert Checkpoints(tmp_path, {"images or labels": "a", "backbone": "b"}).load().numbers["step"] == 1
    with pytest.raises(ValueError, match="the images or labels of this run changed"):
        Checkpoints(tmp_path, {"images or labels": "c", "backbone": "b"}).load()


def test_other_threads_or_versions_than_those_of_the_last_state_are_reported(tmp_path, capsys):
    assert Checkpoints(tmp_path, made_with={"threads": 1, "torch": "2"}).save(tensors(1), {"step": 1})
    assert Checkpoints(tmp_path, made_with={"threads": 1, "torch": "2"}).load()
    assert not capsys.readouterr().err
    assert Checkpoints(tmp_path, made_with={"threads": 4, "torch": "2"}).load()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("threads was 1, is now 4: last digits of numbers may differ")


@pytest.mark.parametrize("number", range(1, 7))
def test_a_process_that_dies_inside_a_save_leaves_a_whole_state(two, tmp_path, number):
    calls = count(1)

    def dying(function):
        def call(*arguments, **options):
            if next(calls) == number:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nobody tidies up
        with pytest.raises(KeyboardInterrupt):
            two.save(tensors(3), {"step": 3})
    assert Checkpoints(tmp_path, two.made_from).load().numbers["step"] in (1, 2, 3)
    assert two.save(tensors(4), {"step": 4})
    assert two.load().numbers["step"] == 4


def test_a_file_that_is_written_wrong_never_replaces_the_last_one(two, monkeypatch, capsys):
    write = checkpoint.write_tensors

    def write_wrong(path, *arguments):
        write(path, *arguments)
        path.write_bytes(path.read_bytes()[:-4] + b"oops")

    monkeypatch.setattr(checkpoint, "write_tensors", write_wrong)
    assert not two.save(tensors(3), {"step": 3})
    assert "sha256" in str(two.error)
    assert two.load().numbers["step"] == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_state_and_the_next_save_is_tried_again(small_disk, capsys):
    disk = small_disk("64k")
    checkpoints = Checkpoints(disk)
    assert checkpoints.save(tensors(1), {"step": 1})
    filler = fill_disk(disk)
    assert not checkpoints.save(tensors(2), {"step": 2})
    assert "No space left on device" in str(checkpoints.error)
    assert "the next checkpoint is tried again" in capsys.readouterr().err
    assert checkpoints.load().numbers["step"] == 1
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "last.checkpoint"]
    filler.unlink()
    assert checkpoints.save(tensors(3), {"step": 3})
    assert checkpoints.error is None
    assert checkpoints.load().numbers["step"] == 3

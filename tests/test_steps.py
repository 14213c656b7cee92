"""Failures of a step: numbers that are not finite, memory, signals."""

import math
import signal
from itertools import pairwise
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.helpers import Evaluator, Separable, cross_entropy, fit_small, make_loader, metric_lines
from vpt.data.loaders import build_loader
from vpt.engine import checkpoint
from vpt.engine.checkpoint import Checkpoints
from vpt.engine.signals import SIGNALS, Stopped, StopSignal
from vpt.engine.steps import OutOfMemoryError, is_out_of_memory
from vpt.engine.trainer import evaluate

NUM, BATCH, EPOCHS = 22, 5, 3


class Images(Dataset):
    """Separable images; `change` replaces some of them, by index."""

    def __init__(self, change=None):
        self.images, self.targets = make_loader(NUM).dataset.tensors
        self.images = self.images.clone()
        for index, value in (change or {}).items():
            self.images[index] = value

    def __getitem__(self, key):
        _, index = key
        return self.images[index], self.targets[index]

    def __len__(self):
        return NUM


class WithDropout(Separable):
    def forward(self, images):
        return super().forward(nn.functional.dropout(images, 0.3, self.training))


def train(folder, model=None, change=None, losses=cross_entropy, stop=None, on_epoch=lambda *_: None, **settings):
    """Start a run, or resume it."""
    loader = build_loader(Images(change), BATCH, shuffle=True, seed=3)
    return fit_small(
        folder,
        model or WithDropout(),
        loader,
        build_loader(Images(), BATCH, shuffle=False),
        losses,
        optimizer=torch.optim.AdamW,
        lr=0.1,
        num_steps=20,
        names_of=lambda epoch, first, end: [
            f"{index}.png" for index in loader.sampler.order(epoch)[first * BATCH : end * BATCH]
        ],
        callbacks={"stop": stop or StopSignal(), "on_epoch": on_epoch},
        **{"epochs": EPOCHS, **settings},
    )


def metrics_of(folder):
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("settings", [{}, {"accumulation": 3}, {"ema": 0.5, "patience": 1}], ids=str)
@pytest.mark.parametrize("number", [1, 4, 5, 6, 7, 11])
def test_a_run_that_a_signal_or_an_error_ends_in_a_batch_resumes_to_the_same_bytes(tmp_path, settings, number):
    calls = []

    def losses(model, images, targets):
        calls.append(None)
        if len(calls) == number == 7:
            raise OSError("the disk is gone")
        if len(calls) == number:
            signal.raise_signal(SIGNALS[number % len(SIGNALS)])
        return cross_entropy(model, images, targets)

    whole, expected, _ = train(tmp_path / "whole", **settings)
    with pytest.raises((Stopped, OSError)), StopSignal() as stop:
        train(tmp_path / "cut", losses=losses, stop=stop, **settings)
    torch.rand(100)  # another process has other random numbers
    again, result, _ = train(tmp_path / "cut", **settings)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert torch.equal(again.head.weight, whole.head.weight)
    assert (result.best_epoch, result.steps, result.best) == (expected.best_epoch, expected.steps, expected.best)
    assert result.seconds > 0


def test_a_finished_run_that_is_resumed_does_nothing_and_its_state_of_other_parameters_is_refused(tmp_path):
    model, result, _ = train(tmp_path)
    before = metrics_of(tmp_path)
    again, same, _ = train(tmp_path, losses=None)
    assert metrics_of(tmp_path) == before
    assert torch.equal(again.head.weight, model.head.weight)
    assert same.best == result.best
    other = nn.Module()
    other.head = nn.Linear(12, 4)
    with pytest.raises(ValueError, match=r"tunes other parameters \(head\.weight\)"):
        train(tmp_path, model=other)
    with pytest.raises(ValueError, match=r"tunes other parameters \(its average\)"):
        train(tmp_path, ema=0.9)


# Numbers.


def test_an_image_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        train(tmp_path, change={7: math.nan, 9: math.inf})
    message = str(caught.value)
    assert all(text in message for text in ("the loss is nan at step", "(lr/head 0.", "skip_nonfinite=0"))
    assert "7.png (not finite itself)" in message or "9.png (not finite itself)" in message
    assert "0.png" not in message


def test_skipped_steps_are_counted_and_change_nothing(tmp_path, capsys):
    weights = []

    class Watched(Separable):
        def forward(self, images):
            weights.append((self.head.weight.detach().clone(), bool(torch.isfinite(images).all())))
            return super().forward(images)

    model, result, state = train(tmp_path, model=Watched(), change={7: math.nan}, skip_nonfinite=3)
    assert state.num_skipped == 3 == EPOCHS
    assert result.steps == 3 * 5
    assert torch.isfinite(model.head.weight).all()
    assert capsys.readouterr().err.count("7.png (not finite itself)") == 3
    for (weight, is_finite), (after, _) in pairwise(weights):
        if not is_finite:
            assert torch.equal(weight, after)
    assert any("train/loss" in line and line["train/loss"] is None for line in metric_lines(tmp_path))
    with pytest.raises(FloatingPointError, match="skip_nonfinite=2"):
        train(tmp_path / "b", change={7: math.nan}, skip_nonfinite=2)


def test_a_gradient_that_is_not_finite_stops_the_run_with_a_finite_loss(tmp_path):
    def losses(model, images, targets):
        of_zero = (0 * model.head.weight.sum()).sqrt()  # is 0, its derivative is 0 / 0
        return {"class": cross_entropy(model, images, targets)["class"] + of_zero}

    with pytest.raises(FloatingPointError, match=r"gradient's norm is nan at step 1, .*images \d+\.png, \d+\.png"):
        train(tmp_path, losses=losses)


def test_an_epoch_whose_val_loss_is_not_finite_is_never_the_best(tmp_path, capsys, monkeypatch):
    odd = {"top1": 1.0, "loss": math.nan}
    monkeypatch.setattr(Evaluator, "compute", Mock(side_effect=[odd, odd, {"top1": 0.5, "loss": 1.0}]))
    _, result, _ = train(tmp_path / "a")
    assert result.best_epoch == 3
    assert capsys.readouterr().err.count("this epoch cannot be the best one") == 2
    monkeypatch.setattr(Evaluator, "compute", lambda evaluator: {"top1": 1.0, "loss": math.inf})
    with pytest.raises(FloatingPointError, match="not finite in any epoch"):
        train(tmp_path / "b")


# Memory.


def hungry(limit, calls, error):
    """Losses that need more memory than there is for more than `limit` images."""

    def losses(model, images, targets):
        calls.append(len(images))
        if len(images) > limit:
            raise error
        return cross_entropy(model, images, targets)

    return losses


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_without_memory_batches_are_halved_until_they_fit_with_the_same_result(tmp_path, error, capsys):
    calls = []
    plain, expected, _ = train(tmp_path / "a", model=Separable())
    halved, result, state = train(tmp_path / "b", model=Separable(), losses=hungry(2, calls, error), auto_batch=True)
    assert state.num_parts == 4
    assert max(calls[2:]) <= 2
    assert capsys.readouterr().err.count("out of memory: batches of 5 are computed in") == 2
    torch.testing.assert_close(halved.head.weight, plain.head.weight, rtol=1e-4, atol=1e-5)
    assert result.steps == expected.steps
    assert result.best["loss"] == pytest.approx(expected.best["loss"], rel=1e-4)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_without_memory_the_error_names_the_size_of_the_batch(tmp_path, monkeypatch, error):
    with pytest.raises(OutOfMemoryError, match="at step 1, with batches of 5 in 1 parts"):
        train(tmp_path / "a", losses=hungry(2, [], error), accumulation=3)
    with pytest.raises(OutOfMemoryError, match="in 8 parts"):
        train(tmp_path / "b", losses=hungry(0, [], error), auto_batch=True)

    monkeypatch.setattr(Evaluator, "update", Mock(side_effect=error))
    with pytest.raises(OutOfMemoryError, match=r"with a batch of 5; .*batch_size=2"):
        evaluate(Separable(), make_loader(), Evaluator())


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(tmp_path, losses=hungry(0, [], RuntimeError("cannot be multiplied")), auto_batch=True)


# Time.


def test_a_signal_ends_the_wait_for_a_batch(tmp_path):
    class Slow(DataLoader):
        def __iter__(self):
            signal.raise_signal(signal.SIGUSR1)
            pytest.fail("it waited")
            yield

    with pytest.raises(Stopped), StopSignal() as stop:
        fit_small(tmp_path, train=Slow(make_loader().dataset), callbacks={"stop": stop})
    assert Checkpoints(tmp_path).load().numbers["batch"] == 0


@pytest.mark.parametrize(("seconds", "batches"), [(0.0, [1, 2, 3, 4, 5, 0]), (1000.0, [0])])
def test_a_long_epoch_is_saved_again_and_again(tmp_path, monkeypatch, seconds, batches):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments: saved.append(arguments[2]["batch"]) or save(*arguments))
    train(tmp_path, epochs=1, save_every_s=seconds)
    assert saved == batches


def test_a_run_whose_folder_is_moved_ends_and_resumes_where_the_folder_is(tmp_path):
    def move(epoch, step):
        if epoch == 2:
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(FileNotFoundError, match="moved or removed"):
        train(tmp_path / "run", on_epoch=move)
    assert not (tmp_path / "run").exists()
    model, *_ = train(tmp_path / "moved")
    whole, *_ = train(tmp_path / "whole")
    assert metrics_of(tmp_path / "moved") == metrics_of(tmp_path / "whole")
    assert torch.equal(model.head.weight, whole.head.weight)


def test_a_checkpoint_that_fails_at_the_end_is_tried_again(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    write = Mock(wraps=checkpoint.write_tensors, side_effect=[DEFAULT, full, full, DEFAULT])
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    _, result, _ = train(tmp_path)
    assert (result.epochs, write.call_count) == (EPOCHS, 4)
    assert Checkpoints(tmp_path).load().numbers["epoch"] == EPOCHS + 1

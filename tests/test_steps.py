"""What can go wrong in a step: numbers that are not finite, memory, a signal."""

import math
import signal
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.helpers import Evaluator, Separable, cross_entropy, make_loader, metric_lines
from vpt.data.loaders import build_loader
from vpt.engine.checkpoint import Checkpoints
from vpt.engine.monitor import Monitor
from vpt.engine.optim import MovingAverage, warmup_cosine
from vpt.engine.signals import SIGNALS, Stopped, StopSignal
from vpt.engine.state import RunState
from vpt.engine.steps import FitSettings, OutOfMemoryError, is_out_of_memory
from vpt.engine.trainer import evaluate, fit

NUM, BATCH, EPOCHS = 22, 5, 3


class Pictures(Dataset):
    """Separable pictures, with a few that are what `change` makes of them."""

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


def train(folder, model=None, change=None, losses=cross_entropy, stop=None, on_best=None, ema=None, **settings):
    """Begin a run, or go on with it."""
    model = model or WithDropout()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "lr": 0.1, "name": "head"}])
    schedule = warmup_cosine(optimizer, num_steps=20, num_warmup_steps=2)
    average = MovingAverage(dict(model.named_parameters()), ema) if ema else None
    state = RunState(dict(model.named_parameters()), optimizer, schedule, average)
    loader = build_loader(Pictures(change), BATCH, shuffle=True, seed=3)
    checkpoints = Checkpoints(folder)
    saved = checkpoints.load()
    if saved is not None:
        state.load(saved.tensors, saved.numbers)
    going_on = None if saved is None else (saved.numbers["metrics_bytes"], state.result.steps)
    with Monitor(folder, going_on=going_on) as monitor:
        result = fit(
            model,
            loader,
            build_loader(Pictures(), BATCH, shuffle=False),
            state=state,
            losses=losses,
            evaluator=Evaluator(),
            settings=FitSettings(**{"epochs": EPOCHS, "select": "top1", "log_every": 1, **settings}),
            checkpoints=checkpoints,
            monitor=monitor,
            stop=stop,
            names_of=lambda epoch, first, behind: [
                f"{index}.png" for index in loader.sampler.order(epoch)[first * BATCH : behind * BATCH]
            ],
            on_best=on_best or (lambda values: None),
        )
    return model, result, state


def kept(folder):
    return (folder / "metrics.jsonl").read_bytes()


def stopping_losses(stop, number):
    """The losses, and a signal in the middle of a batch of the given number."""
    calls = []

    def losses(model, images, targets):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(SIGNALS[number % len(SIGNALS)])
        return cross_entropy(model, images, targets)

    return losses


@pytest.mark.parametrize("settings", [{}, {"accumulation": 3}, {"ema": 0.5, "patience": 1}], ids=str)
@pytest.mark.parametrize("number", [1, 4, 5, 6, 11])
def test_a_run_that_a_signal_stops_goes_on_to_the_same_bytes(tmp_path, settings, number):
    whole, expected, _ = train(tmp_path / "whole", **settings)
    with pytest.raises(Stopped), StopSignal() as stop:
        train(tmp_path / "cut", losses=stopping_losses(stop, number), stop=stop, **settings)
    torch.rand(100)  # another process has other random numbers
    again, result, _ = train(tmp_path / "cut", **settings)
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    assert torch.equal(again.head.weight, whole.head.weight)
    assert (result.best_epoch, result.steps, result.best) == (expected.best_epoch, expected.steps, expected.best)
    assert result.seconds > 0


def test_a_run_that_an_error_ends_goes_on_to_the_same_bytes(tmp_path):
    calls = []

    def failing(model, images, targets):
        calls.append(None)
        if len(calls) == 7:
            raise OSError("the disk with the pictures is gone")
        return cross_entropy(model, images, targets)

    whole, _, _ = train(tmp_path / "whole")
    with pytest.raises(OSError, match="is gone"):
        train(tmp_path / "cut", losses=failing)
    again, _, _ = train(tmp_path / "cut")
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    assert torch.equal(again.head.weight, whole.head.weight)


def test_a_finished_run_that_goes_on_has_nothing_to_do(tmp_path):
    model, result, _ = train(tmp_path)
    before = kept(tmp_path)
    again, same, _ = train(tmp_path, losses=None)
    assert kept(tmp_path) == before
    assert torch.equal(again.head.weight, model.head.weight)
    assert same.best == result.best


def test_a_state_of_other_parameters_is_refused(tmp_path):
    train(tmp_path)
    other = nn.Module()
    other.head = nn.Linear(12, 4)
    with pytest.raises(ValueError, match=r"tunes other parameters \(head\.weight\)"):
        train(tmp_path, model=other)
    with pytest.raises(ValueError, match=r"tunes other parameters \(its average\)"):
        train(tmp_path, ema=0.9)


# Numbers.


def test_a_picture_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        train(tmp_path, change={7: math.nan, 9: math.inf})
    message = str(caught.value)
    assert "the loss is nan at step" in message
    assert "(lr/head 0." in message
    assert "7.png (not finite itself)" in message or "9.png (not finite itself)" in message
    assert "0.png" not in message
    assert "leave such steps out: train.skip_nonfinite=10" in message


def test_so_many_steps_as_allowed_are_left_out_and_change_nothing(tmp_path, capsys):
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
    with pytest.raises(FloatingPointError, match=r"train\.skip_nonfinite=12"):
        train(tmp_path / "b", change={7: math.nan}, skip_nonfinite=2)


def test_a_gradient_that_is_not_finite_stops_the_run_with_a_finite_loss(tmp_path):
    def losses(model, images, targets):
        of_zero = (0 * model.head.weight.sum()).sqrt()  # is 0, its derivative is 0 / 0
        return {"class": cross_entropy(model, images, targets)["class"] + of_zero}

    with pytest.raises(
        FloatingPointError, match=r"the gradient's norm is nan at step 1, .*pictures \d+\.png, \d+\.png"
    ):
        train(tmp_path, losses=losses)


def test_an_epoch_whose_val_loss_is_not_finite_is_never_the_best(tmp_path, capsys, monkeypatch):
    compute, calls = Evaluator.compute, []

    def odd(evaluator):
        calls.append(None)
        return {**compute(evaluator), "top1": 1.0, "loss": math.nan} if len(calls) < 3 else compute(evaluator)

    monkeypatch.setattr(Evaluator, "compute", odd)
    _, result, _ = train(tmp_path / "a")
    assert result.best_epoch == 3
    assert capsys.readouterr().err.count("this epoch cannot be the best one") == 2
    monkeypatch.setattr(Evaluator, "compute", lambda evaluator: {"top1": 1.0, "loss": math.inf})
    with pytest.raises(FloatingPointError, match="not finite in any epoch"):
        train(tmp_path / "b")


# Memory.


def hungry(limit, calls, error):
    """Losses that need more memory than there is for more than `limit` pictures."""

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
def test_without_memory_and_auto_batch_the_error_says_what_to_type(tmp_path, error):
    with pytest.raises(
        OutOfMemoryError, match=r"batches of 5 .*type auto_batch=true, or train\.batch_size=2 train\.accumulation=6"
    ):
        train(tmp_path, losses=hungry(2, [], error), accumulation=3)


def test_what_does_not_fit_picture_by_picture_is_an_error(tmp_path):
    with pytest.raises(OutOfMemoryError, match=r"in 8 parts"):
        train(tmp_path, losses=hungry(0, [], ERRORS[0]), auto_batch=True)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_without_memory_for_an_evaluation_the_error_says_what_to_type(monkeypatch, error):
    def update(*_):
        raise error

    monkeypatch.setattr(Evaluator, "update", update)
    with pytest.raises(
        OutOfMemoryError, match=r"with a batch of 5; type batch_size=2 \(train\.batch_size=2 in training\)"
    ):
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

    model = Separable()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.1, "name": "head"}])
    state = RunState(
        dict(model.named_parameters()), optimizer, warmup_cosine(optimizer, num_steps=9, num_warmup_steps=1), None
    )
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Stopped), StopSignal() as stop, Monitor(tmp_path) as monitor:
        fit(
            model,
            Slow(make_loader().dataset),
            make_loader(),
            state=state,
            losses=cross_entropy,
            evaluator=Evaluator(),
            settings=FitSettings(epochs=1, select="top1"),
            checkpoints=checkpoints,
            monitor=monitor,
            stop=stop,
        )
    assert checkpoints.load().numbers["batch"] == 0


def test_a_long_epoch_is_saved_again_and_again(tmp_path, monkeypatch):
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments: saved.append(arguments[2]["batch"]) or save(*arguments))
    train(tmp_path / "a", epochs=1, save_every_s=0.0)
    assert saved == [1, 2, 3, 4, 5, 0]
    saved.clear()
    train(tmp_path / "b", epochs=1, save_every_s=1000.0)
    assert saved == [0]


def test_a_checkpoint_that_fails_at_the_end_is_tried_again(tmp_path, monkeypatch):
    from vpt.engine import checkpoint

    calls, write = [], checkpoint.write_tensors

    def full(*arguments):
        calls.append(None)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    _, result, _ = train(tmp_path)
    assert result.epochs == EPOCHS
    assert len(calls) == 4
    assert Checkpoints(tmp_path).load().numbers["epoch"] == EPOCHS + 1

"""The training loop, evaluation, and the test that one batch can be learned; knows neither prompts nor data sets."""

import itertools
import math
import time
from contextlib import nullcontext
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from vpt.engine.console import Progress, percent, warn
from vpt.engine.signals import StopSignal
from vpt.engine.state import FitResult, RunState
from vpt.engine.steps import (
    Batch,
    Callbacks,
    Evaluator,
    FitData,
    FitSettings,
    Loader,
    Losses,
    OutOfMemoryError,
    Stepper,
    autocast,
    is_out_of_memory,
    move,
    num_batches_of,
    total_of,
)

OVERFIT_EVERY = 5  # steps between two evaluations


def fit(model: nn.Module, data: FitData, state: RunState, settings: FitSettings, callbacks: Callbacks) -> FitResult:
    """Train, evaluate on val after each epoch, and leave the model with the weights of the best epoch.

    If a signal or an error ends it early, it leaves a checkpoint from which another call resumes with the same numbers,
    to the last bit where torch's own operations are reproducible.

    Args:
        model: On the device that the batches are moved to.
        data: What it is trained and evaluated on.
        state: Of a new run, or loaded from a checkpoint; where it has an average, that is evaluated on val.
        settings: Settings of the loop.
        callbacks: Monitor, checkpoints, signals and hooks.

    Raises:
        FloatingPointError: Loss or gradient is not finite more often than allowed, or the val loss in every epoch.
        OutOfMemoryError: A step does not fit into memory.
        Stopped: A signal was received; the state is saved.
    """
    monitor, stop, checkpoints = callbacks.monitor, callbacks.stop, callbacks.checkpoints
    start, seconds_before = time.monotonic(), state.result.seconds

    def save() -> None:
        state.result.seconds = seconds_before + time.monotonic() - start
        checkpoints.save(state.tensors(), {**state.numbers(), "metrics_bytes": monitor.sync()})

    stepper = Stepper(model, data, state, settings, callbacks)
    validate = partial(evaluate, precision=settings.precision, max_batches=settings.max_batches, stop=stop)
    try:
        with stop.deferred():
            while not _is_over(state, settings):
                stepper.run_epoch(save)
                with state.average.swapped_in() if state.average else nullcontext():
                    values = validate(model, data.val_loader, data.evaluator)
                    is_best = _is_better(values, state.result.best, settings.select)
                    if is_best:
                        state.save_best(values)
                        callbacks.on_best(values)
                callbacks.on_epoch(state.epoch, state.result.steps)
                _print_epoch(state, settings, values, is_best)
                with state.changing():
                    monitor.scalars({f"val/{name}": value for name, value in values.items()}, state.result.steps)
                    state.result.epochs, state.epoch, state.batch = state.epoch, state.epoch + 1, 0
                save()
                stop.check()
            if checkpoints.error is not None:  # there may be room on the disk by now
                save()
    except BaseException:
        if state.is_whole:
            save()
        raise
    if not state.result.best:
        raise FloatingPointError("the loss on val was not finite in any epoch")
    state.restore_best()
    return state.result


def evaluate(
    model: nn.Module,
    loader: Loader,
    evaluator: Evaluator,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    max_batches: int | None = None,
    description: str | None = None,
    stop: StopSignal | None = None,
) -> dict[str, float]:
    """Metrics of a model over the batches of a loader, all or `max_batches`, in eval mode and without gradients.

    The evaluator is reset first. "bf16" computes the forward pass under autocast. A `description` shows progress under
    this name. OutOfMemoryError if a batch does not fit into memory; Stopped after a batch if `stop` received a signal.
    """
    device = next(model.parameters()).device
    evaluator.reset()
    model.eval()
    shown = nullcontext() if description is None else Progress(num_batches_of(loader, max_batches), description)
    with torch.inference_mode(), autocast(device, precision), shown as progress:
        for images, targets in itertools.islice(loader, max_batches):
            try:
                evaluator.update(model, *move((images, targets), device))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                num, halved = len(images), max(1, len(images) // 2)
                raise OutOfMemoryError(f"out of memory with a batch of {num}; try batch_size={halved}") from error
            if progress is not None:
                progress.advance(len(images))
            if stop is not None:
                stop.check()
    return evaluator.compute()


def overfit(
    model: nn.Module,
    batch: Batch,
    *,
    losses: Losses,
    evaluator: Evaluator,
    select: str,
    goal: float,
    optimizer: Optimizer,
    max_steps: int = 300,
    stop: StopSignal | None = None,
) -> int | None:
    """Train on one batch until the metric `select` of it reaches `goal`; return the steps, None if it never does.

    A model that cannot learn one batch is broken: the model itself, its gradients or its optimiser.
    """
    images, targets = move(batch, next(model.parameters()).device)
    for step in range(1, max_steps + 1):
        model.train()
        loss = total_of(losses(model, images, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % OVERFIT_EVERY == 0 or step == max_steps:
            values = evaluate(model, [batch], evaluator, stop=stop)  # type: ignore[arg-type]  # a list is a loader, too
            print(f"step {step}: loss {loss.item():.4f}, {select} {percent(values[select])}", flush=True)
            if values[select] >= goal:
                return step
    return None


def _is_over(state: RunState, settings: FitSettings) -> bool:
    """Whether all epochs are done, or none of the last `patience` was better."""
    result = state.result
    since = max([result.best_epoch, *result.extended_after])
    if settings.patience is not None and result.epochs - since >= settings.patience:
        print(f"no better val {settings.select} for {settings.patience} epochs: stopping")
        return True
    return state.epoch > settings.epochs


def _is_better(values: dict[str, float], best: dict[str, float], select: str) -> bool:
    """Whether an epoch is better on val than the best so far; one whose loss is not finite never is."""
    if select not in values:
        raise ValueError(f"select={select!r}: the val metrics of this model are {', '.join(values)}")
    sign = -1 if select == "loss" else 1

    def rank(values: dict[str, float]) -> list[float]:
        ordered = sign * values[select], -values.get("loss", math.nan)
        return [-math.inf if math.isnan(value) else value for value in ordered]

    return math.isfinite(values.get("loss", 0.0)) and (not best or rank(values) > rank(best))


def _print_epoch(state: RunState, settings: FitSettings, values: dict[str, float], is_best: bool) -> None:
    shown = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    if settings.select != "loss":
        shown.append(f"{settings.select} {percent(values[settings.select])}")
    print(f"epoch {state.epoch}/{settings.epochs}: val {', '.join(shown)}{' *' if is_best else ''}", flush=True)
    if not math.isfinite(values.get("loss", 0.0)):
        warn("the loss on val is not finite: this epoch cannot be the best one")
    elif math.isnan(values[settings.select]):
        warn(f"{settings.select} on val is not a number, as of no example: any other epoch is better than this one")

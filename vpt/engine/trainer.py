"""fit() and evaluate(): the loop, on one screen. It knows modules, loaders and numbers, neither prompts nor data sets.

A loader gives batches `(images, targets)`; its sampler, when it has a `set_epoch`, is told the epoch and how much of it
is done. What a kind of task makes of a batch is given to the loop: a function to its losses, and an evaluator for its
metrics.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vpt.engine.checkpoint import Checkpoints
from vpt.engine.console import Progress, percent, warn
from vpt.engine.monitor import Monitor
from vpt.engine.signals import StopSignal
from vpt.engine.state import FitResult, RunState
from vpt.engine.steps import (
    Batch,
    FitSettings,
    Loader,
    Losses,
    NamesOf,
    Stepper,
    autocast,
    memory_errors,
    move,
    num_batches_of,
    total_of,
)
from vpt.engine.watch import RowWatch

OVERFIT_EVERY = 5  # steps between two looks at the metric


class Evaluator(Protocol):
    """What evaluate() asks of an evaluation: it runs the model on batches, and says what all of them come to."""

    def reset(self) -> None:
        """Forget everything."""

    def update(self, model: nn.Module, images: Tensor, targets: Any) -> None:
        """Run the model on a batch, and add what it gives."""

    def compute(self) -> dict[str, float]:
        """The metrics of all that was added, "loss" among them where the model has one in evaluation."""


def fit(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    *,
    state: RunState,
    losses: Losses,
    evaluator: Evaluator,
    settings: FitSettings,
    checkpoints: Checkpoints,
    monitor: Monitor,
    stop: StopSignal | None = None,
    watches: Sequence[RowWatch] = (),
    names_of: NamesOf = lambda epoch, first, behind: (),
    on_best: Callable[[dict[str, float]], object] = lambda values: None,
    on_epoch: Callable[[int, int], object] = lambda epoch, step: None,
) -> FitResult:
    """Train, evaluate on val after each epoch, remember the best; the model ends with the weights of the best.

    What ends it early, be it a signal or an error, leaves a checkpoint from which another call goes on as if nothing
    had happened: with the same numbers, to the last bit where torch's own operations are reproducible.

    Args:
        model: On the device that the batches are moved to.
        train_loader: Batches of train, in a new order each epoch.
        val_loader: Batches of val; they choose.
        state: Where to begin, of a new run or out of a checkpoint; where it has an average, val sees that.
        losses: (model, images, targets) -> scalars by name, means over the batch; their sum trains. Where the mean is
            over something else than pictures, such as boxes, accumulated batches are not quite one large batch.
        evaluator: The evaluation on val.
        settings: Numbers of the loop.
        checkpoints: Where the state is saved, after each epoch and every `save_every_s` inside of one.
        monitor: Where numbers go.
        stop: The signals that end it; None listens to none.
        watches: Parameters whose rows are logged.
        names_of: Pictures of batches, for errors.
        on_best: Called with the val metrics at each new best epoch, while the model has the weights of it.
        on_epoch: Called with epoch (from 1) and step after each evaluation on val.

    Raises:
        FloatingPointError: Loss or gradient is not finite more often than allowed, or that of val in every epoch.
        OutOfMemoryError: A step does not fit into memory.
        Stopped: A signal came; the state is saved.
    """
    stop, start, before = stop or StopSignal(), time.monotonic(), state.result.seconds

    def save() -> None:
        state.result.seconds = before + time.monotonic() - start
        checkpoints.save(state.tensors(), {**state.numbers(), "metrics_bytes": monitor.sync()})

    stepper = Stepper(
        model,
        state,
        losses=losses,
        settings=settings,
        monitor=monitor,
        watches=watches,
        stop=stop,
        save=save,
        names_of=names_of,
    )
    try:
        with stop.patient():
            while not _is_over(state, settings):
                stepper.run_epoch(train_loader)
                with state.average.swapped_in() if state.average else nullcontext():
                    values = evaluate(
                        model,
                        val_loader,
                        evaluator,
                        precision=settings.precision,
                        max_batches=settings.max_batches,
                        stop=stop,
                    )
                    is_best = _is_better(values, state.result.best, settings.select)
                    if is_best:
                        state.keep_best(values)
                        on_best(values)
                on_epoch(state.epoch, state.result.steps)
                _tell(state, settings, values, is_best)
                with state.moving():
                    monitor.scalars({f"val/{name}": value for name, value in values.items()}, state.result.steps)
                    state.result.epochs, state.epoch, state.batch = state.epoch, state.epoch + 1, 0
                save()
                stop.check()
            if checkpoints.error is not None:
                save()
    except BaseException:
        if state.is_whole:
            save()
        raise
    if not state.result.best:
        raise FloatingPointError("the loss on val was not finite in any epoch; lower the learning rates")
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
    """Metrics of a model over all batches of a loader, in eval mode and without gradients.

    Args:
        model: Computes what the evaluator asks of it.
        loader: Batches, in a fixed order.
        evaluator: Is reset first.
        precision: "bf16" computes the forward pass under autocast.
        max_batches: Batches to take; None takes all.
        description: Shows progress under this name; None shows none.
        stop: Is asked after each batch; None is not.

    Raises:
        OutOfMemoryError: A batch does not fit into memory.
        Stopped: A signal came.
    """
    device = next(model.parameters()).device
    evaluator.reset()
    model.eval()
    batches = itertools.islice(loader, max_batches)
    shown = nullcontext() if description is None else Progress(num_batches_of(loader, max_batches), description)
    with torch.inference_mode(), autocast(device, precision), shown as progress:
        for images, targets in batches:
            with memory_errors(len(images)):
                evaluator.update(model, *move((images, targets), device))
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
) -> int | None:
    """Train on one batch until a metric of it reaches its goal; return the steps, None if it never does.

    A model, its gradients and its optimiser that cannot do this are broken.
    """
    device = next(model.parameters()).device
    images, targets = move(batch, device)
    for step in range(1, max_steps + 1):
        model.train()
        loss = total_of(losses(model, images, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % OVERFIT_EVERY == 0 or step == max_steps:
            reached = evaluate(model, [batch], evaluator)[select]  # type: ignore[arg-type]  # a list is a loader, too
            print(f"step {step}: loss {loss.item():.4f}, {select} {percent(reached)}", flush=True)
            if reached >= goal:
                return step
    return None


def _is_over(state: RunState, settings: FitSettings) -> bool:
    """Whether all epochs are done, or none was better for so long that no more is tried."""
    if settings.patience is not None and state.result.epochs - state.result.best_epoch >= settings.patience:
        print(f"no better val {settings.select} for {settings.patience} epochs: stopping")
        return True
    return state.epoch > settings.epochs


def _tell(state: RunState, settings: FitSettings, values: dict[str, float], is_best: bool) -> None:
    loss = f"loss {values['loss']:.4f}, " if "loss" in values else ""
    line = f"val {loss}{settings.select} {percent(values[settings.select])}"
    print(f"epoch {state.epoch}/{settings.epochs}: {line}{' *' if is_best else ''}", flush=True)
    if not math.isfinite(values.get("loss", 0.0)):
        warn("the loss on val is not finite: this epoch cannot be the best one")


def _is_better(values: dict[str, float], best: dict[str, float], select: str) -> bool:
    """Whether val says that this epoch is better than the best so far; one whose loss is not finite never is."""
    return math.isfinite(values.get("loss", 0.0)) and (not best or _rank(values, select) > _rank(best, select))


def _rank(values: dict[str, float], select: str) -> tuple[float, float]:
    loss = values.get("loss", math.nan)
    return tuple(-math.inf if math.isnan(value) else value for value in (values[select], -loss))  # type: ignore[return-value]

"""fit() and evaluate(): the loop, on one screen. It knows modules, loaders and numbers, neither prompts nor data sets.

A loader gives batches `(images, targets)`; its sampler, when it has a `set_epoch`, is told the epoch. What a kind of
task makes of a batch is given to the loop: a function to its losses, and an evaluator for its metrics.
"""

import contextlib
import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from vpt.engine.checkpoint import Checkpoints
from vpt.engine.console import Progress, percent
from vpt.engine.monitor import Monitor
from vpt.engine.optim import MovingAverage
from vpt.engine.watch import RowWatch

OVERFIT_EVERY = 5  # steps between two looks at the metric

Batch = tuple[Tensor, Any]  # images (B, ...), and targets as the kind of task has them
Loader = DataLoader[Any]  # its batches are Batch, whatever its data set gives
Losses = Callable[[nn.Module, Tensor, Any], Mapping[str, Tensor]]  # (model, images, targets) -> means over the batch


class Evaluator(Protocol):
    """What evaluate() asks of an evaluation: it runs the model on batches, and says what all of them come to."""

    def reset(self) -> None:
        """Forget everything."""

    def update(self, model: nn.Module, images: Tensor, targets: Any) -> None:
        """Run the model on a batch, and add what it gives."""

    def compute(self) -> dict[str, float]:
        """The metrics of all that was added, "loss" among them where the model has one in evaluation."""


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Args:
        epochs: Passes over train.
        select: The val metric that chooses the best epoch, higher is better, nan is the worst; of equal ones the lower
            loss wins.
        accumulation: Batches in an optimiser step.
        clip_norm: Largest norm of the gradient of all tuned parameters; None does not clip.
        patience: Epochs without a better val metric before training stops; None never stops.
        precision: "bf16" computes the forward pass under autocast.
        log_every: Optimiser steps between two points in the monitor.
        max_batches: Batches of each pass over a loader; None takes all.
    """

    epochs: int
    select: str
    accumulation: int = 1
    clip_norm: float | None = None
    patience: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: int = 10
    max_batches: int | None = None


@dataclass
class FitResult:
    """What fit() did: the best epoch (from 1), its last step and its val metrics; epochs, steps and seconds of all."""

    best_epoch: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0


def fit(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    *,
    losses: Losses,
    evaluator: Evaluator,
    optimizer: Optimizer,
    schedule: LRScheduler,
    settings: FitSettings,
    checkpoints: Checkpoints,
    monitor: Monitor,
    average: MovingAverage | None = None,
    watches: Sequence[RowWatch] = (),
    on_best: Callable[[dict[str, float]], object] = lambda values: None,
    on_epoch: Callable[[int, int], object] = lambda epoch, step: None,
) -> FitResult:
    """Train, evaluate on val after each epoch, keep the last and the best; the model ends with the weights of the best.

    Args:
        model: On the device that the batches are moved to.
        train_loader: Batches of train, in a new order each epoch.
        val_loader: Batches of val; they choose.
        losses: (model, images, targets) -> scalars by name, means over the batch; their sum trains. Where the mean is
            over something else than pictures, such as boxes, accumulated batches are not quite one large batch.
        evaluator: The evaluation on val.
        optimizer: Steps the tuned parameters.
        schedule: Advanced once an optimiser step.
        settings: Numbers of the loop.
        checkpoints: Where `last` and `best` go.
        monitor: Where numbers go.
        average: Moving average of the tuned parameters; when given, val sees it and `best` holds it.
        watches: Parameters whose rows are logged.
        on_best: Called with the val metrics at each new best epoch, while the model has the weights of it.
        on_epoch: Called with epoch (from 1) and step after each evaluation on val.

    Raises:
        FloatingPointError: The loss is not finite; nothing of that epoch is saved.
    """
    stepper = _Stepper(model, losses, optimizer, schedule, settings, monitor, average, watches)
    result, start = FitResult(), time.monotonic()
    for epoch in range(1, settings.epochs + 1):
        result.epochs, result.steps = epoch, stepper.run_epoch(train_loader, epoch)
        with average.swapped_in() if average else contextlib.nullcontext():
            values = evaluate(
                model, val_loader, evaluator, precision=settings.precision, max_batches=settings.max_batches
            )
            is_best = not result.best or _rank(values, settings.select) > _rank(result.best, settings.select)
            if is_best:
                result.best_epoch, result.best_step, result.best = epoch, result.steps, values
                checkpoints.save("best", {"epoch": epoch, "step": result.steps, "metrics": {"val": values}})
                on_best(values)
        checkpoints.save("last", {"epoch": epoch, "step": result.steps})
        monitor.scalars({f"val/{name}": value for name, value in values.items()}, result.steps)
        on_epoch(epoch, result.steps)
        loss = f"loss {values['loss']:.4f}, " if "loss" in values else ""
        line = f"val {loss}{settings.select} {percent(values[settings.select])}"
        print(f"epoch {epoch}/{settings.epochs}: {line}{' *' if is_best else ''}", flush=True)
        if settings.patience is not None and epoch - result.best_epoch >= settings.patience:
            print(f"no better val {settings.select} for {settings.patience} epochs: stopping")
            break
    checkpoints.restore("best")
    result.seconds = time.monotonic() - start
    return result


def evaluate(
    model: nn.Module,
    loader: Loader,
    evaluator: Evaluator,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    max_batches: int | None = None,
    description: str | None = None,
) -> dict[str, float]:
    """Metrics of a model over all batches of a loader, in eval mode and without gradients.

    Args:
        model: Computes what the evaluator asks of it.
        loader: Batches, in a fixed order.
        evaluator: Is reset first.
        precision: "bf16" computes the forward pass under autocast.
        max_batches: Batches to take; None takes all.
        description: Shows progress under this name; None shows none.
    """
    device = next(model.parameters()).device
    evaluator.reset()
    model.eval()
    batches = itertools.islice(loader, max_batches)
    shown = (
        contextlib.nullcontext() if description is None else Progress(_num_batches(loader, max_batches), description)
    )
    with torch.inference_mode(), autocast(device, precision), shown as progress:
        for images, targets in batches:
            evaluator.update(model, *_move((images, targets), device))
            if progress is not None:
                progress.advance(len(images))
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
    images, targets = _move(batch, device)
    for step in range(1, max_steps + 1):
        model.train()
        loss = _total(losses(model, images, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % OVERFIT_EVERY == 0 or step == max_steps:
            reached = evaluate(model, [batch], evaluator)[select]  # type: ignore[arg-type]  # a list is a loader, too
            print(f"step {step}: loss {loss.item():.4f}, {select} {percent(reached)}", flush=True)
            if reached >= goal:
                return step
    return None


class _Stepper:
    """Optimiser steps over one epoch after another."""

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        optimizer: Optimizer,
        schedule: LRScheduler,
        settings: FitSettings,
        monitor: Monitor,
        average: MovingAverage | None,
        watches: Sequence[RowWatch],
    ) -> None:
        self.model, self.losses, self.optimizer, self.schedule = model, losses, optimizer, schedule
        self.settings, self.monitor, self.average, self.watches = settings, monitor, average, watches
        self.device = next(model.parameters()).device
        self.tuned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.num_steps = 0

    def run_epoch(self, loader: Loader, epoch: int) -> int:
        """Train on all batches; return the optimiser steps so far."""
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        self.model.train()
        num_batches, pace = _num_batches(loader, self.settings.max_batches), _Pace()
        with Progress(total=num_batches, description=f"epoch {epoch}/{self.settings.epochs}") as progress:
            batches = pace.timed(itertools.islice(loader, num_batches))
            for group in _groups(batches, self.settings.accumulation):
                losses = self._backward(group, progress)
                rates = self._rates()
                logged = self._step()
                pace.num_images += sum(len(images) for images, _ in group)
                if logged:
                    self._check_finite(losses["train/loss"], epoch, rates)
                    self.monitor.scalars({**losses, **rates, **pace.measured(), **logged}, self.num_steps)
        self._check_finite(losses["train/loss"], epoch, rates)
        return self.num_steps

    def _backward(self, group: Sequence[Batch], progress: Progress) -> dict[str, Tensor]:
        """Gradients of the mean loss of the group's batches, weighed by pictures; it and its parts if several."""
        num_images = sum(len(images) for images, _ in group)
        sums: dict[str, Tensor] = {}
        for batch in group:
            images, targets = _move(batch, self.device)
            with autocast(self.device, self.settings.precision):
                losses = self.losses(self.model, images, targets)
            share = len(images) / num_images
            _total(losses).mul(share).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() * share
            total = _total(sums)
            progress.advance(len(images), loss=total)
        parts = {f"train/{name}_loss": loss for name, loss in sums.items()} if len(sums) > 1 else {}
        return {"train/loss": total, **parts}

    def _step(self) -> dict[str, SupportsFloat]:
        """Clip and step; returns the gradient's norm and what the watches saw, if this step is to be logged."""
        is_logged = self.num_steps == 0 or (self.num_steps + 1) % self.settings.log_every == 0
        norm = nn.utils.clip_grad_norm_(self.tuned, self.settings.clip_norm or float("inf"))
        for watch in self.watches if is_logged else ():
            watch.before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.num_steps += 1
        if self.average is not None:
            self.average.update()
        rows = {tag: value for watch in self.watches for tag, value in watch.after_step().items()} if is_logged else {}
        return {"train/grad_norm": norm, **rows} if is_logged else {}

    def _rates(self) -> dict[str, float]:
        groups = self.optimizer.param_groups
        return {f"lr/{group['name'].removesuffix('_bias')}": group["lr"] for group in groups}

    def _check_finite(self, loss: Tensor, epoch: int, rates: Mapping[str, float]) -> None:
        if not bool(torch.isfinite(loss)):
            described = ", ".join(f"{name} {value:.2g}" for name, value in rates.items())
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.num_steps}, epoch {epoch} ({described}); "
                "lower optim.prompt_lr, optim.head_lr or tuning.lr, or check the data"
            )


class _Pace:
    """Images a second and the fraction of time spent waiting for data, since it was last asked."""

    def __init__(self) -> None:
        self._restart()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time between asking and getting counted as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            self.waited_s += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def measured(self) -> dict[str, float]:
        """`perf/` and `memory/` values; starts the next measurement."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        values = {
            "perf/images_per_s": self.num_images / seconds,
            "perf/data_wait_fraction": min(1.0, self.waited_s / seconds),
            "memory/peak_mib": _peak_memory_mib(),
        }
        self._restart()
        return values

    def _restart(self) -> None:
        self.start, self.waited_s, self.num_images = time.monotonic(), 0.0, 0


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _rank(values: dict[str, float], select: str) -> tuple[float, float]:
    loss = values.get("loss", math.nan)
    return tuple(-math.inf if math.isnan(value) else value for value in (values[select], -loss))  # type: ignore[return-value]


def _total(losses: Mapping[str, Tensor]) -> Any:  # torch does not type backward()
    return torch.stack(list(losses.values())).sum()


def _move(value: Any, device: torch.device) -> Any:
    """Tensors on the device, in tuples, lists and dicts as they were."""
    match value:
        case Tensor():
            return value.to(device, non_blocking=True)
        case dict():
            return {key: _move(part, device) for key, part in value.items()}
        case tuple() | list():
            return type(value)(_move(part, device) for part in value)
    return value


def _num_batches(loader: Loader, max_batches: int | None) -> int:
    return len(loader) if max_batches is None else min(len(loader), max_batches)


def autocast(device: torch.device, precision: str) -> Any:
    """The context of a forward pass: bfloat16 where that is exact enough, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _peak_memory_mib() -> float:
    """Peak allocated memory of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

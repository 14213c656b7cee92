"""Optimiser steps over the batches of an epoch, and what can end one: numbers that are not finite, memory, signals."""

import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, SupportsFloat

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpt.engine.checkpoint import Checkpoints
from vpt.engine.console import Progress, warn
from vpt.engine.monitor import Monitor
from vpt.engine.signals import StopSignal
from vpt.engine.state import RunState
from vpt.engine.watch import RowWatch

MAX_NAMES = 8  # of images in an error

Batch = tuple[Tensor, Any]  # images (B, ...), and targets in the form of the task type
Loader = DataLoader[Any]  # of batches
Losses = Callable[[nn.Module, Tensor, Any], Mapping[str, Tensor]]  # (model, images, targets) -> means over the batch
NamesOf = Callable[[int, int, int], Sequence[str]]  # (epoch, first batch, end) -> names of the images in batches


class OutOfMemoryError(RuntimeError):
    """A batch does not fit into memory."""


class Evaluator(Protocol):
    """Runs a model on the batches of a split and accumulates its metrics."""

    def reset(self) -> None:
        """Clear what was accumulated."""

    def update(self, model: nn.Module, images: Tensor, targets: Any) -> None:
        """Run the model on a batch and add its outputs."""

    def compute(self) -> dict[str, float]:
        """Metrics of all batches; with "loss" where the model has one in evaluation."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of the training loop.

    Args:
        epochs: Passes over train.
        select: The val metric that chooses the best epoch. Higher is better, but for "loss"; nan is the worst; the
            lower loss breaks ties.
        accumulation: Batches in an optimiser step.
        clip_norm: Largest norm of the gradient of all tuned parameters; None does not clip.
        patience: Epochs without a better val metric before training stops; None never stops.
        precision: "bf16" computes the forward pass under autocast.
        log_every: Optimiser steps between two logged points.
        max_batches: Batches of each pass over a loader; None takes all.
        skip_nonfinite: Steps that may be skipped because their loss or gradient is not finite; one more is an error.
        auto_batch: Compute batches in parts, halved until they fit into memory.
        save_every_s: Seconds between two checkpoints inside of an epoch.
    """

    epochs: int
    select: str
    accumulation: int = 1
    clip_norm: float | None = None
    patience: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: int = 10
    max_batches: int | None = None
    skip_nonfinite: int = 0
    auto_batch: bool = False
    save_every_s: float = math.inf


@dataclass(frozen=True)
class FitData:
    """What a model is trained and evaluated on; `names_of` are the images in batches of train, for errors.

    If the sampler of train has `set_epoch(epoch, num_done)`, that is called before each epoch with the number of
    samples that are done. The sum of the losses trains. Where their mean is over something else than images, such as
    boxes, accumulated batches do not equal one large batch exactly.
    """

    train_loader: Loader
    val_loader: Loader
    losses: Losses
    evaluator: Evaluator
    names_of: NamesOf = lambda epoch, first, end: ()


@dataclass(frozen=True)
class Callbacks:
    """Where a run writes, what may stop it, by default nothing, and functions that it calls.

    `on_best` gets the val metrics at each new best epoch, while the model has its weights; `on_epoch` gets epoch (from
    1) and step after each evaluation on val. The rows of `watches` are logged.
    """

    monitor: Monitor
    checkpoints: Checkpoints
    stop: StopSignal = field(default_factory=StopSignal)
    watches: Sequence[RowWatch] = ()
    on_best: Callable[[dict[str, float]], object] = lambda values: None
    on_epoch: Callable[[int, int], object] = lambda epoch, step: None


class Stepper:
    """Optimiser steps over one epoch after another; `state` is whole whenever a signal or an error ends them."""

    def __init__(
        self, model: nn.Module, data: FitData, state: RunState, settings: FitSettings, callbacks: Callbacks
    ) -> None:
        self.model, self.data, self.state, self.settings, self.callbacks = model, data, state, settings, callbacks
        self.device = next(model.parameters()).device
        self.tuned = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]

    def run_epoch(self, save: Callable[[], object]) -> None:
        """Train on the batches of the epoch that are not done yet; `save` is called between steps, when it is time."""
        state, settings, callbacks = self.state, self.settings, self.callbacks
        self.model.train()
        batches = Batches(self.data.train_loader, state.epoch, state.batch, settings, callbacks.stop)
        saved = time.monotonic()
        with Progress(total=batches.num_batches, description=f"epoch {state.epoch}/{settings.epochs}") as progress:
            progress.skip(state.batch)
            for group in batches:
                losses, rates = self._backward(group), self._rates()
                norm = self._clip(losses["train/loss"], group, rates)
                with state.changing():  # what an error leaves inside of it cannot be resumed from
                    logged = self._step(norm)
                    state.batch += len(group)
                for images, _ in group:
                    progress.advance(len(images), loss=losses["train/loss"])
                if logged:
                    callbacks.monitor.scalars({**losses, **rates, **batches.measure(), **logged}, state.result.steps)
                if time.monotonic() - saved >= settings.save_every_s:
                    save()
                    saved = time.monotonic()
                callbacks.stop.check()

    def _backward(self, group: Sequence[Batch]) -> dict[str, Tensor]:
        """Gradients of the mean loss of the group's batches; in smaller parts if they do not fit into memory."""
        state, largest = self.state, max(len(images) for images, _ in group)
        while True:
            try:
                return self._backward_in_parts(group)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self.settings.auto_batch or state.num_parts >= largest:
                    reason = (str(error) or type(error).__name__).splitlines()[0]
                    raise OutOfMemoryError(
                        f"out of memory at step {state.result.steps + 1}, with batches of {largest} in "
                        f"{state.num_parts} parts ({reason})"
                    ) from error
            state.num_parts *= 2
            warn(f"out of memory: batches of {largest} are computed in {state.num_parts} parts from here on")
            state.optimizer.zero_grad()
            state.restore_random()  # the same dropout again
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward_in_parts(self, group: Sequence[Batch]) -> dict[str, Tensor]:
        """Gradients of the mean loss over images; the loss, and the losses that it sums if there are several."""
        num_images = sum(len(images) for images, _ in group)
        sums: dict[str, Tensor] = {}
        for batch in group:
            for part in _split(batch, self.state.num_parts):
                self.callbacks.stop.check()
                images, targets = move(part, self.device)
                with autocast(self.device, self.settings.precision):
                    losses = self.data.losses(self.model, images, targets)
                # A part counts by its number of images, so that each image counts alike however the group is split.
                share = len(images) / num_images
                total_of(losses).mul(share).backward()
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + loss.detach() * share
        parts = {f"train/{name}_loss": loss for name, loss in sums.items()} if len(sums) > 1 else {}
        return {"train/loss": total_of(sums), **parts}

    def _rates(self) -> dict[str, float]:
        """The learning rate of each part that trains."""
        groups = self.state.optimizer.param_groups
        return {f"lr/{group['name'].removesuffix('_bias')}": group["lr"] for group in groups}

    def _clip(self, loss: Tensor, group: Sequence[Batch], rates: Mapping[str, float]) -> Tensor:
        """Clip the gradient and return its norm before; drop it, within `skip_nonfinite`, where it is not finite.

        Without gradients the optimiser changes nothing.
        """
        # With an infinite limit nothing is clipped, but the norm is still needed: for the log and the check below.
        norm: Tensor = nn.utils.clip_grad_norm_(self.tuned, self.settings.clip_norm or math.inf)
        if bool(torch.isfinite(loss) & torch.isfinite(norm)):
            return norm
        state, allowed = self.state, self.settings.skip_nonfinite
        state.optimizer.zero_grad()
        what = f"the loss is {loss.item()}" if not torch.isfinite(loss) else f"the gradient's norm is {norm.item()}"
        described = ", ".join(f"{name} {value:.2g}" for name, value in rates.items())
        where = f"{what} at step {state.result.steps + 1}, epoch {state.epoch} ({described}), images "
        where += self._describe_images(group)
        if state.num_skipped >= allowed:
            raise FloatingPointError(f"{where}; no more such steps are skipped: skip_nonfinite={allowed}")
        state.num_skipped += 1
        warn(f"{where}; the step is skipped ({state.num_skipped} of at most {allowed})")
        return norm

    def _step(self, norm: Tensor) -> dict[str, SupportsFloat]:
        """Update the parameters; return the gradient's norm and the watched rows if this step is to be logged."""
        state, num_steps, watches = self.state, self.state.result.steps, self.callbacks.watches
        is_logged = num_steps == 0 or (num_steps + 1) % self.settings.log_every == 0
        for watch in watches if is_logged else ():
            watch.before_step()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.schedule.step()
        state.result.steps += 1
        if state.average is not None:
            state.average.update()
        rows = {tag: value for watch in watches for tag, value in watch.after_step().items()} if is_logged else {}
        return {"train/grad_norm": norm, **rows} if is_logged else {}

    def _describe_images(self, group: Sequence[Batch]) -> str:
        """Names of the images of a step: those that are not finite themselves, or else all."""
        names = self.data.names_of(self.state.epoch, self.state.batch, self.state.batch + len(group))
        is_odd = [not bool(torch.isfinite(image).all()) for images, _ in group for image in images]
        if any(is_odd) and len(names) == len(is_odd):
            names = [f"{name} (not finite itself)" for name, odd in zip(names, is_odd, strict=True) if odd]
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        return ", ".join(names[:MAX_NAMES]) + more or "without names"


class Batches:
    """The batches of an epoch that are not done yet, in groups for an optimiser step each.

    A signal ends the wait for a batch, however long that would be. `epoch` counts from 1.
    """

    def __init__(self, loader: Loader, epoch: int, num_done: int, settings: FitSettings, stop: StopSignal) -> None:
        self.loader, self.epoch, self.num_done, self.stop = loader, epoch, num_done, stop
        self.group_size, self.num_batches = settings.accumulation, num_batches_of(loader, settings.max_batches)
        self._restart()

    def __iter__(self) -> Iterator[list[Batch]]:
        loader: Any = self.loader
        if hasattr(loader.sampler, "set_epoch"):  # it skips samples before they are loaded
            loader.sampler.set_epoch(self.epoch, self.num_done * (loader.batch_size or 1))
            batches = itertools.islice(loader, self.num_batches - self.num_done)
        else:
            batches = itertools.islice(loader, self.num_done, self.num_batches)
        # `iter` with a sentinel calls `_next` until it returns None, the end of the loader.
        waited_for = iter(lambda: self._next(batches), None)
        while group := list(itertools.islice(waited_for, self.group_size)):
            yield group

    def measure(self) -> dict[str, float]:
        """`perf/` and `memory/` values since the last call."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        values = {
            "perf/images_per_s": self._num_images / seconds,
            "perf/data_wait_fraction": min(1.0, self._waited_s / seconds),
            "memory/peak_mib": _peak_memory_mib(),
        }
        self._restart()
        return values

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        asked = time.monotonic()
        with self.stop.interruptible():
            batch = next(batches, None)
        self._waited_s += time.monotonic() - asked
        self._num_images += 0 if batch is None else len(batch[0])
        return batch

    def _restart(self) -> None:
        self._start, self._waited_s, self._num_images = time.monotonic(), 0.0, 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory; torch has no class of its own for that on a CPU."""
    text = str(error)
    is_cpu = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_cpu


def _split(batch: Batch, num_parts: int) -> Iterator[Batch]:
    """A batch in parts of equal size but the last; targets are a tensor or a list."""
    images, targets = batch
    size = math.ceil(len(images) / num_parts)
    for start in range(0, len(images), size):
        yield batch if size >= len(images) else (images[start : start + size], targets[start : start + size])


def total_of(losses: Mapping[str, Tensor]) -> Any:  # torch does not type backward()
    """The sum of losses, which trains."""
    return torch.stack(list(losses.values())).sum()


def move(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested tuples, lists and dicts to a device."""
    match value:
        case Tensor():
            return value.to(device, non_blocking=True)
        case dict():
            return {key: move(part, device) for key, part in value.items()}
        case tuple() | list():
            return type(value)(move(part, device) for part in value)
    return value


def num_batches_of(loader: Loader, max_batches: int | None) -> int:
    """Batches of a pass over a loader."""
    return len(loader) if max_batches is None else min(len(loader), max_batches)


def autocast(device: torch.device, precision: str) -> Any:
    """The context of a forward pass: bfloat16 for "bf16", otherwise nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _peak_memory_mib() -> float:
    """Peak allocated memory of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

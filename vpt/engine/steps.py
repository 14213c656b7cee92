"""Optimiser steps over the batches of an epoch, and what can go wrong in one: numbers, memory, time."""

import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpt.engine.console import Progress, warn
from vpt.engine.monitor import Monitor
from vpt.engine.signals import StopSignal
from vpt.engine.state import RunState
from vpt.engine.watch import RowWatch

MAX_NAMES = 8  # of pictures in an error

Batch = tuple[Tensor, Any]  # images (B, ...), and targets as the kind of task has them
Loader = DataLoader[Any]  # its batches are Batch, whatever its data set gives
Losses = Callable[[nn.Module, Tensor, Any], Mapping[str, Tensor]]  # (model, images, targets) -> means over the batch
NamesOf = Callable[[int, int, int], Sequence[str]]  # (epoch, first batch, behind the last one) -> names of pictures


class OutOfMemoryError(RuntimeError):
    """A step needs more memory than there is; the message says what to change."""


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
        skip_nonfinite: Steps that are left out as their loss or gradient is not finite; one more stops the run.
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


class Stepper:
    """Optimiser steps over one epoch after another; `state` is whole whenever a signal or an error ends them.

    Args:
        model: On the device that the batches are moved to.
        state: Is moved on with each step.
        losses: What trains the model.
        settings: Numbers of the loop.
        monitor: Where numbers go.
        watches: Parameters whose rows are logged.
        stop: Is asked after each batch.
        save: Called between two steps, when it is time.
        names_of: Pictures of batches, for errors.
    """

    def __init__(
        self,
        model: nn.Module,
        state: RunState,
        *,
        losses: Losses,
        settings: FitSettings,
        monitor: Monitor,
        watches: Sequence[RowWatch],
        stop: StopSignal,
        save: Callable[[], object],
        names_of: NamesOf,
    ) -> None:
        self.model, self.state, self.losses, self.settings = model, state, losses, settings
        self.monitor, self.watches, self.stop, self.save, self.names_of = monitor, watches, stop, save, names_of
        self.device = next(model.parameters()).device
        self.tuned = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]

    def run_epoch(self, loader: Loader) -> None:
        """Train on the batches of the epoch that are not done yet."""
        state, settings = self.state, self.settings
        self.model.train()
        num_batches, pace, saved = num_batches_of(loader, settings.max_batches), _Pace(), time.monotonic()
        with Progress(total=num_batches, description=f"epoch {state.epoch}/{settings.epochs}") as progress:
            progress.skip(state.batch)
            batches = pace.timed(self._interruptible(_rest(loader, state.epoch, state.batch, num_batches)))
            for group in _groups(batches, settings.accumulation):
                losses, rates = self._backward(group), self._rates()
                norm = self._clip(losses["train/loss"], group, rates)
                with state.moving():
                    logged = self._step(norm)
                    state.batch += len(group)
                for images, _ in group:
                    progress.advance(len(images), loss=losses["train/loss"])
                    pace.num_images += len(images)
                if logged:
                    self.monitor.scalars({**losses, **rates, **pace.measured(), **logged}, state.result.steps)
                if time.monotonic() - saved >= settings.save_every_s:
                    self.save()
                    saved = time.monotonic()
                self.stop.check()

    def _interruptible(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; a signal ends the wait for one, however long it would have been."""
        iterator = iter(batches)
        while True:
            with self.stop.patient(False):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

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
                    raise OutOfMemoryError(_less_memory(error, largest, state, self.settings)) from error
            state.num_parts *= 2
            warn(f"out of memory: batches of {largest} are computed in {state.num_parts} parts from here on")
            state.optimizer.zero_grad()
            state.restore_random()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward_in_parts(self, group: Sequence[Batch]) -> dict[str, Tensor]:
        """Gradients of the mean loss, weighed by pictures; it, and its parts by name if it has several."""
        num_images = sum(len(images) for images, _ in group)
        sums: dict[str, Tensor] = {}
        for batch in group:
            for part in _split(batch, self.state.num_parts):
                self.stop.check()
                images, targets = move(part, self.device)
                with autocast(self.device, self.settings.precision):
                    losses = self.losses(self.model, images, targets)
                share = len(images) / num_images
                total_of(losses).mul(share).backward()
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + loss.detach() * share
        parts = {f"train/{name}_loss": loss for name, loss in sums.items()} if len(sums) > 1 else {}
        return {"train/loss": total_of(sums), **parts}

    def _clip(self, loss: Tensor, group: Sequence[Batch], rates: Mapping[str, float]) -> Tensor:
        """Clip the gradient, or drop it where a step would ruin the parameters; returns its norm before."""
        norm: Tensor = nn.utils.clip_grad_norm_(self.tuned, self.settings.clip_norm or math.inf)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self._drop(loss, norm, group, rates)
        return norm

    def _step(self, norm: Tensor) -> dict[str, SupportsFloat]:
        """Step; returns the gradient's norm and what the watches saw, if this step is to be logged."""
        state, num_steps = self.state, self.state.result.steps
        is_logged = num_steps == 0 or (num_steps + 1) % self.settings.log_every == 0
        for watch in self.watches if is_logged else ():
            watch.before_step()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.schedule.step()
        state.result.steps += 1
        if state.average is not None:
            state.average.update()
        rows = {tag: value for watch in self.watches for tag, value in watch.after_step().items()} if is_logged else {}
        return {"train/grad_norm": norm, **rows} if is_logged else {}

    def _drop(self, loss: Tensor, norm: Tensor, group: Sequence[Batch], rates: Mapping[str, float]) -> None:
        """Without gradients the optimiser leaves all as it is; or stop, if that has happened too often."""
        state = self.state
        state.optimizer.zero_grad()
        what = f"the loss is {loss.item()}" if not torch.isfinite(loss) else f"the gradient's norm is {norm.item()}"
        described = ", ".join(f"{name} {value:.2g}" for name, value in rates.items())
        where = f"{what} at step {state.result.steps + 1}, epoch {state.epoch} ({described}), pictures "
        where += self._describe_pictures(group)
        if state.num_skipped >= self.settings.skip_nonfinite:
            raise FloatingPointError(
                f"{where}; lower optim.prompt_lr, optim.head_lr or tuning.lr (and add fresh=true), look at these "
                f"pictures, or leave such steps out: train.skip_nonfinite={state.num_skipped + 10}"
            )
        state.num_skipped += 1
        warn(f"{where}; the step is left out ({state.num_skipped} of at most {self.settings.skip_nonfinite})")

    def _describe_pictures(self, group: Sequence[Batch]) -> str:
        """Names of the pictures of a step: those that are not finite themselves, or else all."""
        names = self.names_of(self.state.epoch, self.state.batch, self.state.batch + len(group))
        is_odd = [not bool(torch.isfinite(image).all()) for images, _ in group for image in images]
        if any(is_odd) and len(names) == len(is_odd):
            names = [f"{name} (not finite itself)" for name, odd in zip(names, is_odd, strict=True) if odd]
        return _shortened(names)

    def _rates(self) -> dict[str, float]:
        groups = self.state.optimizer.param_groups
        return {f"lr/{group['name'].removesuffix('_bias')}": group["lr"] for group in groups}


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left; torch has no class of its own for that on a CPU."""
    text = str(error)
    is_cpu = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_cpu


@contextmanager
def memory_errors(num_images: int) -> Iterator[None]:
    """A context in which a batch is only looked at: without memory for it, say what to type."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        halved = max(1, num_images // 2)
        advice = f"type batch_size={halved} (train.batch_size={halved} in training)"
        raise OutOfMemoryError(f"out of memory with a batch of {num_images}; {advice}") from error


def _less_memory(error: BaseException, num_images: int, state: RunState, settings: FitSettings) -> str:
    halved, first = max(1, num_images // 2), str(error).splitlines()[0] if str(error) else type(error).__name__
    accumulation = settings.accumulation * (2 if num_images > 1 else 1)
    return (
        f"out of memory at step {state.result.steps + 1}, with batches of {num_images} in {state.num_parts} parts "
        f"({first}); type auto_batch=true, or train.batch_size={halved} train.accumulation={accumulation}, or "
        "grad_checkpointing=true, or a smaller backbone.img_size"
    )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more or "without names"


def _rest(loader: Loader, epoch: int, num_done: int, num_batches: int) -> Iterable[Batch]:
    """The batches of an epoch behind those that are done."""
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch, num_done * (loader.batch_size or 1))
        return itertools.islice(loader, num_batches - num_done)
    return itertools.islice(loader, num_done, num_batches)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _split(batch: Batch, num_parts: int) -> Iterator[Batch]:
    """A batch in parts, the first ones the larger ones; targets are a tensor or a list."""
    images, targets = batch
    size = math.ceil(len(images) / num_parts)
    for start in range(0, len(images), size):
        is_whole = size >= len(images)
        yield batch if is_whole else (images[start : start + size], targets[start : start + size])


def total_of(losses: Mapping[str, Tensor]) -> Any:  # torch does not type backward()
    """The sum of losses, which trains."""
    return torch.stack(list(losses.values())).sum()


def move(value: Any, device: torch.device) -> Any:
    """Tensors on the device, in tuples, lists and dicts as they were."""
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
    """The context of a forward pass: bfloat16 where that is exact enough, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _peak_memory_mib() -> float:
    """Peak allocated memory of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

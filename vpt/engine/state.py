"""Training state stored in a checkpoint: a run that resumes from it continues bit for bit."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vpt.engine.optim import MovingAverage


@dataclass
class FitResult:
    """Result of fit(): the best epoch (from 1), its last step and its val metrics; total epochs, steps and seconds.

    `extended_after` are the epochs after which the schedule of the learning rates began anew.
    """

    best_epoch: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    extended_after: list[int] = field(default_factory=list)


class RunState:
    """The state of a run between two optimiser steps: all that decides the result of the next one.

    `epoch`, from 1, is the current one, `batch` its batches that are done, `num_parts` the parts that each batch is
    computed in, to fit into memory, `num_skipped` the steps that were skipped because their loss or gradient was not
    finite, `result` that of the epochs that are done; `is_whole` tells whether the state may be saved.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        schedule: LRScheduler,
        average: MovingAverage | None,
    ) -> None:
        self.parameters, self.optimizer, self.schedule, self.average = dict(parameters), optimizer, schedule, average
        self.epoch, self.batch, self.num_parts, self.num_skipped = 1, 0, 1, 0
        self.result = FitResult()
        self._best: dict[str, Tensor] = {}
        self.device = next(iter(self.parameters.values())).device
        self.is_whole = True
        self._copy_random()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A context in which the state changes; if an error leaves it, the state is not whole and must not be saved."""
        self.is_whole = False
        yield
        self._copy_random()
        self.is_whole = True

    def _copy_random(self) -> None:
        # The next step starts from it, also where it is repeated after a lack of memory.
        self._random = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            self._random[self.device.type] = torch.get_device_module(self.device).get_rng_state()

    def restore_random(self) -> None:
        """Set torch's random generators to their state before the current step."""
        torch.set_rng_state(self._random["cpu"])
        if self.device.type in self._random and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(self._random[self.device.type])

    def extend(self, schedule: LRScheduler) -> None:
        """Begin a new schedule of the learning rates after the epochs that are done."""
        self.schedule = schedule
        self.result.extended_after.append(self.result.epochs)

    def save_best(self, values: dict[str, float]) -> None:
        """Copy the current parameters as those of the best epoch, with its val metrics."""
        self._best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}
        self.result.best_epoch, self.result.best_step, self.result.best = self.epoch, self.result.steps, values

    def restore_best(self) -> None:
        """Load the best parameters into the model."""
        _copy(self._best, self.parameters)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by names such as "tuned/head.weight" and "optimizer/0/exp_avg"."""
        average = {} if self.average is None else self.average.average
        steps = self.optimizer.state_dict()["state"]
        return {
            **{f"tuned/{name}": parameter.detach() for name, parameter in self.parameters.items()},
            **{f"best/{name}": tensor for name, tensor in self._best.items()},
            **{f"average/{name}": tensor for name, tensor in average.items()},
            **{f"random/{name}": tensor for name, tensor in self._random.items()},
            **{
                f"optimizer/{index}/{name}": value
                for index, values in steps.items()
                for name, value in values.items()
                if isinstance(value, Tensor)
            },
        }

    def numbers(self) -> dict[str, Any]:
        """All else, as JSON values."""
        return {
            **{"epoch": self.epoch, "batch": self.batch, "num_parts": self.num_parts, "num_skipped": self.num_skipped},
            "result": asdict(self.result),
            "schedule": self.schedule.state_dict(),
            "groups": self.optimizer.state_dict()["param_groups"],
            "num_updates": None if self.average is None else self.average.num_updates,
        }

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Load what `tensors` and `numbers` returned; ValueError if they are of a run that tunes other parameters."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        shapes = {name: tensor.shape for name, tensor in parts["tuned"].items()}
        expected = {name: parameter.shape for name, parameter in self.parameters.items()}
        if shapes != expected or ("average" in parts) != (self.average is not None):
            names = (name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name))
            raise ValueError(f"holds the state of a run that tunes other parameters ({next(names, 'its average')})")
        _copy(parts["tuned"], self.parameters)
        self._best = parts.get("best", {})
        self._random = parts["random"]
        if self.average is not None:
            _copy(parts["average"], self.average.average)
            self.average.num_updates = numbers["num_updates"]
        steps: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            steps.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": steps, "param_groups": numbers["groups"]})
        self.schedule.load_state_dict(numbers["schedule"])
        self.epoch, self.batch = numbers["epoch"], numbers["batch"]
        self.num_parts, self.num_skipped = numbers["num_parts"], numbers["num_skipped"]
        self.result = FitResult(**numbers["result"])
        self.result.best = {name: math.nan if value is None else value for name, value in self.result.best.items()}
        self.restore_random()


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])

"""Optimisers with a group for each part that trains, the learning-rate schedule and the moving average."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["adamw", "sgd"]


def make_optimizer(
    name: OptimizerName,
    parts: Mapping[str, tuple[Iterable[nn.Parameter], float]],
    *,
    weight_decay: float,
    momentum: float,
) -> Optimizer:
    """Make an optimiser with a named group, `group["name"]`, for each part; ValueError if none has parameters.

    `parts` are parameters and learning rates, such as {"prompt": (..., 1e-2), "head": (..., 1e-3)}; parts without
    parameters are left out. Vectors, which are biases, have no weight decay. The momentum is that of SGD.
    """
    groups = []
    for part, (parameters, lr) in parts.items():
        parameters = list(parameters)
        for suffix, members, decay in (
            ("", [p for p in parameters if p.ndim > 1], weight_decay),
            ("_bias", [p for p in parameters if p.ndim <= 1], 0.0),
        ):
            if members:
                groups.append({"name": part + suffix, "params": members, "lr": lr, "weight_decay": decay})
    if not groups:
        raise ValueError("parts: none has parameters, nothing would train")
    if name not in get_args(OptimizerName):
        raise ValueError(f"name={name!r}: must be one of {', '.join(get_args(OptimizerName))}")
    return AdamW(groups) if name == "adamw" else SGD(groups, momentum=momentum)


def warmup_cosine(optimizer: Optimizer, *, num_steps: int, num_warmup_steps: int) -> LambdaLR:
    """Linear warm-up, then a cosine to zero, advanced once a step.

    Step s of w warm-up steps trains at (s + 1) / w of the learning rate, so that the first step is not at zero (in the
    code of the VPT paper the whole first epoch is). Later steps train at (1 + cos(pi * t)) / 2 for t from 0 to 1.
    """
    warmup = min(num_warmup_steps, max(0, num_steps - 1))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))

    return LambdaLR(optimizer, factor)


class MovingAverage:
    """Exponential moving average of parameters; the decay at update s is min(decay, (1 + s) / (10 + s)).

    Example:
        >>> parameter = nn.Parameter(torch.zeros(1))
        >>> average = MovingAverage({"w": parameter}, decay=0.9)
        >>> parameter.data += 1.0
        >>> average.update()
        >>> with average.swapped_in():
        ...     print(f"{parameter.item():.2f}")
        0.90
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.num_updates = dict(parameters), decay, 0
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current parameters."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A context in which the parameters have their averaged values."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self._assign(self.average)
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

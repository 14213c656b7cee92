"""Measurement of a model's cost: FLOPs, memory saved for the backward pass, peak CUDA memory and comparable times."""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

Function = Callable[[], object]


def inference(model: nn.Module, inputs: Tensor) -> Function:
    """Return a function that runs the model without gradients, in its current mode."""

    def run() -> None:
        with torch.inference_mode():
            model(inputs)

    return run


def training_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes the cross-entropy of logits (B, K) and targets (B,)."""
    return lambda: F.cross_entropy(model(inputs).float(), targets)


def training_step(model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: Optimizer) -> Function:
    """Return a function that runs a training step: forward, backward, optimiser."""
    loss = training_loss(model, inputs, targets)

    def run() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def count_flops(function: Function) -> int:
    """Count the FLOPs of matrix products, convolutions and attention in a call, two per multiply-add.

    Element-wise operations are not counted. A compiled function hides its products; count the uncompiled one.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def check_attention_is_counted(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if torch does not count the FLOPs of a device's attention, forward and backward."""
    tokens, width = 16, 64
    part = torch.randn(1, 1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    product = 2 * tokens * tokens * width
    attended: list[Tensor] = []
    forward = count_flops(lambda: attended.append(F.scaled_dot_product_attention(part, part, part)))
    backward = count_flops(lambda: attended[0].sum().backward())  # type: ignore[no-untyped-call]
    if forward != 2 * product or backward < 4 * product:  # 5 products in flash kernels, which recompute the weights
        raise ValueError(f"device={device.type}: torch {torch.__version__} does not count the FLOPs of its attention")


def count_saved_bytes(function: Function, held: Iterable[Tensor]) -> int:
    """Count the bytes that autograd saves for the backward pass while a function computes a loss.

    The total of all storages with saved tensors, each counted whole and once, but for parameters and buffers in `held`,
    which are in memory anyway, and their views.
    """
    known = _storages(held)
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(_storages([tensor]))  # held until the end, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for address, storage in saved.items() if address not in known)


def count_held_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Count the bytes of parameters, buffers and optimiser state."""
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(storage.nbytes() for storage in _storages([*model_tensors(model), *state]).values())


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a model."""
    return [*model.parameters(), *model.buffers()]


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """Peak CUDA memory during a call minus the memory in use before it, in bytes; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def time_rounds(
    functions: Mapping[Any, Function], rounds: int, device: torch.device, after_call: Function = lambda: None
) -> Iterator[dict[Any, float]]:
    """Time functions in turn, once per round, so that a temporary slowdown of the machine affects all of them.

    The functions are warmed up already; `after_call` is not timed. Yields seconds by function, after each round.
    """
    for _ in range(rounds):
        seconds = {}
        for name, function in functions.items():
            _wait_for(device)
            start = time.perf_counter()
            function()
            _wait_for(device)
            seconds[name] = time.perf_counter() - start
            after_call()
        yield seconds


def spread(values: Iterable[float]) -> float:
    """Interquartile range of at least two values, as a fraction of their median.

    Example:
        >>> spread([1.0, 2.0, 2.0, 3.0, 90.0])
        0.5
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def median_ratio(values: Iterable[float], reference: Iterable[float]) -> float:
    """Median over rounds of the ratio within a round, which is robust to slowdowns between rounds.

    Example:
        >>> median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 3.0])
        0.5
    """
    return statistics.median(value / other for value, other in zip(values, reference, strict=True))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, GPU (if any), threads and package versions."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "timm", "vpt", "peft")},
    }


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    return {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is mostly empty on Linux
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

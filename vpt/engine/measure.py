"""What a model costs: FLOPs, bytes saved for backward, peak memory on CUDA, and times that can be compared."""

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
    """A call of the model without gradients; the mode of the model is left as it is."""

    def run() -> None:
        with torch.inference_mode():
            model(inputs)

    return run


def training_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """The first half of a training step: logits (B, K) and their cross-entropy with targets (B,)."""
    return lambda: F.cross_entropy(model(inputs).float(), targets)


def training_step(model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: Optimizer) -> Function:
    """A whole training step: forward, backward, optimiser."""
    loss = training_loss(model, inputs, targets)

    def run() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def count_flops(function: Function) -> int:
    """FLOPs of the matrix products, convolutions and attention of a call, two for each multiply and add.

    What is done element by element counts as nothing. A compiled function hides its products: count the plain one.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def check_attention_is_counted(device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that the attention kernel of a device is one whose FLOPs torch knows, forward and backward.

    Raises:
        ValueError: It is not, so every count would lack attention.
    """
    tokens, width = 16, 64
    part = torch.randn(1, 1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    product = 2 * tokens * tokens * width
    attended: list[Tensor] = []
    forward = count_flops(lambda: attended.append(F.scaled_dot_product_attention(part, part, part)))
    backward = count_flops(lambda: attended[0].sum().backward())  # type: ignore[no-untyped-call]
    if forward != 2 * product or backward < 4 * product:  # flash kernels compute the weights again: 5
        raise ValueError(f"torch {torch.__version__} does not count the FLOPs of attention on device={device.type}")


def count_saved_bytes(function: Function, held: Iterable[Tensor]) -> int:
    """Bytes of memory that autograd keeps for the backward pass while a function computes a loss.

    Args:
        function: The forward pass and the loss.
        held: Parameters and buffers, which are in memory anyway and do not count, nor do views of them.

    Returns:
        The sizes of all storages of which something is saved, each counted whole and once.
    """
    known = _storages(held)
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(_storages([tensor]))  # held until the end, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for address, storage in saved.items() if address not in known)


def count_held_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of the parameters and buffers of a model and of the state of its optimiser."""
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(storage.nbytes() for storage in _storages([*model_tensors(model), *state]).values())


def model_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model."""
    return [*model.parameters(), *model.buffers()]


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """Most bytes of CUDA memory in use during a call, less those in use before it; None on another device."""
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
    """Time functions in turn, once a round, so that whatever slows a machine for a while slows all of them.

    Args:
        functions: What to call, by name; warmed up before.
        rounds: Passes over all functions.
        device: Where they compute; it is waited for before the clock starts and before it stops.
        after_call: Called after each, off the clock.

    Yields:
        Seconds of each function, after each round.
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
    """The range of the middle half of two values or more, as a fraction of their median.

    Example:
        >>> spread([1.0, 2.0, 2.0, 3.0, 90.0])
        0.5
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def median_ratio(values: Iterable[float], reference: Iterable[float]) -> float:
    """The median over rounds of the ratio within a round, which a machine that slows down between rounds cannot bend.

    Example:
        >>> median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 3.0])
        0.5
    """
    return statistics.median(value / other for value, other in zip(values, reference, strict=True))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, GPU if it is one, threads, and the versions of what was measured."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "timm", "vpt", "peft")},
    }


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages}


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # on Linux platform.processor() says little or nothing
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

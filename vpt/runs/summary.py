"""Summary of a run at its start, and tables of its results."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import torch

from vpt.build import Data, choose_precision
from vpt.config.schema import Config, Dtype
from vpt.data.samples import Samples
from vpt.engine.console import format_table, percent
from vpt.engine.state import FitResult
from vpt.models.task_file import task_tensors
from vpt.models.task_model import TaskModel
from vpt.models.tuning import count_parameters

MAX_COLUMNS = 8
FEW_IMAGES, FEW_OF_A_CLASS = 20, 2  # fewer of a split, or of a class in it, are reported beside its metrics


def summarise(model: TaskModel, data: Data, config: Config, described: Sequence[str], cache: str) -> str:
    """Describe model, data and settings of a run, in a few lines; `described` are lines on the data, `cache` is one."""
    count, device = count_parameters(model), next(model.parameters()).device
    height, width = data.preprocessing.size
    prompt = model.backbone.prompt
    held = "" if config.backbone.dtype is Dtype.fp32 else f" in {config.backbone.dtype.value}"
    options = {"grad_checkpointing": config.grad_checkpointing, "compile": config.compile}
    threads = [f"{torch.get_num_threads()} threads"] if device.type == "cpu" else []
    ways = [*threads, choose_precision(config, device), *(name for name, is_on in options.items() if is_on)]
    parts = {"prompt": count.prompt, "neck": count.neck, "head": count.head}
    parts["adapters" if count.adapters else "backbone"] = count.backbone_tuned
    tuned = " + ".join(f"{name} {num:,}" for name, num in parts.items() if num)
    frozen = "frozen" if not count.backbone_tuned else f"{config.tuning.method.value} tuned"
    frozen = f"frozen, with {config.tuning.adapters} adapters" if count.adapters else frozen
    no_prompt = "none" if count.backbone_tuned else "none (linear probe)" if not count.neck else "none (head only)"
    # Where features are pooled, the last block computes only the tokens that are read.
    path = model.backbone.extra_repr() if model.pools_features else model.backbone.describe_paths()
    rows = [
        ["backbone", f"{model.backbone.name}, {count.backbone:,} parameters, {frozen}{held}, {height} x {width} px"],
        ["prompt", no_prompt if prompt is None else prompt.extra_repr()],
        *([] if prompt is None else [["path", path]]),
        *(["data" if i == 0 else "", line] for i, line in enumerate(described)),
        ["tuned", f"{tuned} = {count.tuned:,} parameters, {100 * count.share:.2f} % of the backbone's"],
        ["task file", f"about {task_file_bytes(model) / 1000:,.0f} kB"],
        ["cache", cache],
        ["device", f"{device}, {', '.join(ways)}, seed {config.seed}"],
    ]
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


def task_file_bytes(model: TaskModel) -> int:
    """Bytes of the tensors in the task file of a model."""
    return sum(tensor.numel() * tensor.element_size() for tensor in task_tensors(model).values())


def result_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Format a table of metrics by split, {"val": {"top1": 0.9}, ...}, in percent except for losses.

    It has a row for each split, or for each metric if there are more than `MAX_COLUMNS`.
    """

    def cell(name: str, values: Mapping[str, float]) -> str:
        value = values.get(name)
        return "" if value is None else f"{value:.4f}" if name.startswith("loss") else percent(value)

    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    columns = [[cell(name, values) for name in names] for values in metrics.values()]
    if len(names) > MAX_COLUMNS:
        return format_table([[*row] for row in zip(names, *columns, strict=True)], ["metric", *metrics])
    return format_table([[split, *row] for split, row in zip(metrics, columns, strict=True)], ["split", *names])


def describe_small_splits(splits: Mapping[str, Samples], metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each evaluated split of few images, or few of a class, with the interval of its top-1 accuracy."""
    lines = []
    for split, values in metrics.items():
        samples, num = splits[split], len(splits[split])
        counts = zip(samples.classes, samples.class_counts().tolist(), strict=True)
        rare = [name for name, count in counts if count < FEW_OF_A_CLASS]
        if num >= FEW_IMAGES and not rare:
            continue
        line = f"{split} has {num:,} image{'s' if num > 1 else ''}"
        if rare:
            line += f", and fewer than {FEW_OF_A_CLASS} examples of {len(rare):,} of its classes (first {rare[0]})"
        if "top1" in values:
            low, high = wilson_interval(values["top1"], num)
            line += f": its top1 of {percent(values['top1'])} has a 95 % interval of {percent(low)} to {percent(high)}"
        lines.append(f"{line}; more images would give a more certain number")
    return lines


def wilson_interval(fraction: float, num: int) -> tuple[float, float]:
    """The 95 % confidence interval of a fraction of `num` independent images.

    References:
        Probable Inference, the Law of Succession, and Statistical Inference (Wilson, 1927).

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(1.0, 1)]
        [0.207, 1.0]
    """
    z = NormalDist().inv_cdf(0.975)
    centre = fraction + z**2 / (2 * num)
    half = z * math.sqrt(fraction * (1 - fraction) / num + z**2 / (4 * num**2))
    scale = 1 + z**2 / num
    return (centre - half) / scale, min(1.0, (centre + half) / scale)


def describe_schedules(result: FitResult, epochs: int) -> str:
    """A line on the schedules of a run that was extended; empty for any other."""
    if not result.extended_after:
        return ""
    bounds = [0, *result.extended_after, epochs]
    parts = ", ".join(f"{first + 1} to {last}" for first, last in pairwise(bounds))
    return f"\n{'schedule':<10} one each for epochs {parts} (extend=true), not one of {epochs} epochs"


def describe_result(result: FitResult, metrics: Mapping[str, Mapping[str, float]], task: Path) -> str:
    """Describe the result of a run: the best epoch, a table of metrics, the task file."""
    seconds = f"{result.seconds:.0f} s" + "".join(f", extended after epoch {epoch}" for epoch in result.extended_after)
    return "\n".join(
        [
            f"\nbest epoch {result.best_epoch} of {result.epochs}, {result.steps} steps, {seconds}",
            result_table(metrics),
            f"task file  {task} ({task.stat().st_size / 1000:,.0f} kB)",
        ]
    )

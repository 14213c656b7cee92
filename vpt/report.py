"""What a run tells a person: the summary at its start, the table at its end, and the pictures in TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpt.build import Data, build_settings
from vpt.config import Config, Dtype
from vpt.data.transforms import denormalise
from vpt.engine.console import format_table, percent
from vpt.engine.metrics import ClassificationMetrics
from vpt.engine.monitor import Monitor
from vpt.engine.pictures import RIGHT, WRONG, confusion_picture, picture_grid
from vpt.engine.trainer import FitResult
from vpt.models.classification import ClassificationModel
from vpt.models.task_file import task_tensors
from vpt.models.tuning import count_parameters

NUM_GRID_PICTURES = 32


def summarise(model: ClassificationModel, data: Data, config: Config, cache: str) -> str:
    """What is about to be trained, on what, and what is kept for later epochs: a few lines for the console."""
    count, device = count_parameters(model), next(model.parameters()).device
    height, width = data.preprocessing.size
    prompt = model.backbone.prompt
    held = "" if config.backbone.dtype is Dtype.fp32 else f" in {config.backbone.dtype.value}"
    options = {"grad_checkpointing": config.grad_checkpointing, "compile": config.compile}
    ways = [build_settings(config, device).precision, *(name for name, is_on in options.items() if is_on)]
    splits = ", ".join(f"{split} {len(samples.targets)}" for split, samples in data.samples.items())
    rows = [
        ["backbone", f"{model.backbone.name}, {count.backbone:,} parameters, frozen{held}, {height} x {width} px"],
        ["prompt", "none (linear probe)" if prompt is None else prompt.extra_repr()],
        *([] if prompt is None else [["path", model.backbone.extra_repr()]]),
        ["data", f"{config.dataset.title}: {len(data.classes)} classes; pictures: {splits}"],
        [
            "tuned",
            f"prompt {count.prompt:,} + head {count.head:,} = {count.tuned:,} parameters, "
            f"{100 * count.share:.2f} % of the backbone's",
        ],
        ["task file", f"about {task_file_bytes(model) / 1000:,.0f} kB"],
        ["cache", cache],
        ["device", f"{device}, {', '.join(ways)}, seed {config.seed}"],
    ]
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


def task_file_bytes(model: ClassificationModel) -> int:
    """Bytes of the tensors that the task file will hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in task_tensors(model).values())


def result_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the metrics of some splits: {"val": {"top1": 0.9}, ...}; accuracies in percent."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [
        [split, *(_format(name, values[name]) if name in values else "" for name in names)]
        for split, values in metrics.items()
    ]
    return format_table(rows, ["split", *names])


def describe_result(result: FitResult, metrics: Mapping[str, Mapping[str, float]], task: Path) -> str:
    """What a run ended with: the best epoch, a table of metrics, the task file."""
    return "\n".join(
        [
            f"\nbest epoch {result.best_epoch} of {result.epochs}, {result.steps} steps, {result.seconds:.0f} s",
            result_table(metrics),
            f"task file  {task} ({task.stat().st_size / 1000:,.0f} kB)",
        ]
    )


def class_table(metrics: ClassificationMetrics, classes: Sequence[str]) -> str:
    """A table of the recall of each class and the number of its pictures."""
    counts = metrics.confusion.sum(dim=1).tolist()
    rows = [
        [name, percent(recall), str(num)]
        for name, recall, num in zip(classes, metrics.per_class(), counts, strict=True)
    ]
    return format_table(rows, ["class", "recall", "pictures"])


def log_start(monitor: Monitor, data: Data, config_text: str, summary: str) -> None:
    """The config, the summary and a grid of train pictures as the model will see them, augmented."""
    monitor.text("config", f"```yaml\n{config_text}\n```")
    monitor.text("summary", f"```\n{summary}\n```")
    train = data.datasets["train"]
    chosen = np.linspace(0, len(train) - 1, min(NUM_GRID_PICTURES, len(train))).astype(int)
    images, targets = zip(*(train[(1, int(index))] for index in chosen), strict=True)
    captions = [data.classes[target] for target in targets]
    monitor.images("train/augmented", picture_grid(denormalise(torch.stack(images), data.preprocessing), captions), 0)


def log_end(
    monitor: Monitor,
    data: Data,
    val: ClassificationMetrics,
    result: FitResult,
    config: Mapping[str, Any],
    test: Mapping[str, float],
) -> None:
    """The confusion matrix and the worst pictures of val, and the row of this run in the table of hyperparameters."""
    monitor.images("val/confusion", confusion_picture(val.confusion.numpy(), data.classes), result.best_step)
    worst = val.worst()
    images = torch.stack([data.datasets["val"][sample.position][0] for sample in worst])
    captions = [
        f"{data.classes[sample.target]}\nsaid {data.classes[sample.prediction]}\nloss {sample.loss:.1f}"
        for sample in worst
    ]
    colours = [RIGHT if sample.target == sample.prediction else WRONG for sample in worst]
    grid = picture_grid(denormalise(images, data.preprocessing), captions, columns=4, colours=colours)
    monitor.images("val/worst", grid, result.best_step)
    recall = {f"val_recall/{name}": value for name, value in zip(data.classes, val.per_class(), strict=True)}
    monitor.scalars(recall, result.best_step)
    results = {f"best/val_{name}": value for name, value in result.best.items()}
    monitor.hparams(config, results | {f"best/test_{name}": value for name, value in test.items()})


def _format(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else percent(value)

"""What a trained run answers on the split that is reported, and what it takes to put its task onto a backbone."""

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt import build
from vpt.config.schema import Config, OnError
from vpt.engine.trainer import evaluate
from vpt.models.bank import TaskBank
from vpt.models.task_file import put_task
from vpt.models.vit import load_vit
from vpt.storage.files import write_json
from vpt.task_types.base import kind_of

FILE = "answers.json"
NUM_SWITCHES = 5


@dataclass(frozen=True)
class Answers:
    """What is kept of one run, in a file of its folder.

    Args:
        split: Of which pictures.
        predictions: Classification: the class of each picture, by number.
        probabilities: Classification: what the run says of that class, in [0, 1].
        precision: Detection: the average precision of each class, under "map" and "map50".
        switch_ms: Milliseconds to put the task file onto a backbone in memory, the median of some times.
        is_shared: Whether images of this task go through a `TaskBank` together with those of others.
    """

    split: str
    switch_ms: float
    is_shared: bool
    predictions: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    precision: dict[str, list[float | None]] = field(default_factory=dict)


class ClassAnswers:
    """An evaluator that keeps the class that a model gives to each picture."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.labels: list[int] = []
        self.probabilities: list[float] = []

    def update(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        """Add the answers to a batch."""
        probabilities, labels = model(images).float().softmax(dim=1).max(dim=1)
        self.labels += labels.tolist()
        self.probabilities += [round(value, 4) for value in probabilities.tolist()]

    def compute(self) -> dict[str, float]:
        """Nothing: the run has its metrics."""
        return {}


def answers_of(config: Config, run_dir: Path, samples: Mapping[str, Any], split: str) -> Answers:
    """What was kept of a run earlier, or is found now and kept.

    Args:
        config: Of the run, which has finished.
        run_dir: Its folder.
        samples: Its data.
        split: Which of them.
    """
    try:
        values = json.loads((run_dir / FILE).read_text())
        kept = Answers(**{entry.name: values[entry.name] for entry in fields(Answers)})
        if kept.split == split:
            return kept
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged
        pass
    found = _find(config, run_dir, samples, split)
    write_json(run_dir / FILE, asdict(found))
    return found


def _find(config: Config, run_dir: Path, samples: Mapping[str, Any], split: str) -> Answers:
    config.data.on_error = OnError.stop  # only train pictures may be skipped
    run = build.load_run(run_dir, checkpoint=config.backbone.checkpoint, device=config.device)
    kind = kind_of(config)
    data = kind.build_data({split: samples[split], "train": samples["train"]}, run.metadata.preprocessing)
    device = next(run.model.parameters()).device
    reading: dict[str, Any] = {"precision": build.choose_precision(config, device), "description": split}
    switching = _time_switch(config, run_dir / "task.safetensors", device)
    if config.task == "detection":
        evaluator: Any = kind.evaluator(data, split)
        evaluate(run.model, data.loaders[split], evaluator, **reading)
        metrics = evaluator.metrics
        precision = {"map": metrics.per_class(), "map50": metrics.precision_curves().mean(axis=1).tolist()}
        return Answers(split, *switching, precision=precision)
    found = ClassAnswers()
    evaluate(run.model, data.loaders[split], found, **reading)
    return Answers(split, *switching, found.labels, found.probabilities)


def _time_switch(config: Config, task: Path, device: torch.device) -> tuple[float, bool]:
    """Milliseconds to put a task onto a backbone in memory, and whether it shares batches with others there."""
    build.seed_everything(config.seed, config.deterministic)  # a backbone without pretrained weights comes from it
    backbone = config.backbone
    vit = load_vit(
        backbone.name,
        pretrained=backbone.pretrained,
        checkpoint=backbone.checkpoint,
        img_size=backbone.img_size,
        dtype=build.DTYPES[backbone.dtype],
    )
    bank = TaskBank(vit, device=device)
    seconds = []
    for _ in range(NUM_SWITCHES):
        start = time.perf_counter()
        put_task(task, bank.vit, shares=True)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), bank.is_shared(bank.load(task))

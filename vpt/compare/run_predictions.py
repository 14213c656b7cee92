"""Predictions of a finished run on the reported split, and the time to load its task."""

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vpt import build
from vpt.config.schema import Config, OnError
from vpt.engine.trainer import evaluate
from vpt.models.bank import TaskBank
from vpt.models.task_file import put_task
from vpt.storage.files import write_json
from vpt.task_types.base import task_type_of

FILE = "predictions.json"
NUM_SWITCHES = 5


@dataclass(frozen=True)
class RunPredictions:
    """Predictions of a run, saved in its folder."""

    split: str
    switch_ms: float  # milliseconds to load the task file into a backbone in memory, the median of several times
    is_shared: bool  # whether a `TaskBank` runs images of this task and of others in one batch
    predictions: list[int] = field(default_factory=list)  # classification: the class of each image, by number
    probabilities: list[float] = field(default_factory=list)  # classification: of these classes, in [0, 1]
    precision: dict[str, list[float | None]] = field(default_factory=dict)  # detection: of each class; map, map50


def read_or_predict(config: Config, run_dir: Path, samples: Mapping[str, Any], split: str) -> RunPredictions:
    """The saved predictions of a finished run; computed and saved if there are none."""
    try:
        values = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        saved = RunPredictions(**{entry.name: values[entry.name] for entry in fields(RunPredictions)})
        if saved.split == split:
            return saved
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged
        pass
    predicted = _predict(config, run_dir, samples, split)
    write_json(run_dir / FILE, asdict(predicted))
    return predicted


def _predict(config: Config, run_dir: Path, samples: Mapping[str, Any], split: str) -> RunPredictions:
    config.data.on_error = OnError.stop  # only train images may be skipped
    run = build.load_run(run_dir, checkpoint=config.backbone.checkpoint, device=config.device)
    task_type = task_type_of(config)
    data = task_type.build_data({split: samples[split], "train": samples["train"]}, run.metadata.preprocessing)
    device = next(run.model.parameters()).device
    evaluator = task_type.prediction_evaluator(data, split)
    if evaluator is not None:
        precision = build.choose_precision(config, device)
        evaluate(run.model, data.loaders[split], evaluator, precision=precision, description=split)
    switch_ms, is_shared = _time_switch(config, run_dir / "task.safetensors", device)
    return RunPredictions(split, switch_ms, is_shared, **(evaluator.result() if evaluator is not None else {}))


def _time_switch(config: Config, task: Path, device: torch.device) -> tuple[float, bool]:
    """Milliseconds to load a task into a backbone in memory, and whether it shares batches with other tasks."""
    build.seed_everything(config.seed, config.deterministic)  # for backbones without pretrained weights
    bank = TaskBank(build.build_backbone(config), device=device)
    seconds = []
    for _ in range(NUM_SWITCHES):
        start = time.perf_counter()
        put_task(task, bank.vit, shares=True)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), bank.is_shared(bank.load(task))

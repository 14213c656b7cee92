"""The data of a finished run, read again without augmentation."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unicodedata import normalize

from vpt.build import Data, TrainedRun
from vpt.config.errors import ConfigError
from vpt.data.ranges import format_range
from vpt.task_types.base import TaskType, task_type_of


def read_run(
    run: TrainedRun,
    splits: Sequence[str],
    *,
    root: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> tuple[TaskType, Data]:
    """The task type of a run and its data, prepared as its task file states.

    `splits` are required. The config of the run is changed to what is read: `root`, where the data set has moved,
    `batch_size`, by default as in training, and `num_workers` loader processes.

    Raises:
        ConfigError: A split does not exist, or its classes are not those of the model.
        ValueError, OSError: The data cannot be read.
    """
    config = run.config
    config.dataset.root = root or config.dataset.root
    config.train.batch_size, config.num_workers = batch_size or config.train.batch_size, num_workers
    config.augment.transforms = []
    config.data.range = format_range(run.preprocessing.range)
    task_type = task_type_of(config)
    try:
        samples = task_type.read()
    except (ValueError, OSError) as error:
        place = config.dataset.root
        if place is None or Path(place).expanduser().exists():
            raise
        moved = f"root={place}: no such file or folder"
        moved += "; if the data of this run have moved, add root=PATH" if root is None else ""
        raise ConfigError(moved) from error
    for split in splits:
        if split not in samples:
            raise ConfigError(f"split={split}: this data set has {', '.join(samples)}")
    for members in samples.values():
        _check_classes("the data of this run" if root is None else f"root={root}", members, run.model)
    return task_type, task_type.build_data(samples, run.metadata.preprocessing)


def _check_classes(given: str, samples: Any, model: Any) -> None:
    """Refuse data whose classes, in order, are not those of the model."""
    for key in ("classes", "category_ids"):
        of_data, of_task = getattr(samples, key, None) or (), getattr(model, key, None) or ()
        for label, (one, other) in enumerate(zip_longest(of_data, of_task, fillvalue="missing")):
            if normalize("NFC", str(one)) != normalize("NFC", str(other)):  # names were not composed in 0.1
                raise ConfigError(
                    f"{given}: {key}[{label}] is {one} in the data and {other} in the task file; the data must have "
                    f"those of the task file, in this order: {', '.join(map(str, of_task[:20]))}"
                )

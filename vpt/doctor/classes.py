"""Classes with too few images or boxes, and imbalance."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vpt.task_types.base import TaskType
from vpt.task_types.findings import Finding, Level, share, some

FEW = 5  # train images (or boxes) of a class
IMBALANCE = 10  # the largest class over the smallest one

Counts = dict[str, NDArray[np.int64]]


def find_class_problems(task_type: TaskType, classes: tuple[str, ...], counts: Counts) -> Iterator[Finding]:
    """Classes that are empty in a split or small in train, and imbalance; counts are (K,), by split."""
    counted = task_type.counted
    for split, of_split in counts.items():
        if missing := [classes[label] for label in np.flatnonzero(of_split == 0)]:
            effect = "they cannot be learned" if split == "train" else f"{split} cannot evaluate them"
            message = f"{share(len(missing), len(classes))} classes have no {counted}, {effect}: {some(missing)}"
            yield Finding(Level.warning, "missing_class", message, split)
    train = counts["train"]
    if few := [f"{classes[label]} ({train[label]})" for label in np.flatnonzero((train > 0) & (train < FEW))]:
        message = f"{share(len(few), len(classes))} classes have fewer than {FEW} {counted}: {some(few)}"
        yield Finding(Level.warning, "few", message, "train")
    present = np.flatnonzero(train)
    if len(present) and train[present].min() < train[present].max():
        smallest, largest = present[np.argmin(train[present])], present[np.argmax(train[present])]
        ratio = train[largest] / train[smallest]
        message = (
            f"the largest class, {classes[largest]}, has {train[largest]:,} {counted}, the smallest, "
            f"{classes[smallest]}, {train[smallest]:,}: {ratio:.1f} to 1"
        )
        note = task_type.imbalance_note(train)
        level = Level.warning if ratio >= IMBALANCE else Level.note
        yield Finding(level, "imbalance", f"{message}; {note}" if note else message, "train")

"""Classes: how many pictures or boxes each has, and where there are too few."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.config.schema import ClassWeights, Config
from vpt.doctor.findings import Finding, Level, share, some

FEW = 5  # train pictures (or boxes) of a class
IMBALANCE = 10  # the largest class over the smallest one

Counts = dict[str, NDArray[np.int64]]


def count_classes(splits: Mapping[str, Any]) -> Counts:
    """Pictures, or boxes that are no crowds, of each class (K,), by split."""
    return {split: samples.class_counts() for split, samples in splits.items()}


def find_class_problems(config: Config, classes: tuple[str, ...], counts: Counts, what: str) -> Iterator[Finding]:
    """Classes with nothing or little in a split, and imbalance.

    Args:
        config: Says whether classes are weighted.
        classes: Their names.
        counts: As `count_classes` has them.
        what: "pictures" or "boxes".
    """
    for split, of_split in counts.items():
        missing = [classes[label] for label in np.flatnonzero(of_split == 0)]
        if not missing:
            continue
        then = "they cannot be learned" if split == "train" else f"{split} says nothing about them"
        message = f"{share(len(missing), len(classes))} classes have no {what}, {then}: {some(missing)}"
        yield Finding(Level.warning, "missing_class", message, split)
    train = counts["train"]
    few = [f"{classes[label]} ({train[label]})" for label in np.flatnonzero((train > 0) & (train < FEW))]
    if few:
        message = f"{share(len(few), len(classes))} classes have fewer than {FEW} {what}: {some(few)}"
        yield Finding(Level.warning, "few", message, "train")
    yield from _find_imbalance(config, classes, train, what)


def _find_imbalance(config: Config, classes: tuple[str, ...], train: NDArray[np.int64], what: str) -> Iterator[Finding]:
    there = np.flatnonzero(train)
    if len(there) < 2:
        return
    smallest, largest = there[np.argmin(train[there])], there[np.argmax(train[there])]
    ratio = train[largest] / train[smallest]
    if ratio <= 1:
        return
    message = (
        f"the largest class, {classes[largest]}, has {train[largest]:,} {what}, the smallest, {classes[smallest]}, "
        f"{train[smallest]:,}: {ratio:.1f} to 1"
    )
    if what == "pictures":
        weights = train[there].sum() / (len(classes) * train[there])
        would = "weights" if config.train.class_weights is ClassWeights.balanced else "would weigh"
        message += (
            f"; train.class_weights=balanced {would} their losses with {weights.min():.2g} and {weights.max():.2g}"
        )
    yield Finding(Level.warning if ratio >= IMBALANCE else Level.note, "imbalance", message, "train")

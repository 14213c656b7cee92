"""Splits of a data set: their names, splitting val and test off train, and few images per class."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from vpt.data.loaders import stable_seed
from vpt.data.samples import ClassificationSamples, SamplesT

SPLITS = ("train", "val", "test")
SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def stratified_split(
    targets: Sequence[int], fraction: float, seed: int, names: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Hold out a fraction of each class: (indices to keep, indices held out), both ascending.

    A class of two or more keeps at least one and, if the fraction is not 0, has at least one held out. With names an
    image's place depends on its name, by default its index, so that a new image moves at most one other of its class.
    A fraction outside of [0, 1) is a `ValueError`.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: must be in [0, 1)")
    held = set()
    for indices in _shuffled_by_class(targets, seed, names or range(len(targets))).values():
        if fraction > 0 and len(indices) > 1:
            held.update(indices[: min(max(round(fraction * len(indices)), 1), len(indices) - 1)])
    return [i for i in range(len(targets)) if i not in held], sorted(held)


def take_per_class(samples: ClassificationSamples, num: int, seed: int) -> ClassificationSamples:
    """Take `num` images of each class, chosen by seed (k-shot); a `ValueError` if a class has fewer, or `num` < 1."""
    if num < 1:
        raise ValueError(f"num_per_class={num}: must be at least 1, or null for all images")
    by_class = _shuffled_by_class(samples.targets, seed, samples.names)
    for name, count in zip(samples.classes, samples.class_counts(), strict=True):
        if count < num:
            raise ValueError(f"class {name!r} has {count} train images, fewer than num_per_class={num}; lower it")
    return samples.take(sorted(i for indices in by_class.values() for i in indices[:num]))


def split_off(
    splits: Mapping[str, SamplesT], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, SamplesT]:
    """Split test and val off train where they are missing; the result depends on names, labels and seed only.

    Raises:
        ValueError: A fraction of the given train is out of range, or train has too few images.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: each must be at least 0, their sum below 1"
        )
    result = dict(splits)
    rest = 1.0
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in result and fraction > 0:
            train = result["train"]
            keep, held = stratified_split(train.strata, fraction / rest, stable_seed(seed, split), train.names)
            if not held:
                raise ValueError(
                    f"{split}_fraction={fraction}: train has too few images to split off {split} (it takes two, of "
                    f"one class for classification); add images, or a {split} split"
                )
            result["train"], result[split] = train.take(keep), train.take(held)
            rest -= fraction
    return {split: result[split] for split in SPLITS if split in result}


def _shuffled_by_class(targets: Sequence[int], seed: int, names: Sequence[int | str]) -> dict[int, list[int]]:
    """Indices of each class in an order that depends on seed and names only."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(targets)), key=lambda index: stable_seed(seed, names[index])):
        by_class[targets[index]].append(index)
    return by_class

"""Splits of a data set: their names, splitting val and test off train, folds, and few images per class."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypedDict

from vpt.data.loaders import stable_seed
from vpt.data.samples import ClassificationSamples, SamplesT

SPLITS = ("train", "val", "test")
DEFAULT_FRACTION = 0.2
SPLIT_OF = {
    **dict.fromkeys(("train", "training", "train_set", "trainset", "training_set"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "val_set", "valset", "validation_set"), "val"),
    **dict.fromkeys(("dev_set", "devset", "eval_set", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "test_set", "testset", "testing_set"), "test"),
}


class Division(TypedDict, total=False):
    """Keyword arguments of every reader: how val and test are split off train where they are missing.

    `val_fraction` and `test_fraction` are parts of the given images, chosen by `seed`; by default 0.2, but no test if
    the data name any split. Images of one group are never in two splits: `group` is a regular expression, of which the
    first parenthesis, or else the whole, is found in the name of an image; of a CSV file it is a column. With `folds`,
    train is divided into so many parts of equal size, and the part `fold`, counted from 0, becomes test, or val if
    there is a test; without groups, each class is spread evenly.
    """

    val_fraction: float
    test_fraction: float | None
    seed: int
    group: str | None
    folds: int | None
    fold: int


def split_named(name: str) -> str | None:
    """The split that a folder, a file or a cell of this name stands for.

    Example:
        >>> split_named("Training-Set"), split_named("dev"), split_named("cat")
        ('train', 'val', None)
    """
    return SPLIT_OF.get(name.lower().replace("-", "_").replace(" ", "_"))


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


def divide(
    splits: Mapping[str, SamplesT],
    *,
    names_splits: bool = True,
    val_fraction: float = DEFAULT_FRACTION,
    test_fraction: float | None = None,
    seed: int = 0,
    group: str | None = None,
    folds: int | None = None,
    fold: int = 0,
) -> dict[str, SamplesT]:
    """Split what is missing off train, see `Division`; `names_splits`: whether the data say what belongs to which.

    Raises:
        ValueError: A number is out of range, the group of an image is not found, or train is too small.
    """
    if group is not None:
        splits = {split: _with_groups(samples, group) for split, samples in splits.items()}
    if folds is not None:
        splits = take_fold(splits, folds, fold, seed)
    elif fold:
        raise ValueError(f"fold={fold}: is one of folds, so folds must be given too")
    if test_fraction is None:
        is_enough = max(Counter(splits["train"].strata).values()) > 2  # for one image in each split
        test_fraction = 0.0 if names_splits or folds is not None or not is_enough else DEFAULT_FRACTION
    return split_off(splits, val_fraction, test_fraction, seed)


def split_off(
    splits: Mapping[str, SamplesT], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, SamplesT]:
    """Split test and val off train where they are missing; the result depends on names, labels and seed only.

    Raises:
        ValueError: A fraction of the given train is out of range, or train has too few images or groups.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: each must be at least 0, their sum below 1"
        )
    result = dict(splits)
    rest = 1.0
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in result and fraction > 0:
            train, part = result["train"], fraction / rest
            if train.groups:
                parts = _parts_of_groups(train.strata, train.groups, (1 - part, part), stable_seed(seed, split))
                keep, held = ([i for i, of in enumerate(parts) if of == wanted] for wanted in (0, 1))
            else:
                keep, held = stratified_split(train.strata, part, stable_seed(seed, split), train.names)
            if not held:
                raise ValueError(
                    f"{split}_fraction={fraction}: train has too few images to split off {split} (it takes two, of "
                    f"one class for classification, and of two groups); add images, or a {split} split"
                )
            result["train"], result[split] = train.take(keep), train.take(held)
            rest -= fraction
    return {split: result[split] for split in SPLITS if split in result}


def take_fold(splits: Mapping[str, SamplesT], folds: int, fold: int, seed: int) -> dict[str, SamplesT]:
    """Make one of `folds` parts of train the split that is missing, test before val.

    Raises:
        ValueError: Neither is missing, `fold` is not in [0, `folds`), or there are fewer images or groups than folds.
    """
    train = splits["train"]
    missing = next((split for split in ("test", "val") if split not in splits), None)
    if missing is None:
        raise ValueError(f"folds={folds}: this data set has a val and a test already; leave folds out")
    if not 0 <= fold < folds:
        raise ValueError(f"fold={fold}: must be at least 0 and below folds={folds}")
    num, what = (len(set(train.groups)), "groups") if train.groups else (len(train), "images")
    if num < folds:
        raise ValueError(f"folds={folds}: train has {num} {what} only; use fewer folds")
    if train.groups:
        parts = _parts_of_groups(train.strata, train.groups, [1 / folds] * folds, seed)
    else:
        parts = [0] * len(train)
        for position, index in enumerate(chain(*_shuffled_by_class(train.strata, seed, train.names).values())):
            parts[index] = position % folds
    keep, held = ([i for i, part in enumerate(parts) if (part == fold) is is_held] for is_held in (False, True))
    return {**splits, "train": train.take(keep), missing: train.take(held)}


def _with_groups(samples: SamplesT, group: str) -> SamplesT:
    """The samples with the group that a regular expression finds in the name of each image."""
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"group={group}: no regular expression ({error})") from error
    found = [pattern.search(name) for name in samples.names]
    for name, match in zip(samples.names, found, strict=True):
        if match is None or match[min(pattern.groups, 1)] is None:
            raise ValueError(f"group={group}: not found in the name {name}; each image needs a group")
    return replace(samples, groups=tuple(match[min(pattern.groups, 1)] for match in found if match))


def _parts_of_groups(strata: Sequence[int], groups: Sequence[str], weights: Sequence[float], seed: int) -> list[int]:
    """The part of each image, so that a group is in one part, and parts and their classes have sizes as the weights.

    As GroupKFold of scikit-learn: from the largest group down, each goes to the part that is furthest from its size,
    here first by the classes of the group.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(groups):
        members[name].append(index)
    total, sizes = Counter(strata), [0] * len(weights)
    counts: list[Counter[int]] = [Counter() for _ in weights]
    parts = [0] * len(groups)
    for name in sorted(members, key=lambda name: (-len(members[name]), stable_seed(seed, name))):
        added = Counter(strata[index] for index in members[name])

        def fill(part: int, added: Counter[int] = added) -> tuple[float, float, float]:
            of_classes = sum(num * counts[part][label] / total[label] for label, num in added.items())
            return of_classes / weights[part], sizes[part] / weights[part], -weights[part]

        best = min(range(len(weights)), key=fill)
        counts[best] += added
        sizes[best] += len(members[name])
        for index in members[name]:
            parts[index] = best
    return parts


def _shuffled_by_class(targets: Sequence[int], seed: int, names: Sequence[int | str]) -> dict[int, list[int]]:
    """Indices of each class in an order that depends on seed and names only."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(targets)), key=lambda index: stable_seed(seed, names[index])):
        by_class[targets[index]].append(index)
    return by_class

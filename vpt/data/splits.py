"""Pictures with one class each, in folders; `tables.py` reads them from lists, `torchvision.py` those that have a name.

Every reader returns `dict[str, Samples]` with keys among train, val and test. The class map is made from train and
holds for all splits. Labels and paths are all checked here, at once; pictures are decoded later, one by one.

Shapes: H, W pixels.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from vpt.data.loaders import stable_seed
from vpt.data.samples import Samples

SPLITS = ("train", "val", "test")


SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def stratified_split(
    targets: Sequence[int], fraction: float, seed: int, names: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Hold out a fraction of each class: (indices to keep, indices held out), both ascending.

    A class of two or more keeps at least one and, if the fraction is not 0, has at least one held out. With names a
    picture's place depends on its name, so that a new picture moves at most one other of its class.

    Args:
        targets: The class of each picture.
        fraction: In [0, 1).
        seed: Decides which pictures are held out.
        names: A name for each picture; without them its index counts.

    Raises:
        ValueError: The fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to hold out is {fraction}; allowed: 0 <= fraction < 1")
    held = set()
    for indices in _shuffled_by_class(targets, seed, names or range(len(targets))).values():
        if fraction > 0 and len(indices) > 1:
            num_held = min(max(round(fraction * len(indices)), 1), len(indices) - 1)
            held.update(indices[:num_held])
    return [i for i in range(len(targets)) if i not in held], sorted(held)


def take_per_class(samples: Samples, num: int, seed: int) -> Samples:
    """Take `num` pictures of each class, chosen by seed: the k-shot setting.

    Raises:
        ValueError: `num` is not positive, or a class has fewer pictures.
    """
    if num < 1:
        raise ValueError(f"num_per_class is {num}; allowed: 1 or more, or null for all pictures")
    by_class = _shuffled_by_class(samples.targets, seed, samples.names)
    for target, name in enumerate(samples.classes):
        count = len(by_class.get(target, ()))
        if count < num:
            raise ValueError(f"class {name!r} has {count} train pictures, fewer than num_per_class={num}; lower it")
    return samples.take(sorted(i for indices in by_class.values() for i in indices[:num]))


def split_off(
    splits: Mapping[str, Samples], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, Samples]:
    """Split test and val off train where they are missing; both fractions are parts of the train that is given."""
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"dataset.val_fraction={val_fraction}, test_fraction={test_fraction}; allowed: 0 or more, together under 1"
        )
    result = dict(splits)
    rest = 1.0
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in result and fraction > 0:
            train = result["train"]
            keep, held = stratified_split(train.targets, fraction / rest, stable_seed(seed, split), train.names)
            if not held:
                raise ValueError(
                    f"dataset.{split}_fraction={fraction}: no class has two pictures, so no {split} can be split off; "
                    f"add pictures, or a {split} split of your own (a folder {split}/)"
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

"""Pictures with one class each, in folders; `tables.py` reads them from lists, `torchvision.py` those that have a name.

Every reader returns `dict[str, Samples]` with keys among train, val and test. The class map is made from train and
holds for all splits. Labels and paths are all checked here, at once; pictures are decoded later, one by one.

Shapes: H, W pixels.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NoReturn

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vpt.data.images import DEFAULT_DECODING, EXTENSIONS, Decoding, ImageError, check_image, find_images, read_image
from vpt.data.loaders import stable_seed

SPLITS = ("train", "val", "test")
SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FOLDER_LAYOUT = "expected <root>/train/<class>/<picture> (and val/, test/), or <root>/<class>/<picture>"


@dataclass(frozen=True)
class Samples:
    """One split: a class, a printable name and a way to read it, for each picture.

    Args:
        classes: The class names, by target.
        targets: A number in [0, len(classes)) for each picture.
        names: A relative path, or what else tells a person which picture it is, for each picture.
        reader: Gives the RGB picture of an index; must be picklable, since workers get a copy.
        paths: The file of each picture, or nothing where the pictures are no files.
    """

    classes: tuple[str, ...]
    targets: tuple[int, ...]
    names: tuple[str, ...]
    reader: Callable[[int], Image.Image] = field(repr=False)
    paths: tuple[Path, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        assert len(self.targets) == len(self.names)
        assert len(self.paths) in (0, len(self.names))

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> Image.Image:
        """Read a picture, mode RGB."""
        return self.reader(index)

    def take(self, indices: Sequence[int]) -> "Samples":
        """The samples at these indices, in this order."""
        return replace(
            self,
            targets=tuple(self.targets[i] for i in indices),
            names=tuple(self.names[i] for i in indices),
            reader=_TakenReader(self.reader, tuple(indices)),
            paths=tuple(self.paths[i] for i in indices) if self.paths else (),
        )


class ClassificationDataset(Dataset[tuple[Tensor, int]]):
    """Samples behind a transform.

    A key is `(epoch, index)`, or an index, which means epoch 0. The transform is called with a seed made of `seed`,
    epoch and index, so an item does not depend on who asks for it, nor when.

    Args:
        samples: One split.
        transform: Called with (RGB picture, seed), returns a tensor (3, H, W) float32.
        seed: The seed of the run.
    """

    def __init__(self, samples: Samples, transform: Callable[[Image.Image, int], Tensor], seed: int = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.transform(self.samples.read(index), stable_seed(self.seed, epoch, index))
        return image, self.samples.targets[index]

    def __len__(self) -> int:
        return len(self.samples)


def fruit_root() -> Path:
    """The folder of the fruit set that ships in the package: 14 classes, for `read_folder`.

    Example:
        >>> {split: len(samples) for split, samples in read_folder(fruit_root()).items()}
        {'train': 308, 'val': 112, 'test': 336}
    """
    return Path(__file__).parent / "fruit"


def check_readable(samples: Samples, decoding: Decoding = DEFAULT_DECODING) -> None:
    """Look at the header of every picture file, before hours go by until one that cannot be read; decodes nothing.

    Args:
        samples: One split.
        decoding: Says how large a picture may be.

    Raises:
        ImageError: Pictures are missing, broken or too large; names the first and counts the others.
    """
    reasons = []
    for path in samples.paths:
        try:
            check_image(path, decoding.max_pixels)
        except ImageError as error:
            reasons.append(str(error))
    refuse_unreadable(reasons)


def refuse_unreadable(reasons: Sequence[str]) -> None:
    """Refuse pictures that cannot be read, if there are any.

    Args:
        reasons: What is wrong with each, with its path.

    Raises:
        ImageError: There are any; names the first and counts the others.
    """
    if reasons:
        others = f"; {len(reasons) - 1} more cannot be read" if len(reasons) > 1 else ""
        raise ImageError(f"{reasons[0]}{others}; replace or remove what cannot be read")


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


def read_folder(
    root: str | Path,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, Samples]:
    """Read class folders, inside train/, val/ and test/ or directly under the root.

    A missing val/ (or valid/, validation/) is split off train, and so is test/ if `test_fraction` is not 0. Upper and
    lower case of these names are one; pictures in folders below a class folder are of that class.

    Args:
        root: The folder.
        val_fraction: Part of the given pictures that becomes val if there is no val/.
        test_fraction: Part of the given pictures that becomes test if there is no test/.
        seed: Decides what is split off.
        decoding: How the pictures will be decoded.

    Raises:
        ValueError: No pictures, one class only, an empty class folder, or a class that train does not have.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"dataset.root={root} is no folder; {FOLDER_LAYOUT}")
    folders = _split_folders(root)
    classes = [folder.name for folder in _class_folders(folders["train"])]
    if not classes:
        raise ValueError(f"{folders['train']}: no class folders; {FOLDER_LAYOUT}")
    if len(classes) == 1:
        _refuse_one_class_folder(root, folders["train"])
    pictures = {split: list(_walk_classes(root, folder, classes)) for split, folder in folders.items()}
    return assemble(classes, pictures, val_fraction, test_fraction, seed, decoding)


# What the readers share.


@dataclass(frozen=True)
class Picture:
    """A file and its target, before it is checked; `where` says for an error what named it."""

    path: Path
    name: str
    target: int
    where: str


@dataclass(frozen=True)
class FileReader:
    """Reads the picture file of an index."""

    paths: tuple[Path, ...]
    decoding: Decoding = DEFAULT_DECODING

    def __call__(self, index: int) -> Image.Image:
        """Read a picture, mode RGB."""
        return read_image(self.paths[index], self.decoding.max_pixels, self.decoding.background)


@dataclass(frozen=True)
class _TakenReader:
    reader: Callable[[int], Image.Image]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Image.Image:
        return self.reader(self.indices[index])


def assemble(
    classes: Sequence[str],
    pictures: Mapping[str, Sequence[Picture]],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    decoding: Decoding,
) -> dict[str, Samples]:
    """Make samples of the pictures of each split, refuse duplicates, split off what is missing."""
    real_folder = cache(os.path.realpath)  # to look it up for each picture would take half a minute for a million
    seen: dict[Path, Picture] = {}
    for picture in (picture for split in pictures.values() for picture in split):
        path = Path(os.path.realpath(picture.path)) if picture.path.is_symlink() else picture.path
        other = seen.setdefault(Path(real_folder(path.parent), path.name), picture)
        if other is not picture:
            raise ValueError(
                f"{picture.where}: {picture.name} is there twice, first at {other.where}; keep one of them"
            )
    splits = {}
    for split in (split for split in SPLITS if pictures.get(split)):
        rows = pictures[split]
        paths = tuple(row.path for row in rows)
        splits[split] = Samples(
            classes=tuple(classes),
            targets=tuple(row.target for row in rows),
            names=tuple(row.name for row in rows),
            reader=FileReader(paths, decoding),
            paths=paths,
        )
    return split_off(splits, val_fraction, test_fraction, seed)


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


def refuse_one_class(classes: Sequence[str], where: str) -> None:
    """Refuse what gives nothing to tell apart; `where` says what names the classes."""
    if len(classes) < 2:
        raise ValueError(f"{where}: one class only, {classes[0]!r}; add pictures of at least one more class")


def refuse_class(name: str, where: str, classes: Sequence[str]) -> NoReturn:
    """Refuse a class that train does not have, and say which it may have meant."""
    nearest = get_close_matches(name, classes, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "add pictures of it to train, or remove it"
    raise ValueError(f"{where}: class {name!r} is not among the {len(classes)} classes of train; {hint}")


# Folders.


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; a root without split folders is train itself."""
    found: dict[str, Path] = {}
    for folder in _class_folders(root):
        split = SPLIT_OF.get(folder.name.lower())
        if split in found:
            raise ValueError(f"{root} has both {found[split].name}/ and {folder.name}/; keep one of them")
        if split is not None:
            found[split] = folder
    if found and "train" not in found:
        raise ValueError(f"{root} has {', '.join(f'{f.name}/' for f in found.values())} but no train/; {FOLDER_LAYOUT}")
    return found or {"train": root}


def _class_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _refuse_one_class_folder(root: Path, folder: Path) -> NoReturn:
    """Say where the class folders are, if they are wrapped in another folder."""
    (only,) = _class_folders(folder)
    wrapped = _several_classes_below(only)
    if wrapped is None:
        advice = f"add a folder beside it for each other class, {folder}/<class>/<picture>"
    elif folder == root:
        advice = f"did you mean dataset.root={wrapped}?"
    else:
        advice = f"move the class folders of {wrapped} to {folder}"
    raise ValueError(f"{folder} has one class folder, {only.name}; {advice}")


def _several_classes_below(folder: Path) -> Path | None:
    """The first folder, down a chain of folders without pictures, that holds several class folders or a split."""
    while not any(entry.suffix.lower() in EXTENSIONS for entry in folder.iterdir()):
        below = _class_folders(folder)
        if len(below) > 1 or any(entry.name.lower() in SPLIT_OF for entry in below):
            return folder
        if not below:
            return None
        folder = below[0]
    return None


def _walk_classes(root: Path, folder: Path, classes: Sequence[str]) -> Iterator[Picture]:
    """All pictures in the class folders of one split, sorted by path."""
    for class_folder in _class_folders(folder):
        if class_folder.name not in classes:
            refuse_class(class_folder.name, str(class_folder), classes)
        paths = find_images(class_folder)
        if not paths:
            raise ValueError(f"{class_folder}: no pictures; add some or remove the folder. {FOLDER_LAYOUT}")
        target = classes.index(class_folder.name)
        for path in paths:
            yield Picture(path, path.relative_to(root).as_posix(), target, where=str(path))

"""Pictures with one class each, in folders; `tables.py` reads them from lists, `torchvision.py` those that have a name.

Every reader returns `dict[str, Samples]` with keys among train, val and test. The class map is made from train and
holds for all splits. Labels and paths are all checked here, at once; pictures are decoded later, one by one.

Shapes: H, W pixels.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NoReturn

from vpt.data.images import DEFAULT_DECODING, EXTENSIONS, Decoding, find_images
from vpt.data.samples import FileReader, Samples
from vpt.data.splits import SPLIT_OF, SPLITS, split_off

FOLDER_LAYOUT = "expected <root>/train/<class>/<picture> (and val/, test/), or <root>/<class>/<picture>"


def fruit_root() -> Path:
    """The folder of the fruit set that ships in the package: 14 classes, for `read_folder`.

    Example:
        >>> {split: len(samples) for split, samples in read_folder(fruit_root()).items()}
        {'train': 308, 'val': 112, 'test': 336}
    """
    return Path(__file__).parents[1] / "fruit"


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

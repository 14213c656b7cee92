"""Text files, paths, split names and classes, read and checked alike by all readers."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NoReturn, TypeVar

from vpt.data.images import Decoding
from vpt.data.samples import ClassificationSamples, FileReader
from vpt.data.splits import SPLIT_OF, SPLITS, split_off

Value = TypeVar("Value")


def read_text(path: Path) -> str:
    """The text of a file that must exist and be UTF-8, without a byte order mark, which spreadsheets write."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file that are not blank, stripped, each with "<path>, line <number>"."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(line.strip(), f"{path}, line {number}") for number, line in lines if line.strip()]


def to_numbers(values: Iterable[object]) -> list[float]:
    """Numbers, also where they are written as text; none at all if one of the values is no number."""
    try:
        return [value if type(value) is float else float(str(value)) for value in values]
    except ValueError:
        return []


def inside(root: Path, path: Path) -> Path | None:
    """The path without its dots; None if it leaves the root."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would also follow links)
    base = os.path.abspath(root)  # noqa: PTH100
    return root / absolute.relative_to(base) if absolute.is_relative_to(base) else None


def require_inside(root: Path, path: Path, where: str) -> Path:
    """The path without its dots; a `ValueError` at the place `where` if it leaves the root."""
    if (found := inside(root, path)) is None:
        raise ValueError(f"{where}: {path} is outside of root={root}; use paths inside of it")
    return found


def is_file(path: Path) -> bool:
    """Whether there is a file of this name; not if no file can have it, such as a name that is too long."""
    return os.path.isfile(path)  # noqa: PTH113  (Path.is_file() raises OSError)


def find_by_end(folders: Sequence[Path], name: str) -> Path | None:
    """The file or folder in one of these whose path is the longest end of a name that begins on another machine.

    For `C:/data/train/a.jpg` that is `train/a.jpg` in one of the folders, or else `a.jpg`.
    """
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    places = (folder.joinpath(*parts[start:]) for start in range(len(parts)) for folder in folders)
    return next((place for place in places if os.path.exists(place)), None)  # noqa: PTH110  (as above)


def by_split(entries: Iterable[tuple[str, Value]], where: str) -> dict[str, Value]:
    """Values of the entries named as a split; a `ValueError` if two are the same one, such as val and valid."""
    found: dict[str, tuple[str, Value]] = {}
    for name, value in entries:
        split = SPLIT_OF.get(name.lower())
        if split in found:
            raise ValueError(f"{where}: both {found[split][0]} and {name} are {split}; keep one of them")
        if split is not None:
            found[split] = name, value
    return {split: found[split][1] for split in SPLITS if split in found}


def require_train(root: Path, splits: Mapping[str, object], layout: str) -> None:
    """Refuse splits without train by a `ValueError` that names the expected layout."""
    if "train" not in splits:
        found = f"{', '.join(splits)} but no train" if splits else "nothing"
        raise ValueError(f"{root}: {found} found; expected {layout}")


def refuse_equal_names(classes: Sequence[str], where: str) -> None:
    """Refuse two classes of the same name by a `ValueError`; `where` names the file."""
    if equal := sorted(name for name, count in Counter(classes).items() if count > 1):
        raise ValueError(f"{where}: two classes are named {equal[0]!r}; rename one of them")


def refuse_one_class(classes: Sequence[str], where: str) -> None:
    """Refuse a data set of a single class; `where` names the source of the classes."""
    if len(classes) < 2:
        raise ValueError(f"{where}: one class only, {classes[0]!r}; add images of at least one more class")


def refuse_class(name: str, where: str, classes: Sequence[str]) -> NoReturn:
    """Refuse a class that train does not have, and suggest a similar one."""
    nearest = get_close_matches(name, classes, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "add images of it to train, or remove it"
    raise ValueError(f"{where}: class {name!r} is not among the {len(classes)} classes of train; {hint}")


@dataclass(frozen=True)
class ImageFile:
    """An unchecked image file and its target; `where` names its source in errors."""

    path: Path
    name: str
    target: int
    where: str


def assemble(
    classes: Sequence[str],
    files: Mapping[str, Sequence[ImageFile]],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    decoding: Decoding,
) -> dict[str, ClassificationSamples]:
    """Make samples of the image files of each split, refuse duplicates, and split off what is missing."""
    real_folder = cache(os.path.realpath)  # uncached it would take half a minute for a million images
    seen: dict[Path, ImageFile] = {}
    for file in (file for members in files.values() for file in members):
        path = Path(os.path.realpath(file.path)) if file.path.is_symlink() else file.path
        other = seen.setdefault(Path(real_folder(path.parent), path.name), file)
        if other is not file:
            raise ValueError(f"{file.where}: {file.name} is a duplicate, first at {other.where}; remove one")
    splits = {}
    for split in (split for split in SPLITS if files.get(split)):
        paths = tuple(file.path for file in files[split])
        splits[split] = ClassificationSamples(
            classes=tuple(classes),
            targets=tuple(file.target for file in files[split]),
            names=tuple(file.name for file in files[split]),
            reader=FileReader(paths, decoding),
            paths=paths,
        )
    return split_off(splits, val_fraction, test_fraction, seed)

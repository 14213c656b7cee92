"""Pictures with one class each: folders, list files (VTAB), CSV; `torchvision.py` reads the sets that have a name.

Every reader returns `dict[str, Samples]` with keys among train, val and test. The class map is made from train and
holds for all splits. Labels and paths are all checked here, at once; pictures are decoded later, one by one.

Shapes: H, W pixels.
"""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vpt.data.images import find_images, read_image
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
    """

    classes: tuple[str, ...]
    targets: tuple[int, ...]
    names: tuple[str, ...]
    reader: Callable[[int], Image.Image] = field(repr=False)

    def __post_init__(self) -> None:
        assert len(self.targets) == len(self.names)

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


def stratified_split(targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a fraction of each class: (indices to keep, indices held out), both ascending.

    A class of two or more keeps at least one and, if the fraction is not 0, has at least one held out.

    Args:
        targets: The class of each picture.
        fraction: In [0, 1).
        seed: Decides which pictures are held out.

    Raises:
        ValueError: The fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to hold out is {fraction}; allowed: 0 <= fraction < 1")
    held = set()
    for indices in _shuffled_by_class(targets, seed).values():
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
    by_class = _shuffled_by_class(samples.targets, seed)
    for target, name in enumerate(samples.classes):
        count = len(by_class.get(target, ()))
        if count < num:
            raise ValueError(f"class {name!r} has {count} train pictures, fewer than num_per_class={num}; lower it")
    return samples.take(sorted(i for indices in by_class.values() for i in indices[:num]))


def read_folder(
    root: str | Path, val_fraction: float = 0.2, test_fraction: float = 0.0, seed: int = 0
) -> dict[str, Samples]:
    """Read class folders, inside train/, val/ and test/ or directly under the root.

    A missing val/ (or valid/, validation/) is split off train, and so is test/ if `test_fraction` is not 0.

    Args:
        root: The folder.
        val_fraction: Part of the given pictures that becomes val if there is no val/.
        test_fraction: Part of the given pictures that becomes test if there is no test/.
        seed: Decides what is split off.

    Raises:
        ValueError: No pictures, an empty class folder, or a class that train does not have.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"dataset.root={root} is no folder; {FOLDER_LAYOUT}")
    folders = _split_folders(root)
    classes = [folder.name for folder in _class_folders(folders["train"])]
    if not classes:
        raise ValueError(f"{folders['train']}: no class folders; {FOLDER_LAYOUT}")
    pictures = {split: list(_walk_classes(root, folder, classes)) for split, folder in folders.items()}
    return _assemble(classes, pictures, val_fraction, test_fraction, seed)


def read_list(
    root: str | Path,
    train: str = "train800.txt",
    val: str | None = "val200.txt",
    test: str | None = "test.txt",
    classes: Sequence[str] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> dict[str, Samples]:
    """Read list files of lines `relative/path label`, labels counting from 0: the VTAB-1k layout of SSF and NOAH.

    Args:
        root: The folder of the lists; paths in them start here and stay inside.
        train: Name of the list for train.
        val: Name of the list for val; null splits it off train.
        test: Name of the list for test; null means no test split.
        classes: Class names by label; without them the labels of train are counted, and the names are "0", "1", ...
        val_fraction: Part of train that becomes val if `val` is null.
        seed: Decides what is split off.

    Raises:
        ValueError: A list or a picture is missing, or a line is wrong; names the file and the line.
    """
    root = Path(root)
    lists = {split: name for split, name in zip(SPLITS, (train, val, test), strict=True) if name is not None}
    pictures = {split: list(_read_lines(root, root / name)) for split, name in lists.items()}
    names = list(classes) if classes else [str(i) for i in range(1 + max(p.target for p in pictures["train"]))]
    for picture in (picture for split in pictures.values() for picture in split):
        if picture.target >= len(names):
            raise ValueError(
                f"{picture.where}: label {picture.target}, but there are {len(names)} classes, 0 to {len(names) - 1}, "
                f"by {'dataset.classes' if classes else train}; correct the label"
            )
    return _assemble(names, pictures, val_fraction, 0.0, seed)


def read_csv(
    path: str | Path,
    root: str | Path | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> dict[str, Samples]:
    """Read a CSV file with the columns path, label and, if you like, split.

    A label is a name or a whole number. The classes are the labels of train, sorted, numbers by value.

    Args:
        path: The file.
        root: Where the paths start, and stay inside; by default the folder of the file.
        val_fraction: Part of the given pictures that becomes val if no row is val.
        test_fraction: Part of the given pictures that becomes test if no row is test.
        seed: Decides what is split off.

    Raises:
        ValueError: A column or a picture is missing, or a row is wrong; names the file and the row.
    """
    path = Path(path)
    rows = list(_read_rows(path, Path(root) if root is not None else path.parent))
    labels = {row.label for row in rows if row.split == "train"}
    if not labels:
        raise ValueError(f"{path}: no train rows; the column split holds train, val or test, or is left out")
    are_numbers = all(label.isascii() and label.isdecimal() for label in labels)
    classes = sorted(labels, key=int) if are_numbers else sorted(labels)
    targets = {label: target for target, label in enumerate(classes)}
    pictures: dict[str, list[_Picture]] = defaultdict(list)
    for row in rows:
        if row.label not in targets:
            _refuse_class(row.label, row.picture.where, classes)
        pictures[row.split].append(replace(row.picture, target=targets[row.label]))
    return _assemble(classes, pictures, val_fraction, test_fraction, seed)


# What the readers share.


@dataclass(frozen=True)
class _Picture:
    """A file and its target, before it is checked; `where` says for an error what named it."""

    path: Path
    name: str
    target: int
    where: str


@dataclass(frozen=True)
class FileReader:
    """Reads the picture file of an index."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Image.Image:
        """Read a picture, mode RGB."""
        return read_image(self.paths[index])


@dataclass(frozen=True)
class _TakenReader:
    reader: Callable[[int], Image.Image]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Image.Image:
        return self.reader(self.indices[index])


def _assemble(
    classes: Sequence[str],
    pictures: Mapping[str, Sequence[_Picture]],
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, Samples]:
    """Make samples of the pictures of each split, refuse duplicates, split off what is missing."""
    seen: dict[str, _Picture] = {}
    for picture in (picture for split in pictures.values() for picture in split):
        other = seen.setdefault(os.path.normpath(picture.path), picture)
        if other is not picture:
            raise ValueError(
                f"{picture.where}: {picture.name} is there twice, first at {other.where}; keep one of them"
            )
    splits = {}
    for split in (split for split in SPLITS if pictures.get(split)):
        rows = pictures[split]
        splits[split] = Samples(
            classes=tuple(classes),
            targets=tuple(row.target for row in rows),
            names=tuple(row.name for row in rows),
            reader=FileReader(tuple(row.path for row in rows)),
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
            keep, held = stratified_split(train.targets, fraction / rest, stable_seed(seed, split))
            if not held:
                raise ValueError(
                    f"no class has two pictures, so no {split} can be split off; add pictures or set "
                    f"dataset.{split}_fraction=0"
                )
            result["train"], result[split] = train.take(keep), train.take(held)
            rest -= fraction
    return {split: result[split] for split in SPLITS if split in result}


def _shuffled_by_class(targets: Sequence[int], seed: int) -> dict[int, list[int]]:
    """Indices of each class in an order that depends on seed and index only."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(targets)), key=lambda index: stable_seed(seed, index)):
        by_class[targets[index]].append(index)
    return by_class


def _refuse_class(name: str, where: str, classes: Sequence[str]) -> NoReturn:
    nearest = get_close_matches(name, classes, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "add pictures of it to train, or remove it"
    raise ValueError(f"{where}: class {name!r} is not among the {len(classes)} classes of train; {hint}")


def _path_inside(root: Path, relative: str, where: str) -> Path:
    """The path of a picture that a list names; it must exist and may not leave the root."""
    path = Path(os.path.abspath(root / relative))  # noqa: PTH100  (resolve() would also follow links)
    if not path.is_relative_to(os.path.abspath(root)):  # noqa: PTH100
        raise ValueError(f"{where}: {relative!r} leaves the folder {root}; write paths relative to it")
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {path}; check dataset.root")
    return path


def _read_text(path: Path, keys: str) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; check {keys}")
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


# Folders.


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; a root without split folders is train itself."""
    found: dict[str, Path] = {}
    for name, split in SPLIT_OF.items():
        if (root / name).is_dir():
            if split in found:
                raise ValueError(f"{root} has both {found[split].name}/ and {name}/; keep one of them")
            found[split] = root / name
    if found and "train" not in found:
        raise ValueError(f"{root} has {', '.join(f'{f.name}/' for f in found.values())} but no train/; {FOLDER_LAYOUT}")
    return found or {"train": root}


def _class_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _walk_classes(root: Path, folder: Path, classes: Sequence[str]) -> Iterator[_Picture]:
    """All pictures in the class folders of one split, sorted by path."""
    for class_folder in _class_folders(folder):
        if class_folder.name not in classes:
            _refuse_class(class_folder.name, str(class_folder), classes)
        paths = find_images(class_folder)
        if not paths:
            raise ValueError(f"{class_folder}: no pictures; add some or remove the folder. {FOLDER_LAYOUT}")
        target = classes.index(class_folder.name)
        for path in paths:
            yield _Picture(path, path.relative_to(root).as_posix(), target, where=str(path))


# List files.


def _read_lines(root: Path, path: Path) -> Iterator[_Picture]:
    """The lines of a list file; blank lines are skipped."""
    lines = _read_text(path, "dataset.root, and the names dataset.train, val and test").split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: no lines; write `relative/path label`, one picture a line")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _read_line(root, line, where=f"{path}, line {number}")


def _read_line(root: Path, line: str, where: str) -> _Picture:
    name, _, label = line.strip().rpartition(" ")
    name = name.strip()
    if not name or not (label.isascii() and label.isdecimal()):
        raise ValueError(f"{where}: {line!r} is not `relative/path label` with a whole number from 0 as label")
    return _Picture(_path_inside(root, name, where), name, int(label), where)


# CSV.


_COLUMNS = {"path": "", "label": "", "split": "train"}  # and what an empty or missing cell means


@dataclass(frozen=True)
class _Row:
    picture: _Picture
    label: str
    split: str


def _read_rows(path: Path, root: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(_read_text(path, "dataset.path")))
    header = list(reader.fieldnames or [])
    for column in ("path", "label"):
        if column not in header:
            raise ValueError(f"{path}: no column {column!r}, only {header}; the first row names the columns")
    for row in reader:
        yield _read_row(root, row, where=f"{path}, row {reader.line_num}")


def _read_row(root: Path, row: Mapping[str, str | None], where: str) -> _Row:
    name, label, split = ((row.get(column) or default).strip() for column, default in _COLUMNS.items())
    if not name or not label:
        raise ValueError(f"{where}: path {name!r} and label {label!r}; both must be filled")
    if split not in SPLIT_OF:
        raise ValueError(f"{where}: split {split!r}; allowed: train, val, test")
    return _Row(_Picture(_path_inside(root, name, where), name, -1, where), label, SPLIT_OF[split])

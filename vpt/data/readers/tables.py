"""Pictures listed in a file: list files (VTAB) and CSV."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vpt.data.images import DEFAULT_DECODING, Decoding
from vpt.data.readers.folder import Picture, assemble, refuse_class, refuse_one_class
from vpt.data.samples import Samples
from vpt.data.splits import SPLIT_OF, SPLITS

MAX_DIGITS = 9  # of a label in a list file; Python refuses to read numbers of thousands of digits


def read_list(
    root: str | Path,
    train: str = "train800.txt",
    val: str | None = "val200.txt",
    test: str | None = "test.txt",
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, Samples]:
    """Read list files of lines `relative/path label`: the VTAB-1k layout of SSF and NOAH.

    The labels of all lists together are 0, 1, ... without a gap, and are the names of the classes. Train may lack some:
    of the 397 classes of SUN397, VTAB's 800 train pictures show 309.

    Args:
        root: The folder of the lists; paths in them start here and stay inside.
        train: Name of the list for train.
        val: Name of the list for val; null splits it off train.
        test: Name of the list for test; null splits it off train, if `test_fraction` is not 0.
        val_fraction: Part of the given train that becomes val if `val` is null.
        test_fraction: Part of the given train that becomes test if `test` is null.
        seed: Decides what is split off.
        decoding: How the pictures will be decoded.

    Raises:
        ValueError: A list, a picture or a label is missing, or a line is wrong; names the file and the line.
    """
    root = Path(root)
    lists = {split: name for split, name in zip(SPLITS, (train, val, test), strict=True) if name is not None}
    pictures = {split: list(_read_lines(root, root / name)) for split, name in lists.items()}
    refuse_one_class(sorted({str(picture.target) for picture in pictures["train"]}), str(root / train))
    classes = _count_labels([picture for split in pictures.values() for picture in split])
    return assemble(classes, pictures, val_fraction, test_fraction, seed, decoding)


def read_csv(
    path: str | Path,
    root: str | Path | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, Samples]:
    """Read a CSV file with the columns path, label and, if you like, split.

    A label is a name or a whole number. The classes are the labels of train, sorted, numbers by value.

    Args:
        path: The file.
        root: Where the paths start, and stay inside; by default the folder of the file.
        val_fraction: Part of the given pictures that becomes val if no row is val.
        test_fraction: Part of the given pictures that becomes test if no row is test.
        seed: Decides what is split off.
        decoding: How the pictures will be decoded.

    Raises:
        ValueError: A column or a picture is missing, or a row is wrong; names the file and the row.
    """
    path = Path(path)
    rows = list(_read_rows(path, Path(root) if root is not None else path.parent))
    labels = {row.label for row in rows if row.split == "train"}
    if not labels:
        raise ValueError(f"{path}: no train rows; the column split holds train, val or test, or is left out")
    refuse_one_class(sorted(labels), str(path))
    are_numbers = all(label.isascii() and label.isdecimal() for label in labels)
    classes = sorted(labels, key=int) if are_numbers else sorted(labels)
    targets = {label: target for target, label in enumerate(classes)}
    pictures: dict[str, list[Picture]] = defaultdict(list)
    for row in rows:
        if row.label not in targets:
            refuse_class(row.label, row.picture.where, classes)
        pictures[row.split].append(replace(row.picture, target=targets[row.label]))
    return assemble(classes, pictures, val_fraction, test_fraction, seed, decoding)


# What both share.


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


# List files.


def _count_labels(pictures: Sequence[Picture]) -> list[str]:
    """The names of the classes "0", "1", ...; a gap would be a class without a picture, or a wrong label after it."""
    labels = {picture.target for picture in pictures}
    for label in range(len(labels)):
        if label not in labels:
            beyond = next(picture for picture in pictures if picture.target > label)
            raise ValueError(
                f"{beyond.where}: label {beyond.target}, but no picture of any list has label {label}; "
                "correct it, or count the labels from 0 without a gap"
            )
    return [str(label) for label in range(len(labels))]


def _read_lines(root: Path, path: Path) -> Iterator[Picture]:
    """The lines of a list file; blank lines are skipped."""
    lines = _read_text(path, "dataset.root, and the names dataset.train, val and test").split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: no lines; write `relative/path label`, one picture a line")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _read_line(root, line, where=f"{path}, line {number}")


def _read_line(root: Path, line: str, where: str) -> Picture:
    name, _, label = line.strip().rpartition(" ")
    name = name.strip()
    if not name or not (label.isascii() and label.isdecimal() and len(label) <= MAX_DIGITS):
        raise ValueError(f"{where}: {line!r} is not `relative/path label` with a whole number from 0 as label")
    return Picture(_path_inside(root, name, where), name, int(label), where)


# CSV.


_COLUMNS = {"path": "", "label": "", "split": "train"}  # and what an empty or missing cell means


@dataclass(frozen=True)
class _Row:
    picture: Picture
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
    if split.lower() not in SPLIT_OF:
        raise ValueError(f"{where}: split {split!r}; allowed: train, val, test")
    return _Row(Picture(_path_inside(root, name, where), name, -1, where), label, SPLIT_OF[split.lower()])

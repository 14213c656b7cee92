"""Readers of images listed in a file: list files (VTAB) and CSV."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vpt.data.images import DEFAULT_DECODING, Decoding
from vpt.data.readers.annotation_files import (
    ImageFile,
    assemble,
    numbered_lines,
    read_text,
    refuse_class,
    refuse_one_class,
    require_inside,
)
from vpt.data.samples import ClassificationSamples
from vpt.data.splits import SPLIT_OF, SPLITS

MAX_DIGITS = 9  # of a label in a list file; Python refuses to read numbers of thousands of digits
_COLUMNS = {"path": "", "label": "", "split": "train"}  # and the value of an empty or missing cell


def read_list(
    root: str | Path,
    train: str = "train800.txt",
    val: str | None = "val200.txt",
    test: str | None = "test.txt",
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, ClassificationSamples]:
    """Read list files of lines `relative/path label`: the VTAB-1k layout of SSF and NOAH.

    The lists `train`, `val` and `test` are in `root`; paths in them are relative to it and stay inside. A list that is
    null is split off train. The labels of all lists together are 0, 1, ... without a gap, and are the names of the
    classes. Train may lack some: of the 397 classes of SUN397, VTAB's 800 train images show 309. The other parameters
    are those of `read_folder`.

    Raises:
        ValueError: A list, an image or a label is missing, or a line is wrong; names the file and the line.
    """
    root = Path(root)
    lists = {split: name for split, name in zip(SPLITS, (train, val, test), strict=True) if name is not None}
    files = {split: _read_list_file(root, root / name) for split, name in lists.items()}
    refuse_one_class(sorted({str(file.target) for file in files["train"]}), str(root / train))
    classes = _count_labels([file for members in files.values() for file in members])
    return assemble(classes, files, val_fraction, test_fraction, seed, decoding)


def read_csv(
    path: str | Path,
    root: str | Path | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, ClassificationSamples]:
    """Read a CSV file with the columns path, label and, optionally, split.

    A label is a name or a whole number. The classes are the labels of train, sorted, numbers by value. Paths are
    relative to `root`, by default the folder of the file, and stay inside. The other parameters are those of
    `read_folder`.

    Raises:
        ValueError: A column or an image is missing, or a row is wrong; names the file and the row.
    """
    path = Path(path)
    rows = list(_read_rows(path, Path(root) if root is not None else path.parent))
    labels = {label for _, label, split in rows if split == "train"}
    if not labels:
        raise ValueError(f"{path}: no train rows; the column split holds train, val or test, or is left out")
    refuse_one_class(sorted(labels), str(path))
    are_numbers = all(label.isascii() and label.isdecimal() for label in labels)
    classes = sorted(labels, key=int) if are_numbers else sorted(labels)
    targets = {label: target for target, label in enumerate(classes)}
    files: dict[str, list[ImageFile]] = defaultdict(list)
    for file, label, split in rows:
        if label not in targets:
            refuse_class(label, file.where, classes)
        files[split].append(replace(file, target=targets[label]))
    return assemble(classes, files, val_fraction, test_fraction, seed, decoding)


def _listed_file(root: Path, name: str, target: int, where: str) -> ImageFile:
    """An image that a list names; it must exist inside the root."""
    path = require_inside(root, root / name, where)
    if not path.is_file():
        raise ValueError(f"{where}: no such file {path}; check root={root}")
    return ImageFile(path, name, target, where)


def _count_labels(files: Sequence[ImageFile]) -> list[str]:
    """The names of the classes "0", "1", ...; a gap would be a class without an image, or a wrong label after it."""
    labels = {file.target for file in files}
    for label in range(len(labels)):
        if label not in labels:
            beyond = next(file for file in files if file.target > label)
            gap = f"label {beyond.target}, but no image of any list has label {label}"
            raise ValueError(f"{beyond.where}: {gap}; correct it, or count the labels from 0 without a gap")
    return [str(label) for label in range(len(labels))]


def _read_list_file(root: Path, path: Path) -> list[ImageFile]:
    files = []
    for line, where in numbered_lines(path):
        name, _, label = line.rpartition(" ")
        name = name.strip()
        if not name or not (label.isascii() and label.isdecimal() and len(label) <= MAX_DIGITS):
            raise ValueError(f"{where}: {line!r} is not `relative/path label` with a whole number from 0 as label")
        files.append(_listed_file(root, name, int(label), where))
    if not files:
        raise ValueError(f"{path}: no lines; write `relative/path label`, one image per line")
    return files


def _read_rows(path: Path, root: Path) -> Iterator[tuple[ImageFile, str, str]]:
    """The file, without its target, the label and the split of each row."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    header = list(reader.fieldnames or [])
    for column in ("path", "label"):
        if column not in header:
            raise ValueError(f"{path}: no column {column!r}, only {header}; the first row names the columns")
    for row in reader:
        where = f"{path}, row {reader.line_num}"
        name, label, split = ((row.get(column) or default).strip() for column, default in _COLUMNS.items())
        if not name or not label:
            raise ValueError(f"{where}: path {name!r} and label {label!r}; both must be filled")
        if split.lower() not in SPLIT_OF:
            raise ValueError(f"{where}: split {split!r}; allowed: {', '.join(SPLITS)}")
        yield _listed_file(root, name, -1, where), label, SPLIT_OF[split.lower()]

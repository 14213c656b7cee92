"""Readers of images listed in a file: list files (VTAB) and CSV."""

import csv
import io
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from vpt.data.images import DEFAULT_DECODING, Decoding
from vpt.data.readers.annotation_files import (
    ImageFile,
    Note,
    assemble,
    compose,
    numbered_lines,
    quote,
    read_text,
    refuse_class,
    refuse_one_class,
    require_inside,
)
from vpt.data.samples import ClassificationSamples
from vpt.data.splits import SPLITS, Division, split_named
from vpt.storage.text import plain_cell

MAX_DIGITS = 9  # of a label in a list file; Python refuses to read numbers of thousands of digits
MAX_PATH = 4096  # characters of a path
MAX_TEXT = 1000  # characters of a label, the most that a task file takes


class _Division(TypedDict, total=False):
    """`Division` without the group."""

    val_fraction: float
    test_fraction: float | None
    seed: int
    folds: int | None
    fold: int


def read_list(
    root: str | Path,
    train: str = "train800.txt",
    val: str | None = "val200.txt",
    test: str | None = "test.txt",
    decoding: Decoding = DEFAULT_DECODING,
    *,
    notes: list[Note] | None = None,
    **division: Unpack[Division],
) -> dict[str, ClassificationSamples]:
    """Read list files of lines `relative/path label`: the VTAB-1k layout of SSF and NOAH.

    The lists `train`, `val` and `test` are in `root`; paths in them are relative to it and stay inside. A list that is
    null is split off train. The labels of all lists together are 0, 1, ... without a gap, and are the names of the
    classes. Train may lack some: of the 397 classes of SUN397, VTAB's 800 train images show 309. For the other
    parameters see `read_folder` and `Division`.

    Raises:
        ValueError: A list, an image or a label is missing, or a line is wrong; names the file and the line.
    """
    root = Path(root)
    lists = {split: name for split, name in zip(SPLITS, (train, val, test), strict=True) if name is not None}
    files = {split: _read_list_file(root, root / name) for split, name in lists.items()}
    refuse_one_class(sorted({str(file.target) for file in files["train"]}), str(root / train))
    classes = _count_labels([file for members in files.values() for file in members])
    return assemble(classes, files, decoding, [] if notes is None else notes, **division)


def read_csv(
    path: str | Path,
    root: str | Path | None = None,
    decoding: Decoding = DEFAULT_DECODING,
    *,
    notes: list[Note] | None = None,
    group: str | None = None,
    **division: Unpack[_Division],
) -> dict[str, ClassificationSamples]:
    """Read a table with the columns path, label and, optionally, split, separated by commas, semicolons or tabs.

    A label is a name or a whole number. The classes are the labels of train, composed (NFC) and sorted, numbers by
    value. Paths are relative to `root`, by default the folder of the file, and stay inside; a backslash separates
    folders if no file has the name with it. `group` is a column. For the other parameters see `read_folder` and
    `Division`.

    Raises:
        ValueError: A column or an image is missing, or a row is wrong; names the file and the row.
    """
    path, notes = Path(path), [] if notes is None else notes
    rows = list(_read_rows(path, Path(root) if root is not None else path.parent, group, notes))
    composed = compose({label for _, label, _ in rows}, f"labels of {path}", notes)
    labels = {composed[label] for _, label, split in rows if split in ("train", None)}
    if not labels:
        raise ValueError(f"{path}: no train rows; the column split holds train, val or test, or is left out")
    refuse_one_class(sorted(labels), str(path))
    _note_several_labels(path, labels, notes)
    are_numbers = all(label.isascii() and label.isdecimal() for label in labels)
    classes = sorted(labels, key=_by_value if are_numbers else None)
    targets = {label: target for target, label in enumerate(classes)}
    files: dict[str, list[ImageFile]] = defaultdict(list)
    for file, given, split in rows:
        if (label := composed[given]) not in targets:
            refuse_class(label, file.where, classes)
        files[split or "train"].append(replace(file, target=targets[label]))
    names_splits = any(split is not None for _, _, split in rows)
    return assemble(classes, files, decoding, notes, names_splits=names_splits, **division)


def _by_value(number: str) -> tuple[int, str, str]:
    """A sorting key; `int` refuses numbers of thousands of digits."""
    digits = number.lstrip("0")
    return len(digits), digits, number


def _note_several_labels(path: Path, labels: set[str], notes: list[Note]) -> None:
    """Note labels such as "cat|dog", which are classes of their own here."""
    found = []
    for label in sorted(labels):
        parts = next(([part.strip() for part in label.split(sign)] for sign in "|;,+&/" if sign in label), [])
        if len(parts) > 1 and all(parts) and ("|" in label or labels.issuperset(parts)):
            found.append(label)
    if found:
        what = f"labels of {path} that look like several, each read as a class of its own: an image has one class"
        notes.append(Note("several_labels", what, tuple(found)))


def _listed_file(root: Path, name: str, target: int, where: str, group: str | None = None) -> ImageFile:
    """An image that a list names; it must exist inside the root."""
    if len(name) > MAX_PATH:
        raise ValueError(f"{where}: {quote(name)} has {len(name):,} characters and is no path")
    for spelling in _spellings(name):
        path = require_inside(root, root / spelling, where)
        if path.is_file():
            return ImageFile(path, spelling, target, where, group)
    raise ValueError(f"{where}: no such file {root / name}; check root={root}")


def _spellings(name: str) -> Iterator[str]:
    """The name, and what the file may be called: names are decomposed on macOS, and Windows writes backslashes."""
    yield name
    for form in ("NFC", "NFD"):
        yield unicodedata.normalize(form, name)
    yield name.replace("\\", "/")


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
            raise ValueError(f"{where}: {quote(line)} is not `relative/path label` with a whole number from 0 as label")
        files.append(_listed_file(root, name, int(label), where))
    if not files:
        raise ValueError(f"{path}: no lines; write `relative/path label`, one image per line")
    return files


def _read_rows(
    path: Path, root: Path, group: str | None, notes: list[Note]
) -> Iterator[tuple[ImageFile, str, str | None]]:
    """The file, without its target, the label and the split of each row, None where it states none."""
    text = read_text(path)
    columns = ("path", "label", *(() if group is None else (group,)))
    headers = {sign: next(csv.reader([text.partition("\n")[0]], delimiter=sign), []) for sign in ",;\t"}
    delimiter = next((sign for sign, header in headers.items() if set(columns) <= set(header)), ",")
    for column in columns:
        if column not in headers[delimiter]:
            found = f"only {quote(headers[delimiter])}; the first row names the columns"
            raise ValueError(f"{path}: no column {column!r}, {found}")
    if delimiter != ",":
        notes.append(Note("delimiter", f"columns of {path} separated by {delimiter!r}"))
    backslashes = 0
    for where, row in _numbered_rows(path, csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)):
        name, label, split = (plain_cell((row.get(column) or "").strip()) for column in ("path", "label", "split"))
        if not name or not label:
            raise ValueError(f"{where}: path {quote(name)} and label {quote(label)}; both must be filled")
        if len(label) > MAX_TEXT:
            raise ValueError(f"{where}: label {quote(label)} has {len(label):,} characters, more than {MAX_TEXT:,}")
        if split and split_named(split) is None:
            raise ValueError(f"{where}: split {quote(split)}; allowed: {', '.join(SPLITS)}")
        if group is not None and not row[group]:
            raise ValueError(f"{where}: column {group!r} is empty; each image needs a group")
        file = _listed_file(root, name, -1, where, row[group] if group is not None else None)
        backslashes += file.name != name and "\\" in name
        yield file, label, split_named(split)
    if backslashes:
        notes.append(Note("backslashes", f"paths of {path} in which backslashes separate folders: {backslashes:,}"))


def _numbered_rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table, each with "<path>, row <number>"; a `ValueError` if the text is no table."""
    start = 2
    try:
        for row in reader:
            yield f"{path}, row {reader.line_num}", row
            start = reader.line_num + 1
    except csv.Error as error:  # no ValueError
        raise ValueError(f"{path}, row {start}: {error}; is a quotation mark left open?") from error

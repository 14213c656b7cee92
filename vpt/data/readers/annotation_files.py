"""Text files, paths, split names and classes, read and checked alike by all readers."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import NoReturn, TypeVar, Unpack

from vpt.data.images import Decoding
from vpt.data.samples import ClassificationSamples, FileReader, SamplesT
from vpt.data.splits import SPLITS, Division, divide, split_named

NUM_SHOWN = 5  # names of a note
MAX_DEPTH = 20  # folders of a path, so that a name of thousands of parts is not looked for thousands of times
MAX_COMPARED = 1000  # class names that are compared with a wrong one

Value = TypeVar("Value")

_quotes = Repr()
_quotes.maxstring, _quotes.maxother, _quotes.maxlist = 100, 100, 10


def quote(value: object) -> str:
    """A text or a list as a message shows it: quoted, and cut in the middle where it is long."""
    return _quotes.repr(value)


@dataclass(frozen=True)
class Note:
    """Something that a reader ignored, guessed or changed; the summary of a run and the doctor report it."""

    code: str  # one word, stable for programs
    message: str
    names: tuple[str, ...] = ()  # the files, folders or labels concerned

    def __str__(self) -> str:
        rest = len(self.names) - NUM_SHOWN
        shown = ", ".join(map(quote, self.names[:NUM_SHOWN])) + (f" and {rest:,} more" if rest > 0 else "")
        return f"{self.message}: {shown}" if shown else self.message


def compose(names: Iterable[str], what: str, notes: list[Note]) -> dict[str, str]:
    """Class names in Unicode's composed form (NFC), by the given name, so that equal names are one class; noted."""
    composed = {name: unicodedata.normalize("NFC", name) for name in names}
    if changed := [name for name, new in composed.items() if name != new]:
        notes.append(Note("composed", f"{what} changed to Unicode's composed form (NFC)", tuple(sorted(changed))))
    return composed


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

    For `C:/data/train/a.jpg` that is `train/a.jpg` in one of the folders, or else `a.jpg`; at most `MAX_DEPTH` parts.
    """
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")][-MAX_DEPTH:]
    places = (folder.joinpath(*parts[start:]) for start in range(len(parts)) for folder in folders)
    return next((place for place in places if os.path.exists(place)), None)  # noqa: PTH110  (as above)


def by_split(entries: Iterable[tuple[str, Value]], where: str) -> dict[str, Value]:
    """Values of the entries named as a split; a `ValueError` if two are the same one, such as val and valid."""
    found: dict[str, tuple[str, Value]] = {}
    for name, value in entries:
        split = split_named(name)
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
        raise ValueError(f"{where}: two classes are named {quote(equal[0])}; rename one of them")


def refuse_one_class(classes: Sequence[str], where: str) -> None:
    """Refuse a data set of a single class; `where` names the source of the classes."""
    if len(classes) < 2:
        raise ValueError(f"{where}: one class only, {quote(classes[0])}; add images of at least one more class")


def refuse_class(name: str, where: str, classes: Sequence[str]) -> NoReturn:
    """Refuse a class that train does not have, and suggest a similar one."""
    nearest = get_close_matches(name, classes[:MAX_COMPARED], n=1)
    hint = f"did you mean {quote(nearest[0])}?" if nearest else "add images of it to train, or remove it"
    raise ValueError(f"{where}: class {quote(name)} is not among the {len(classes)} classes of train; {hint}")


@dataclass(frozen=True)
class ImageFile:
    """An unchecked image file and its target; `where` names its source in errors."""

    path: Path
    name: str
    target: int
    where: str
    group: str | None = None


def assemble(
    classes: Sequence[str],
    files: Mapping[str, Sequence[ImageFile]],
    decoding: Decoding,
    notes: list[Note],
    *,
    names_splits: bool = True,
    **division: Unpack[Division],
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
            groups=tuple(file.group for file in files[split] if file.group is not None),
        )
    return divide_aloud(splits, notes, names_splits=names_splits, **division)


def divide_aloud(
    splits: Mapping[str, SamplesT],
    notes: list[Note],
    *,
    names_splits: bool = True,
    **division: Unpack[Division],
) -> dict[str, SamplesT]:
    """As `divide`; what was split off train, and groups that the data themselves have in two splits, are noted."""
    divided = divide(splits, names_splits=names_splits, **division)
    if made := [split for split in divided if split not in splits]:
        by = f"fold {division.get('fold', 0)} of {division['folds']}, " if division.get("folds") else ""
        notes.append(Note("split_off", f"split off train ({by}seed {division.get('seed', 0)})", tuple(made)))
    train = set(divided["train"].groups)
    for split in ("val", "test"):
        if split in divided and (shared := train & set(divided[split].groups)):
            notes.append(Note("shared_groups", f"groups that are in train and in {split}", tuple(sorted(shared))))
    return divided

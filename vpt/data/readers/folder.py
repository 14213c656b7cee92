"""Reader of images in class folders."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Unpack

from vpt.data.image_files import describe_unread, find_images, is_ignored
from vpt.data.images import DEFAULT_DECODING, EXTENSIONS, Decoding
from vpt.data.readers.annotation_files import (
    ImageFile,
    Note,
    assemble,
    by_split,
    compose,
    quote,
    refuse_class,
    require_train,
)
from vpt.data.samples import ClassificationSamples
from vpt.data.splits import Division, split_named

FOLDER_LAYOUT = "<root>/train/<class>/<image> (also val/, test/), or <root>/<class>/<image>"


def fruit_root() -> Path:
    """The folder of the fruit data set of the package: 14 classes, for `read_folder`.

    Example:
        >>> {split: len(samples) for split, samples in read_folder(fruit_root()).items()}
        {'train': 308, 'val': 112, 'test': 336}
    """
    return Path(__file__).parents[1] / "fruit"


def read_folder(
    root: str | Path,
    decoding: Decoding = DEFAULT_DECODING,
    *,
    layout: str = "auto",
    notes: list[Note] | None = None,
    **division: Unpack[Division],
) -> dict[str, ClassificationSamples]:
    """Read class folders, inside train/, val/ and test/ or directly in the root.

    The folders of splits may have other usual names, such as Training/, valid/, dev/ or test_set/. Images in subfolders
    of a class folder belong to that class. Class names are composed (NFC). What is ignored or split off is added to
    `notes`. `layout` decides what a root with other folders beside train/ is: "splits" ignores them, "classes" reads
    all as classes. For the other parameters see `Division`.

    Raises:
        ValueError: No images, one class only, an empty class folder, a class that train does not have, a name that is
            not UTF-8, or folders that may be both splits and classes.
    """
    root, notes = Path(root), [] if notes is None else notes
    if not root.is_dir():
        raise ValueError(f"root={root} is no folder; expected {FOLDER_LAYOUT}")
    folders = _split_folders(root, layout, notes)
    numbers = {name: target for target, name in enumerate(sorted(_class_folders(folders["train"], notes)))}
    classes = list(numbers)
    if not classes:
        left_out: list[Path] = []
        found = find_images(folders["train"], left_out)
        why = f"; {describe_unread(left_out)}" if left_out and not found else ""
        raise ValueError(f"{folders['train']}: no class folders; expected {FOLDER_LAYOUT}{why}")
    if len(classes) == 1:
        _refuse_one_class_folder(root, folders["train"])
    reading = _FolderReading(root, numbers, notes)
    files = {split: list(reading.find_files(folder)) for split, folder in folders.items()}
    reading.add_notes(folders)
    is_flat = folders == {"train": root}
    return assemble(classes, files, decoding, notes, names_splits=not is_flat, **division)


def _split_folders(root: Path, layout: str, notes: list[Note]) -> dict[str, Path]:
    """The folder of each split; the root itself for train if there are none."""
    below = _subfolders(root)
    named = [(folder.name, folder) for folder in below if split_named(folder.name)]
    others = [folder for folder in below if not split_named(folder.name)]
    if layout == "classes" or not named:
        return {"train": root}
    found = {split_named(name) for name, _ in named}
    if layout == "auto" and not ("train" in found and len(found) > 1):
        beside = [folder.name for folder in others if find_images(folder)]
        if beside:
            raise ValueError(
                f"{root}: are {quote([name for name, _ in named])} splits, or classes as {quote(beside)}? Type "
                "layout=splits to ignore the others, or layout=classes to read all of them as classes"
            )
    if others:
        what = f"folders beside {named[0][0]}/ that are no split, ignored"
        notes.append(Note("ignored_folders", what, tuple(folder.name for folder in others)))
    folders = by_split(named, str(root))
    require_train(root, folders, FOLDER_LAYOUT)
    for split in [split for split, folder in folders.items() if split != "train" and not _subfolders(folder)]:
        folder = folders.pop(split)
        what = f"{len(find_images(folder)):,} images without class folders, not used as {split}"
        notes.append(Note("unlabelled", f"{what}; python -m vpt.predict input={folder} predicts them", (folder.name,)))
    return folders


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_ignored(entry.name))


def _class_folders(folder: Path, notes: list[Note]) -> dict[str, list[Path]]:
    """The folders of each class, usually one; a `ValueError` if a name is not UTF-8, since no file could hold it."""
    folders = _subfolders(folder)
    for entry in folders:
        if any("\ud800" <= letter <= "\udfff" for letter in entry.name):
            raise ValueError(f"{str(entry)!r}: the name of this class folder is not UTF-8; rename it")
    composed = compose((entry.name for entry in folders), f"names of class folders in {folder}", notes)
    found: dict[str, list[Path]] = {}
    for entry in folders:
        found.setdefault(composed[entry.name], []).append(entry)
    return found


def _refuse_one_class_folder(root: Path, folder: Path) -> NoReturn:
    """Raise an error that names the class folders if they are in another folder."""
    (only,) = _subfolders(folder)
    wrapped = _several_classes_below(only)
    advice = f"did you mean root={wrapped}?" if folder == root else f"move the class folders of {wrapped} to {folder}"
    if wrapped is None:
        advice = f"add a folder for each other class, {folder}/<class>/<image>"
    raise ValueError(f"{folder}: only one class folder, {only.name}; {advice}")


def _several_classes_below(folder: Path) -> Path | None:
    """The first folder, down a chain of folders without images, that holds several class folders or a split."""
    while not any(entry.suffix.lower() in EXTENSIONS for entry in folder.iterdir()):
        below = _subfolders(folder)
        if len(below) > 1 or any(split_named(entry.name) for entry in below):
            return folder
        if not below:
            return None
        folder = below[0]
    return None


class _FolderReading:
    """The images of class folders, and what is odd about them."""

    def __init__(self, root: Path, numbers: Mapping[str, int], notes: list[Note]) -> None:
        self.root, self.numbers, self.notes = root, numbers, notes
        self.left_out: list[Path] = []
        self.deep: dict[str, set[str]] = {}  # by class folder of train without images at its top: its folders
        self.nested: list[str] = []  # class folders of train with images at the top and below
        self.contents: dict[tuple[Path, tuple[str, ...]], list[Path]] = defaultdict(list)  # by parent and names below

    def find_files(self, folder: Path) -> Iterator[ImageFile]:
        """All images in the class folders of one split, by class and path."""
        for name, members in sorted(_class_folders(folder, []).items()):
            if name not in self.numbers:
                refuse_class(name, str(members[0]), list(self.numbers))
            known = len(self.left_out)
            for folder_of_class in members:
                paths = find_images(folder_of_class, self.left_out)
                names = [path.relative_to(folder_of_class).as_posix() for path in paths]
                self._look_at(folder_of_class, names)
                prefix = folder_of_class.relative_to(self.root).as_posix()
                for path, below in zip(paths, names, strict=True):
                    yield ImageFile(path, f"{prefix}/{below}", self.numbers[name], str(path))
                if not paths:
                    why = describe_unread(self.left_out[known:]) if len(self.left_out) > known else "add some"
                    remove = f"{why}, or remove the folder. Expected {FOLDER_LAYOUT}"
                    raise ValueError(f"{folder_of_class}: no images; {remove}")

    def _look_at(self, folder: Path, names: Sequence[str]) -> None:
        below = {name.partition("/")[0] for name in names if "/" in name}
        if below and all("/" in name for name in names):
            self.deep[folder.name] = below
        elif below:
            self.nested.append(folder.name)
        self.contents[folder.parent, tuple(names)].append(folder)

    def add_notes(self, folders: Mapping[str, Path]) -> None:
        """Note files that are left out or ignored, and signs that the root is the wrong folder."""
        if self.left_out:
            names = tuple(path.relative_to(self.root).as_posix() for path in self.left_out)
            self.notes.append(Note("ignored", describe_unread(self.left_out), names))
        if loose := [path for folder in {self.root, *folders.values()} for path in _loose_images(folder)]:
            names = tuple(sorted(path.relative_to(self.root).as_posix() for path in loose))
            self.notes.append(Note("loose", "images in no class folder, ignored", names))
        if self.deep:
            first, *others = self.deep
            alike = [name for name in others if len(self.deep[first]) > 1 and self.deep[name] == self.deep[first]]
            hint = f"; did you mean root={self.root / first}?" if alike else ""
            what = f"class folders with images in folders below only; is {self.root} the right folder{hint or '?'}"
            self.notes.append(Note("deep_folders", what, tuple(sorted(self.deep))))
        if self.nested:
            what = "class folders with further folders, whose images are of the same class"
            self.notes.append(Note("deep_folders", what, tuple(sorted(self.nested))))
        for (_, names_below), members in self.contents.items():
            same = [member for member in members[1:] if _is_copy(members[0], member, names_below)]
            if same:
                names = tuple(member.relative_to(self.root).as_posix() for member in (members[0], *same))
                self.notes.append(Note("copied_folders", "class folders that hold the same files", names))


def _loose_images(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.suffix.lower() in EXTENSIONS and not is_ignored(entry.name)]


def _is_copy(one: Path, other: Path, names: Sequence[str]) -> bool:
    """Whether two folders that hold the same names hold files of the same sizes, the last of them of the same bytes."""
    try:
        is_alike = all((one / name).stat().st_size == (other / name).stat().st_size for name in names)
        return is_alike and (one / names[-1]).read_bytes() == (other / names[-1]).read_bytes()
    except OSError:  # reading the images reports it
        return False

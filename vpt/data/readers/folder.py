"""Reader of images in class folders."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from vpt.data.images import DEFAULT_DECODING, EXTENSIONS, Decoding, find_images
from vpt.data.readers.annotation_files import ImageFile, assemble, by_split, refuse_class, require_train
from vpt.data.samples import ClassificationSamples
from vpt.data.splits import SPLIT_OF

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
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, ClassificationSamples]:
    """Read class folders, inside train/, val/ and test/ or directly in the root.

    The parts `val_fraction` and `test_fraction` of the given images, chosen by `seed`, become val and test if there is
    no val/ (or valid/, validation/) or test/. These names are case-insensitive. Images in subfolders of a class folder
    belong to that class.

    Raises:
        ValueError: No images, one class only, an empty class folder, or a class that train does not have.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root={root} is no folder; expected {FOLDER_LAYOUT}")
    folders = by_split([(folder.name, folder) for folder in _subfolders(root)], str(root)) or {"train": root}
    require_train(root, folders, FOLDER_LAYOUT)
    classes = [folder.name for folder in _subfolders(folders["train"])]
    if not classes:
        raise ValueError(f"{folders['train']}: no class folders; expected {FOLDER_LAYOUT}")
    if len(classes) == 1:
        _refuse_one_class_folder(root, folders["train"])
    files = {split: list(_find_files(root, folder, classes)) for split, folder in folders.items()}
    return assemble(classes, files, val_fraction, test_fraction, seed, decoding)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


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
        if len(below) > 1 or any(entry.name.lower() in SPLIT_OF for entry in below):
            return folder
        if not below:
            return None
        folder = below[0]
    return None


def _find_files(root: Path, folder: Path, classes: Sequence[str]) -> Iterator[ImageFile]:
    """All images in the class folders of one split, sorted by path."""
    for class_folder in _subfolders(folder):
        if class_folder.name not in classes:
            refuse_class(class_folder.name, str(class_folder), classes)
        paths = find_images(class_folder)
        if not paths:
            raise ValueError(f"{class_folder}: no images; add some, or remove the folder. Expected {FOLDER_LAYOUT}")
        target = classes.index(class_folder.name)
        yield from (ImageFile(path, path.relative_to(root).as_posix(), target, str(path)) for path in paths)

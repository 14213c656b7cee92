"""Read a data set as training does; if training would refuse its labels, read the images alone."""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vpt.config.errors import ConfigError
from vpt.config.schema import Config
from vpt.data.image_files import find_images
from vpt.data.readers.box_checks import DataReport
from vpt.data.samples import ClassificationSamples, FileReader
from vpt.data.splits import SPLITS, split_named
from vpt.storage.archives import unpacked
from vpt.task_types.base import task_type_of

UNSPLIT = "train"  # the split of images for which no split is given


@dataclass(frozen=True)
class Reading:
    """A data set as far as it can be read: samples by split."""

    splits: dict[str, Any]
    report: DataReport  # what the reader found in labels
    split_off: tuple[str, ...] = ()  # splits taken from the given train
    refusal: str | None = None  # why training would refuse the data at once
    has_labels: bool = True  # those that training would use
    root: Path | None = None  # of the images, if they are files


def read_data(config: Config) -> Reading:
    """Read labels and names, decode no image; raises ConfigError if there are no images in the configured place."""
    root = _root_of(config)
    dataset = replace(config.dataset, strict=False)
    if root is not None and dataset.root:
        dataset.root = str(root)  # an archive is unpacked once
    task_type = task_type_of(replace(config, dataset=dataset))
    try:
        splits: dict[str, Any] = task_type.decode(task_type.read_all())
    except ValueError as error:
        loose = {} if root is None else _read_loosely(root)
        if not any(map(len, loose.values())):
            raise ConfigError(str(error)) from error
        return Reading(loose, task_type.report, (), str(error), config.dataset.reader == "folder", root)
    whole = replace(dataset, val_fraction=0.0, test_fraction=0.0, folds=None, fold=0)
    given = task_type_of(replace(config, dataset=whole)).read_all()
    return Reading(splits, task_type.report, tuple(split for split in splits if split not in given), root=root)


def _root_of(config: Config) -> Path | None:
    """The folder of the image files, or None."""
    dataset = config.dataset
    if dataset.reader == "torchvision" or not (dataset.root or dataset.path):
        return None
    given = Path(dataset.root or dataset.path or "").expanduser()
    root = unpacked(given, config.cache_dir) if dataset.root else given.parent
    return root if root.is_dir() else None


def _read_loosely(root: Path) -> dict[str, ClassificationSamples]:
    """All images below a folder, in splits and classes by folder name, without any check."""
    rows: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    folders = Counter[str]()
    has_splits = any(_split_of(entry) == "train" and entry.is_dir() for entry in root.iterdir())
    for path in find_images(root):
        parts = path.relative_to(root).parts[:-1]
        split = (split_named(parts[0]) or UNSPLIT) if has_splits and parts else UNSPLIT
        name = next(iter(parts[1:] if has_splits else parts), ".")
        rows[split].append((path, name))
        folders[name] += 1
    for parent in [entry for entry in root.iterdir() if _split_of(entry)] if has_splits else [root]:
        folders.update({entry.name: 0 for entry in parent.iterdir() if entry.is_dir() and entry.name[0] != "."})
    classes = tuple(sorted(folders))
    return {split: _loose_samples(root, classes, rows[split]) for split in SPLITS if split == "train" or rows[split]}


def _split_of(folder: Path) -> str | None:
    return split_named(folder.name) if folder.is_dir() else None


def _loose_samples(root: Path, classes: tuple[str, ...], rows: list[tuple[Path, str]]) -> ClassificationSamples:
    paths = tuple(path for path, _ in rows)
    number = {name: target for target, name in enumerate(classes)}
    targets = tuple(number[name] for _, name in rows)
    names = tuple(path.relative_to(root).as_posix() for path in paths)
    return ClassificationSamples(classes=classes, targets=targets, names=names, reader=FileReader(paths), paths=paths)

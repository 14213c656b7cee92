"""Read data as training does; where training would refuse their labels, go on with the pictures alone."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vpt.config.errors import ConfigError
from vpt.config.schema import Config
from vpt.data.images import find_images
from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.samples import FileReader, Samples
from vpt.data.splits import SPLIT_OF, SPLITS
from vpt.storage.archives import unpacked
from vpt.task_types.base import kind_of

UNSPLIT = "train"  # what pictures are called that no label says more about


@dataclass
class FullReport(DataReport):
    """A report that remembers every place, not only the first of each kind."""

    places: dict[Finding, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, finding: Finding, where: str) -> None:
        """Count a finding, and keep where it is."""
        super().add(finding, where)
        self.places[finding].append(where)


@dataclass(frozen=True)
class Reading:
    """What could be read of a data set.

    Args:
        splits: Samples by split.
        split_off: Splits that are parts of what train was given.
        refusal: Why training would refuse the data at once; None if it would not.
        report: What the reader found in boxes; empty for classification.
        has_labels: Whether targets or boxes of the samples mean anything.
        root: The folder of the pictures, if they have one of their own.
    """

    splits: dict[str, Any]
    split_off: tuple[str, ...] = ()
    refusal: str | None = None
    report: FullReport = field(default_factory=FullReport)
    has_labels: bool = True
    root: Path | None = None


def read_data(config: Config) -> Reading:
    """Read what there is, without a look into the pictures.

    Raises:
        ConfigError: There is no picture where the config says.
    """
    report, root = FullReport(), _root_of(config)
    dataset = replace(config.dataset, strict=False)
    if root is not None and dataset.root:
        dataset.root = str(root)  # an archive is unpacked once
    lenient = replace(config, dataset=dataset)
    try:
        splits = _read(lenient, report)
    except ValueError as error:
        loose = {} if root is None else _read_loosely(root)
        if not any(map(len, loose.values())):
            raise ConfigError(str(error)) from error
        has_labels = config.dataset.reader == "folder"
        return Reading(loose, refusal=str(error), report=report, has_labels=has_labels, root=root)
    return Reading(splits, _split_off(lenient, splits), report=report, root=root)


def _read(config: Config, report: FullReport) -> dict[str, Any]:
    """Samples as a run gets them, but with the pictures that cannot be read."""
    kind: Any = kind_of(config)
    if config.task == "detection":
        kind.report = report
    splits: dict[str, Any] = kind.read_all()
    return splits


def _split_off(config: Config, splits: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits that are not there when nothing may be split off."""
    whole = replace(config, dataset=replace(config.dataset, val_fraction=0.0, test_fraction=0.0))
    given = _read(whole, FullReport())
    return tuple(split for split in splits if split not in given)


def _root_of(config: Config) -> Path | None:
    """The folder that holds the pictures as files of their own, or None."""
    dataset = config.dataset
    if dataset.reader == "torchvision" or not (dataset.root or dataset.path):
        return None
    given = Path(dataset.root or dataset.path or "").expanduser()
    root = unpacked(given, config.cache_dir) if dataset.root else given.parent
    return root if root.is_dir() else None


def _read_loosely(root: Path) -> dict[str, Samples]:
    """All pictures below a folder, in splits and classes as their folders say, whatever is wrong with those."""
    rows: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    folders = Counter[str]()
    has_splits = any(_split_of(entry) == "train" and entry.is_dir() for entry in root.iterdir())
    for path in find_images(root):
        parts = path.relative_to(root).parts[:-1]
        split = SPLIT_OF.get(parts[0].lower(), UNSPLIT) if has_splits and parts else UNSPLIT
        below = parts[1:] if has_splits else parts
        rows[split].append((path, below[0] if below else "."))
        folders[below[0] if below else "."] += 1
    for parent in [entry for entry in root.iterdir() if _split_of(entry)] if has_splits else [root]:
        folders.update({entry.name: 0 for entry in parent.iterdir() if entry.is_dir() and entry.name[0] != "."})
    classes = tuple(sorted(folders))
    return {split: _loose_samples(root, classes, rows[split]) for split in SPLITS if split == "train" or rows[split]}


def _split_of(folder: Path) -> str | None:
    return SPLIT_OF.get(folder.name.lower()) if folder.is_dir() else None


def _loose_samples(root: Path, classes: tuple[str, ...], rows: list[tuple[Path, str]]) -> Samples:
    paths = tuple(path for path, _ in rows)
    number = {name: target for target, name in enumerate(classes)}
    return Samples(
        classes=classes,
        targets=tuple(number[name] for _, name in rows),
        names=tuple(path.relative_to(root).as_posix() for path in paths),
        reader=FileReader(paths),
        paths=paths,
    )

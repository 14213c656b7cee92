"""Reader of the classification data sets of torchvision, by class name."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from vpt.data.images import DEFAULT_DECODING, Decoding, ImageError, to_rgb
from vpt.data.readers.annotation_files import Note, divide_aloud, refuse_one_class
from vpt.data.samples import ClassificationSamples, FileReader
from vpt.data.splits import Division
from vpt.storage.archives import ArchiveError, extract, open_metered

_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_ALL: dict[str, dict[str, Any]] = {"train": {}}


@dataclass(frozen=True)
class _Source:
    """The arguments of a data set of torchvision for each split, and the names of its attributes.

    Without `files` torchvision reads the images. If `files` and `targets` are the same attribute, it holds pairs of
    them. Without `targets`, `_pcam_targets` reads them.
    """

    splits: Mapping[str, Mapping[str, Any]]
    targets: str | None
    classes: str | None
    files: str | None = None


TORCHVISION = {
    "CIFAR10": _Source(_BY_FLAG, "targets", "classes"),
    "CIFAR100": _Source(_BY_FLAG, "targets", "classes"),
    "Caltech101": _Source(_ALL, "y", "categories"),
    "Caltech256": _Source(_ALL, "y", "categories"),
    "Country211": _Source({**_TRAIN_TEST, "val": {"split": "valid"}}, "samples", "classes", "samples"),
    "DTD": _Source(_TRAIN_VAL_TEST, "_labels", "classes", "_image_files"),
    "EuroSAT": _Source(_ALL, "samples", "classes", "samples"),
    "FGVCAircraft": _Source(_TRAIN_VAL_TEST, "_labels", "classes", "_image_files"),
    "FashionMNIST": _Source(_BY_FLAG, "targets", "classes"),
    "Flowers102": _Source(_TRAIN_VAL_TEST, "_labels", "classes", "_image_files"),
    "Food101": _Source(_TRAIN_TEST, "_labels", "classes", "_image_files"),
    "GTSRB": _Source(_TRAIN_TEST, "_samples", None, "_samples"),
    "KMNIST": _Source(_BY_FLAG, "targets", "classes"),
    "MNIST": _Source(_BY_FLAG, "targets", "classes"),
    "OxfordIIITPet": _Source({**_TRAIN_TEST, "train": {"split": "trainval"}}, "_labels", "classes", "_images"),
    "PCAM": _Source(_TRAIN_VAL_TEST, None, None),
    "RenderedSST2": _Source(_TRAIN_VAL_TEST, "_samples", "classes", "_samples"),
    "STL10": _Source(_TRAIN_TEST, "labels", "classes"),
    "SUN397": _Source(_ALL, "_labels", "classes", "_image_files"),
    "SVHN": _Source(_TRAIN_TEST, "labels", None),
    "StanfordCars": _Source(_TRAIN_TEST, "_samples", "classes", "_samples"),
    "USPS": _Source(_BY_FLAG, "targets", None),
}


def read_torchvision(
    name: str,
    root: str | Path,
    download: bool = False,
    decoding: Decoding = DEFAULT_DECODING,
    *,
    notes: list[Note] | None = None,
    **division: Unpack[Division],
) -> dict[str, ClassificationSamples]:
    """Read a data set of torchvision by its class name.

    Official splits are used; a missing val or test is split off train. `root` is the folder of the files; `download` of
    missing ones is the only use of the network. `max_pixels` applies to images that are files. The other parameters are
    those of `read_folder`.

    Raises:
        ValueError: The name is no key of `TORCHVISION`, or the files are missing.
    """
    if name not in TORCHVISION:
        nearest = get_close_matches(name, TORCHVISION, n=1, cutoff=0.0)[0]
        raise ValueError(f"name={name!r}: unknown; did you mean {nearest!r}? Allowed: {', '.join(sorted(TORCHVISION))}")
    source = TORCHVISION[name]
    found = {split: _open_torchvision(name, split, Path(root), download, decoding) for split in source.splits}
    classes = found["train"].classes or tuple(map(str, range(1 + max(found["train"].targets))))
    refuse_one_class(classes, f"torchvision's {name} in {root}")
    found = {split: replace(samples, classes=classes) for split, samples in found.items()}
    names_splits = "test" in found
    return divide_aloud(found, [] if notes is None else notes, names_splits=names_splits, **division)


@dataclass(frozen=True)
class _TorchvisionReader:
    dataset: Any
    name: str
    decoding: Decoding

    def __call__(self, index: int) -> Image.Image:
        try:
            return to_rgb(self.dataset[index][0], self.decoding)
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            raise ImageError(f"{self.name} {index}: broken image ({error})") from error


def _open_torchvision(name: str, split: str, root: Path, download: bool, decoding: Decoding) -> ClassificationSamples:
    """One official split; classes are empty where torchvision has no names."""
    source = TORCHVISION[name]
    dataset = _construct(name, split, root, download)
    classes = tuple(getattr(dataset, source.classes, ())) if source.classes else ()
    targets = getattr(dataset, source.targets) if source.targets else _pcam_targets(dataset, split)
    if source.files is None:
        names = tuple(f"{name} {split} {i}" for i in range(len(targets)))
        reader = _TorchvisionReader(dataset, f"{name} {split}", decoding)
        return ClassificationSamples(classes=classes, targets=tuple(map(int, targets)), names=names, reader=reader)
    files = getattr(dataset, source.files)
    if source.files == source.targets:
        files, targets = zip(*files, strict=True)
    names = tuple(Path(os.path.relpath(file, root)).as_posix() for file in files)
    paths = tuple(map(Path, files))
    samples = ClassificationSamples(
        classes=classes, targets=tuple(map(int, targets)), names=names, reader=FileReader(paths, decoding), paths=paths
    )
    return samples.take(sorted(range(len(names)), key=names.__getitem__))  # SUN397 is listed in the order of the disk


def _construct(name: str, split: str, root: Path, download: bool) -> Any:
    import torchvision.datasets

    try:
        arguments = TORCHVISION[name].splits[split]
        with _guarded_extraction():
            return getattr(torchvision.datasets, name)(root=root, download=download, **arguments)
    except ArchiveError as error:
        raise ValueError(f"torchvision's {name}: {error}") from error
    except ImportError as error:
        raise ValueError(f"torchvision's {name} needs {error.name}: pip install {error.name}") from error
    except (RuntimeError, OSError) as error:
        if "pip install" in str(error):
            raise ValueError(f"torchvision's {name}: {error}") from error
        advice = "check the network" if download else "use download=True to download them"
        raise ValueError(f"the files of torchvision's {name} are not in {root} ({error}); {advice}") from error


@contextmanager
def _guarded_extraction() -> Iterator[None]:
    """Make torchvision extract archives by `vpt.storage.archives` inside this block, or refuse its version."""
    from torchvision.datasets import utils

    try:
        tables = utils._ARCHIVE_EXTRACTORS, utils._COMPRESSED_FILE_OPENERS
    except AttributeError as error:
        raise ValueError(
            "this torchvision extracts archives in a way that cannot be guarded; install the one of constraints.txt"
        ) from error
    before = [dict(table) for table in tables]
    for table, ours in zip(tables, (_extract, open_metered), strict=True):
        table.update(dict.fromkeys(table, ours))
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.update(entries)


def _extract(archive: str | Path, into: str | Path, compression: str | None) -> None:
    """Called by torchvision; the content of the archive decides how it is unpacked."""
    extract(archive, into)


def _pcam_targets(dataset: Any, split: str) -> Any:
    """The targets of PCAM, (num,); torchvision reads them from its HDF5 file one by one."""
    with dataset.h5py.File(dataset._base_folder / dataset._FILES[split]["targets"][0]) as file:
        return file["y"][:, 0, 0, 0]

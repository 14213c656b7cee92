"""Samples of one split and the data sets made of them, for classification and detection.

Readers return `dict[str, Samples]` with keys among train, val and test. The classes are those of train, and are the
same for all splits. Labels and paths are checked when samples are made; images are decoded when they are used.

Shapes: H, W pixels, S side of the input, K classes, n boxes of an image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vpt.data.images import DEFAULT_DECODING, Decoding, ImageError, check_image, read_image
from vpt.data.loaders import stable_seed

Size = tuple[int, int]  # height, width in pixels
Target = dict[str, Tensor]
# (RGB image, boxes, seed) -> tensor, the boxes that remain, their indices
BoxTransform = Callable[[Image.Image, NDArray[np.float32], int], tuple[Tensor, NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Samples(ABC):
    """One split: for each image a name, a way to read it, and the labels that a subclass adds.

    Names are relative paths or other printable ones. `reader` returns the RGB image of an index; it must be picklable,
    since loader processes get a copy. `paths` is empty if the images are not files.
    """

    PER_IMAGE: ClassVar[tuple[str, ...]] = ("names", "paths", "groups")  # fields with a value for each image, or empty
    READERS: ClassVar[tuple[str, ...]] = ("reader",)  # fields that are called with the index of an image

    classes: tuple[str, ...]
    names: tuple[str, ...]
    reader: Callable[[int], Image.Image] = field(repr=False)
    paths: tuple[Path, ...] = field(default=(), repr=False)
    groups: tuple[str, ...] = field(default=(), repr=False)  # images of one group, such as a patient, stay in one split

    def __post_init__(self) -> None:
        lengths = {key: len(getattr(self, key)) for key in self.PER_IMAGE}
        assert all(length == len(self) for key, length in lengths.items() if length or key == "names")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """Read an image, upright, mode RGB, or raise an `ImageError`."""
        return self.reader(index)

    def take(self, indices: Sequence[int]) -> Self:
        """The samples at these indices, in this order."""
        values: dict[str, Any] = {key: getattr(self, key) for key in self.PER_IMAGE}
        taken: dict[str, Any] = {key: tuple(value[i] for i in indices) for key, value in values.items() if value}
        taken |= {key: _TakenReader(getattr(self, key), tuple(indices)) for key in self.READERS}
        return replace(self, **taken)

    def decoded(self, decoding: Decoding) -> Self:
        """The same samples, whose files are read in another way; readers of other classes are kept."""
        return replace(self, reader=_with_decoding(self.reader, decoding))

    @property
    @abstractmethod
    def strata(self) -> Sequence[int]:
        """A number for each image; `split_off` takes the same part of the images of each number."""

    @abstractmethod
    def labels_of(self, index: int) -> NDArray[np.int64]:
        """The class numbers of an image, one for each of its labels."""

    @abstractmethod
    def class_counts(self) -> NDArray[np.int64]:
        """The number of images, or of boxes that are not crowd, of each class, (K,)."""

    @abstractmethod
    def label_text(self, index: int) -> str:
        """The labels of an image in short, equal for equal labels only."""

    @abstractmethod
    def label_bytes(self) -> Iterator[bytes]:
        """All labels as bytes, for `data_digest`."""


@dataclass(frozen=True, kw_only=True)
class ClassificationSamples(Samples):
    """Samples with one class for each image: `targets` are numbers in [0, K)."""

    PER_IMAGE = (*Samples.PER_IMAGE, "targets")

    targets: tuple[int, ...]

    @property
    def strata(self) -> Sequence[int]:
        """The classes."""
        return self.targets

    def labels_of(self, index: int) -> NDArray[np.int64]:
        """The class number of an image, (1,)."""
        return np.array(self.targets[index : index + 1], np.int64)

    def class_counts(self) -> NDArray[np.int64]:
        """The number of images of each class, (K,)."""
        return np.bincount(np.array(self.targets, np.int64), minlength=len(self.classes))

    def label_text(self, index: int) -> str:
        """The class name."""
        return self.classes[self.targets[index]]

    def label_bytes(self) -> Iterator[bytes]:
        """The targets as text."""
        return (f"{target} ".encode() for target in self.targets)


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSamples(Samples):
    """Samples with checked boxes for each image, in pixels of the upright image.

    Args:
        category_ids: The id of each class in its source: a COCO category id, a YOLO class number, or 1, 2, ...
        sizes: Height and width of each upright image.
        image_ids: The id of each image in its source: a COCO image id, or 1, 2, ...
        boxes: Corners x1, y1, x2, y2 for each image, (n, 4) float32; read-only, as the next two.
        labels: A number in [0, K) for each box, (n,) int64.
        crowd: Whether loss and matching ignore a box, (n,) bool.
    """

    PER_IMAGE = (*Samples.PER_IMAGE, "sizes", "image_ids", "boxes", "labels", "crowd")

    category_ids: tuple[int, ...]
    sizes: tuple[Size, ...] = field(repr=False)
    image_ids: tuple[int, ...] = field(repr=False)
    boxes: tuple[NDArray[np.float32], ...] = field(repr=False)
    labels: tuple[NDArray[np.int64], ...] = field(repr=False)
    crowd: tuple[NDArray[np.bool_], ...] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self.classes) == len(self.category_ids)
        for array in self._arrays():
            array.setflags(write=False)

    @property
    def strata(self) -> Sequence[int]:
        """Zeros: an image may have boxes of any number of classes."""
        return [0] * len(self)

    def labels_of(self, index: int) -> NDArray[np.int64]:
        """The class number of each box of an image, (n,)."""
        return self.labels[index]

    def class_counts(self) -> NDArray[np.int64]:
        """The number of boxes of each class that are not crowd, (K,)."""
        counted = [labels[~crowd] for labels, crowd in zip(self.labels, self.crowd, strict=True)]
        return np.bincount(np.concatenate([np.zeros(0, np.int64), *counted]), minlength=len(self.classes))

    def label_text(self, index: int) -> str:
        """The number of boxes and a digest of them."""
        parts = (self.labels[index], self.boxes[index], self.crowd[index])
        rows = sorted(zip(*(part.tolist() for part in parts), strict=True))
        return f"{len(rows)} boxes ({hashlib.sha256(repr(rows).encode()).hexdigest()[:8]})"

    def label_bytes(self) -> Iterator[bytes]:
        """The arrays of boxes, labels and crowd."""
        return (array.tobytes() for array in self._arrays())

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return *self.boxes, *self.labels, *self.crowd


SamplesT = TypeVar("SamplesT", bound=Samples)


def data_digest(splits: Mapping[str, Samples]) -> str:
    """SHA-256 of the classes, names, labels and file sizes in bytes of all splits.

    Checkpoints hold it, so its value for the same data must never change.
    """
    digest = hashlib.sha256()
    for split, samples in splits.items():
        digest.update(f"{split} {samples.classes} {samples.names}".encode())
        for part in samples.label_bytes():
            digest.update(part)
        digest.update(f"{[path.stat().st_size for path in samples.paths]}".encode())
    return digest.hexdigest()


def check_readable(samples: Samples, decoding: Decoding = DEFAULT_DECODING) -> None:
    """Raise an `ImageError` if image files are missing, broken or too large by their headers; nothing is decoded."""
    reasons = []
    for path in samples.paths:
        try:
            check_image(path, decoding)
        except ImageError as error:
            reasons.append(str(error))
    refuse_unreadable(reasons)


def refuse_unreadable(reasons: Sequence[str]) -> None:
    """If there are reasons, raise an `ImageError` that names the first and counts the others."""
    if reasons:
        others = f"; {len(reasons) - 1} more cannot be read" if len(reasons) > 1 else ""
        raise ImageError(f"{reasons[0]}{others}; replace or remove what cannot be read")


@dataclass(frozen=True)
class FileReader:
    """Reads the image file of an index; if `sizes` are given, the upright image must have that height and width."""

    paths: tuple[Path, ...]
    decoding: Decoding = DEFAULT_DECODING
    sizes: tuple[Size, ...] = ()

    def __call__(self, index: int) -> Image.Image:
        """Read an image, mode RGB; an `ImageError` if it cannot be read, or has another size."""
        path = self.paths[index]
        image = read_image(path, self.decoding)
        if self.sizes and (image.height, image.width) != self.sizes[index]:
            raise ImageError(
                f"{path}: {image.width} x {image.height} pixels, but its boxes are for "
                f"{format_size(self.sizes[index])}; it was changed meanwhile, or EXIF data at its end turn it; "
                "save it again, and restart"
            )
        return image


@dataclass(frozen=True)
class _TakenReader:
    reader: Callable[[int], Any]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Any:
        return self.reader(self.indices[index])


def _with_decoding(reader: Callable[[int], Image.Image], decoding: Decoding) -> Callable[[int], Image.Image]:
    if isinstance(reader, _TakenReader):
        return replace(reader, reader=_with_decoding(reader.reader, decoding))
    return replace(reader, decoding=decoding) if isinstance(reader, FileReader) else reader


class SampleDataset(Dataset[Any], ABC, Generic[SamplesT]):
    """Samples behind a transform.

    A key is `(epoch, index)`, or an index, which means epoch 0. The transform is called with the RGB image, what the
    subclass adds, and a seed made of `seed`, epoch and index, so that an item depends on nothing else.
    """

    def __init__(self, samples: SamplesT, transform: Callable[..., Any], seed: int = 0) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.make_item(self.samples.read(index), index, stable_seed(self.seed, epoch, index))

    def __len__(self) -> int:
        return len(self.samples)

    @abstractmethod
    def make_item(self, image: Image.Image, index: int, seed: int) -> tuple[Tensor, Any]:
        """The transformed image and its target."""


class ClassificationDataset(SampleDataset[ClassificationSamples]):
    """Items (image, target): what the transform makes of (RGB image, seed), (3, S, S) float32, and a class number."""

    def make_item(self, image: Image.Image, index: int, seed: int) -> tuple[Tensor, int]:
        """The transformed image and its class number."""
        return self.transform(image, seed), self.samples.targets[index]


class DetectionDataset(SampleDataset[DetectionSamples]):
    """Items (image, target) for detection; the transform is a `BoxTransform`.

    The image is (3, S, S) float32. The target has "boxes" (n, 4) float32 in pixels of the input, "labels" (n,) int64,
    "crowd" (n,) bool and "image_index" ().
    """

    def make_item(self, image: Image.Image, index: int, seed: int) -> tuple[Tensor, Target]:
        """The transformed image and its target."""
        samples = self.samples
        tensor, boxes, kept = self.transform(image, samples.boxes[index], seed)
        return tensor, {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor(samples.labels[index][kept]),
            "crowd": torch.tensor(samples.crowd[index][kept]),
            "image_index": torch.tensor(index),
        }


def collate_detection(batch: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Collate items to images (B, 3, S, S) and a list of targets."""
    return torch.stack([image for image, _ in batch]), [target for _, target in batch]


def format_size(size: Size) -> str:
    """Height and width as "width x height".

    Example:
        >>> format_size((480, 640))
        '640 x 480'
    """
    return f"{size[1]} x {size[0]}"

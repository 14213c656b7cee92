"""Pictures with one class each, in folders; `tables.py` reads them from lists, `torchvision.py` those that have a name.

Every reader returns `dict[str, Samples]` with keys among train, val and test. The class map is made from train and
holds for all splits. Labels and paths are all checked here, at once; pictures are decoded later, one by one.

Shapes: H, W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vpt.data.images import DEFAULT_DECODING, Decoding, ImageError, check_image, read_image
from vpt.data.loaders import stable_seed


@dataclass(frozen=True)
class Samples:
    """One split: a class, a printable name and a way to read it, for each picture.

    Args:
        classes: The class names, by target.
        targets: A number in [0, len(classes)) for each picture.
        names: A relative path, or what else tells a person which picture it is, for each picture.
        reader: Gives the RGB picture of an index; must be picklable, since workers get a copy.
        paths: The file of each picture, or nothing where the pictures are no files.
    """

    classes: tuple[str, ...]
    targets: tuple[int, ...]
    names: tuple[str, ...]
    reader: Callable[[int], Image.Image] = field(repr=False)
    paths: tuple[Path, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        assert len(self.targets) == len(self.names)
        assert len(self.paths) in (0, len(self.names))

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> Image.Image:
        """Read a picture, mode RGB."""
        return self.reader(index)

    def take(self, indices: Sequence[int]) -> "Samples":
        """The samples at these indices, in this order."""
        return replace(
            self,
            targets=tuple(self.targets[i] for i in indices),
            names=tuple(self.names[i] for i in indices),
            reader=_TakenReader(self.reader, tuple(indices)),
            paths=tuple(self.paths[i] for i in indices) if self.paths else (),
        )


class ClassificationDataset(Dataset[tuple[Tensor, int]]):
    """Samples behind a transform.

    A key is `(epoch, index)`, or an index, which means epoch 0. The transform is called with a seed made of `seed`,
    epoch and index, so an item does not depend on who asks for it, nor when.

    Args:
        samples: One split.
        transform: Called with (RGB picture, seed), returns a tensor (3, H, W) float32.
        seed: The seed of the run.
    """

    def __init__(self, samples: Samples, transform: Callable[[Image.Image, int], Tensor], seed: int = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.transform(self.samples.read(index), stable_seed(self.seed, epoch, index))
        return image, self.samples.targets[index]

    def __len__(self) -> int:
        return len(self.samples)


def check_readable(samples: Samples, decoding: Decoding = DEFAULT_DECODING) -> None:
    """Look at the header of every picture file, before hours go by until one that cannot be read; decodes nothing.

    Args:
        samples: One split.
        decoding: Says how large a picture may be.

    Raises:
        ImageError: Pictures are missing, broken or too large; names the first and counts the others.
    """
    reasons = []
    for path in samples.paths:
        try:
            check_image(path, decoding.max_pixels)
        except ImageError as error:
            reasons.append(str(error))
    refuse_unreadable(reasons)


def refuse_unreadable(reasons: Sequence[str]) -> None:
    """Refuse pictures that cannot be read, if there are any.

    Args:
        reasons: What is wrong with each, with its path.

    Raises:
        ImageError: There are any; names the first and counts the others.
    """
    if reasons:
        others = f"; {len(reasons) - 1} more cannot be read" if len(reasons) > 1 else ""
        raise ImageError(f"{reasons[0]}{others}; replace or remove what cannot be read")


@dataclass(frozen=True)
class FileReader:
    """Reads the picture file of an index."""

    paths: tuple[Path, ...]
    decoding: Decoding = DEFAULT_DECODING

    def __call__(self, index: int) -> Image.Image:
        """Read a picture, mode RGB."""
        return read_image(self.paths[index], self.decoding.max_pixels, self.decoding.background)


@dataclass(frozen=True)
class _TakenReader:
    reader: Callable[[int], Image.Image]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Image.Image:
        return self.reader(self.indices[index])


Size = tuple[int, int]  # height, width in pixels


Target = dict[str, Tensor]


BoxTransform = Callable[
    [Image.Image, NDArray[np.float32], int], tuple[Tensor, NDArray[np.float32], NDArray[np.int64]]
]  # (RGB picture, boxes, seed) -> image, the boxes that stay, their indices


@dataclass(frozen=True, eq=False)
class DetectionSamples:
    """One split: for each picture its file and its boxes, checked, in pixels of the upright picture.

    Args:
        classes: The class names, by label.
        category_ids: What the source calls each class, by label: a COCO category id, a YOLO class number, or 1, 2, ...
        names: The path of each picture, relative to the root.
        paths: The file of each picture.
        sizes: Height and width of each upright picture.
        image_ids: What the source calls each picture: a COCO image id, or 1, 2, ...
        boxes: Corners x1, y1, x2, y2 for each picture, (n, 4) float32; read-only, as the next two.
        labels: A number in [0, K) for each box, (n,) int64.
        crowd: Whether loss and matching ignore a box, (n,) bool.
        reader: Gives the picture of an index, such as one that remembers it; None reads the file.
        decoding: How a file is decoded.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    paths: tuple[Path, ...] = field(repr=False)
    sizes: tuple[Size, ...] = field(repr=False)
    image_ids: tuple[int, ...] = field(repr=False)
    boxes: tuple[NDArray[np.float32], ...] = field(repr=False)
    labels: tuple[NDArray[np.int64], ...] = field(repr=False)
    crowd: tuple[NDArray[np.bool_], ...] = field(repr=False)
    reader: Callable[[int], Image.Image] | None = field(default=None, repr=False)
    decoding: Decoding = field(default=DEFAULT_DECODING, repr=False)

    def __post_init__(self) -> None:
        assert len(self.classes) == len(self.category_ids)
        assert len({len(getattr(self, key)) for key in _BY_PICTURE}) == 1
        for arrays in (self.boxes, self.labels, self.crowd):
            for array in arrays:
                array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """Read a picture, upright, mode RGB.

        Raises:
            ImageError: It cannot be read, or is not of the size that its boxes were checked for.
        """
        if self.reader is not None:
            return self.reader(index)
        path, size = self.paths[index], self.sizes[index]
        image = read_image(path, self.decoding.max_pixels, self.decoding.background)
        if (image.height, image.width) != size:
            raise ImageError(
                f"{path}: {image.width} x {image.height} pixels, but its boxes are for {format_size(size)}; was it "
                "changed meanwhile, or does EXIF data at its end turn it? save it anew, and start again"
            )
        return image

    def take(self, indices: Sequence[int]) -> "DetectionSamples":
        """The samples at these indices, in this order."""
        assert self.reader is None  # it counts as these samples do
        taken: dict[str, Any] = {key: tuple(getattr(self, key)[i] for i in indices) for key in _BY_PICTURE}
        return replace(self, **taken)


_BY_PICTURE = ("names", "paths", "sizes", "image_ids", "boxes", "labels", "crowd")


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Samples behind a transform.

    A key is `(epoch, index)`, or an index, which means epoch 0. The transform is called with a seed made of `seed`,
    epoch and index, so an item does not depend on who asks for it, nor when. An item is an image (3, S, S) float32 and
    a target: "boxes" (n, 4) float32 in pixels of the image, "labels" (n,) int64, "crowd" (n,) bool, "image_index" ().

    Args:
        samples: One split.
        transform: Called with (RGB picture, boxes, seed), returns a tensor, the boxes that stay, and their indices.
        seed: The seed of the run.
    """

    def __init__(self, samples: DetectionSamples, transform: BoxTransform, seed: int = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        samples = self.samples
        image, boxes, kept = self.transform(
            samples.read(index), samples.boxes[index], stable_seed(self.seed, epoch, index)
        )
        return image, {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor(samples.labels[index][kept]),
            "crowd": torch.tensor(samples.crowd[index][kept]),
            "image_index": torch.tensor(index),
        }

    def __len__(self) -> int:
        return len(self.samples)


def collate_detection(batch: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Make a batch of items: images (B, 3, S, S), and a target for each."""
    return torch.stack([image for image, _ in batch]), [target for _, target in batch]


def format_size(size: Size) -> str:
    """Width and height, as people say them.

    Example:
        >>> format_size((480, 640))
        '640 x 480'
    """
    return f"{size[1]} x {size[0]}"

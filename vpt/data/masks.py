"""Masks: which class each pixel of an image belongs to, as files hold it and as numbers of classes.

A label map is (H, W) int16: the number of a class in [0, K), or `IGNORE` where the class is not known. Losses and
metrics leave those pixels out.

Shapes: H, W pixels of the upright image, K classes, n images.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.data.images import DEFAULT_DECODING, TURNS, Decoding, ImageError, exif_orientation, opened
from vpt.data.samples import SampleDataset, Samples, Size, Target, format_size

IGNORE = -1
UNKNOWN = -2  # in the result of `to_labels`: a value that stands for no class
MAX_VALUE = 2**24 - 1  # of a pixel: an index, or red, green and blue
NEAR = 64  # of 0 or 255, how far JPEG may move a value of a mask of two values

LabelMap = NDArray[np.int16]


@dataclass(frozen=True)
class MaskValues:
    """What the values of mask files stand for.

    Args:
        labels: Value -> number of a class, or `IGNORE`. A colour is the value 65536 * red + 256 * green + blue.
        has_colours: Whether values are colours, and not indices.
        merges: Whether every value above 0 counts as 1, where masks number objects.
    """

    labels: Mapping[int, int]
    has_colours: bool = False
    merges: bool = False

    def to_labels(self, values: NDArray[np.int32]) -> LabelMap:
        """A label map of values (H, W); `UNKNOWN` for values that are not listed."""
        if self.merges:
            values = np.minimum(values, 1)
        keys = np.array(sorted(self.labels))
        numbers = np.array([self.labels[int(key)] for key in keys], np.int16)
        found = np.searchsorted(keys, values).clip(max=len(keys) - 1)
        return np.where(keys[found] == values, numbers[found], np.int16(UNKNOWN))


def read_mask(
    path: Path, has_colours: bool = False, decoding: Decoding = DEFAULT_DECODING
) -> tuple[NDArray[np.int32], int]:
    """The values (H, W) that a mask file stores, and the EXIF orientation by which they are still to be turned.

    Palette images give their indices, grey images of any depth their values. Colour images of greys only give these;
    other colours, and with `has_colours` all of them, are 65536 * red + 256 * green + blue. JPEG changes values: it is
    read if all of them are near 0 or 255, as these two.

    Raises:
        ImageError: The file cannot be read, has values that are no integers in [0, 16777215], or is JPEG with others.
    """
    with opened(path, decoding) as image:
        image.load()
        orientation = exif_orientation(image) or 1  # Pillow turns a TIFF when it loads it
        if image.mode in ("F", "CMYK", "LAB", "HSV", "YCbCr"):
            raise ImageError(f"a mask of mode {image.mode} has no indices; save it as PNG")
        if has_colours or image.mode.startswith("RGB"):
            channels = np.asarray(image.convert("RGB")).astype(np.int32)
            values = channels @ np.array([65536, 256, 1], np.int32)
            if not has_colours and (channels == channels[..., :1]).all():
                values = channels[..., 0]
        else:
            values = np.asarray(image.getchannel(0) if image.mode in ("LA", "PA", "La") else image).astype(np.int32)
        if image.format == "JPEG":
            if ((values > NEAR) & (values < 255 - NEAR)).any() or values.max() > 255:
                raise ImageError("a mask saved as JPEG has lost its values; save it as PNG")
            values = np.where(values > 127, 255, 0).astype(np.int32)
    if values.min() < 0 or values.max() > MAX_VALUE:
        raise ImageError(f"{path}: values {values.min()} to {values.max()} of a mask; must be in [0, {MAX_VALUE}]")
    return values, orientation


def fit_to_image(
    values: NDArray[np.int32], orientation: int, image: Size, stored: Size, turn: int
) -> NDArray[np.int32]:
    """Values of a mask for the upright image of this size.

    A mask with an EXIF orientation of its own is turned by it. One that has none, and the size of the stored image
    where that is not the size of the upright one, is turned as the image is. A mask that is smaller or larger by one
    factor is resized to the nearest values.

    Raises:
        ValueError: The mask has another shape.
    """
    if orientation in TURNS:
        values = np.asarray(Image.fromarray(values).transpose(TURNS[orientation]))
    elif values.shape == stored != image:
        values = np.asarray(Image.fromarray(values).transpose(TURNS[turn]))
    if values.shape == image:
        return values
    if abs(values.shape[0] * image[1] - values.shape[1] * image[0]) > max(*image, *values.shape):
        raise ValueError(f"a mask of {format_size(values.shape)} for an image of {format_size(image)}")
    return np.asarray(Image.fromarray(values).resize(image[::-1], Image.Resampling.NEAREST))


@dataclass(frozen=True)
class MaskReader:
    """Reads the label map of an index from mask files; unknown values are `IGNORE`. `turns` are EXIF orientations."""

    paths: tuple[Path, ...]
    values: MaskValues
    sizes: tuple[Size, ...]
    stored: tuple[Size, ...]
    turns: tuple[int, ...]
    decoding: Decoding = DEFAULT_DECODING

    def __call__(self, index: int) -> LabelMap:
        """The label map (H, W) of the upright image; an `ImageError` if the file cannot be read or has another size."""
        labels = self.read(index)
        return np.where(labels == UNKNOWN, np.int16(IGNORE), labels)

    def read(self, index: int) -> LabelMap:
        """The same, with `UNKNOWN` for unknown values."""
        path = self.paths[index]
        values, orientation = read_mask(path, self.values.has_colours, self.decoding)
        try:
            fitted = fit_to_image(values, orientation, self.sizes[index], self.stored[index], self.turns[index])
        except ValueError as error:
            raise ImageError(f"{path}: {error}; export it again at the size of the image") from error
        return self.values.to_labels(fitted)


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationSamples(Samples):
    """Samples with a mask for each image.

    Args:
        category_ids: The value of each class in the data's own files, K numbers.
        sizes: Height and width of each upright image.
        masks: Returns the label map of an index; picklable.
        pixels: The number of pixels of each class in each image, and in a last column of ignored ones: n tuples of
            K + 1 numbers.
        digests: Eight digits for each image, which differ for masks of other values.
    """

    PER_IMAGE = (*Samples.PER_IMAGE, "sizes", "pixels", "digests")
    READERS = (*Samples.READERS, "masks")

    category_ids: tuple[int, ...]
    sizes: tuple[Size, ...] = field(repr=False)
    masks: Callable[[int], LabelMap] = field(repr=False)
    pixels: tuple[tuple[int, ...], ...] = field(repr=False)
    digests: tuple[str, ...] = field(repr=False)

    @property
    def strata(self) -> list[int]:
        """Zeros: an image has pixels of any number of classes."""
        return [0] * len(self)

    def labels_of(self, index: int) -> NDArray[np.int64]:
        """The numbers of the classes in an image."""
        return np.flatnonzero(self.pixels[index][:-1])

    def class_counts(self) -> NDArray[np.int64]:
        """The number of pixels of each class, (K,)."""
        counts: NDArray[np.int64] = np.array(self.pixels, np.int64).reshape(-1, len(self.classes) + 1).sum(axis=0)
        return counts[:-1]

    def label_text(self, index: int) -> str:
        """The names of the classes in an image, and the digest of its mask."""
        return f"{', '.join(self.classes[label] for label in self.labels_of(index))} ({self.digests[index]})"

    def label_bytes(self) -> Iterator[bytes]:
        """The digests and the numbers of pixels of all images."""
        return (f"{digest} {pixels}".encode() for digest, pixels in zip(self.digests, self.pixels, strict=True))


class SegmentationDataset(SampleDataset[SegmentationSamples]):
    """Items (image, target); the transform is called with an RGB image, its label map and a seed.

    The image is (3, S, S) float32. The target has "mask", (S, S) int16, and "image_index", ().
    """

    def make_item(self, image: Image.Image, index: int, seed: int) -> tuple[Tensor, Target]:
        """The transformed image and its target."""
        tensor, mask = self.transform(image, self.samples.masks(index), seed)
        return tensor, {"mask": torch.tensor(mask), "image_index": torch.tensor(index)}

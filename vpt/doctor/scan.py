"""Scan of a data set: every image is decoded once, as in training; digests and sizes are stored, pixels are not."""

import hashlib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntFlag, auto
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.build import build_loaders
from vpt.config.schema import Config
from vpt.data.images import EXTENSIONS, FORMATS, Decoding, ImageError, exif_orientation, read_properties
from vpt.data.ranges import ANY_RANGE
from vpt.engine.console import Progress

ENDINGS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "MPO": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# 64 bits of a sha256: among ten million images, two different ones collide in one of 400,000 data sets.
COLUMNS = np.dtype([("file", "u8"), ("pixels", "u8"), ("height", "i4"), ("width", "i4"), ("oddities", "u2")])


class Oddity(IntFlag):
    """Unusual properties of an image file."""

    ANIMATED = auto()
    PAGES = auto()
    SIXTEEN_BIT = auto()
    TURNED = auto()
    CMYK = auto()
    ALPHA = auto()
    ENDING = auto()
    TOO_LARGE = auto()
    METADATA = auto()


@dataclass(frozen=True)
class ImageScan:
    """The scan of an image."""

    index: int  # in its split
    row: tuple[int, int, int, int, int]  # file, pixels, height, width, oddities, see `COLUMNS`; zeros where unknown
    error: str | None  # why it cannot be read


@dataclass
class SplitScan:
    """The scan of a split."""

    columns: NDArray[np.void]  # (n,) for n images, see `COLUMNS`; height and width of the upright images
    errors: dict[int, str] = field(default_factory=dict)  # why images cannot be read, by index

    @property
    def readable(self) -> NDArray[np.int64]:
        """Indices of the images that can be read, ascending."""
        return np.flatnonzero(self.columns["height"] > 0)

    def odd(self, oddity: Oddity) -> list[int]:
        """Indices of the images with this property, ascending."""
        return list(np.flatnonzero(self.columns["oddities"] & oddity.value).tolist())


class ScanDataset:
    """Scans of samples; a key is `(epoch, index)`, as the samplers of the loaders yield."""

    def __init__(self, samples: Any, max_pixels: int) -> None:
        self.samples, self.max_pixels = samples, max_pixels

    def __getitem__(self, key: tuple[int, int]) -> ImageScan:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata that is not used
            return self._scan(key[1])

    def __len__(self) -> int:
        return len(self.samples)

    def _scan(self, index: int) -> ImageScan:
        path = self.samples.paths[index] if self.samples.paths else None
        if path is not None and not path.is_file():  # a pipe would be read for ever
            what = "not a plain file" if path.exists() else "no such file"
            return ImageScan(index, (0, 0, 0, 0, 0), what)
        digest = 0 if path is None else file_digest(path)
        oddities = Oddity(0) if path is None else find_oddities(path, self.max_pixels)
        try:
            image = self.samples.read(index)
        except ImageError as error:
            return ImageScan(index, (digest, 0, 0, 0, oddities.value), str(error).removeprefix(f"{path}: "))
        return ImageScan(index, (digest, pixel_digest(image), image.height, image.width, oddities.value), None)


def scan_images(config: Config, splits: Mapping[str, Any]) -> dict[str, SplitScan]:
    """Scan every image of all splits once, in as many processes as training would use."""
    most = config.data.max_pixels
    datasets = {split: ScanDataset(samples, most) for split, samples in splits.items() if len(samples)}
    loaders = build_loaders(config, datasets, list)
    found = {split: SplitScan(np.zeros(len(samples), COLUMNS)) for split, samples in splits.items()}
    with Progress(sum(map(len, loaders.values())), "scan") as progress:
        for split in datasets:
            for batch in loaders.pop(split):  # its processes end with it
                for scan in batch:
                    found[split].columns[scan.index] = scan.row
                    if scan.error is not None:
                        found[split].errors[scan.index] = scan.error
                progress.advance(len(batch))
    return found


def file_digest(path: Path) -> int:
    """64 bits of the sha256 of a file."""
    try:
        with path.open("rb") as file:
            return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:8], "big")
    except OSError:  # decoding the image reports why
        return 0


def pixel_digest(image: Image.Image) -> int:
    """64 bits of the sha256 of the pixels of an RGB image, equal for copies in other lossless formats."""
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest()[:8], "big")


def find_oddities(path: Path, max_pixels: int) -> Oddity:
    """Unusual properties according to the header of an image file; none if it cannot be read."""
    found = Oddity(0)
    with suppress(ImageError):
        properties = read_properties(path, Decoding(max_pixels, range=ANY_RANGE))
        for oddity, is_so in ((Oddity.SIXTEEN_BIT, properties.is_deep), (Oddity.METADATA, properties.is_ignored)):
            found |= oddity if is_so else Oddity(0)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return found | _oddities_of(image, path, max_pixels)
    except Image.DecompressionBombError:
        return Oddity.TOO_LARGE
    except Exception:  # Pillow raises almost anything on a broken file; decoding the image reports it
        return found


def _oddities_of(image: Image.Image, path: Path, max_pixels: int) -> Oddity:
    # An MPO is a photo of a phone, with its preview.
    has_frames = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    suffix = path.suffix.lower()
    found = {
        Oddity.ANIMATED: has_frames and image.format != "TIFF",
        Oddity.PAGES: has_frames and image.format == "TIFF",
        Oddity.TURNED: exif_orientation(image) not in (None, 1),
        Oddity.CMYK: image.mode == "CMYK",
        Oddity.ALPHA: image.has_transparency_data,
        Oddity.ENDING: suffix in EXTENSIONS and suffix not in ENDINGS.get(str(image.format), (suffix,)),
        Oddity.TOO_LARGE: image.width * image.height > max_pixels,
    }
    return Oddity(sum(oddity.value for oddity, is_so in found.items() if is_so))

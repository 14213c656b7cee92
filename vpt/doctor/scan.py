"""One look at every picture, as training reads it: what is kept of a picture are numbers, never its pixels.

Shapes: n pictures of a split.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntFlag, auto
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from vpt.build import build_loaders
from vpt.config.schema import Config
from vpt.data.images import EXTENSIONS, FORMATS, ImageError
from vpt.engine.console import Progress

ENDINGS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# 64 of the 256 bits of a sha256: in ten million pictures two different ones look alike once in 400,000 data sets.
COLUMNS = np.dtype([("file", "u8"), ("pixels", "u8"), ("height", "i4"), ("width", "i4"), ("oddities", "u2")])


class Oddity(IntFlag):
    """What is unusual about a picture file."""

    ANIMATED = auto()
    PAGES = auto()
    SIXTEEN_BIT = auto()
    TURNED = auto()
    CMYK = auto()
    ALPHA = auto()
    ENDING = auto()
    TOO_LARGE = auto()


@dataclass(frozen=True)
class Look:
    """What one look at a picture tells.

    Args:
        index: Its place in the split.
        row: file, pixels, height, width, oddities, see `COLUMNS`; zeros for what is not known.
        error: Why it cannot be read, or None.
    """

    index: int
    row: tuple[int, int, int, int, int]
    error: str | None


@dataclass
class Looks:
    """What was seen of a split.

    Args:
        columns: (n,), see `COLUMNS`; height and width are those of the upright picture.
        errors: Why pictures cannot be read, by index.
    """

    columns: NDArray[np.void]
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def readable(self) -> NDArray[np.int64]:
        """Indices of the pictures that can be read, ascending."""
        return np.flatnonzero(self.columns["height"] > 0)

    def odd(self, oddity: Oddity) -> list[int]:
        """Indices of the pictures that are unusual in this way."""
        found: list[int] = np.flatnonzero(self.columns["oddities"] & oddity.value).tolist()
        return found


class LookDataset:
    """Samples, looked at; a key is `(epoch, index)`, as the sampler of the loaders gives it."""

    def __init__(self, samples: Any, max_pixels: int) -> None:
        self.samples, self.max_pixels = samples, max_pixels

    def __getitem__(self, key: tuple[int, int]) -> Look:
        _, index = key
        path = self.samples.paths[index] if self.samples.paths else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on metadata that nobody reads
            return self._look(index, path)

    def __len__(self) -> int:
        return len(self.samples)

    def _look(self, index: int, path: Path | None) -> Look:
        if path is not None and not path.is_file():  # a pipe would be read for ever
            what = "not a plain file" if path.exists() else "no such file"
            return Look(index, (0, 0, 0, 0, 0), what)
        digest = 0 if path is None else file_digest(path)
        oddities = Oddity(0) if path is None else find_oddities(path, self.max_pixels)
        try:
            image = self.samples.read(index)
        except ImageError as error:
            return Look(index, (digest, 0, 0, 0, oddities.value), str(error).removeprefix(f"{path}: "))
        return Look(index, (digest, pixel_digest(image), image.height, image.width, oddities.value), None)


def look_at(config: Config, splits: Mapping[str, Any]) -> dict[str, Looks]:
    """Look at every picture of all splits once, in as many processes as training would use.

    Args:
        config: Says how many processes, and what is too large.
        splits: Samples by split.
    """
    datasets = {
        split: LookDataset(samples, config.data.max_pixels) for split, samples in splits.items() if len(samples)
    }
    loaders = build_loaders(config, datasets, list)
    found = {split: Looks(np.zeros(len(samples), COLUMNS)) for split, samples in splits.items()}
    with Progress(sum(map(len, loaders.values())), "look") as progress:
        for split in datasets:
            for batch in _batches(loaders.pop(split)):  # its processes end with it
                for look in batch:
                    found[split].columns[look.index] = look.row
                    if look.error is not None:
                        found[split].errors[look.index] = look.error
                progress.advance(len(batch))
    return found


def _batches(loader: Any) -> Iterator[list[Look]]:
    yield from loader


def file_digest(path: Path) -> int:
    """64 bits of the sha256 of a file."""
    try:
        with path.open("rb") as file:
            return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:8], "big")
    except OSError:  # reading the picture will say why
        return 0


def pixel_digest(image: Image.Image) -> int:
    """64 bits of the sha256 of an RGB picture: the same for a copy that was saved in another lossless format."""
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest()[:8], "big")


def find_oddities(path: Path, max_pixels: int) -> Oddity:
    """What the header of a picture file tells; nothing if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _oddities_of(image, path, max_pixels)
    except Image.DecompressionBombError:
        return Oddity.TOO_LARGE
    except Exception:  # Pillow raises almost anything on a broken file; reading the picture will say what
        return Oddity(0)


def _oddities_of(image: Image.Image, path: Path, max_pixels: int) -> Oddity:
    has_frames = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # a phone's photo and its preview
    suffix = path.suffix.lower()
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    seen = {
        Oddity.ANIMATED: has_frames and image.format != "TIFF",
        Oddity.PAGES: has_frames and image.format == "TIFF",
        Oddity.SIXTEEN_BIT: image.mode.startswith("I"),
        Oddity.TURNED: orientation in range(2, 9),
        Oddity.CMYK: image.mode == "CMYK",
        Oddity.ALPHA: image.has_transparency_data,
        Oddity.ENDING: suffix in EXTENSIONS and suffix not in ENDINGS.get(str(image.format), (suffix,)),
        Oddity.TOO_LARGE: image.width * image.height > max_pixels,
    }
    return Oddity(sum(oddity.value for oddity, is_so in seen.items() if is_so))

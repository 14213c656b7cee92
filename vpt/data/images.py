"""Decode a picture file safely: one RGB picture, upright, or an error that names the file.

Pillow decodes, and nothing else: other decoders crash, or return half a picture without a word, on broken files. What
Pillow itself gets wrong is put right here: it leaves a photograph lying on its side, drops transparency, and turns
16-bit grey into white.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000

# Not every format that Pillow knows: some start other programs (EPS calls Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpg", ".jpeg", ".png", ".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)


class ImageError(ValueError):
    """A picture that cannot be used; the message names it and says what is wrong."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file as RGB, upright; of an animation the first frame.

    Args:
        path: The file; its content decides the format, not its name.
        max_pixels: Larger pictures are refused by the size in their header, before they are decoded.

    Returns:
        A picture of mode RGB, fully decoded.

    Raises:
        ImageError: The file is missing, empty, truncated, not a picture, too large, or holds floating point values.
    """
    with _opened(path, max_pixels) as image:
        image.load()
        return to_rgb(image)


def check_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Refuse what `read_image` refuses, as far as the header of the file tells; takes a tenth of a millisecond.

    Returns:
        Width and height as the header says; a picture that lies on its side is not turned upright yet.

    Raises:
        ImageError: The file is missing, empty, not a picture, or too large.
    """
    with _opened(path, max_pixels) as image:
        return image.size


def read_header(path: str | Path) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Height and width of the upright picture and of the stored one, and EXIF's number of how it lies.

    The number is 1 unless the picture is stored on its side, which makes it 5, 6, 7 or 8.

    Raises:
        ImageError: What `check_image` refuses, or broken EXIF data.
    """
    with _opened(path, MAX_PIXELS) as image:
        # Pillow's own method for PNG would decode the picture, for the rare EXIF data that follow it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        is_upright = image.format == "TIFF"  # Pillow turns the size of a TIFF when it opens it
        size = image.height, image.width
    if orientation not in (5, 6, 7, 8):
        return size, size, 1
    return (size, size[::-1], orientation) if is_upright else (size[::-1], size, orientation)


def find_images(path: str | Path) -> list[Path]:
    """The pictures below a folder, sorted; dot files and dot folders are none. A file is itself.

    Links to folders are followed, but no folder is read twice. A name that is not there may be a pattern, as
    `photos/**/*.jpg`: then these are the pictures that match it, and those below folders that do; `**` is any number
    of folders, but no links to them.

    Raises:
        FileNotFoundError: There is neither a file nor a folder of this name, or no picture that matches it.
        ValueError: It is no possible pattern.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _walk(path)
    folder, pattern = split_pattern(path)
    if not pattern:
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        matches = list(folder.glob(pattern))
    except ValueError as error:  # "**.jpg"
        raise ValueError(f"{path}: {error}") from error
    found: set[Path] = set()
    for match in matches:
        if not any(part.startswith(".") for part in match.relative_to(folder).parts):
            found.update(_walk(match) if match.is_dir() else [match] if match.suffix.lower() in EXTENSIONS else [])
    if not found:
        raise FileNotFoundError(f"{path}: matches no picture ({', '.join(sorted(EXTENSIONS))})")
    return sorted(found)


def split_pattern(path: Path) -> tuple[Path, str]:
    """The folder that a pattern starts from, and the rest; "" if the path is no pattern.

    Names that are there stand for themselves, whatever they look like.

    Example:
        >>> split_pattern(Path("photos/20*/**/*.jpg"))
        (PosixPath('photos'), '20*/**/*.jpg')
    """
    folder = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for index, part in enumerate(parts):
        if any(character in part for character in "*?[") and not (folder / part).exists():
            return folder, str(Path(*parts[index:]))
        folder = folder / part
    return folder, ""


def _walk(folder: Path) -> list[Path]:
    """The pictures below a folder, sorted."""
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(file for file in found if file.suffix.lower() in EXTENSIONS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright and into mode RGB: transparency over white, 16-bit grey scaled by 257.

    Args:
        image: A decoded picture of any mode but floating point.

    Raises:
        ImageError: The mode is floating point or unknown, or its values are no 16-bit grey.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ImageError("floating point pictures have no known range; save it with 8 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """A file with its header read and its size checked; every error in here, and in the block, names the file."""
    try:
        with _open(path) as image:
            num_pixels = image.width * image.height
            if num_pixels > max_pixels:
                raise ImageError(f"{num_pixels:,} pixels are more than the {max_pixels:,} allowed; shrink the picture")
            yield image
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too many pixels ({error}); shrink the picture") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: {_why_unidentified(Path(path))}; pictures are {', '.join(FORMATS)}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise ImageError(f"{path}: broken picture ({error})") from error


def _open(path: str | Path) -> Image.Image:
    """Open a file and read its header, without Pillow's warning on large pictures: the caller has its own limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _why_unidentified(path: Path) -> str:
    return "the file is empty" if path.stat().st_size == 0 else "not a picture, or its header is broken"


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale grey values 0 to 65535, of mode I;16 or I, to 0 to 255."""
    values = np.asarray(image).astype(np.int32, copy=False)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"grey values {values.min()} to {values.max()} are no 16-bit values; save it with 8 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")

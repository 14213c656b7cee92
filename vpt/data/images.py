"""Decoding of image files: an upright RGB image, or an error that names the file.

Only Pillow decodes: other decoders crash on broken files, or silently return half an image. Corrected here is what
Pillow leaves to its callers: EXIF orientation, transparency, 16-bit grey, and pipes, on which opening would block.
"""

import os
import re
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError, features

MAX_PIXELS = 50_000_000

# Not every format that Pillow supports: some start other programs (EPS calls Ghostscript).
FORMATS: tuple[str, ...] = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".pbm", ".pgm", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
# What only some builds of Pillow read, and what a plug-in adds that is installed beside it: format, extensions.
OPTIONAL = {"avif": ("AVIF", {".avif"}), "jpg_2000": ("JPEG2000", {".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"})}
PLUG_INS = {"pillow_heif": ("HEIF", {".heic", ".heif", ".hif"}), "pillow_jxl": ("JXL", {".jxl"})}
# Image files that Pillow cannot read without more; they are left out and counted.
UNREAD = frozenset(
    {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2", ".exr", ".hdr", ".ico", ".psd", ".svg", ".tga"}
    | {ending for _, endings in (*OPTIONAL.values(), *PLUG_INS.values()) for ending in endings}
)
IGNORED_FOLDERS = frozenset(
    {"__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found", "@eadir"}
)


def _plug_in_formats() -> Iterator[tuple[str, set[str]]]:
    """Format and extensions of each plug-in of Pillow that is installed, after it is registered."""
    with suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found]

        pillow_heif.register_heif_opener()
        yield PLUG_INS["pillow_heif"]
    with suppress(ImportError):
        import pillow_jxl  # type: ignore[import-not-found]  # noqa: F401  # registers itself

        yield PLUG_INS["pillow_jxl"]


for _form, _endings in [*(OPTIONAL[name] for name in OPTIONAL if features.check(name)), *_plug_in_formats()]:
    FORMATS, EXTENSIONS = (*FORMATS, _form), EXTENSIONS | _endings

# The operation that turns an image upright, by EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoding:
    """Options of decoding.

    Images of more than `max_pixels` are refused by the size in their header, before they are decoded. The `background`
    of transparent images is the name of an opaque colour, or "#RRGGBB"; anything else is a `ValueError`.
    """

    max_pixels: int = MAX_PIXELS
    background: str = "white"

    def __post_init__(self) -> None:
        _colour(self.background)


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS, background: str = "white") -> Image.Image:
    """Read an image file as RGB, upright and fully decoded; of an animation the first frame.

    The content of the file decides the format, not its name. For the other parameters see `Decoding`.

    Raises:
        ImageError: The file is missing, empty, truncated, not an image, too large, or holds floating point values.
    """
    _colour(background)  # before an image is blamed for it
    with _opened(path, max_pixels) as image:
        image.load()
        return to_rgb(image, background)


def check_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in the header, before EXIF orientation is applied; takes a tenth of a millisecond.

    Raises:
        ImageError: As `read_image`, as far as the header shows: missing, empty, not an image, or too large.
    """
    with _opened(path, max_pixels) as image:
        return image.size


def read_header(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Height and width of the upright image, those of the stored one, and the EXIF orientation, 1 unless it is 5 to 8.

    Raises an `ImageError` as `check_image`, or if the EXIF data are broken.
    """
    with _opened(path, max_pixels) as image:
        orientation = _orientation(image)
        is_upright = image.format == "TIFF"  # Pillow turns the size of a TIFF when it opens it
        size = image.height, image.width
    if orientation not in (5, 6, 7, 8):
        return size, size, 1
    return (size, size[::-1], orientation) if is_upright else (size[::-1], size, orientation)


def find_images(path: str | Path, left_out: list[Path] | None = None) -> list[Path]:
    """The image files of a folder and its subfolders, sorted, without hidden ones; a file is returned as it is.

    Files that look like images, but cannot be read (`UNREAD`, or an image whose name has no extension), are added to
    `left_out`. Hidden folders and those of systems, such as `__MACOSX`, are ignored. Links to folders are followed, but
    no folder is read twice. A name that does not exist may be a pattern, such as `photos/**/*.jpg`: it returns the
    images that match, and those in folders that match; `**` matches any number of folders, but no links.

    Raises:
        FileNotFoundError: There is neither a file nor a folder of this name, or no image matches.
        ValueError: The pattern is invalid.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _walk(path, left_out)
    folder, pattern = split_pattern(path)
    if not pattern:
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        matches = list(folder.glob(pattern))
    except ValueError as error:  # "**.jpg"
        raise ValueError(f"{path}: {error}") from error
    found: set[Path] = set()
    for match in matches:
        if not any(map(is_ignored, match.relative_to(folder).parts)):
            found.update(_walk(match, left_out) if match.is_dir() else _only_images([match], left_out))
    if not found:
        hint = f"; {describe_unread(left_out)}" if left_out else f" ({', '.join(sorted(EXTENSIONS))})"
        raise FileNotFoundError(f"{path}: matches no image{hint}")
    return sorted(found)


def split_pattern(path: Path) -> tuple[Path, str]:
    """The folder that a pattern starts from, and the rest, or ""; names that exist are taken literally.

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


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a system's own, and no data."""
    return name.startswith(".") or name.lower() in IGNORED_FOLDERS


def describe_unread(paths: Sequence[Path]) -> str:
    """How many image files are left out, by extension, and what to do.

    Example:
        >>> describe_unread([Path("a.HEIC"), Path("b.heic"), Path("c.psd")])
        '3 image files cannot be read: 2 .heic, 1 .psd; save them as .jpg or .png, or pip install pillow-heif'
    """
    counts = Counter(path.suffix.lower() or "without an extension" for path in paths)
    listed = ", ".join(f"{number:,} {ending}" for ending, number in counts.most_common())
    plug_ins = [name for name, (_, endings) in PLUG_INS.items() if endings & counts.keys()]
    advice = "".join(f", or pip install {name.replace('_', '-')}" for name in plug_ins)
    files = "1 image file" if len(paths) == 1 else f"{len(paths):,} image files"
    return f"{files} cannot be read: {listed}; save them as .jpg or .png{advice}"


def _walk(folder: Path, left_out: list[Path] | None = None) -> list[Path]:
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        found += [Path(parent, name) for name in files if not is_ignored(name)]
    return _only_images(sorted(found), left_out)


def _only_images(paths: Sequence[Path], left_out: list[Path] | None) -> list[Path]:
    """The paths that end like images; others that hold an image are added to `left_out`."""
    if left_out is not None:
        left_out += [path for path in paths if _is_unread(path)]
    return [path for path in paths if path.suffix.lower() in EXTENSIONS]


def _is_unread(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in UNREAD - EXTENSIONS
    with suppress(ImageError):
        check_image(path)
        return True
    return False


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Turn an image upright and convert it to RGB: transparency over a colour, 16-bit grey divided by 257.

    Raises:
        ImageError: The mode is floating point or unknown, or its values are not 16-bit grey.
    """
    orientation = _orientation(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ImageError("floating point images have no known range; save it with 8 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _colour(background)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """A file with its header read and its size checked; every error here and in the block names the file."""
    try:
        with _without_warnings(), _open(path) as image:
            if (num_pixels := image.width * image.height) > max_pixels:
                raise ImageError(f"{num_pixels:,} pixels are more than the {max_pixels:,} allowed; shrink the image")
            yield image
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too many pixels ({error}); shrink the image") from error
    except UnidentifiedImageError as error:
        reason = "not an image, or its header is broken" if Path(path).stat().st_size else "the file is empty"
        raise ImageError(f"{path}: {reason}; formats: {', '.join(FORMATS)}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        if isinstance(error, OSError) and error.strerror:  # of the system: Pillow's own have a text only
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: broken image ({reason})") from error


def _open(path: str | Path) -> Image.Image:
    if isinstance(path, str | Path):
        mode = os.stat(path).st_mode  # noqa: PTH116  (either type)
        if not stat.S_ISREG(mode):  # opening a pipe blocks until it is written to, and a device may never end
            raise ImageError(f"{'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not an image")
    return Image.open(path, formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 by default."""
    try:
        # Pillow's own method for PNG would decode the image, for the rare EXIF data that follow it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception as error:
        reason = f"broken EXIF data ({' '.join(str(error).split())}), so that the orientation is unknown"
        raise ImageError(f"{reason}; save it without them") from error
    return orientation if orientation in tuple(TURNS) else 1


def _colour(name: str) -> tuple[int, ...]:
    """Red, green and blue of an opaque colour."""
    try:
        colour = ImageColor.getrgb(name)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"background={name!r}: not a colour; use a name such as white, or '#RRGGBB'") from error
    if len(colour) != 3:
        raise ValueError(f"background={name!r}: must be opaque; use a name such as white, or '#RRGGBB'")
    return colour


DEFAULT_DECODING = Decoding()

_SILENT = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_silence = threading.Lock()
_num_silent = 0


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings: about unused metadata, and about sizes, which have a limit here.

    Images are read in several threads, in which `warnings.catch_warnings` would restore each other's filters.
    """
    global _num_silent
    with _silence:
        _num_silent += 1
        if _num_silent == 1:
            warnings.filterwarnings("ignore", module=_SILENT[3].pattern)
    try:
        yield
    finally:
        with _silence:
            _num_silent -= 1
            if _num_silent == 0:
                filters: Any = warnings.filters
                with suppress(ValueError):  # the filters were replaced meanwhile
                    filters.remove(_SILENT)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale grey values 0 to 65535, of mode I;16 or I, to 0 to 255."""
    values = np.asarray(image).astype(np.int32, copy=False)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"grey values {values.min()} to {values.max()} are not 16-bit; save it with 8 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")

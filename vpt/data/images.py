"""Decoding of image files: an upright RGB image, or an error that names the file.

Only Pillow decodes: other decoders crash on broken files, or silently return half an image. Corrected here is what
Pillow leaves to its callers: EXIF orientation, transparency, bands without a meaning, more than 8 bits, metadata that
cannot be read, files that take much longer than their pixels, and pipes, on which opening would block.
"""

import errno
import io
import math
import os
import re
import stat
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, TiffImagePlugin, UnidentifiedImageError, features

MAX_PIXELS = 50_000_000
MAX_HEADER = 4096  # bytes of a PNM file before its pixels
MAX_SCANS = 100  # of a progressive JPEG; each is a pass over all pixels, however few bytes it has
IGNORED = "vpt_ignored"  # in `Image.info` of an image whose metadata were left out
FULL = (0.0, 65535.0)  # the range of 16 bits
FEW = 4096  # values; an image that uses no more of 16 bits has at most 17 grey levels of 8 bits
SMALL_RANGE = "its values take a small part of 16 bits, so that few grey levels remain; give their range (data.range)"
NO_RANGE = "floating point images have no known range; give it, in configs data.range=LOW:HIGH"
COLOUR_BANDS = {5: 4, 2: 3, 6: 3, 8: 3}  # of a TIFF by its PhotometricInterpretation; others have one

# Not every format that Pillow supports: some start other programs (EPS calls Ghostscript).
FORMATS: tuple[str, ...] = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".pbm", ".pgm", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
# What only some builds of Pillow read, and what a plug-in adds that is installed beside it: format, extensions.
OPTIONAL = {"avif": ("AVIF", {".avif"}), "jpg_2000": ("JPEG2000", {".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"})}
PLUG_INS = {"pillow_heif": ("HEIF", {".heic", ".heif", ".hif"}), "pillow_jxl": ("JXL", {".jxl"})}


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

# Of 16-bit raw modes of Pillow, such as "RGB;16B", to the other order of bytes; N is that of this machine.
_EXCHANGED = str.maketrans({"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"})
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of a JPEG segment

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


def _colour(name: str) -> tuple[int, ...]:
    """Red, green and blue of an opaque colour."""
    try:
        colour = ImageColor.getrgb(name)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"background={name!r}: not a colour; use a name such as white, or '#RRGGBB'") from error
    if len(colour) != 3:
        raise ValueError(f"background={name!r}: must be opaque; use a name such as white, or '#RRGGBB'")
    return colour


@dataclass(frozen=True)
class Decoding:
    """Options of decoding.

    Args:
        max_pixels: Images of more pixels are refused by the size in their header, before they are decoded.
        background: The name of an opaque colour, or "#RRGGBB", behind transparent images.
        range: The values of channels with more than 8 bits that become 0 and 255; those beyond are clipped. None is
            `FULL`, 0 and 65535, refuses floating point and other values, and warns of an image that uses few of them.
        bands: Numbers, from 1, of the bands that are read as red, green and blue; the others, also alpha, are dropped.
            None reads the colours and alpha, and refuses a file with bands of which it does not say what they are.

    Raises:
        ValueError: A value is not as described.
    """

    max_pixels: int = MAX_PIXELS
    background: str = "white"
    range: tuple[float, float] | None = None
    bands: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        _colour(self.background)
        if self.range is not None and not -math.inf < self.range[0] < self.range[1] < math.inf:
            raise ValueError(f"range={list(self.range)}: must be two finite numbers, the lower one first")
        if self.bands is not None and (len(self.bands) != 3 or min(self.bands) < 1):
            raise ValueError(f"bands={list(self.bands)}: must be three numbers from 1, such as [1, 2, 3]")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


DEFAULT_DECODING = Decoding()


@dataclass(frozen=True)
class Properties:
    """What the header of an image says, beside its size, of how the image is read."""

    is_deep: bool  # its channels have more than 8 bits
    is_ignored: bool  # it has metadata that cannot be read, and are not used


def read_image(path: str | Path, decoding: Decoding = DEFAULT_DECODING) -> Image.Image:
    """Read an image file as RGB, upright and fully decoded; of an animation the first frame.

    The content of the file decides the format, not its name. Metadata that are damaged or too large are ignored.

    Raises:
        ImageError: The file is missing, empty, truncated, not an image, too large, has bands of unknown meaning, or
            values outside of 8 or 16 bits although `decoding` has no range.
    """
    uses_few = False
    with opened(path, decoding) as image:
        if decoding.range is not None and _is_deep(image) and (decoding.range != FULL or image.mode == "F"):
            return _from_values(_deep_values(path, image, decoding), decoding)
        is_deep = _is_deep(image)
        image.load()
        found = to_rgb(image, decoding)
        if is_deep and decoding.range is None:
            few = FEW if image.mode.startswith("I") else FEW / 256  # of colours Pillow has the upper byte
            uses_few = bool(np.ptp(np.asarray(image)) < few)
    if uses_few:
        warnings.warn(f"{path}: {SMALL_RANGE}", stacklevel=2)
    return found


def read_values(path: str | Path, decoding: Decoding = DEFAULT_DECODING) -> NDArray[Any]:
    """The numbers in an image file with more than 8 bits a channel, upright: (H, W), or (H, W, C) without alpha.

    Raises an `ImageError` as `read_image`.
    """
    with opened(path, decoding) as image:
        return _deep_values(path, image, decoding)


def check_image(path: str | Path, decoding: Decoding = DEFAULT_DECODING) -> tuple[int, int]:
    """Width and height in the header, before EXIF orientation is applied; takes a tenth of a millisecond.

    Raises:
        ImageError: As `read_image`, as far as the header shows: missing, empty, not an image, or too large.
    """
    with opened(path, decoding) as image:
        return image.size


def read_properties(path: str | Path, decoding: Decoding = DEFAULT_DECODING) -> Properties:
    """Properties of an image by its header.

    Raises an `ImageError` as `check_image`, or if it holds floating point values and `decoding` has no range.
    """
    with opened(path, decoding) as image:
        if image.mode == "F" and decoding.range is None:
            raise ImageError(NO_RANGE)
        return Properties(_is_deep(image), IGNORED in image.info or exif_orientation(image) is None)


def read_header(
    path: str | Path, decoding: Decoding = DEFAULT_DECODING
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Height and width of the upright image, those of the stored one, and the EXIF orientation, 1 by default.

    Raises an `ImageError` as `check_image`.
    """
    with opened(path, decoding) as image:
        orientation = _orientation(image)
        is_upright = image.format == "TIFF"  # Pillow turns the size of a TIFF when it opens it
        size = image.height, image.width
    if orientation not in (5, 6, 7, 8):
        return size, size, orientation
    return (size, size[::-1], orientation) if is_upright else (size[::-1], size, orientation)


def to_rgb(image: Image.Image, decoding: Decoding = DEFAULT_DECODING) -> Image.Image:
    """Turn an image upright and convert it to RGB: transparency over a colour, 16-bit grey divided by 257.

    Raises:
        ImageError: The mode is floating point or unknown, its values are not 16-bit grey, or it lacks a band.
    """
    orientation = _orientation(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if image.mode == "F" and decoding.range is not None:
        return _from_values(np.asarray(image), decoding)
    if image.mode.startswith("I"):
        is_full = decoding.range in (None, FULL)
        return _from_16_bit(image) if is_full else _from_values(np.asarray(image), decoding)
    if image.mode == "F":
        raise ImageError(NO_RANGE)
    if decoding.bands is not None:
        bands = image.convert("RGB").split() if image.mode == "P" else image.split()
        return Image.merge("RGB", [bands[band] for band in _band_indices(decoding, len(bands))])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _colour(decoding.background)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _band_indices(decoding: Decoding, num_bands: int) -> list[int]:
    bands = decoding.bands or (1, 2, 3)
    if max(bands) > num_bands:
        raise ImageError(f"bands={list(bands)}: of this file only {num_bands} can be read; change data.bands")
    return [band - 1 for band in bands]


def _from_values(values: NDArray[Any], decoding: Decoding) -> Image.Image:
    """Scale the range to 0 to 255: (H, W) or (H, W, C) of any numbers to RGB; what is not a number becomes 0."""
    assert decoding.range is not None
    low, high = decoding.range
    scaled = np.nan_to_num((values.astype(np.float64) - low) * (255 / (high - low)), nan=0.0)
    pixels = np.floor(scaled.clip(0, 255) + 0.5).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = pixels[..., _band_indices(decoding, pixels.shape[2])]
    elif decoding.bands is not None:
        _band_indices(decoding, 1)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _raw_modes(image: Image.Image) -> list[str]:
    """How the file stores the pixels, in Pillow's words: a mode and what differs from it, such as "RGB;16B"."""
    found = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in image.tile]  # type: ignore[attr-defined]
    return [mode for mode in found if isinstance(mode, str)]


def _with_raw_mode(tile: Any, mode: str) -> Any:
    """A tile of Pillow whose stored pixels are read in another mode."""
    return tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)


def _is_deep(image: Image.Image) -> bool:
    """Whether the channels of an image that is not decoded yet have more than 8 bits."""
    return image.mode.startswith(("I", "F")) or any(re.search(";16[BLN]$", mode) for mode in _raw_modes(image))


def _deep_values(path: str | Path, image: Image.Image, decoding: Decoding) -> NDArray[Any]:
    """The numbers of an image that is not decoded yet, upright: (H, W), or (H, W, C) without alpha.

    Of 16-bit colours Pillow decodes the upper byte only. With the order of bytes exchanged it decodes the lower one.
    """
    raw_modes = _raw_modes(image)
    image.load()
    values, orientation = np.asarray(image), _orientation(image)  # Pillow turns a TIFF when it loads it
    if values.ndim == 3:
        if image.mode not in ("RGB", "RGBA"):
            raise ImageError(f"16-bit {image.mode} has no range; save it with 8 bits per channel")
        with opened(path, decoding) as other:
            exchanged = [mode[:-1] + mode[-1].translate(_EXCHANGED) for mode in raw_modes]
            other.tile = [_with_raw_mode(tile, mode) for tile, mode in zip(other.tile, exchanged, strict=True)]  # type: ignore[attr-defined]
            other.load()
            values = values.astype(np.uint16) << 8 | np.asarray(other)
        if decoding.bands is None:
            values = values[..., :3]
    if orientation in TURNS:
        places = np.arange(image.width * image.height, dtype=np.int32).reshape(image.size[::-1])
        turned = np.asarray(Image.fromarray(places).transpose(TURNS[orientation]))
        values = values.reshape(-1, *values.shape[2:])[turned]
    return values


@contextmanager
def opened(path: str | Path, decoding: Decoding) -> Iterator[Image.Image]:
    """A file with its header read and checked; every error here and in the block names the file."""
    try:
        with _without_warnings(), _open(path) as image:
            if (num_pixels := image.width * image.height) > decoding.max_pixels:
                allowed = f"{decoding.max_pixels:,} allowed"
                raise ImageError(f"{num_pixels:,} pixels are more than the {allowed}; shrink the image")
            _check_bands(image, decoding)
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
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # nothing of the image, which must not be left out for it
        if isinstance(error, OSError) and error.strerror:  # of the system: Pillow's own have a text only
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: broken image ({reason})") from error


@contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    if not isinstance(path, str | Path):  # a file in memory
        yield _open_file(path)
        return
    mode = os.stat(path).st_mode  # noqa: PTH116  (either type)
    if not stat.S_ISREG(mode):  # opening a pipe blocks until it is written to, and a device may never end
        raise ImageError(f"{'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not an image")
    with open(path, "rb") as file, _open_file(file) as image:  # noqa: PTH123
        yield image


def _open_file(file: Any) -> Any:
    head = file.read(MAX_HEADER)
    if head[:1] == b"P":
        _check_pnm(head)
    try:
        image: Any = Image.open(file, formats=FORMATS)
    except Exception:
        if (pixels := _without_metadata(file)) is None:
            raise
        image = Image.open(pixels, formats=FORMATS)
        image.info[IGNORED] = True
    if image.format == "PNG":
        image.load_end = partial(_load_end, image)
    if image.info.get("progressive") and (num := _num_scans(file)) > MAX_SCANS:
        raise ImageError(f"{num} scans, each a pass over all pixels, are more than {MAX_SCANS}; save it again")
    return image


def _load_end(image: Any) -> None:
    """Read the chunks of a PNG behind its pixels, as far as Pillow can."""
    with suppress(ValueError):
        type(image).load_end(image)


def _check_pnm(head: bytes) -> None:
    """Refuse a PNM file that Pillow would read byte by byte: numbers as text, or a long header."""
    if head[1:2] in (b"1", b"2", b"3"):
        raise ImageError("a PNM file of numbers as text (P1 to P3); save it as P4 to P6, or as PNG")
    num_words = len(re.sub(rb"#[^\r\n]*[\r\n]", b" ", head).split(None, 4))
    if len(head) == MAX_HEADER and num_words < 4:
        raise ImageError(f"a header of more than {MAX_HEADER} bytes; save it without comments")


def _without_metadata(file: Any) -> io.BytesIO | None:
    """A PNG without the chunks that its pixels do not need and EXIF data that are damaged; None if it is no PNG."""
    file.seek(0)
    kept = [file.read(8)]
    if kept[0] != b"\x89PNG\r\n\x1a\n":
        return None
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind not in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        data = file.read(length + 4)
        if kind != b"eXIf" or zlib.crc32(kind + data[:-4]) == int.from_bytes(data[-4:], "big"):
            kept.append(head + data)
    return io.BytesIO(b"".join(kept))


def _num_scans(file: Any) -> int:
    """The number of scans of a JPEG."""
    before = file.tell()
    file.seek(0)
    data, num, place = file.read(), 0, 2
    file.seek(before)
    while (marker := _MARKER.search(data, place)) is not None and marker[0][1] != 0xD9:  # the end of the image
        num += marker[0][1] == 0xDA
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return num


def _check_bands(image: Image.Image, decoding: Decoding) -> None:
    """Refuse an image without the bands that are wanted, and a TIFF that does not say what its bands are."""
    if decoding.bands is not None and max(decoding.bands) == 4:
        _read_fourth_band(image)
    if decoding.bands is not None:
        _band_indices(decoding, 3 if image.mode == "P" else len(image.getbands()))
    elif image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        num = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        num_colours = COLOUR_BANDS.get(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION), 1)
        num_alpha = sum(kind in (1, 2) for kind in tags.get(TiffImagePlugin.EXTRASAMPLES, ()))
        if num > num_colours + num_alpha:
            raise ImageError(
                f"{num} bands, of which {num - num_colours - num_alpha} are neither colours nor declared as "
                f"transparency; choose bands, in configs data.bands={[1, 2, 3] if num > 3 else [1, 1, 1]}"
            )


def _read_fourth_band(image: Image.Image) -> None:
    """Let Pillow read the fourth band of a TIFF that it would drop."""
    modes = _raw_modes(image)
    if modes and all(re.match("RGBX(;|$)", mode) for mode in modes):
        image._mode = "RGBA"
        image.tile = [_with_raw_mode(tile, "RGBA" + modes[0][4:]) for tile in image.tile]  # type: ignore[attr-defined]


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 by default, also where the EXIF data are damaged."""
    return exif_orientation(image) or 1


def exif_orientation(image: Image.Image) -> int | None:
    """EXIF orientation; 1 by default, and None if the EXIF data are damaged."""
    try:
        # Pillow's own method for PNG would decode the image, for the rare EXIF data that follow it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:
        return None
    return orientation if orientation in tuple(TURNS) else 1


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

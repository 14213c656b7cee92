"""The range of values in images with more than 8 bits per channel, found over a training set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vpt.data.images import FULL, Decoding, ImageError, read_properties, read_values

MAX_IMAGES = 1000  # that are decoded, evenly spread
MAX_VALUES = 2000  # of an image, evenly spread, for the quantiles
QUANTILES = (0.001, 0.999)
MAX_FACTOR = 8  # of the span of the quantiles; a larger one is that of a few outliers
DEPTHS = (255, 1023, 4095, 16383, 65535)  # largest values of 8, 10, 12, 14 and 16 bits
ANY_RANGE = (0.0, 1.0)  # for headers: with a range no image is refused for its values

Range = tuple[float, float]


@dataclass(frozen=True)
class HeaderScan:
    """Properties of the image files of a split, by their headers; those that cannot be read have none."""

    deep: tuple[Path, ...]  # with more than 8 bits per channel
    ignored: tuple[Path, ...]  # with metadata that cannot be read


def scan_headers(paths: Sequence[Path], decoding: Decoding) -> HeaderScan:
    """Read the header of each file."""
    deep, ignored, decoding = [], [], replace(decoding, range=ANY_RANGE)
    for path in paths:
        try:
            found = read_properties(path, decoding)
        except ImageError:  # reported when the images are checked
            continue
        deep += [path] * found.is_deep
        ignored += [path] * found.is_ignored
    return HeaderScan(tuple(deep), tuple(ignored))


def find_range(paths: Sequence[Path], decoding: Decoding) -> Range:
    """The range of values in image files with more than 8 bits.

    It is that of 16 bits where the values take at least half of it. Otherwise it begins at the lowest value, or at 0 if
    that is near, and ends at the highest, or at the end of a common depth such as 4095 if that is near. Where less than
    0.2 % of the values would take most of the range, they are left out.
    """
    num, lows, highs, values, is_integer = len(paths), [], [], [], True
    for index in np.linspace(0, num - 1, min(num, MAX_IMAGES)).astype(int).tolist():
        try:
            found = read_values(paths[index], decoding).ravel()
        except ImageError:
            continue
        is_integer &= found.dtype.kind in "iu"
        found = found[np.isfinite(found)].astype(np.float64)
        if found.size:
            lows.append(found.min())
            highs.append(found.max())
            values.append(found[:: max(1, found.size // MAX_VALUES)])
    if not values:
        return FULL
    low, high = float(min(lows)), float(max(highs))
    quantiles = np.quantile(np.concatenate(values), QUANTILES)
    if high - low > MAX_FACTOR * (quantiles[1] - quantiles[0]) > 0:
        low, high = map(float, quantiles)
    if is_integer:
        low, high = float(math.floor(low)), float(math.ceil(high))
    if is_integer and 0 <= low < high / 8:
        low = 0.0
        high = float(next((depth for depth in DEPTHS if 0.75 * depth <= high <= depth), high))
    if low >= 0 and high <= DEPTHS[-1] and high - low >= DEPTHS[-1] / 2:
        return FULL
    return (low, high) if high > low else (low, low + 1)


def format_range(found: Range | None) -> str:
    """A range as `data.range` takes it.

    Example:
        >>> format_range((0.0, 4095.0)), format_range(FULL)
        ('0:4095', 'full')
    """
    if found is None or found == FULL:
        return "full"
    return ":".join(repr(float(value)).removesuffix(".0") for value in found)


def parse_range(text: str) -> Range:
    """The inverse of `format_range`; a `ValueError` for anything else."""
    if text == "full":
        return FULL
    try:
        low, high = map(float, text.split(":"))
        return Decoding(range=(low, high)).range or FULL
    except ValueError as error:
        raise ValueError(f"range={text}: must be auto, full or LOW:HIGH, such as 0:4095") from error

"""Single pictures: which cannot be read, which are unusual, and how their sizes fit the backbone."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.config.schema import Config, OnError
from vpt.data.images import EXTENSIONS
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.doctor.findings import File, Finding, Level, of_pictures, share
from vpt.doctor.scan import Looks, Oddity

EXTREME = 4  # the longer side over the shorter one
OTHER_ENDINGS = {".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jxl", ".nef", ".psd"}
MUCH = 0.4  # of a picture's area that the centre crop cuts off

SAID = {
    Oddity.ANIMATED: ("animated", "are animated; the first frame is read"),
    Oddity.PAGES: ("pages", "have several pages; the first is read"),
    Oddity.SIXTEEN_BIT: ("sixteen_bit", "have 16 bits; they are scaled to 8, the full range to the full range"),
    Oddity.TURNED: ("exif_turned", "are turned by their EXIF data; they are read upright"),
    Oddity.CMYK: ("cmyk", "are CMYK; their colours are converted without a profile"),
    Oddity.ALPHA: ("alpha", "are transparent; {background} shows through"),
    Oddity.ENDING: ("ending", "have the ending of another format; what they contain counts"),
}


def find_unreadable(
    config: Config, splits: Mapping[str, Any], looks: Mapping[str, Looks], left_out: Sequence[tuple[str, str]]
) -> Iterator[Finding]:
    """Pictures that cannot be read or are too large: errors, unless training is told to leave them out.

    Args:
        config: Says whether it is.
        splits: Samples by split.
        looks: What was seen of them.
        left_out: Names of train pictures that the reader knew already, and what is wrong with each.
    """
    for split, of_split in looks.items():
        known = left_out if split == "train" else []
        total = len(splits[split]) + len(known)
        level, fate = _fate(config, split, len(of_split.errors) + len(known), total)
        if known:
            message = f"{share(len(known), total)} pictures are missing or broken; {fate}"
            yield Finding(level, "unreadable", message, split, tuple(File(name, split, why) for name, why in known))
        large = set(of_split.odd(Oddity.TOO_LARGE))
        for code, what, is_large in (("unreadable", "cannot be read", False), ("too_large", "are too large", True)):
            errors = {index: text for index, text in of_split.errors.items() if (index in large) is is_large}
            if errors:
                yield of_pictures(level, code, f"{what}; {fate}", split, splits[split].names, errors)


def _fate(config: Config, split: str, num: int, total: int) -> tuple[Level, str]:
    """How bad it is that pictures of a split cannot be read, and what becomes of them."""
    if split != "train":
        return Level.error, "replace or remove them, nothing is left out of val and test"
    if too_many(config, num, total):
        limit = f"data.max_skipped={config.data.max_skipped:g}"
        return Level.error, f"replace or remove them, they are too many to be left out ({limit})"
    if config.data.on_error is OnError.skip:
        return Level.warning, "training leaves them out"
    return Level.error, "replace or remove them, or leave them out with data.on_error=skip"


def too_many(config: Config, num: int, total: int) -> bool:
    """Whether so many pictures of train cannot be read that they may not be left out."""
    return num > config.data.max_skipped * total or num == total


def find_unusual(config: Config, splits: Mapping[str, Any], looks: Mapping[str, Looks]) -> Iterator[Finding]:
    """What headers tell: animated, 16-bit, turned, CMYK, transparent, a wrong ending."""
    for split, of_split in looks.items():
        for oddity, (code, what) in SAID.items():
            found = dict.fromkeys((index for index in of_split.odd(oddity) if index not in of_split.errors), "")
            if found:
                said = what.format(background=config.data.background)
                yield of_pictures(Level.note, code, said, split, splits[split].names, found)


def find_ignored(root: Path) -> Iterator[Finding]:
    """Pictures below a folder that no reader looks at, because of their ending."""
    names = [
        Path(parent, name).relative_to(root).as_posix()
        for parent, _, files in os.walk(root)
        for name in sorted(files)
        if Path(name).suffix.lower() in OTHER_ENDINGS - EXTENSIONS
    ]
    if names:
        message = f"pictures in formats that are not read: {len(names):,}; save them as .jpg or .png"
        yield Finding(Level.warning, "ignored", message, None, tuple(map(File, names)))


def find_size_problems(
    splits: Mapping[str, Any], looks: Mapping[str, Looks], preprocessing: Preprocessing | None
) -> Iterator[Finding]:
    """Pictures smaller than the input, long and thin ones, and what the centre crop cuts off."""
    for split, of_split in looks.items():
        there = of_split.readable
        heights, widths = (of_split.columns[side][there].astype(float) for side in ("height", "width"))
        for code, said, which in _odd_sizes(heights, widths, preprocessing):
            if which.any():
                found = zip(there[which], widths[which], heights[which], strict=True)
                details = {int(index): f"{width:.0f} x {height:.0f}" for index, width, height in found}
                yield of_pictures(Level.note, code, said, split, splits[split].names, details)


def _odd_sizes(
    heights: NDArray[np.float64], widths: NDArray[np.float64], preprocessing: Preprocessing | None
) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """A code, what to say, and which of the pictures it is said of, (n,)."""
    ratios = np.maximum(heights, widths) / np.minimum(heights, widths)
    yield "extreme_aspect", f"are {EXTREME} times as long as wide, or more", ratios >= EXTREME
    if preprocessing is None:
        return
    height, width = preprocessing.size
    small = f"are smaller than the input of {width} x {height} px, and are enlarged"
    yield "smaller_than_input", small, (heights < height) | (widths < width)
    cut = cut_off(heights, widths, preprocessing)
    lost = f"lose more than {100 * MUCH:.0f} % of their area to the centre crop"
    yield "crop", f"{lost}; augment.crop_mode=squash or letterbox would keep more of them", cut > MUCH


def cut_off(
    heights: NDArray[np.float64], widths: NDArray[np.float64], preprocessing: Preprocessing
) -> NDArray[np.float64]:
    """The part of each picture's area, in [0, 1], that evaluation does not see, (n,)."""
    if preprocessing.crop_mode == "letterbox":
        return np.zeros_like(heights)
    height, width = preprocessing.size
    if preprocessing.crop_mode == "squash":
        return np.full_like(heights, 1 - preprocessing.crop_pct**2)
    scale = np.minimum(heights / height, widths / width) * preprocessing.crop_pct
    return 1 - height * width * scale**2 / (heights * widths)

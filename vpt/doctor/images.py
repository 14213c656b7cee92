"""Images that cannot be read, are unusual, or have sizes that do not fit the backbone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.config.schema import Config, OnError
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.doctor.scan import Oddity, SplitScan
from vpt.task_types.findings import File, Finding, Level, share

EXTREME = 4  # the longer side over the shorter one
MUCH = 0.4  # of the area of an image that the centre crop cuts off

ODDITIES = {
    Oddity.ANIMATED: ("animated", "are animated; the first frame is read"),
    Oddity.PAGES: ("pages", "have several pages; the first is read"),
    Oddity.SIXTEEN_BIT: (
        "sixteen_bit",
        "have 16 bits per channel; data.range decides which values become black and white",
    ),
    Oddity.TURNED: ("exif_turned", "have an EXIF orientation; they are read upright"),
    Oddity.CMYK: ("cmyk", "are CMYK; they are converted to RGB without a colour profile"),
    Oddity.ALPHA: ("alpha", "have transparency; they are placed on the background {background}"),
    Oddity.METADATA: ("metadata", "have metadata that cannot be read; their pixels are read, as if upright"),
    Oddity.ENDING: ("ending", "have the extension of another format; they are read by their content"),
}


def find_unreadable(
    config: Config, splits: Mapping[str, Any], scans: Mapping[str, SplitScan], left_out: Sequence[tuple[str, str]]
) -> Iterator[Finding]:
    """Images that cannot be read or are too large: errors, unless training would skip them.

    `left_out` has the names of train images that the reader skipped, and the reasons.
    """
    for split, of_split in scans.items():
        known = left_out if split == "train" else []
        total = len(splits[split]) + len(known)
        level, fate = _fate(config, split, len(of_split.errors) + len(known), total)
        if known:
            message = f"{share(len(known), total)} images are missing or broken; {fate}"
            yield Finding(level, "unreadable", message, split, tuple(File(name, split, why) for name, why in known))
        large = set(of_split.odd(Oddity.TOO_LARGE))
        for code, what, is_large in (("unreadable", "cannot be read", False), ("too_large", "are too large", True)):
            if errors := {index: text for index, text in of_split.errors.items() if (index in large) is is_large}:
                yield _of_images(level, code, f"{what}; {fate}", split, splits[split].names, errors)


def _fate(config: Config, split: str, num: int, total: int) -> tuple[Level, str]:
    """The level of unreadable images of a split, and what happens to them."""
    if split != "train":
        return Level.error, "replace or remove them; images of val and test are never skipped"
    if too_many(config, num, total):
        limit = f"data.max_skipped={config.data.max_skipped:g}"
        return Level.error, f"replace or remove them; they are too many to be skipped ({limit})"
    if config.data.on_error is OnError.skip:
        return Level.warning, "training skips them"
    return Level.error, "replace or remove them, or skip them with data.on_error=skip"


def too_many(config: Config, num: int, total: int) -> bool:
    """Whether training refuses to skip so many train images."""
    return num > config.data.max_skipped * total or num == total


def find_unusual(config: Config, splits: Mapping[str, Any], scans: Mapping[str, SplitScan]) -> Iterator[Finding]:
    """Unusual files: animated, 16-bit, rotated by EXIF, CMYK, transparent, a wrong extension."""
    for split, of_split in scans.items():
        for oddity, (code, text) in ODDITIES.items():
            if found := dict.fromkeys((index for index in of_split.odd(oddity) if index not in of_split.errors), ""):
                text = text.format(background=config.data.background)
                yield _of_images(Level.note, code, text, split, splits[split].names, found)


def find_size_problems(
    splits: Mapping[str, Any], scans: Mapping[str, SplitScan], preprocessing: Preprocessing | None
) -> Iterator[Finding]:
    """Images that are smaller than the input, very long, or mostly cut off by the centre crop."""
    for split, of_split in scans.items():
        readable = of_split.readable
        heights, widths = (of_split.columns[side][readable].astype(float) for side in ("height", "width"))
        for code, text, which in _odd_sizes(heights, widths, preprocessing):
            if which.any():
                found = zip(readable[which], widths[which], heights[which], strict=True)
                details = {int(index): f"{width:.0f} x {height:.0f}" for index, width, height in found}
                yield _of_images(Level.note, code, text, split, splits[split].names, details)


def _odd_sizes(
    heights: NDArray[np.float64], widths: NDArray[np.float64], preprocessing: Preprocessing | None
) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """A code, its text, and whether it applies to each image, (n,)."""
    ratios = np.maximum(heights, widths) / np.minimum(heights, widths)
    yield "extreme_aspect", f"are at least {EXTREME} times as long as wide", ratios >= EXTREME
    if preprocessing is None:
        return
    height, width = preprocessing.size
    small = f"are smaller than the input of {width} x {height} px and are enlarged"
    yield "smaller_than_input", small, (heights < height) | (widths < width)
    cut = cut_off(heights, widths, preprocessing)
    lost = f"lose more than {100 * MUCH:.0f} % of their area to the centre crop"
    yield "crop", f"{lost}; augment.crop_mode=squash or letterbox would keep more", cut > MUCH


def cut_off(
    heights: NDArray[np.float64], widths: NDArray[np.float64], preprocessing: Preprocessing
) -> NDArray[np.float64]:
    """The fraction of the area of each image, in [0, 1], that evaluation crops away, (n,)."""
    if preprocessing.crop_mode == "letterbox":
        return np.zeros_like(heights)
    height, width = preprocessing.size
    if preprocessing.crop_mode == "squash":
        return np.full_like(heights, 1 - preprocessing.crop_pct**2)
    scale = np.minimum(heights / height, widths / width) * preprocessing.crop_pct
    return 1 - height * width * scale**2 / (heights * widths)


def _of_images(
    level: Level, code: str, text: str, split: str, names: Sequence[str], details: Mapping[int, str]
) -> Finding:
    """A finding about some images of a split, with a detail by index; a note about all of them lists no files."""
    is_all = level is Level.note and len(details) == len(names)
    files = () if is_all else tuple(File(names[index], split, details[index]) for index in sorted(details))
    return Finding(level, code, f"{share(len(details), len(names))} images {text}", split, files, len(details))

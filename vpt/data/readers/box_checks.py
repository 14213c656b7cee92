"""Checks of the boxes that annotation files declare, and samples made of them.

A reader (`coco.py`, `yolo.py`, `voc.py`) describes each image as a `SourceImage`, unchecked. `make_samples` reads the
header of the image file, converts the boxes to pixels of the upright image, repairs or drops what is wrong, and counts
it in a `DataReport`.

Shapes: n boxes of an image.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from vpt.data.images import DEFAULT_DECODING, Decoding, ImageError, read_header
from vpt.data.readers.annotation_files import Note
from vpt.data.samples import DetectionSamples, FileReader, Size, format_size, refuse_unreadable
from vpt.data.splits import split_off

MIN_SIDE = 1.0  # pixels
ROUNDING = 0.5  # pixels; a box that leaves its image by no more is clipped without being counted

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2


class Unit(Enum):
    """The unit of box coordinates."""

    PIXELS = "distances from the image's upper left corner, in pixels"
    PIXEL_NUMBERS = "numbers of the first and the last pixel of the box, counted from 1"
    FRACTIONS = "distances from the upper left corner, as fractions of the upright image's sides"


@dataclass(frozen=True)
class SourceBox:
    """A box as declared in its file, unchecked."""

    corners: Corners
    category: int | str  # the id of its class or its name, whichever the file has
    where: str  # the file and the place in it
    crowd: bool = False  # whether loss and matching ignore it


@dataclass(frozen=True)
class SourceImage:
    """An image and its boxes as declared in their files."""

    path: Path
    name: str  # the path, relative to the root
    image_id: int  # in outputs
    where: str  # the place that names the image, for errors
    boxes: Sequence[SourceBox]
    unit: Unit = Unit.PIXELS
    size: tuple[object, object] = (None, None)  # declared height and width, unchecked, or None


@dataclass(frozen=True)
class CheckedImage:
    """Height and width of the upright image; its boxes (n, 4) float32, labels (n,) int64 and crowd (n,) bool."""

    size: Size
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class Finding(Enum):
    """A type of problem, and what is done about it; those about boxes begin with that word."""

    MISSING = "images that do not exist", "left out"
    UNREADABLE = "images that cannot be read", "left out"
    STRAY = "labels of images that do not exist", "left out"
    SIZE = "images of another size than declared", "boxes used unchanged"
    UNKNOWN = "boxes of a class that is not declared, or not in train", "dropped"
    NOT_FINITE = "boxes with NaN or infinite numbers", "dropped"
    SWAPPED = "boxes with swapped corners", "corrected"
    OUTSIDE = "boxes outside the image", "dropped"
    CLIPPED = "boxes partly outside the image", "clipped"
    SMALL = f"boxes with a side below {MIN_SIDE:g} px", "dropped"
    DUPLICATE = "boxes that occur more than once", "dropped"
    TURNED = "images stored on their side, with their boxes", "turned upright"
    CROWD = "boxes of crowds or difficult objects", "ignored by loss and matching"
    BACKGROUND = "images without boxes", "used as background"

    @property
    def is_error(self) -> bool:
        """Whether something is wrong; other findings are information."""
        return self not in (Finding.TURNED, Finding.CROWD, Finding.BACKGROUND)


@dataclass
class DataReport:
    """Counts of the findings in one data set, and the first place of each; filled by a reader.

    Example:
        >>> report = DataReport()
        >>> report.add(Finding.SMALL, "a.txt, line 2: box (3, 3, 3, 9) of a.jpg")
        >>> print(*report.lines())
        boxes with a side below 1 px: 1, dropped; first a.txt, line 2: box (3, 3, 3, 9) of a.jpg
    """

    counts: Counter[Finding] = field(default_factory=Counter)
    first: dict[Finding, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # names of train images, and what is wrong
    notes: list[Note] = field(default_factory=list)  # what a reader of classes ignored, guessed or changed

    def add(self, finding: Finding, where: str) -> None:
        """Count a finding; `where` names the file, the image and the box."""
        self.counts[finding] += 1
        self.first.setdefault(finding, where)

    def lines(self) -> list[str]:
        """A line for each split and each type of finding."""
        return [f"{split}: {content}" for split, content in self.splits.items()] + self.findings()

    def findings(self) -> list[str]:
        """A line for each type of finding."""
        found = [(finding, *finding.value) for finding in Finding if self.counts[finding]]
        return [f"{what}: {self.counts[key]:,}, {action}; first {self.first[key]}" for key, what, action in found]

    def refuse_errors(self) -> None:
        """Refuse data in which anything is wrong by a `ValueError` that names the first error, and counts all."""
        if errors := [finding for finding in Finding if finding.is_error and self.counts[finding]]:
            counted = ", ".join(f"{finding.value[0]} ({self.counts[finding]:,})" for finding in errors)
            first = self.first[errors[0]]
            raise ValueError(f"{first} is the first of: {counted}; correct the files, or use strict=False")


class Reading(TypedDict, total=False):
    """Keyword arguments of every reader of boxes, see `make_samples`."""

    val_fraction: float
    test_fraction: float
    seed: int
    strict: bool
    report: DataReport | None
    decoding: Decoding


def make_samples(
    categories: Mapping[int, str],
    images: Mapping[str, Iterable[SourceImage]],
    strays: Iterable[str] = (),
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    report: DataReport | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, DetectionSamples]:
    """Check the images of all splits, and split test and val off train where they are missing.

    `categories` has the name of each class by its id, in the order of the labels; `images` those of each split; and
    `strays` the places of labels without an image. Fractions are parts of train that become val and test where there is
    none, chosen by `seed`. `strict` refuses data in which anything is wrong; otherwise it is repaired or dropped, and
    counted in `report`.

    Raises:
        ImageError: An image of a given val or test cannot be read; those of train are left out.
        ValueError: A split without an image, train without a box, a duplicate image, or a wrong fraction; anything that
            is wrong if `strict`.
    """
    report = report or DataReport()
    for where in strays:
        report.add(Finding.STRAY, where)
    splits = _check_splits(categories, images, report, decoding)
    if strict:
        report.refuse_errors()
    splits = split_off(splits, val_fraction, test_fraction, seed)
    for split, samples in splits.items():
        num_boxes = sum(map(len, samples.boxes))
        report.splits[split] = f"{len(samples):,} images, {num_boxes:,} boxes, {len(categories)} classes"
    return splits


def _check_splits(
    categories: Mapping[int, str], images: Mapping[str, Iterable[SourceImage]], report: DataReport, decoding: Decoding
) -> dict[str, DetectionSamples]:
    labels = {key: label for label, category in enumerate(categories.items()) for key in category}
    seen: dict[Path, SourceImage] = {}
    splits = {}
    for split, members in images.items():
        rows: list[tuple[SourceImage, CheckedImage]] = []
        num_left_out = len(report.left_out)
        for image in members:
            other = seen.setdefault(image.path, image)
            if other is not image:
                raise ValueError(f"{image.where}: {image.name} is a duplicate, first at {other.where}; remove one")
            checked = check_image_boxes(image, labels, report, decoding.max_pixels)
            if checked is not None:
                rows.append((image, checked))
        if split != "train":
            refuse_unreadable([reason for _, reason in report.left_out[num_left_out:]])
        if not rows:
            raise ValueError(f"{split} has no usable image; {_summary(report)}")
        paths = tuple(image.path for image, _ in rows)
        sizes = tuple(checked.size for _, checked in rows)
        splits[split] = DetectionSamples(
            classes=tuple(categories.values()),
            category_ids=tuple(categories),
            names=tuple(image.name for image, _ in rows),
            reader=FileReader(paths, decoding, sizes),
            paths=paths,
            sizes=sizes,
            image_ids=tuple(image.image_id for image, _ in rows),
            boxes=tuple(checked.boxes for _, checked in rows),
            labels=tuple(checked.labels for _, checked in rows),
            crowd=tuple(checked.crowd for _, checked in rows),
        )
    if not any(map(len, splits["train"].boxes)):
        raise ValueError(f"train has no usable box; {_summary(report)}")
    return splits


def _summary(report: DataReport) -> str:
    return "; ".join(report.lines()) or "no image is listed"


def check_image_boxes(
    image: SourceImage, labels: Mapping[int | str, int], report: DataReport, max_pixels: int
) -> CheckedImage | None:
    """Check the header of an image and all of its boxes; None if the image cannot be used.

    If EXIF turns an image by 90 degrees, its boxes are turned as well if the declared size is that of the stored image.
    If it is that of the upright one, if the two are equal, or if none is declared, the boxes are upright already.
    """
    try:
        upright, stored, orientation = read_header(image.path, max_pixels)
    except ImageError as error:
        finding = Finding.UNREADABLE if image.path.is_file() else Finding.MISSING
        report.add(finding, f"{image.where}: {error}")
        report.left_out.append((image.name, f"{image.where}: {error}"))
        return None
    declared = _declared_size(*image.size) or upright
    is_on_side = declared == stored != upright
    if is_on_side:
        report.add(Finding.TURNED, str(image.path))
    elif declared != upright:
        sizes = f"{format_size(declared)} declared, {image.path} has {format_size(upright)}"
        report.add(Finding.SIZE, f"{image.where}: {sizes}")
    boxes = list(_check_boxes(image, labels, upright, orientation if is_on_side else 1, report))
    if not boxes:
        report.add(Finding.BACKGROUND, str(image.path))
    return CheckedImage(
        size=upright,
        boxes=np.array([corners for corners, _, _ in boxes], dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for _, label, _ in boxes], dtype=np.int64),
        crowd=np.array([crowd for _, _, crowd in boxes], dtype=np.bool_),
    )


def _declared_size(height: object, width: object) -> Size | None:
    """Height and width; None if they are missing or not positive, such as the 0 that some tools write."""
    try:
        numbers = float(str(height)), float(str(width))
    except ValueError:
        return None
    return (int(numbers[0]), int(numbers[1])) if all(isfinite(number) and number >= 1 for number in numbers) else None


def _check_boxes(
    image: SourceImage, labels: Mapping[int | str, int], size: Size, orientation: int, report: DataReport
) -> Iterator[tuple[Corners, int, bool]]:
    """Corners, label and crowd of each box that remains; of equal ones the first."""
    seen = set()
    for box in image.boxes:
        where = f"{box.where}: box ({', '.join(f'{number:g}' for number in box.corners)}) of {image.name}"
        label = labels.get(box.category)
        if label is None:
            report.add(Finding.UNKNOWN, f"{where}, class {box.category}")
            continue
        corners, findings = _check_corners(box.corners, image.unit, size, orientation)
        row = None if corners is None else (corners, label, box.crowd)
        if row in seen:
            findings.append(Finding.DUPLICATE)
        elif row and box.crowd:
            findings.append(Finding.CROWD)
        for finding in findings:
            report.add(finding, where)
        if row is not None and row not in seen:
            seen.add(row)
            yield row


def _check_corners(corners: Corners, unit: Unit, size: Size, orientation: int) -> tuple[Corners | None, list[Finding]]:
    """Corners in pixels of the upright image, inside it and at least a pixel apart, or None; and what was found."""
    if not all(map(isfinite, corners)):
        return None, [Finding.NOT_FINITE]
    x1, y1, x2, y2 = corners
    ordered = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
    findings = [] if ordered == corners else [Finding.SWAPPED]
    x1, y1, x2, y2 = _turn_upright(_to_pixels(ordered, unit, size), size, orientation)
    height, width = size
    if x1 > width or y1 > height or x2 < 0 or y2 < 0:
        return None, [*findings, Finding.OUTSIDE]
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if min(inside[2] - inside[0], inside[3] - inside[1]) < MIN_SIDE:
        return None, [*findings, Finding.SMALL]
    if max(-x1, -y1, x2 - width, y2 - height) > ROUNDING:
        findings.append(Finding.CLIPPED)
    return inside, findings


def _to_pixels(corners: Corners, unit: Unit, size: Size) -> Corners:
    x1, y1, x2, y2 = corners
    match unit:
        case Unit.PIXELS:
            return corners
        case Unit.FRACTIONS:
            height, width = size
            return x1 * width, y1 * height, x2 * width, y2 * height
        case Unit.PIXEL_NUMBERS:
            # The first pixel begins at 0. Equal numbers would be a box of one pixel; in practice they are a stray
            # click in a tool that writes distances under the name of numbers, so such a box stays empty.
            return x1 - (x2 > x1), y1 - (y2 > y1), x2, y2


def _turn_upright(corners: Corners, size: Size, orientation: int) -> Corners:
    """Corners in the stored image -> corners in the upright one, of this size; by EXIF orientation."""
    height, width = size
    x1, y1, x2, y2 = corners
    match orientation:
        case 5:
            return y1, x1, y2, x2
        case 6:
            return width - y2, x1, width - y1, x2
        case 7:
            return width - y2, height - x2, width - y1, height - x1
        case 8:
            return y1, height - x2, y2, height - x1
        case _:
            return corners

"""Checks of the boxes that annotation files declare, and samples made of them.

A reader (`coco.py`, `yolo.py`, `voc.py`) describes each image as a `SourceImage`, unchecked. `make_samples` reads the
header of the image file, converts the boxes to pixels of the upright image, repairs or drops what is wrong, and counts
it in a `DataReport`.

Shapes: n boxes of an image.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from vpt.data.image_files import find_images
from vpt.data.images import DEFAULT_DECODING, EXTENSIONS, Decoding, ImageError, read_header
from vpt.data.readers.annotation_files import Note, divide_aloud, is_file
from vpt.data.samples import DetectionSamples, FileReader, Size, format_size, refuse_unreadable
from vpt.data.splits import Division

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

    corners: Corners | None  # None if the file has no four numbers
    category: int | str | None  # the id of its class or its name, whichever the file has
    where: str  # the file and the place in it
    crowd: bool = False  # whether loss and matching ignore it
    repair: "Finding | None" = None  # what the reader made of it


@dataclass(frozen=True)
class SourceImage:
    """An image and its boxes as declared in their files."""

    path: Path
    name: str  # the path, relative to the root
    image_id: int  # in outputs
    where: str  # the place that names the image, for errors
    boxes: Iterable[SourceBox]
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
    UNNAMED = "images beside those of the data set that no annotation or list names", "left out"
    REPEATED = "images listed more than once in a split", "used once, with the boxes of all entries"
    MOVED = "images with a path of another folder or machine", "found by the end of the path"
    STRAY = "labels of images that do not exist", "left out"
    SHARED = "images that share a file of labels with another image", "each used with all of its boxes"
    AMBIGUOUS = "labels that fit several images", "left out"
    SIZE = "images of another size than declared", "boxes used unchanged"
    CONVERTED = "labels with ids or numbers of another type than usual, or a score", "converted"
    INVALID = "boxes without a class or four numbers", "dropped"
    POLYGON = "boxes that are given by a polygon only", "computed from it"
    UNKNOWN = "boxes of a class that is not declared, or not in train", "dropped"
    NOT_FINITE = "boxes with NaN or infinite numbers", "dropped"
    SWAPPED = "boxes with swapped corners", "corrected"
    OUTSIDE = "boxes outside the image", "dropped"
    CLIPPED = "boxes partly outside the image", "clipped"
    SMALL = f"boxes with a side below {MIN_SIDE:g} px", "dropped"
    DUPLICATE = "boxes that occur more than once", "dropped"
    TURNED = "images stored turned or mirrored, with their boxes", "turned upright"
    UNSURE = (
        "images that EXIF turns or mirrors, whose boxes may be for the upright or the stored image (set exif_boxes)",
        "boxes taken as for the upright image",
    )
    CROWD = "boxes of crowds or difficult objects", "ignored by loss and matching"
    BACKGROUND = "images without boxes", "used as background"

    @property
    def is_error(self) -> bool:
        """Whether something is wrong or doubtful; other findings are information."""
        return self not in _INFORMATION


_INFORMATION = (
    *(Finding.UNNAMED, Finding.MOVED, Finding.POLYGON, Finding.TURNED),
    *(Finding.CROWD, Finding.BACKGROUND),
)


Problems = list[tuple[Finding, str]]  # what a reader found, and where


@dataclass
class DataReport:
    """Counts of the findings in one data set, and the first place of each; filled by a reader.

    Example:
        >>> report = DataReport()
        >>> report.add(Finding.SMALL, "a.txt, line 2: box (3, 3, 3, 9) of a.jpg")
        >>> print(*report.lines())
        boxes with a side below 1 px: 1, dropped; first a.txt, line 2: box (3, 3, 3, 9) of a.jpg
    """

    kinds: Any = Finding  # an Enum; each with a text, what is done about it, and `is_error`
    counts: Counter[Any] = field(default_factory=Counter)
    first: dict[Any, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # names of train images, and what is wrong
    notes: list[Note] = field(default_factory=list)  # what a reader of classes ignored, guessed or changed

    def add(self, finding: Any, where: str) -> None:
        """Count a finding; `where` names the file, the image and the box."""
        self.counts[finding] += 1
        self.first.setdefault(finding, where)

    def lines(self) -> list[str]:
        """A line for each split and each type of finding."""
        return [f"{split}: {content}" for split, content in self.splits.items()] + self.findings()

    def findings(self) -> list[str]:
        """A line for each type of finding."""
        found = [(finding, *finding.value) for finding in self.kinds if self.counts[finding]]
        return [f"{what}: {self.counts[key]:,}, {action}; first {self.first[key]}" for key, what, action in found]

    def refuse_errors(self) -> None:
        """Refuse data in which anything is wrong by a `ValueError` that names the first error, and counts all."""
        if errors := [finding for finding in self.kinds if self.counts[finding] and finding.is_error]:
            counted = ", ".join(f"{finding.value[0]} ({self.counts[finding]:,})" for finding in errors)
            first = self.first[errors[0]]
            raise ValueError(f"{first} is the first of: {counted}; correct the files, or use strict=False")


class Reading(Division, total=False):
    """Keyword arguments of every reader of boxes, see `make_samples`."""

    strict: bool
    exif_boxes: str
    report: DataReport | None
    decoding: Decoding


def make_samples(
    categories: Mapping[int, str],
    images: Mapping[str, Iterable[SourceImage]],
    problems: Sequence[tuple[Finding, str]] = (),
    *,
    names_splits: bool = True,
    strict: bool = False,
    exif_boxes: str = "auto",
    report: DataReport | None = None,
    decoding: Decoding = DEFAULT_DECODING,
    **division: Unpack[Division],
) -> dict[str, DetectionSamples]:
    """Check the images of all splits, and split test and val off train where they are missing.

    `categories` has the name of each class by its id, in the order of the labels; `images` those of each split; and
    `problems` what the reader found, and where. `division` says how val and test are split off train where there is
    none, by default no test, and `names_splits` whether the data name any split. `strict` refuses data in which
    anything is wrong; otherwise it is repaired or dropped, and counted in `report`. `exif_boxes` states how boxes were
    drawn on images that EXIF turns or mirrors, where the declared size does not show it: on the "upright" or on the
    "stored" image; "auto" means upright, and reports it.

    Raises:
        ImageError: An image of a given val or test cannot be read; those of train are left out.
        ValueError: A split without an image, train without a box, a duplicate image, or a wrong fraction; anything that
            is wrong if `strict`.
    """
    if exif_boxes not in ("auto", "upright", "stored"):
        raise ValueError(f"exif_boxes={exif_boxes!r}: must be one of auto, upright, stored")
    report = report or DataReport()
    for problem in problems:
        report.add(*problem)
    splits = _check_splits(categories, images, report, decoding, exif_boxes)
    if strict:
        report.refuse_errors()
    division.setdefault("test_fraction", 0.0)
    splits = divide_aloud(splits, report.notes, names_splits=names_splits, **division)
    for split, samples in splits.items():
        num_boxes = sum(map(len, samples.boxes))
        report.splits[split] = f"{len(samples):,} images, {num_boxes:,} boxes, {len(categories)} classes"
    return splits


def _check_splits(
    categories: Mapping[int, str],
    images: Mapping[str, Iterable[SourceImage]],
    report: DataReport,
    decoding: Decoding,
    exif_boxes: str,
) -> dict[str, DetectionSamples]:
    labels: dict[int | str | None, int] = {}
    for label, category in enumerate(categories.items()):
        labels |= dict.fromkeys(category, label)
    seen: dict[Path, SourceImage] = {}
    splits = {}
    for split, members in images.items():
        rows: list[tuple[SourceImage, CheckedImage]] = []
        num_left_out = len(report.left_out)
        for image in _join_repeated(members, report):
            other = seen.setdefault(image.path, image)
            if other is not image:
                raise ValueError(f"{image.where}: {image.name} is a duplicate, first at {other.where}; remove one")
            checked = check_image_boxes(image, labels, report, decoding, exif_boxes)
            if checked is not None:
                rows.append((image, checked))
        if split != "train":
            refuse_unreadable([reason for _, reason in report.left_out[num_left_out:]])
        if not rows:
            raise ValueError(f"{split} has no usable image; {_summary(report)}")
        splits[split] = _to_samples(categories, rows, decoding)
    if not any(map(len, splits["train"].boxes)):
        raise ValueError(f"train has no usable box; {_summary(report)}")
    for place in _find_unnamed(seen):
        report.add(Finding.UNNAMED, place)
    return splits


def _to_samples(
    categories: Mapping[int, str], rows: Sequence[tuple[SourceImage, CheckedImage]], decoding: Decoding
) -> DetectionSamples:
    paths = tuple(image.path for image, _ in rows)
    sizes = tuple(checked.size for _, checked in rows)
    return DetectionSamples(
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


def _find_unnamed(images: Mapping[Path, SourceImage]) -> Iterator[str]:
    """Image files that are none of these, below the folders of the root that have any of these, or in the root."""
    depths = {path: image.name.count("/") for path, image in images.items()}
    folders = {path.parents[depth - 1] for path, depth in depths.items() if depth}
    roots = {path.parent for path, depth in depths.items() if not depth}
    loose = (path for root in roots for path in root.iterdir() if path.suffix.lower() in EXTENSIONS)
    for path in sorted({*loose, *(path for folder in folders if folder.is_dir() for path in find_images(folder))}):
        if path not in images and not path.name.startswith("."):
            yield str(path)


def _join_repeated(images: Iterable[SourceImage], report: DataReport) -> Iterable[SourceImage]:
    """The images of a split, each file once, with the boxes of all its entries; those of one place once."""
    joined: dict[Path, SourceImage] = {}
    for image in images:
        first = joined.setdefault(image.path, image)
        if first is not image:
            report.add(Finding.REPEATED, f"{image.where}: {image.name}, first at {first.where}")
            boxes = {box.where: box for box in [*first.boxes, *image.boxes]}
            joined[image.path] = replace(first, boxes=tuple(boxes.values()))
    return joined.values()


def _summary(report: DataReport) -> str:
    return "; ".join(report.lines()) or "no image is listed"


def check_image_boxes(
    image: SourceImage,
    labels: Mapping[int | str | None, int],
    report: DataReport,
    decoding: Decoding,
    exif_boxes: str,
) -> CheckedImage | None:
    """Check the header of an image and all of its boxes; None if the image cannot be used.

    If EXIF turns an image by 90 degrees, its boxes are turned as well if the declared size is that of the stored image,
    and not if it is that of the upright one. Where the declared size does not show it, `exif_boxes` decides.
    """
    try:
        upright, stored, orientation = read_header(image.path, decoding)
    except ImageError as error:
        finding = Finding.UNREADABLE if is_file(image.path) else Finding.MISSING
        report.add(finding, f"{image.where}: {error}")
        report.left_out.append((image.name, f"{image.where}: {error}"))
        return None
    declared = _declared_size(*image.size)
    is_stored = orientation > 1 and exif_boxes == "stored"
    if upright != stored and declared in (upright, stored):
        is_stored = declared == stored
    elif orientation > 1 and exif_boxes == "auto":
        report.add(Finding.UNSURE, str(image.path))
    if is_stored:
        report.add(Finding.TURNED, str(image.path))
    if declared not in (None, upright, stored):
        sizes = f"{format_size(declared)} declared, {image.path} has {format_size(upright)}"
        report.add(Finding.SIZE, f"{image.where}: {sizes}")
    boxes = list(_check_boxes(image, labels, stored if is_stored else upright, orientation if is_stored else 1, report))
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
    image: SourceImage, labels: Mapping[int | str | None, int], size: Size, orientation: int, report: DataReport
) -> Iterator[tuple[Corners, int, bool]]:
    """Corners, label and crowd of each box that remains; of equal ones the first. The size is that of the boxes."""
    seen = set()
    for box in image.boxes:
        label = labels.get(box.category)
        if box.corners is None or box.category is None:
            report.add(Finding.INVALID, f"{box.where} of {image.name}")
            continue
        corners, findings = _check_corners(box.corners, image.unit, size, orientation)
        row = None if corners is None or label is None else (corners, label, box.crowd)
        if label is None:
            findings = [Finding.UNKNOWN]
        elif row in seen:
            findings.append(Finding.DUPLICATE)
        elif row:
            findings += [finding for finding in (box.repair, Finding.CROWD if box.crowd else None) if finding]
        for finding in findings:
            where = f"{box.where}: box ({', '.join(f'{number:g}' for number in box.corners)}) of {image.name}"
            report.add(finding, f"{where}, class {box.category}" if finding is Finding.UNKNOWN else where)
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
    x1, y1, x2, y2 = _to_pixels(ordered, unit, size)
    height, width = size
    if x1 > width or y1 > height or x2 < 0 or y2 < 0:
        return None, [*findings, Finding.OUTSIDE]
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if min(inside[2] - inside[0], inside[3] - inside[1]) < MIN_SIDE:
        return None, [*findings, Finding.SMALL]
    if max(-x1, -y1, x2 - width, y2 - height) > ROUNDING:
        findings.append(Finding.CLIPPED)
    return _turn_upright(inside, size, orientation), findings


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
    """Corners in the stored image, of this size -> corners in the upright one; by EXIF orientation."""
    height, width = size
    x1, y1, x2, y2 = corners
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    return (y1, x1, y2, x2) if orientation >= 5 else (x1, y1, x2, y2)

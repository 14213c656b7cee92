"""What files of labels say of pictures with boxes, and the checks that all of it goes through.

A reader (`coco.py`, `yolo.py`, `voc.py`) describes each picture as a `SourcePicture`, without a judgement of its own.
`make_samples` looks at the picture file, brings the boxes into pixels of the upright picture, repairs or drops what is
wrong, and tells a `DataReport`.

Shapes: H, W pixels, n boxes of a picture.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from vpt.data.images import DEFAULT_DECODING, Decoding, ImageError, read_header
from vpt.data.loaders import stable_seed
from vpt.data.samples import DetectionSamples, Size, format_size, refuse_unreadable
from vpt.data.splits import SPLIT_OF, SPLITS, stratified_split

MIN_SIDE = 1.0  # pixels
ROUNDING = 0.5  # pixels; a box that leaves its picture by no more is clipped without a word

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2
Value = TypeVar("Value")


# What readers say, and how it is checked.


class Unit(Enum):
    """What the numbers of a box count."""

    PIXELS = "distances from the picture's upper left corner, in pixels"
    PIXEL_NUMBERS = "numbers of the first and the last pixel of the box, counted from 1"
    FRACTIONS = "distances from the upper left corner, as fractions of the upright picture's sides"


@dataclass(frozen=True)
class SourceBox:
    """A box as its file gives it.

    Args:
        corners: x1, y1, x2, y2, unchecked.
        category: The id of its class or its name, whichever the file has.
        where: The file and the place in it.
        crowd: To be ignored by loss and matching.
    """

    corners: Corners
    category: int | str
    where: str
    crowd: bool = False


@dataclass(frozen=True)
class SourcePicture:
    """A picture and its boxes as their files give them.

    Args:
        path: The picture file.
        name: The path, relative to the root.
        image_id: The number that outputs call it by.
        where: What names the picture, for an error.
        boxes: Its boxes.
        unit: What their numbers count.
        size: Height and width as the file declares them, unchecked, if it does.
    """

    path: Path
    name: str
    image_id: int
    where: str
    boxes: Sequence[SourceBox]
    unit: Unit = Unit.PIXELS
    size: tuple[object, object] = (None, None)


@dataclass(frozen=True)
class CheckedPicture:
    """Height and width of the upright picture; its boxes (n, 4) float32, labels (n,) int64 and crowd (n,) bool."""

    size: Size
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class Finding(Enum):
    """What a check can find, and what became of it."""

    MISSING = "pictures that are not there", "left out"
    UNREADABLE = "pictures that cannot be read", "left out"
    STRAY = "labels of pictures that are not there", "left out"
    SIZE = "pictures of another size than declared", "their boxes taken as they are"
    UNKNOWN = "boxes of a class that is not declared, or that train does not have", "dropped"
    NOT_FINITE = "boxes with NaN or infinite numbers", "dropped"
    SWAPPED = "boxes with swapped corners", "put right"
    OUTSIDE = "boxes outside their picture", "dropped"
    CLIPPED = "boxes that leave their picture", "clipped"
    SMALL = f"boxes with a side below {MIN_SIDE:g} px", "dropped"
    DUPLICATE = "boxes that are there already", "dropped"
    TURNED = "pictures that lie on their side, and their boxes with them", "turned upright"
    CROWD = "boxes of crowds or difficult objects", "kept, for loss and matching to ignore"
    BACKGROUND = "pictures without boxes", "kept as background"

    @property
    def is_error(self) -> bool:
        """Whether somebody made a mistake; the others are only good to know."""
        return self not in (Finding.TURNED, Finding.CROWD, Finding.BACKGROUND)


@dataclass
class DataReport:
    """What reading a data set found: how often, and where first. A reader fills it; one report is for one reading.

    Example:
        >>> report = DataReport()
        >>> report.add(Finding.SMALL, "a.txt, line 2: box (3, 3, 3, 9) of a.jpg")
        >>> print(*report.lines())
        boxes with a side below 1 px: 1, dropped; first a.txt, line 2: box (3, 3, 3, 9) of a.jpg
    """

    counts: Counter[Finding] = field(default_factory=Counter)
    first: dict[Finding, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # names of train pictures, and what is wrong

    def add(self, finding: Finding, where: str) -> None:
        """Count a finding; `where` names the file, and the picture and box if it is about one."""
        self.counts[finding] += 1
        self.first.setdefault(finding, where)

    def lines(self) -> list[str]:
        """A line for each split, and one for each kind of finding."""
        return [f"{split}: {content}" for split, content in self.splits.items()] + self.findings()

    def findings(self) -> list[str]:
        """A line for each kind of finding."""
        found = [(finding, *finding.value) for finding in Finding if self.counts[finding]]
        return [
            f"{what}: {self.counts[finding]:,}, {fate}; first {self.first[finding]}" for finding, what, fate in found
        ]

    def refuse_errors(self) -> None:
        """Refuse data in which anything is wrong.

        Raises:
            ValueError: Something is; names the first one, and counts all.
        """
        errors = [finding for finding in Finding if finding.is_error and self.counts[finding]]
        if errors:
            counted = ", ".join(f"{finding.value[0]} ({self.counts[finding]:,})" for finding in errors)
            raise ValueError(
                f"{self.first[errors[0]]} is the first of: {counted}; correct the files, or read them with strict=false"
            )


class Reading(TypedDict, total=False):
    """What every reader understands, by keyword, see `make_samples`."""

    val_fraction: float
    test_fraction: float
    seed: int
    strict: bool
    report: DataReport | None
    decoding: Decoding


def make_samples(
    categories: Mapping[int, str],
    pictures: Mapping[str, Iterable[SourcePicture]],
    strays: Iterable[str] = (),
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    report: DataReport | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> dict[str, DetectionSamples]:
    """Check the pictures of all splits, and split test and val off train where they are missing.

    Who is held out depends on names and seed only.

    Args:
        categories: The name of each class by its id, in the order of the labels.
        pictures: The pictures of each split; one of them is train.
        strays: Where there are labels of pictures that are not there.
        val_fraction: Part of the given train that becomes val if there is none.
        test_fraction: Part of the given train that becomes test if there is none.
        seed: Decides what is split off.
        strict: Refuse data in which anything is wrong; otherwise it is repaired or dropped, and counted.
        report: Is told what was found; give a new one.
        decoding: How the pictures will be decoded.

    Raises:
        ImageError: A picture of a val or test that is given cannot be read; those of train are left out.
        ValueError: A split without a picture, train without a box, a picture that is there twice, or a wrong fraction;
            anything that is wrong if `strict`.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"dataset.val_fraction={val_fraction}, test_fraction={test_fraction}; allowed: 0 or more, together under 1"
        )
    report = report or DataReport()
    for where in strays:
        report.add(Finding.STRAY, where)
    result = _check_splits(categories, pictures, report, decoding)
    if strict:
        report.refuse_errors()
    rest = 1.0
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in result and fraction > 0:
            train = result["train"]
            keep, held = stratified_split([0] * len(train), fraction / rest, stable_seed(seed, split), train.names)
            if not held:
                raise ValueError(f"train has one picture, so no {split} can be split off; add pictures")
            result["train"], result[split] = train.take(keep), train.take(held)
            rest -= fraction
    result = {split: result[split] for split in SPLITS if split in result}
    for split, samples in result.items():
        num_boxes = sum(map(len, samples.boxes))
        report.splits[split] = f"{len(samples):,} pictures, {num_boxes:,} boxes, {len(categories)} classes"
    return result


def _check_splits(
    categories: Mapping[int, str],
    pictures: Mapping[str, Iterable[SourcePicture]],
    report: DataReport,
    decoding: Decoding,
) -> dict[str, DetectionSamples]:
    labels = {key: label for label, category in enumerate(categories.items()) for key in category}
    seen: dict[Path, SourcePicture] = {}
    splits = {}
    for split, members in pictures.items():
        rows: list[tuple[SourcePicture, CheckedPicture]] = []
        num_left_out = len(report.left_out)
        for picture in members:
            other = seen.setdefault(picture.path, picture)
            if other is not picture:
                raise ValueError(
                    f"{picture.where}: {picture.name} is there twice, first at {other.where}; keep one of them"
                )
            checked = check_picture(picture, labels, report, decoding.max_pixels)
            if checked is not None:
                rows.append((picture, checked))
        if split != "train":
            refuse_unreadable([reason for _, reason in report.left_out[num_left_out:]])
        if not rows:
            raise ValueError(f"{split} has no picture that can be used; {_found(report)}")
        splits[split] = DetectionSamples(
            classes=tuple(categories.values()),
            category_ids=tuple(categories),
            names=tuple(picture.name for picture, _ in rows),
            paths=tuple(picture.path for picture, _ in rows),
            sizes=tuple(checked.size for _, checked in rows),
            image_ids=tuple(picture.image_id for picture, _ in rows),
            boxes=tuple(checked.boxes for _, checked in rows),
            labels=tuple(checked.labels for _, checked in rows),
            crowd=tuple(checked.crowd for _, checked in rows),
            decoding=decoding,
        )
    if not any(map(len, splits["train"].boxes)):
        raise ValueError(f"train has no box that can be used; {_found(report)}")
    return splits


def _found(report: DataReport) -> str:
    return "; ".join(report.lines()) or "no picture is listed"


def check_picture(
    picture: SourcePicture, labels: Mapping[int | str, int], report: DataReport, max_pixels: int
) -> CheckedPicture | None:
    """Look at the header of a picture, and at all of its boxes; None if the picture cannot be used.

    A picture that EXIF turns by 90 degrees takes its boxes along if the declared size is that of the picture as it is
    stored. If it is the upright one's, if the two are equal, or if none is declared, the boxes are upright already.
    """
    try:
        upright, stored, orientation = read_header(picture.path, max_pixels)
    except ImageError as error:
        finding = Finding.UNREADABLE if picture.path.is_file() else Finding.MISSING
        report.add(finding, f"{picture.where}: {error}")
        report.left_out.append((picture.name, f"{picture.where}: {error}"))
        return None
    declared = _declared_size(*picture.size) or upright
    lies_on_side = declared == stored != upright
    if lies_on_side:
        report.add(Finding.TURNED, str(picture.path))
    elif declared != upright:
        report.add(
            Finding.SIZE,
            f"{picture.where}: {format_size(declared)} declared, {picture.path} has {format_size(upright)}",
        )
    boxes = list(_check_boxes(picture, labels, upright, orientation if lies_on_side else 1, report))
    if not boxes:
        report.add(Finding.BACKGROUND, str(picture.path))
    return CheckedPicture(
        size=upright,
        boxes=np.array([corners for corners, _, _ in boxes], dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for _, label, _ in boxes], dtype=np.int64),
        crowd=np.array([crowd for _, _, crowd in boxes], dtype=np.bool_),
    )


def _declared_size(height: object, width: object) -> Size | None:
    """Height and width; None if they are missing or no size, such as the 0 that some tools write."""
    try:
        numbers = float(str(height)), float(str(width))
    except ValueError:
        return None
    return (int(numbers[0]), int(numbers[1])) if all(isfinite(number) and number >= 1 for number in numbers) else None


def _check_boxes(
    picture: SourcePicture, labels: Mapping[int | str, int], size: Size, orientation: int, report: DataReport
) -> Iterator[tuple[Corners, int, bool]]:
    """Corners, label and crowd of each box that stays; of equal ones the first."""
    seen = set()
    for box in picture.boxes:
        label = labels.get(box.category)
        if label is None:
            report.add(Finding.UNKNOWN, f"{_where(box, picture)}, class {box.category}")
            continue
        corners = _check_corners(box, picture, size, orientation, report)
        if corners is None:
            continue
        row = (corners, label, box.crowd)
        if row in seen:
            report.add(Finding.DUPLICATE, _where(box, picture))
            continue
        seen.add(row)
        if box.crowd:
            report.add(Finding.CROWD, _where(box, picture))
        yield row


def _check_corners(
    box: SourceBox, picture: SourcePicture, size: Size, orientation: int, report: DataReport
) -> Corners | None:
    """Corners in pixels of the upright picture, inside it and at least a pixel apart; None if there are none."""
    if not all(map(isfinite, box.corners)):
        report.add(Finding.NOT_FINITE, _where(box, picture))
        return None
    ordered = _in_order(box.corners)
    if ordered != box.corners:
        report.add(Finding.SWAPPED, _where(box, picture))
    x1, y1, x2, y2 = _turn_upright(_to_pixels(ordered, picture.unit, size), size, orientation)
    height, width = size
    if x1 > width or y1 > height or x2 < 0 or y2 < 0:
        report.add(Finding.OUTSIDE, _where(box, picture))
        return None
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if min(inside[2] - inside[0], inside[3] - inside[1]) < MIN_SIDE:
        report.add(Finding.SMALL, _where(box, picture))
        return None
    if max(-x1, -y1, x2 - width, y2 - height) > ROUNDING:
        report.add(Finding.CLIPPED, _where(box, picture))
    return inside


def _where(box: SourceBox, picture: SourcePicture) -> str:
    return f"{box.where}: box ({', '.join(f'{number:g}' for number in box.corners)}) of {picture.name}"


def _in_order(corners: Corners) -> Corners:
    x1, y1, x2, y2 = corners
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


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
    """Corners in the picture as it is stored -> corners in the upright one, of this size."""
    height, width = size
    x1, y1, x2, y2 = corners
    match orientation:  # as EXIF numbers them
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


# What the readers share.


def by_split(entries: Iterable[tuple[str, Value]], where: str) -> dict[str, Value]:
    """Values by split, of those whose name is one of a split.

    Raises:
        ValueError: A split is there twice, as val and valid; `where` says in what.
    """
    found: dict[str, tuple[str, Value]] = {}
    for name, value in entries:
        split = SPLIT_OF.get(name.lower())
        if split in found:
            raise ValueError(f"{where} has {split} twice, {found[split][0]} and {name}; keep one of them")
        if split is not None:
            found[split] = name, value
    return {split: found[split][1] for split in SPLITS if split in found}


def need_train(root: Path, splits: Mapping[str, object], layout: str) -> None:
    """Refuse splits without train.

    Raises:
        ValueError: There is no train; names the layout that was looked for.
    """
    if "train" not in splits:
        found = f"{', '.join(splits)} but no train" if splits else "nothing"
        raise ValueError(f"{root}: {found} found; looked for {layout}")


def refuse_twins(classes: Sequence[str], where: str) -> None:
    """Refuse two classes of one name.

    Raises:
        ValueError: There are two; `where` names the file.
    """
    twins = sorted({name for name in classes if classes.count(name) > 1})
    if twins:
        raise ValueError(f"{where}: two classes are called {twins[0]!r}; rename one of them")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: There is no such file, or it is no UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def inside(root: Path, path: Path) -> Path | None:
    """The path without its dots; None if it leaves the root."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would also follow links)
    base = os.path.abspath(root)  # noqa: PTH100
    return root / absolute.relative_to(base) if absolute.is_relative_to(base) else None


def need_inside(root: Path, path: Path, where: str) -> Path:
    """The path without its dots.

    Raises:
        ValueError: It leaves the root; `where` names the file and the place in it.
    """
    found = inside(root, path)
    if found is None:
        raise ValueError(f"{where}: {path} is outside of {root}; write paths that stay inside dataset.root")
    return found

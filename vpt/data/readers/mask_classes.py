"""Classes of masks: which value stands for which class, as a config, a file beside the masks or a known layout says."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vpt.data.masks import IGNORE, MAX_VALUE, MaskValues
from vpt.data.readers.annotation_files import numbered_lines, read_text, refuse_equal_names

VOID_NAMES = frozenset({"void", "ignore", "ignored", "unlabeled", "unlabelled"})
MAX_INDEX = 65_535
MAX_FOUND = 256  # values that become classes where nothing names them

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CITYSCAPES_CLASSES = {  # name -> label id; all others are ignored
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """What the values of masks mean, as far as the user says.

    Args:
        classes: Names of the values 0, 1, 2, ...; or for each name a value, a list of values, or a colour, "#RRGGBB".
        ignore: The value of pixels that belong to no class; not for colours.
        reduce_zero_label: Whether 0 is ignored and 1 is the first class, as in ADE20K.
        instances: Whether values number objects, so that all above 0 are one class; then `classes` has two names.

    Raises:
        ValueError: `classes` has another form, or two arguments exclude each other.
    """

    classes: Sequence[str] | Mapping[str, Any] | None = None
    ignore: int | None = 255
    reduce_zero_label: bool = False
    instances: bool = False

    def __post_init__(self) -> None:
        names = self.classes
        if names is not None and (isinstance(names, str) or not isinstance(names, Sequence | Mapping) or not names):
            raise ValueError(f"dataset.classes={names!r}: must be a list of names, or an object of names and values")
        if self.instances and names is not None and (isinstance(names, Mapping) or len(names) != 2):
            raise ValueError(f"dataset.classes={names!r}: with dataset.instances=true two names, as [background,cell]")
        if self.instances and self.reduce_zero_label:
            raise ValueError("dataset.reduce_zero_label=true and dataset.instances=true exclude each other")

    def named(self, root: Path, first_mask: Path) -> "MaskClasses | None":
        """The classes that the user, a file in the root or the layout of a mask names; None if nothing does."""
        if self.instances:
            names = tuple(map(str, self.classes or ("background", "object")))
            return MaskClasses(names, ((0,), (1,)), merges=True)
        found = classes_of_folder(root, first_mask) if self.classes is None else classes_of_config(self.classes)
        if found is None or found.has_colours:
            return found
        if self.reduce_zero_label and (0,) in found.values:
            found = replace(found, values=tuple(tuple(value + 1 for value in values) for values in found.values))
        return self._with_ignored(found)

    def found(self, values: Mapping[int, int], where: str) -> "MaskClasses":
        """The classes of the values in the masks of train, value -> number of pixels.

        0 and 255 alone are background and foreground, as painting tools write them; then 255 is not ignored.

        Raises:
            ValueError: One value only, colours, or so many values that they number objects and not classes.
        """
        if set(values) == {0, 255}:
            return MaskClasses(("background", "foreground"), ((0,), (255,)), where=where)
        found = sorted(set(values) - {self.ignore, 0 if self.reduce_zero_label else None})
        if found and found[-1] > MAX_INDEX:
            shown = ", ".join(f"#{value:06X}" for value in sorted(values, key=lambda value: -values[value])[:5])
            raise ValueError(
                f"{where}: masks are in colour ({shown}); name them, dataset.classes={{sky:'#RRGGBB',...}}"
            )
        if len(found) > MAX_FOUND:
            raise ValueError(
                f"{where}: {len(found)} values in masks, which seem to number objects: type dataset.instances=true to "
                "join them to one class, or dataset.classes=[...]"
            )
        if len(found) < 2:
            raise ValueError(f"{where}: masks have the value {found} only, so there is nothing to learn; check them")
        return self._with_ignored(MaskClasses(tuple(map(str, found)), tuple((value,) for value in found), where=where))

    def _with_ignored(self, classes: "MaskClasses") -> "MaskClasses":
        ignored = [*classes.ignored, *([0] if self.reduce_zero_label else [])]
        return replace(classes, ignored=(*ignored, *([] if self.ignore is None else [self.ignore])))


@dataclass(frozen=True)
class MaskClasses:
    """Names of the K classes, and the values of each; colours are 65536 * red + 256 * green + blue.

    Raises:
        ValueError: One class, two equal names, or a value of two classes.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignored: tuple[int, ...] = ()
    has_colours: bool = False
    merges: bool = False
    where: str = "dataset.classes"

    def __post_init__(self) -> None:
        refuse_equal_names(self.names, self.where)
        if len(self.names) < 2:
            raise ValueError(f"{self.where}: one class only, {self.names[0]!r}; name the rest as a class as well")
        seen = dict.fromkeys(self.ignored, "ignored")
        for name, values in zip(self.names, self.values, strict=True):
            for value in values:
                if value in seen:
                    other = f"value {value} is both {seen[value]!r} and {name!r}"
                    raise ValueError(f"{self.where}: {other}; correct one of them, or type dataset.ignore=null")
                seen[value] = name

    @property
    def mapping(self) -> MaskValues:
        """Values -> labels."""
        labels = dict.fromkeys(self.ignored, IGNORE)
        labels |= {value: label for label, values in enumerate(self.values) for value in values}
        return MaskValues(labels, self.has_colours, self.merges)


def classes_of_config(classes: Sequence[str] | Mapping[str, Any]) -> MaskClasses:
    """The classes of `dataset.classes`.

    A list has the names of the values 0, 1, 2, ... An object has for each name a value, a list of values, or a colour
    such as "#FF0000".

    Raises:
        ValueError: Another form, or two equal names or values.
    """
    if not isinstance(classes, Mapping):
        return MaskClasses(tuple(map(str, classes)), tuple((value,) for value in range(len(classes))))
    values = {
        str(name): value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for name, value in classes.items()
    }
    if empty := [name for name, of_class in values.items() if not of_class]:
        raise ValueError(f"dataset.classes: {empty[0]!r} has no value; write a number, a list or a colour")
    colours = {isinstance(one, str) for of_class in values.values() for one in of_class}
    if len(colours) != 1:
        raise ValueError(f"dataset.classes={dict(classes)}: mixes colours and values; use one of them")
    parsed = {name: tuple(map(_parse_value, of_class)) for name, of_class in values.items()}
    return MaskClasses(tuple(parsed), tuple(parsed.values()), has_colours=colours.pop())


def _parse_value(value: object) -> int:
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        return int(value[1:], 16)
    if type(value) is int and 0 <= value <= MAX_VALUE:
        return value
    raise ValueError(f"dataset.classes: {value!r} is no value of a mask; write a number, or a colour such as '#FF0000'")


def classes_of_folder(root: Path, first_mask: Path) -> MaskClasses | None:
    """The classes that a file in the root, or the known layout of the first mask, tells; None if nothing does.

    Files: `labelmap.txt` of CVAT, `_classes.csv` of Roboflow, also in train/, `objectInfo150.txt` of ADE20K, and
    `classes.txt`, a name per line, for the values 0, 1, 2, ...
    """
    for name, read in _FILES.items():
        for path in (root / name, root / "train" / name):
            if path.is_file():
                return read(path)
    if first_mask.stem.endswith("_labelIds"):
        names = tuple(CITYSCAPES_CLASSES)
        values = tuple((value,) for value in CITYSCAPES_CLASSES.values())
        ignored = tuple(value for value in range(35) if (value,) not in values)
        return MaskClasses(names, values, ignored, where="Cityscapes")
    if first_mask.stem.endswith("_labelTrainIds"):
        return MaskClasses(tuple(CITYSCAPES_CLASSES), tuple((value,) for value in range(19)), where="Cityscapes")
    if first_mask.parent.name == "SegmentationClass":
        return MaskClasses(tuple(VOC_CLASSES), tuple((value,) for value in range(21)), where="Pascal VOC")
    return None


def _read_names(path: Path) -> MaskClasses:
    names = tuple(line for line, _ in numbered_lines(path))
    return MaskClasses(names, tuple((value,) for value in range(len(names))), where=str(path))


def _read_labelmap(path: Path) -> MaskClasses:
    """Lines `name:red,green,blue:parts:actions`; a line that begins with # is a comment."""
    values, ignored = {}, []
    for line, where in numbered_lines(path):
        if line.startswith("#"):
            continue
        name, colour, *_ = *line.split(":"), ""
        numbers = colour.split(",")
        if len(numbers) != 3 or not all(number.strip().isdigit() and int(number) < 256 for number in numbers):
            raise ValueError(f"{where}: must be name:red,green,blue::, each colour in 0 to 255")
        red, green, blue = map(int, numbers)
        value = 65536 * red + 256 * green + blue
        if name.strip().lower() in VOID_NAMES:
            ignored.append(value)
        else:
            values[name.strip()] = (value,)
    return MaskClasses(tuple(values), tuple(values.values()), tuple(ignored), has_colours=True, where=str(path))


def _read_roboflow(path: Path) -> MaskClasses:
    """A table with the columns "Pixel Value" and "Class"."""
    rows = list(csv.reader(io.StringIO(read_text(path)), skipinitialspace=True))[1:]
    try:
        values = {row[1].strip(): (int(row[0]),) for row in rows if row}
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path}: must have the columns Pixel Value, Class") from error
    return MaskClasses(tuple(values), tuple(values.values()), where=str(path))


def _read_ade20k(path: Path) -> MaskClasses:
    """A table, separated by tabs, whose first column is the value and whose last one is the name; 0 is ignored."""
    rows = [line.split("\t") for line, _ in numbered_lines(path)][1:]
    try:
        values = {row[-1].split(",")[0].strip(): (int(row[0]),) for row in rows}
    except ValueError as error:
        raise ValueError(f"{path}: the first column must be a number") from error
    return MaskClasses(tuple(values), tuple(values.values()), ignored=(0,), where=str(path))


_FILES = {
    "labelmap.txt": _read_labelmap,
    "_classes.csv": _read_roboflow,
    "objectInfo150.txt": _read_ade20k,
    "classes.txt": _read_names,
}

"""Files of boxes that were found: tables (CSV, parquet), COCO results JSON, YOLO text files.

A writer returns text or bytes, and leaves the file to its caller. Boxes are in pixels of the upright original picture,
rounded to 0.001; a score keeps all of its digits, so that metrics of the file are metrics of the model.

Shapes: H, W pixels, n boxes of a picture, K classes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.samples import Size
from vpt.predictions.tables import to_table

NUMBERS = ("score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True, eq=False)
class FoundBoxes:
    """What was found in one picture.

    Args:
        path: The picture file.
        size: Height and width of the upright picture.
        image_id: What its data set calls the picture, such as a COCO image id; None if it has no number.
        boxes: Corners x1, y1, x2, y2 in pixels of the upright picture, (n, 4) float32.
        scores: In [0, 1], (n,) float32.
        labels: Numbers of classes in [0, K), (n,) int64.
    """

    path: str
    size: Size
    image_id: int | None
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        n = len(self.labels)
        assert self.boxes.shape == (n, 4)
        assert self.scores.shape == self.labels.shape == (n,)

    def rows(self) -> list[tuple[int, float, list[float]]]:
        """Label, score and corners of each box."""
        return [
            (int(label), _shortest(score), [_pixels(corner) for corner in box])
            for label, score, box in zip(self.labels, self.scores, self.boxes, strict=True)
        ]

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values but the path, of which `from_record` makes the same arrays, bit by bit."""
        return {
            "size": list(self.size),
            "image_id": self.image_id,
            "boxes": [[_shortest(corner) for corner in box] for box in self.boxes],
            "scores": [_shortest(score) for score in self.scores],
            "labels": self.labels.tolist(),
        }

    @classmethod
    def from_record(cls, path: str, record: Mapping[str, Any]) -> "FoundBoxes":
        """What `to_record` wrote of a picture."""
        height, width = record["size"]
        return cls(
            path,
            (height, width),
            record["image_id"],
            np.array(record["boxes"], np.float32).reshape(-1, 4),
            np.array(record["scores"], np.float32),
            np.array(record["labels"], np.int64),
        )


def to_box_table(
    found: Mapping[str, Mapping[str, FoundBoxes]], classes: Mapping[str, Sequence[str]], ending: str
) -> bytes:
    """A table with a row for each box: path, class, score, x1, y1, x2, y2; none for a picture without boxes.

    With several tasks path is followed by task.

    Args:
        found: By path, then by task.
        classes: By task, the names of its classes.
        ending: ".csv" or ".parquet".

    Example:
        >>> box, score, label = np.float32([[1, 2, 30, 40]]), np.float32([0.9]), np.int64([0])
        >>> found = {"a.jpg": {"fruit": FoundBoxes("a.jpg", (50, 60), None, box, score, label)}}
        >>> print(to_box_table(found, {"fruit": ["pear"]}, ".csv").decode(), end="")
        path,class,score,x1,y1,x2,y2
        a.jpg,pear,0.9,1.0,2.0,30.0,40.0
    """
    is_one = len(classes) == 1
    columns: dict[str, type] = {"path": str, **({} if is_one else {"task": str}), "class": str}
    columns |= dict.fromkeys(NUMBERS, float)

    def rows() -> Iterator[list[Any]]:
        for path, of_tasks in found.items():
            for task, picture in of_tasks.items():
                for label, score, box in picture.rows():
                    yield [path, *([] if is_one else [task]), classes[task][label], score, *box]

    return to_table(columns, rows(), ending)


def to_coco(found: Sequence[FoundBoxes], category_ids: Sequence[int], classes: Sequence[str]) -> str:
    """COCO results: a list with a line for each box, {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    To these, "file_name" and "category" say in words which picture and class it is. The pictures' numbers are those of
    `coco_image_ids`. pycocotools reads this with `COCO.loadRes`, but for a list without any box, for which it raises
    IndexError.

    Args:
        found: The pictures.
        category_ids: What the data set calls each class, by label.
        classes: The names of the classes.

    Raises:
        ValueError: If two pictures have one number.
    """
    return _lines(
        {
            "image_id": image_id,
            "category_id": int(category_ids[label]),
            "bbox": [x1, y1, _pixels(x2 - x1), _pixels(y2 - y1)],
            "score": score,
            "file_name": picture.path,
            "category": classes[label],
        }
        for image_id, picture in zip(coco_image_ids(found), found, strict=True)
        for label, score, (x1, y1, x2, y2) in picture.rows()
    )


def coco_image_ids(found: Sequence[FoundBoxes]) -> list[int]:
    """A number for each picture: its image_id if all have one, else the number that it is called by, else 1, 2, ...

    COCO's own pictures are called by numbers, as 000000000139.jpg. Either all pictures have such names, and no two the
    same number, or all are counted from 1: so no number can mean two pictures.

    Raises:
        ValueError: If two pictures have one image_id.
    """
    given = [picture.image_id for picture in found if picture.image_id is not None]
    if len(given) == len(found):
        if len(set(given)) < len(given):
            twin = next(number for number, count in Counter(given).items() if count > 1)
            raise ValueError(f"two pictures have the image_id {twin}; give each its own, or None to all of them")
        return given
    stems = [PurePath(picture.path).stem for picture in found]
    if all(stem.isascii() and stem.isdigit() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(found) + 1))


def to_yolo(found: FoundBoxes) -> str:
    """The YOLO text file of a picture: a line `class cx cy w h score` for each box, so an empty one without boxes.

    Centre, width and height are fractions of the upright picture's sides. The score makes six columns; labels for
    training have five.
    """
    return "".join(_yolo_line(found.size, *row) for row in found.rows())


def file_names(paths: Sequence[str], ending: str) -> list[str]:
    """Names of files that belong to pictures, one for each, in the same sub-folders.

    A file is called as its picture, with another ending, or with both endings where two pictures differ in nothing
    else.

    Args:
        paths: The pictures, relative to the folder of all.
        ending: Of the files, as ".txt".

    Raises:
        ValueError: If a path is absolute or leaves its folder, or is there twice.

    Example:
        >>> file_names(["a/x.jpg", "y.jpg", "y.png"], ".txt")
        ['a/x.txt', 'y.jpg.txt', 'y.png.txt']
    """
    pictures = [PurePosixPath(PurePath(path).as_posix()) for path in paths]
    for picture in pictures:
        if PurePath(picture).is_absolute() or ".." in picture.parts:
            raise ValueError(f"{picture}: a path must be relative, and stay in the folder of all pictures")
    counts = Counter(picture.with_suffix(ending) for picture in pictures)
    names: dict[str, PurePosixPath] = {}
    for picture in pictures:
        short = picture.with_suffix(ending)
        name = str(short if counts[short] == 1 else picture.with_name(f"{picture.name}{ending}"))
        if name in names:
            raise ValueError(f"{picture}: its file would be {name}, which is that of {names[name]}; rename one of them")
        names[name] = picture
    return list(names)


def _yolo_line(size: Size, label: int, score: float, box: Sequence[float]) -> str:
    x1, y1, x2, y2 = box
    height, width = size
    fractions = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
    return " ".join([str(label), *(f"{fraction:.8f}" for fraction in fractions), str(score)]) + "\n"


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    """JSON with a line for each entry of a list."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def _shortest(value: np.float32) -> float:
    """The number of fewest digits that is this one in float32: 0.9, where float() gives 0.8999999761581421."""
    return float(str(np.float32(value)))


def _pixels(value: float) -> float:
    return round(float(value), 3)

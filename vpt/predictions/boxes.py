"""Files of predicted boxes: tables (CSV, parquet), COCO results JSON, YOLO text files.

All functions return text or bytes. Boxes are in pixels of the upright original image, rounded to 0.001; scores keep all
digits, so that metrics of the file are those of the model.

Shapes: H, W pixels, n boxes of an image, K classes.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.data.samples import Size
from vpt.data.transforms.preprocessing import Preprocessing, unletterbox
from vpt.engine.console import warn
from vpt.predictions.tables import to_table

NUMBERS = ("score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True, eq=False)
class FoundBoxes:
    """The boxes predicted in one image."""

    path: str  # of the image
    size: Size  # height and width of the upright image
    image_id: int | None  # its number in the data set, such as a COCO image id, if any
    boxes: NDArray[np.float32]  # (n, 4) corners x1, y1, x2, y2 in pixels of the upright image
    scores: NDArray[np.float32]  # (n,) in [0, 1]
    labels: NDArray[np.int64]  # (n,) class indices in [0, K)

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
        """Plain JSON values without the path, from which `from_record` restores the same arrays, bit by bit."""
        return {
            "size": list(self.size),
            "image_id": self.image_id,
            "boxes": [[_shortest(corner) for corner in box] for box in self.boxes],
            "scores": [_shortest(score) for score in self.scores],
            "labels": self.labels.tolist(),
        }

    @classmethod
    def from_record(cls, path: str, record: Mapping[str, Any]) -> "FoundBoxes":
        """Restore what `to_record` returned."""
        height, width = record["size"]
        boxes = np.array(record["boxes"], np.float32).reshape(-1, 4)
        scores, labels = np.array(record["scores"], np.float32), np.array(record["labels"], np.int64)
        return cls(path, (height, width), record["image_id"], boxes, scores, labels)


def to_box_table(
    found: Mapping[str, Mapping[str, FoundBoxes]], classes: Mapping[str, Sequence[str]], ending: str
) -> bytes:
    """A table with a row for each box: path, class, score, x1, y1, x2, y2; several tasks add a column task.

    `found` is by path, then by task, `classes` by task; the ending is ".csv" or ".parquet".

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

    rows = (
        [path, *([] if is_one else [task]), classes[task][label], score, *box]
        for path, of_tasks in found.items()
        for task, image in of_tasks.items()
        for label, score, box in image.rows()
    )
    return to_table(columns, rows, ending)


def to_coco(found: Sequence[FoundBoxes], category_ids: Sequence[int], classes: Sequence[str]) -> str:
    """COCO results: a list with a line for each box, {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    "file_name" and "category" are added for readers. Image ids, and errors, are those of `coco_image_ids`.
    `category_ids` are the numbers of the classes in the data set. pycocotools reads this with `COCO.loadRes`, but
    raises IndexError for an empty list.
    """
    rows = [
        {
            "image_id": image_id,
            "category_id": int(category_ids[label]),
            "bbox": [x1, y1, _pixels(x2 - x1), _pixels(y2 - y1)],
            "score": score,
            "file_name": image.path,
            "category": classes[label],
        }
        for image_id, image in zip(coco_image_ids(found), found, strict=True)
        for label, score, (x1, y1, x2, y2) in image.rows()
    ]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def coco_image_ids(found: Sequence[FoundBoxes]) -> list[int]:
    """A distinct number for each image: its image_id if all have one, else the number in its name, else 1, 2, ...

    Names are used if all are distinct numbers, such as COCO's 000000000139.jpg, see `numbers_of_images`.

    Raises:
        ValueError: Two images have the same image_id.
    """
    given = [image.image_id for image in found if image.image_id is not None]
    if len(given) == len(found):
        if len(set(given)) < len(given):
            twin = next(number for number, count in Counter(given).items() if count > 1)
            raise ValueError(f"two images have image_id={twin}; make them distinct, or None for all images")
        return given
    return numbers_of_images([image.path for image in found])


def numbers_of_images(paths: Sequence[str]) -> list[int]:
    """A distinct number for each image, as COCO results require: that in its name if all have one, else 1, 2, ...

    Numbers that are counted belong to no annotation file, which is reported on the standard error.
    """
    stems = [PurePath(path).stem for path in paths]
    if all(stem.isascii() and stem.isdigit() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    if paths:
        warn(
            "image_id counts the images 1, 2, ..., and is not that of an annotation file; to measure the results, take "
            "its ids (annotations=FILE of vpt.predict, or FoundBoxes.image_id)"
        )
    return list(range(1, len(paths) + 1))


def match_image_ids(paths: Sequence[str], ids: Mapping[str, int]) -> dict[str, int]:
    """The id of each image that a COCO file names, by its path; `ids` is by the file names of that file.

    Paths and names may begin in different folders. Of several names with the file name of an image, those that it ends
    in, or that end in it, come first, and of these the longest.

    Raises:
        ValueError: An image has several such names, or two images have the same one.

    Example:
        >>> match_image_ids(["test/a.jpg", "b.jpg"], {"a.jpg": 7, "train/a.jpg": 8})
        {'test/a.jpg': 7}
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for name in ids:
        by_name[PurePosixPath(name).name].append(name)
    found: dict[str, int] = {}
    owners: dict[str, str] = {}
    for path in paths:
        names = by_name.get(PurePosixPath(path).name, [])
        ends = [name for name in names if f"/{path}".endswith(f"/{name}") or f"/{name}".endswith(f"/{path}")]
        longest = max(map(len, ends), default=0) if path not in ends else len(path)
        best = [name for name in ends if len(name) == longest] or names
        if len(best) > 1:
            raise ValueError(f"{path} may be {best[0]} or {best[1]}; name a folder of images that shows which")
        for name in best:
            if other := owners.get(name):
                raise ValueError(f"{path} and {other} are both {name}; name a folder of images that shows which")
            owners[name], found[path] = path, ids[name]
    return found


def to_yolo(found: FoundBoxes) -> str:
    """The YOLO text file of an image: a line `class cx cy w h score` for each box, in fractions of its sides."""
    height, width = found.size
    lines = []
    for label, score, (x1, y1, x2, y2) in found.rows():
        fractions = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        lines.append(" ".join([str(label), *(f"{fraction:.8f}" for fraction in fractions), str(score)]) + "\n")
    return "".join(lines)


def file_names(paths: Sequence[str], ending: str) -> list[str]:
    """Names of output files, one for each image, in the same sub-folders; paths are relative to the input folder.

    The ending of the image is replaced, or kept before the new one where two images differ in nothing else.

    Raises:
        ValueError: A path is absolute, leaves its folder, or is a duplicate.

    Example:
        >>> file_names(["a/x.jpg", "y.jpg", "y.png"], ".txt")
        ['a/x.txt', 'y.jpg.txt', 'y.png.txt']
    """
    images = [PurePosixPath(PurePath(path).as_posix()) for path in paths]
    for image in images:
        if PurePath(image).is_absolute() or ".." in image.parts:
            raise ValueError(f"{image}: must be relative, and stay in the folder of the images")
    counts = Counter(image.with_suffix(ending) for image in images)
    names: dict[str, PurePosixPath] = {}
    for image in images:
        short = image.with_suffix(ending)
        name = str(short if counts[short] == 1 else image.with_name(f"{image.name}{ending}"))
        if name in names:
            raise ValueError(f"{image}: its file {name} is also that of {names[name]}; rename one of them")
        names[name] = image
    return list(names)


def to_original(detection: dict[str, Tensor], size: Size, preprocessing: Preprocessing) -> dict[str, Tensor]:
    """A detection in pixels of the input -> in pixels of the image of this height and width, on the CPU."""
    boxes = unletterbox(detection["boxes"].float().cpu().numpy(), size, preprocessing)
    return {name: value.cpu() for name, value in detection.items()} | {"boxes": torch.from_numpy(boxes)}


def _shortest(value: np.float32) -> float:
    """The shortest decimal of a float32: 0.9, where float() returns 0.8999999761581421."""
    return float(str(np.float32(value)))


def _pixels(value: float) -> float:
    return round(float(value), 3)

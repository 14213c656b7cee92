"""Reader of boxes in YOLO text files: a line for each box, and a data.yaml that names splits and classes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from vpt.data.images import find_images
from vpt.data.readers.annotation_files import (
    by_split,
    inside,
    numbered_lines,
    read_text,
    refuse_equal_names,
    require_inside,
    require_train,
)
from vpt.data.readers.box_checks import Finding, Reading, SourceBox, SourceImage, Unit, make_samples
from vpt.data.samples import DetectionSamples

YOLO_LAYOUT = "data.yaml (or data.yml, dataset.yaml) with the keys train, val, test and names"
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")


def read_yolo(root: str | Path, **reading: Unpack[Reading]) -> dict[str, DetectionSamples]:
    """Read YOLO text files: `YOLO_LAYOUT`.

    An entry of data.yaml is a folder, a file that lists images, or a list of these. The labels of images/x.jpg are in
    labels/x.txt, or beside the image if no folder above it is named images; an image without such a file has no boxes.
    A line is `class cx cy w h`, or a polygon, `class x1 y1 x2 y2 ...`, which becomes its bounding box, or a pose (if
    data.yaml has `kpt_shape`), of which the box is read; all in fractions of the upright image's sides. `root` has
    data.yaml and all images; `reading` is for `make_samples`.

    Raises:
        ValueError: A file or a line is wrong, with its name and number; or there is nothing to train on.
    """
    root = Path(root)
    path = find_yaml(root)
    if path is None:
        raise ValueError(f"{root}: nothing found; expected {YOLO_LAYOUT}")
    content = _load_yaml(path)
    classes = _read_classes(content, path)
    entries = by_split([(key, value) for key, value in content.items() if value], str(path))
    require_train(root, entries, YOLO_LAYOUT)
    images = {}
    for split, entry in entries.items():
        where = f"{path}, {split}"
        paths = _find_listed(root, content.get("path"), entry, where)
        images[split] = [
            _read_image(root, path, i, "kpt_shape" in content, where) for i, path in enumerate(paths, start=1)
        ]
    strays = _find_strays(root, [image.path for members in images.values() for image in members])
    return make_samples(dict(enumerate(classes)), images, [(Finding.STRAY, place) for place in strays], **reading)


def find_yaml(root: Path) -> Path | None:
    """The file that names splits and classes, if there is one."""
    return next((root / name for name in YAML_NAMES if (root / name).is_file()), None)


def _load_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: of type {type(content).__name__}; must have the keys train, val, test and names")
    return {key: value for key, value in content.items() if isinstance(key, str)}


def _read_classes(content: Mapping[str, Any], path: Path) -> list[str]:
    """The names; no error shows values of a YAML file, since a few bytes of it can expand to gigabytes."""
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{path}: the keys of names must be 0, 1, 2, ... without a gap")
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: names must be a list of classes, such as [cat, dog] or {{0: cat, 1: dog}}")
    for label, name in enumerate(names):
        if type(name) not in (str, int, float):
            raise ValueError(f"{path}: the name of class {label} is of type {type(name).__name__}; write it in quotes")
    if content.get("nc", len(names)) != len(names):
        raise ValueError(f"{path}: nc must be {len(names)}, the number of names")
    classes = [str(name) for name in names]
    refuse_equal_names(classes, f"{path}, names")
    return classes


def _find_listed(root: Path, base: object, entry: object, where: str) -> list[Path]:
    """The images of an entry: those in a folder, or those that a file lists."""
    bases = [root / base, root] if isinstance(base, str) else [root]
    paths: list[Path] = []
    for item in entry if isinstance(entry, list) else [entry]:
        if not isinstance(item, str):
            raise ValueError(f"{where}: of type {type(item).__name__}; must be a folder, or a file that lists images")
        # Roboflow writes ../train/images for train/images, and `path` is often the folder on another machine.
        places = [place / item for place in bases] + [root / re.sub(r"^(\.\./)+", "", item)]
        place = next((place for place in (inside(root, place) for place in places) if place and place.exists()), None)
        if place is None:
            raise ValueError(f"{where}: no {item!r} in {root}; correct or remove the entry")
        paths += find_images(place) if place.is_dir() else _listed_paths(root, place)
    return paths


def _listed_paths(root: Path, path: Path) -> Iterator[Path]:
    """The images that a file lists, relative to its folder or to the root."""
    for line, where in numbered_lines(path):
        name = line.replace("\\", "/")
        beside = path.parent / name
        yield require_inside(root, beside if beside.is_file() or not (root / name).is_file() else root / name, where)


def _read_image(root: Path, path: Path, image_id: int, has_keypoints: bool, where: str) -> SourceImage:
    lines = numbered_lines(labels) if (labels := _label_path(root, path)).is_file() else []
    boxes = [_read_box(line, has_keypoints, place) for line, place in lines]
    return SourceImage(path, path.relative_to(root).as_posix(), image_id, where, boxes, Unit.FRACTIONS)


def _label_path(root: Path, image: Path) -> Path:
    """The file of labels: the last folder named images becomes labels."""
    folders = image.parent.relative_to(root).parts
    for i in reversed(range(len(folders))):
        if folders[i] == "images":
            return root.joinpath(*folders[:i], "labels", *folders[i + 1 :], f"{image.stem}.txt")
    return image.with_suffix(".txt")


def _read_box(line: str, has_keypoints: bool, where: str) -> SourceBox:
    try:
        label, *numbers = map(float, line.split())
    except ValueError:
        label, numbers = inf, []
    if not label.is_integer() or len(numbers) < 4 or not (has_keypoints or len(numbers) % 2 == 0):
        form = "`class cx cy w h`, or a polygon, `class x1 y1 x2 y2 x3 y3 ...`"
        raise ValueError(f"{where}: {line[:80]!r}; must be {form}")
    if has_keypoints or len(numbers) == 4:
        x, y, width, height = numbers[:4]
        corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    else:
        points = np.reshape(numbers, (-1, 2))
        (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        corners = x1, y1, x2, y2
    return SourceBox(corners, int(label), where)


def _find_strays(root: Path, paths: Iterable[Path]) -> Iterator[str]:
    """Files of labels without an image, in folders that hold nothing else."""
    folders = {_label_path(root, path).parent: path.parent for path in paths}
    for labels, images in sorted(folders.items()):
        stems = {path.stem for path in images.glob("*")}
        for path in sorted(labels.glob("*.txt")) if labels != images else []:
            if path.stem not in stems and path.name != "classes.txt":
                yield str(path)

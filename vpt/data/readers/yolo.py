"""Reader of boxes in YOLO text files: a line for each box, and a data.yaml that names splits and classes."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from vpt.data.image_files import find_images
from vpt.data.images import EXTENSIONS
from vpt.data.readers.annotation_files import (
    by_split,
    find_by_end,
    inside,
    is_file,
    numbered_lines,
    read_text,
    refuse_equal_names,
    require_inside,
    require_train,
    to_numbers,
)
from vpt.data.readers.box_checks import Finding, Problems, Reading, SourceBox, SourceImage, Unit, make_samples
from vpt.data.samples import DetectionSamples
from vpt.data.splits import SPLIT_OF

YOLO_LAYOUT = (
    "data.yaml (or another .yaml) with the keys train, val, test and names; or classes.txt (or obj.names) and images, "
    "with labels in images/ and labels/ or side by side"
)
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
MAX_YAML = 1_000_000  # bytes that are searched for keys
CLASS_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "images/classes.txt", "train/_darknet.labels")


def read_yolo(root: str | Path, **reading: Unpack[Reading]) -> dict[str, DetectionSamples]:
    """Read YOLO text files: `YOLO_LAYOUT`.

    An entry of data.yaml is a folder, a file that lists images, or a list of these; paths of another machine are found
    by their end. Without a YAML file the splits are lists (train.txt) or folders (images/train, train), or all images
    are train. The labels of images/x.jpg are in labels/x.txt, or beside the image if no folder above it is named
    images; an image without such a file has no boxes. A line is `class cx cy w h`, or a polygon, `class x1 y1 x2 y2
    ...`, which becomes its bounding box, or a pose (if data.yaml has `kpt_shape`), of which the box is read; all in
    fractions of the upright image's sides. A score behind a box is ignored, and the class may be a name. `root` has all
    images; `reading` is for `make_samples`.

    Raises:
        ValueError: A file is wrong, with its name; or there is nothing to train on.
    """
    root = Path(root)
    path = find_yolo(root)
    if path is None:
        raise ValueError(f"{root}: nothing found; expected {YOLO_LAYOUT}")
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    content = _load_yaml(path) if is_yaml else {"names": [line for line, _ in numbered_lines(path)], **_entries(root)}
    classes = _read_classes(content, path)
    named = by_split([(key, value) for key, value in content.items() if value], str(path))
    entries = named or ({} if is_yaml else {"train": "images" if (root / "images").is_dir() else "."})
    require_train(root, entries, YOLO_LAYOUT)
    lines = _Lines({name: label for label, name in enumerate(classes)}, "kpt_shape" in content)
    problems: Problems = []
    images = {}
    for split, entry in entries.items():
        where = f"{path}, {split}"
        paths = _find_listed(root, content.get("path"), entry, where, problems)
        images[split] = [_read_image(root, path, i, lines, where) for i, path in enumerate(paths, start=1)]
    problems += _find_strays(root, {image.path for members in images.values() for image in members})
    return make_samples(dict(enumerate(classes)), images, problems, names_splits=bool(named), **reading)


def find_yolo(root: Path) -> Path | None:
    """The file that names the classes, if there is one; a `ValueError` if there are several."""
    if found := [root / name for name in YAML_NAMES if (root / name).is_file()]:
        return found[0]
    found = [path for path in sorted(root.glob("*.y*ml")) if _names_classes(path)]
    if len(found) > 1:
        raise ValueError(f"{root}: both {found[0].name} and {found[1].name} name splits and classes; keep one of them")
    if found:
        return found[0]
    names = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    has_labels = names and ((root / "labels").is_dir() or any(map(_has_labels, [*root.iterdir(), *root.glob("*/*")])))
    return names if has_labels else None


def _names_classes(path: Path) -> bool:
    """Whether a YAML file has the keys train and names; it is not parsed."""
    with path.open("rb") as file:
        content = file.read(MAX_YAML)
    return all(re.search(rf"^{key}\s*:".encode(), content, re.MULTILINE) for key in ("train", "names"))


def _has_labels(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.with_suffix(".txt").is_file()


def _entries(root: Path) -> dict[str, str]:
    """The lists or folders of the splits of a folder without a YAML file; empty if there are none."""
    lists = {path.stem: path.name for path in sorted(root.glob("*.txt")) if path.stem.lower() in SPLIT_OF}
    folders = [path for parent in (root / "images", root) for path in sorted(parent.glob("*/"))]
    named = {path.name: path.relative_to(root).as_posix() for path in folders if path.name.lower() in SPLIT_OF}
    return lists or named


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


def _find_listed(root: Path, base: object, entry: object, where: str, problems: Problems) -> list[Path]:
    """The images of an entry: those in a folder, or those that a file lists."""
    bases = [root / base, root] if isinstance(base, str) else [root]
    paths: list[Path] = []
    for item in entry if isinstance(entry, list) else [entry]:
        if not isinstance(item, str):
            raise ValueError(f"{where}: of type {type(item).__name__}; must be a folder, or a file that lists images")
        # Roboflow writes ../train/images for train/images, and `path` is often the folder on another machine.
        places = (place for place in (inside(root, place / item) for place in bases) if place and place.exists())
        place = next(places, None) or find_by_end([root], item.replace("\\", "/"))
        if place is None:
            raise ValueError(f"{where}: no {item!r} in {root}; correct or remove the entry")
        paths += find_images(place) if place.is_dir() else _listed_paths(root, place, problems)
    return paths


def _listed_paths(root: Path, path: Path, problems: Problems) -> Iterator[Path]:
    """The images that a file lists, relative to its folder or to the root, or by the end of their path."""
    for line, where in numbered_lines(path):
        name = line.replace("\\", "/")
        places = (inside(root, place / name) for place in (path.parent, root))
        found = next((place for place in places if place and is_file(place)), None)
        if found is None and (found := find_by_end([path.parent, root], name)):
            problems.append((Finding.MOVED, f"{where}: {line}, found as {found}"))
        yield found or require_inside(root, path.parent / name, where)


def _read_image(root: Path, path: Path, image_id: int, lines: "_Lines", where: str) -> SourceImage:
    boxes = lines.read_file(_label_path(root, path))
    return SourceImage(path, path.relative_to(root).as_posix(), image_id, where, boxes, Unit.FRACTIONS)


def _label_path(root: Path, image: Path) -> Path:
    """The file of labels: the last folder named images becomes labels."""
    folders = image.parent.relative_to(root).parts
    for i in reversed(range(len(folders))):
        if folders[i] == "images":
            return root.joinpath(*folders[:i], "labels", *folders[i + 1 :], f"{image.stem}.txt")
    return image.with_suffix(".txt")


@dataclass(frozen=True)
class _Lines:
    """How lines of labels are read."""

    labels: Mapping[str, int]  # by the name of a class
    has_keypoints: bool

    def read_file(self, path: Path) -> Iterator[SourceBox]:
        """The boxes of a file, if it exists; it is opened when they are needed."""
        for line, where in numbered_lines(path) if path.is_file() else ():
            yield self.read(line, where)

    def read(self, line: str, where: str) -> SourceBox:
        """A box; without corners if the line is none."""
        word, *words = line.split()
        numbers = to_numbers(words)
        try:
            label = int(float(word)) if float(word).is_integer() else None
        except ValueError:
            label = self.labels.get(word)
        is_box = len(numbers) in (4, 5) or (self.has_keypoints and len(numbers) > 4)
        repair = None if word.isdigit() and (len(numbers) != 5 or self.has_keypoints) else Finding.CONVERTED
        if label is None or not (is_box or (len(numbers) > 5 and len(numbers) % 2 == 0)):
            return SourceBox(None, label, f"{where}: {line[:80]!r}")
        if is_box:
            x, y, width, height = numbers[:4]
            corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        else:
            points = np.reshape(numbers, (-1, 2))
            (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
            corners = x1, y1, x2, y2
        return SourceBox(corners, label, where, repair=repair)


def _find_strays(root: Path, paths: Collection[Path]) -> Iterator[tuple[Finding, str]]:
    """Images that share a file of labels, and files of labels without an image."""
    images: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(paths):
        images[_label_path(root, path)].append(path)
    for labels, members in images.items():
        if len(members) > 1 and labels.is_file():
            yield from ((Finding.SHARED, f"{labels}: {path.relative_to(root).as_posix()}") for path in members)
    for labels, folder in sorted({labels.parent: members[0].parent for labels, members in images.items()}.items()):
        stems = {path.stem for path in folder.glob("*") if path.suffix != ".txt"}
        for path in sorted(labels.glob("*.txt")):
            if path.stem not in stems and path.name != "classes.txt" and (labels != folder or _begins_with_box(path)):
                yield Finding.STRAY, str(path)


def _begins_with_box(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"\s*\d+(\s+[\d.eE+-]+){4}", file.read(1000)) is not None

"""Reader of boxes in COCO JSON: a file for each split, with images, annotations and categories."""

import json
import re
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

from vpt.data.readers.annotation_files import (
    by_split,
    find_by_end,
    inside,
    is_file,
    read_text,
    refuse_equal_names,
    require_train,
    to_numbers,
)
from vpt.data.readers.box_checks import (
    Corners,
    Finding,
    Problems,
    Reading,
    SourceBox,
    SourceImage,
    make_samples,
)
from vpt.data.samples import DetectionSamples
from vpt.data.splits import SPLIT_OF, SPLITS

MAX_DIGITS = 18  # of an id that is a number
COCO_LAYOUT = (
    "annotations/instances_train*.json (also val, test), train/_annotations.coco.json (also val/, test/), or another "
    "file with images, annotations and categories in the folder, in annotations/ or in train/"
)


def read_coco(
    root: str | Path, annotations: Mapping[str, str | Path] | None = None, **reading: Unpack[Reading]
) -> dict[str, DetectionSamples]:
    """Read COCO JSON: `COCO_LAYOUT`, or a file for each split.

    A file that names no split, such as instances_default.json or result.json, is train. The classes are the categories
    of train by ascending id, without the one that Roboflow adds for the data set as a whole; categories of other splits
    are matched by id. `iscrowd` becomes crowd. The images of a split are in the first of these folders that has any of
    them: that of its file; a folder of the root or of images/ that is named as the file (train2017) or the split;
    images/; data/; the root. Paths of another machine are found by their end. `annotations` has the file of each split,
    relative to the root or absolute; `reading` is for `make_samples`.

    Raises:
        ValueError: A file is missing or not COCO JSON, with its name and the key; or there is nothing to train on.
    """
    root = Path(root)
    if unknown := sorted(set(annotations or ()) - set(SPLITS)):
        raise ValueError(f"annotations: unknown key {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    if annotations is None:
        files = by_split(find_json(root), str(root))
    else:
        files = {split: root / annotations[split] for split in SPLITS if split in annotations}
    require_train(root, files, COCO_LAYOUT)
    contents = {split: _load_json(path) for split, path in files.items()}
    categories = _read_categories(contents["train"], files["train"])
    for split, content in contents.items():
        _refuse_other_names(content, files[split], categories)
    problems: Problems = []
    images = {split: _read_images(content, files[split], root, split, problems) for split, content in contents.items()}
    is_named = _split_word(files["train"], files["train"].parent.name.lower() in SPLIT_OF) is not None
    names_splits = annotations is not None or len(files) > 1 or is_named
    return make_samples(categories, images, problems, names_splits=names_splits, **reading)


def read_ids(path: str | Path) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of the images of a COCO file by file name, and those of its categories by name.

    Raises:
        ValueError: The file is missing or not COCO JSON, or an id is no whole number.
    """
    path = Path(path)
    content = _load_json(path)
    images = {}
    for i, entry in enumerate(content["images"]):
        name, image_id = _value(entry, "file_name", str, f"{path}, images[{i}]"), _id(entry, "id")
        if not isinstance(image_id, int):
            raise ValueError(f"{path}, images[{i}]: 'id' is missing or no whole number; export the file again")
        images[name.replace("\\", "/")] = image_id
    return images, {name: category_id for _, category_id, name, _ in _categories(content, path)}


def find_json(root: Path) -> list[tuple[str, Path]]:
    """Candidates for the file of a split, with the name of the split, in the first of the layouts that has any.

    Files that name no split are train if no other file is.
    """
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name.lower() in SPLIT_OF]
    roboflow = [folder / "_annotations.coco.json" for folder in folders]
    files = [*filter(Path.is_file, roboflow), *sorted(root.glob("annotations/instances_*.json"))]
    if not files:
        places = [root, root / "annotations", *folders]
        files = [path for place in places for path in sorted(place.glob("*.json")) if _is_coco(path)]
    named = [(word, path) for path in files if (word := _split_word(path, path.parent in folders))]
    if "train" not in {SPLIT_OF[word.lower()] for word, _ in named}:
        named += [("train", path) for path in files if not _split_word(path, path.parent in folders)]
    return sorted(named)


def _split_word(path: Path, is_in_split: bool) -> str | None:
    """The word of a path that names a split: its folder, or a part of its name."""
    words = [path.parent.name] if is_in_split else re.findall(r"[a-zA-Z]+", path.stem)
    return next((word for word in words if word.lower() in SPLIT_OF), None)


def _is_coco(path: Path) -> bool:
    """Whether a file contains the keys of COCO; it is not parsed, since it may be large."""
    with path.open("rb") as file:
        content = file.read()
    return all(f'"{key}"'.encode() in content for key in ("images", "annotations", "categories"))


def _load_json(path: Path) -> Mapping[str, Any]:
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); export it again") from error
    for key in ("images", "annotations", "categories"):
        _value(content, key, list, str(path))
    return content  # type: ignore[no-any-return]


def _value(entry: Any, key: str, expected: type, where: str) -> Any:
    """The value of a required key of this type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: of type {type(entry).__name__}; must be an object with the key {key!r}")
    if key not in entry:
        raise ValueError(f"{where}: no key {key!r}, only {', '.join(entry) or 'an empty object'}")
    if type(entry[key]) is not expected:
        raise ValueError(f"{where}: {key!r} is of type {type(entry[key]).__name__}; must be {expected.__name__}")
    return entry[key]


def _id(entry: Any, key: str) -> int | str | None:
    """An id, as a whole number also where it is written as 3.0 or "3"; None if there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < MAX_DIGITS else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == inf:
        return None
    return int(value) if value == int(value) else None


def _categories(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, int, str, Any]]:
    """For each category: its place, id, name and parent."""
    for i, entry in enumerate(content["categories"]):
        where = f"{path}, categories[{i}]"
        category_id, name = _id(entry, "id"), entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(category_id, int):
            raise ValueError(f"{where}: 'id' is missing or no whole number; export the file again")
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            raise ValueError(f"{where}: 'name' is missing or no text; write the name of the class")
        yield where, category_id, str(name), entry.get("supercategory")


def _read_categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names by category id, ascending; without a parent of others that has no boxes, as Roboflow adds it."""
    names: dict[int, str] = {}
    parents = set()
    for where, category_id, name, parent in _categories(content, path):
        if names.setdefault(category_id, name) != name:
            raise ValueError(f"{where}: id {category_id} is not unique; use another for each category")
        if parent != name:
            parents.add(str(parent))
    used = {_id(entry, "category_id") for entry in content["annotations"]}
    kept = {key: name for key, name in sorted(names.items()) if key in used or name not in parents}
    refuse_equal_names(list(kept.values()), f"{path}, categories")
    return kept


def _refuse_other_names(content: Mapping[str, Any], path: Path, categories: Mapping[int, str]) -> None:
    """Refuse a file that has another name for an id of train."""
    for where, category_id, name, _ in _categories(content, path):
        if categories.get(category_id, name) != name:
            known = categories[category_id]
            raise ValueError(f"{where}: id {category_id} is {name!r}, in train {known!r}; use the same ids")


def _read_images(
    content: Mapping[str, Any], path: Path, root: Path, split: str, problems: Problems
) -> list[SourceImage]:
    """The images of a file, in its order; what is wrong with its entries is added to `problems`."""
    names: dict[int | str, str] = {}
    entries = []
    for i, entry in enumerate(content["images"]):
        where = f"{path}, images[{i}]"
        name, image_id = _value(entry, "file_name", str, where).replace("\\", "/"), _id(entry, "id")
        if image_id is None:
            raise ValueError(f"{where}: 'id' is missing or no whole number; export the file again")
        if names.setdefault(image_id, name) != name:
            raise ValueError(f"{where}: id {image_id} is not unique; use another for each image")
        if type(entry["id"]) is not int:
            problems.append((Finding.CONVERTED, f"{where}: id {str(entry['id'])[:80]!r}"))
        entries.append((where, image_id, name, (entry.get("height"), entry.get("width"))))
    annotations: dict[int | str | None, list[int]] = {image_id: [] for image_id in names}
    for i, entry in enumerate(content["annotations"]):
        if (owner := _id(entry, "image_id")) in annotations:
            annotations[owner].append(i)
        else:
            problems.append((Finding.STRAY, f"{path}, annotations[{i}]: image_id {owner}"))
    numbered = all(isinstance(image_id, int) for image_id in names)
    places = _image_folders(root, path, split)
    folder = next((place for place in places if any(_has_image(root, place / name) for name in names.values())), None)
    images = []
    for number, (where, image_id, name, size) in enumerate(entries, start=1):
        image_path = inside(root, (folder or root) / name)
        if image_path is None or folder is None:
            if found := find_by_end(places, name):
                problems.append((Finding.MOVED, f"{where}: {name}, found as {found}"))
            inner = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
            image_path = found or root.joinpath(*inner)  # never outside of the root; reported as missing
        boxes = (
            _read_box(content["annotations"][i], f"{path}, annotations[{i}]") for i in annotations.pop(image_id, ())
        )
        shown = image_path.relative_to(root).as_posix()
        images.append(SourceImage(image_path, shown, int(image_id) if numbered else number, where, boxes, size=size))
    return images


def _has_image(root: Path, path: Path) -> bool:
    return inside(root, path) is not None and is_file(path)


def _image_folders(root: Path, path: Path, split: str) -> list[Path]:
    """Where the images of a file may be, the usual place first."""
    titles = [path.stem.removeprefix("instances_"), *(name for name in SPLIT_OF if SPLIT_OF[name] == split)]
    places = [path.parent, *(root / above / title for title in titles for above in ("", "images"))]
    return [*places, root / "images", root / "data", root]


def _read_box(entry: Any, where: str) -> SourceBox:
    """A box; without corners if it has neither four numbers nor a polygon."""
    category_id, numbers = _id(entry, "category_id"), entry.get("bbox") if isinstance(entry, dict) else None
    box, repair = to_numbers(numbers) if isinstance(numbers, list) else [], None
    if len(box) == 4:
        corners: Corners | None = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        if type(entry.get("category_id")) is not int or any(isinstance(number, str) for number in numbers or ()):
            repair = Finding.CONVERTED
    elif corners := _polygon_corners(entry):
        repair = Finding.POLYGON
    else:
        where = f"{where}: bbox {str(numbers)[:80]}"
    if category_id is None:
        where = f"{where}: no category_id"
    return SourceBox(
        corners, category_id, where, crowd=isinstance(entry, dict) and entry.get("iscrowd") in (1, "1"), repair=repair
    )


def _polygon_corners(entry: Any) -> Corners | None:
    """The corners of the polygons of an annotation, if it has any."""
    polygons = entry.get("segmentation") if isinstance(entry, dict) else None
    polygons = polygons if isinstance(polygons, list) else []
    points = [to_numbers(polygon) for polygon in polygons if isinstance(polygon, list)]
    xs, ys = ([number for polygon in points for number in polygon[start::2]] for start in (0, 1))
    return (min(xs), min(ys), max(xs), max(ys)) if len(xs) == len(ys) >= 2 else None

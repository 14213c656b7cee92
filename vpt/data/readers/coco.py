"""Reader of boxes in COCO JSON: a file for each split, with images, annotations and categories."""

import json
import re
from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any, Unpack

from vpt.data.readers.annotation_files import by_split, read_text, refuse_equal_names, require_inside, require_train
from vpt.data.readers.box_checks import Reading, SourceBox, SourceImage, make_samples
from vpt.data.samples import DetectionSamples
from vpt.data.splits import SPLIT_OF, SPLITS

COCO_LAYOUT = "annotations/instances_train*.json (also val, test), or train/_annotations.coco.json (also val/, test/)"


def read_coco(
    root: str | Path, annotations: Mapping[str, str | Path] | None = None, **reading: Unpack[Reading]
) -> dict[str, DetectionSamples]:
    """Read COCO JSON: `COCO_LAYOUT`, or a file for each split.

    The classes are the categories of train by ascending id, without the one that Roboflow adds for the data set as a
    whole; categories of other splits are matched by id. `iscrowd` becomes crowd. The images of a split are in the first
    of these folders that has any of them: that of its file; a folder of the root or of images/ that is named as the
    file (train2017) or the split; images/; the root. `annotations` has the file of each split, relative to the root or
    absolute; `reading` is for `make_samples`.

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
    strays: list[str] = []
    images = {split: _read_images(content, files[split], root, split, strays) for split, content in contents.items()}
    return make_samples(categories, images, strays, **reading)


def find_json(root: Path) -> list[tuple[str, Path]]:
    """Candidates for the file of a split, in either layout, with the name of the split."""
    files = [(path.parent.name, path) for path in root.glob("*/_annotations.coco.json")]
    for path in root.glob("annotations/instances_*.json"):
        files += [(word, path) for word in re.findall(r"^instances_([a-zA-Z]+)", path.name)]
    return sorted((name, path) for name, path in files if name.lower() in SPLIT_OF)


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


def _read_categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names by category id, ascending; without a parent of others that has no boxes, as Roboflow adds it."""
    names: dict[int, str] = {}
    parents = set()
    for i, entry in enumerate(content["categories"]):
        where = f"{path}, categories[{i}]"
        category_id, name = _value(entry, "id", int, where), _value(entry, "name", str, where)
        if category_id in names:
            raise ValueError(f"{where}: id {category_id} is not unique; use another for each category")
        names[category_id] = name
        if entry.get("supercategory") != name:
            parents.add(str(entry.get("supercategory")))
    used = {
        _value(entry, "category_id", int, f"{path}, annotations[{i}]") for i, entry in enumerate(content["annotations"])
    }
    kept = {key: name for key, name in sorted(names.items()) if key in used or name not in parents}
    refuse_equal_names(list(kept.values()), f"{path}, categories")
    return kept


def _refuse_other_names(content: Mapping[str, Any], path: Path, categories: Mapping[int, str]) -> None:
    """Refuse a file that has another name for an id of train."""
    for i, entry in enumerate(content["categories"]):
        where = f"{path}, categories[{i}]"
        category_id, name = _value(entry, "id", int, where), _value(entry, "name", str, where)
        if categories.get(category_id, name) != name:
            known = categories[category_id]
            raise ValueError(f"{where}: id {category_id} is {name!r}, in train {known!r}; use the same ids")


def _read_images(
    content: Mapping[str, Any], path: Path, root: Path, split: str, strays: list[str]
) -> list[SourceImage]:
    """The images of a file, in its order; labels of others are added to `strays`."""
    names: dict[int, str] = {}
    boxes: dict[int, list[SourceBox]] = {}
    for i, entry in enumerate(content["images"]):
        where = f"{path}, images[{i}]"
        image_id = _value(entry, "id", int, where)
        if image_id in names:
            raise ValueError(f"{where}: id {image_id} is not unique; use another for each image")
        names[image_id] = _value(entry, "file_name", str, where).replace("\\", "/")
        boxes[image_id] = []
    for i, entry in enumerate(content["annotations"]):
        where = f"{path}, annotations[{i}]"
        image_id = _value(entry, "image_id", int, where)
        if image_id in boxes:
            boxes[image_id].append(_read_box(entry, where))
        else:
            strays.append(f"{where}: image_id {image_id}")
    folder = _find_folder(root, path, split, names.values())
    images = []
    for i, (entry, (image_id, name)) in enumerate(zip(content["images"], names.items(), strict=True)):
        where = f"{path}, images[{i}]"
        image_path = require_inside(root, folder / name, where)
        name, size = image_path.relative_to(root).as_posix(), (entry.get("height"), entry.get("width"))
        images.append(SourceImage(image_path, name, image_id, where, boxes[image_id], size=size))
    return images


def _find_folder(root: Path, path: Path, split: str, names: Iterable[str]) -> Path:
    """The first folder that has any image of a file, or else the root."""
    titles = [path.stem.removeprefix("instances_"), *(name for name in SPLIT_OF if SPLIT_OF[name] == split)]
    places = [path.parent, *(root / above / title for title in titles for above in ("", "images")), root / "images"]
    return next((place for place in places if any((place / name).is_file() for name in names)), root)


def _read_box(entry: Mapping[str, Any], where: str) -> SourceBox:
    category_id, numbers = _value(entry, "category_id", int, where), _value(entry, "bbox", list, where)
    if len(numbers) != 4 or not all(type(number) in (int, float) for number in numbers):
        raise ValueError(f"{where}: 'bbox' is {str(numbers)[:80]}; must be four numbers, x, y, width, height")
    try:
        x, y, width, height = map(float, numbers)
    except OverflowError:
        x = y = width = height = inf
    return SourceBox((x, y, x + width, y + height), category_id, where, crowd=entry.get("iscrowd") == 1)

"""Readers of boxes: COCO JSON, YOLO text files, Pascal VOC XML.

Every reader returns `dict[str, DetectionSamples]` with keys among train, val and test. The class map is made once, and
holds for all splits. Files are read as data only; `boxes.py` checks what they say, and counts what is wrong with it.

Shapes: H, W pixels.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from xml.etree import ElementTree

import numpy as np

from vpt.data.boxes import DataReport, DetectionSamples, Finding, Size, SourceBox, SourcePicture, Unit, make_samples
from vpt.data.classification import SPLIT_OF, SPLITS
from vpt.data.images import EXTENSIONS, find_images

LAYOUTS = {
    "coco": "annotations/instances_train*.json (also val, test), or train/_annotations.coco.json (also val/, test/)",
    "yolo": "data.yaml (or data.yml, dataset.yaml) with the keys train, val, test and names",
    "voc": "Annotations/*.xml and JPEGImages/, with or without ImageSets/Main/train.txt (also val, test, trainval)",
}
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")

Value = TypeVar("Value")


def read_detection(
    root: str | Path,
    form: str = "auto",
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    report: DataReport | None = None,
) -> dict[str, DetectionSamples]:
    """Read pictures with boxes, in the form that is there.

    A missing val is split off train, and so is test if `test_fraction` is not 0.

    Args:
        root: The folder.
        form: One of coco, yolo, voc; auto looks which of them is there.
        val_fraction: Part of the given train that becomes val if there is none.
        test_fraction: Part of the given train that becomes test if there is none.
        seed: Decides what is split off.
        strict: Refuse data in which anything is wrong; otherwise it is repaired or dropped, and counted.
        report: Is told what was found; give a new one.

    Raises:
        ValueError: None of the forms is there, or more than one; or what the reader of the form refuses.
    """
    if form != "auto" and form not in READERS:
        raise ValueError(f"dataset.form={form}; allowed: auto, {', '.join(READERS)}")
    if form == "auto":
        forms = find_forms(root)
        if len(forms) != 1:
            _refuse_forms(Path(root), forms)
        form = forms[0]
    return READERS[form](
        root, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, strict=strict, report=report
    )


def trees_root() -> Path:
    """The folder of the aerial pictures of trees that ship in the package, for `read_coco`.

    Example:
        >>> sorted(read_coco(trees_root()))
        ['test', 'train', 'val']
    """
    return Path(__file__).parent / "trees"


def find_forms(root: str | Path) -> list[str]:
    """Which of the forms coco, yolo and voc a folder seems to have, by the names of its files.

    Raises:
        ValueError: It is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"dataset.root={root} is no folder")
    found = {
        "coco": bool(_find_json(root)),
        "yolo": _find_yaml(root) is not None,
        "voc": any((root / "Annotations").glob("*.xml")),
    }
    return [form for form, is_there in found.items() if is_there]


def read_coco(
    root: str | Path,
    annotations: Mapping[str, str | Path] | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    report: DataReport | None = None,
) -> dict[str, DetectionSamples]:
    """Read COCO JSON: `LAYOUTS["coco"]`, or a file for each split.

    The classes are the categories of train by ascending id, without the one that Roboflow adds for the data set as a
    whole; another split's category is the one of the same id. `iscrowd` becomes crowd. The pictures of a split lie
    beside its file, or in a folder of the root or of images/ that is called as the file (train2017) or the split, or in
    images/ or the root itself: in the first of these that has any of them.

    Args:
        root: The folder that all pictures are in.
        annotations: The file of each split, by train, val and test; relative to the root or absolute.
        val_fraction: Part of the given train that becomes val if there is none.
        test_fraction: Part of the given train that becomes test if there is none.
        seed: Decides what is split off.
        strict: Refuse data in which anything is wrong.
        report: Is told what was found.

    Raises:
        ValueError: A file is missing or is no COCO JSON, with its name and the key; or there is nothing to train on.
    """
    root, report = Path(root), report or DataReport()
    unknown = sorted(set(annotations or ()) - set(SPLITS))
    if unknown:
        raise ValueError(f"dataset.annotations has the key {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    if annotations is None:
        files = _by_split(_find_json(root), str(root))
    else:
        files = {split: root / annotations[split] for split in SPLITS if split in annotations}
    _need_train(root, files, "coco")
    contents = {split: _load_json(path) for split, path in files.items()}
    categories = _coco_categories(contents["train"], files["train"])
    for split, content in contents.items():
        _refuse_other_names(content, files[split], categories)
    labels = {category_id: label for label, category_id in enumerate(categories)}
    pictures = {
        split: _coco_pictures(content, files[split], root, split, labels, report) for split, content in contents.items()
    }
    return make_samples(
        list(categories.values()), list(categories), pictures, val_fraction, test_fraction, seed, strict, report
    )


def read_yolo(
    root: str | Path,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    report: DataReport | None = None,
) -> dict[str, DetectionSamples]:
    """Read YOLO text files: `LAYOUTS["yolo"]`.

    An entry of data.yaml is a folder, a file that lists pictures, or a list of these. The labels of images/x.jpg are in
    labels/x.txt, or beside the picture if no folder above it is called images; a picture without such a file has no
    boxes. A line is `class cx cy w h`, or a polygon, `class x1 y1 x2 y2 ...`, which becomes its bounding box, or a pose
    (if data.yaml has `kpt_shape`), of which the box is read; all in fractions of the upright picture's sides.

    Args:
        root: The folder of data.yaml, that all pictures are in.
        val_fraction: Part of the given train that becomes val if there is none.
        test_fraction: Part of the given train that becomes test if there is none.
        seed: Decides what is split off.
        strict: Refuse data in which anything is wrong.
        report: Is told what was found.

    Raises:
        ValueError: A file or a line is wrong, with its name and number; or there is nothing to train on.
    """
    root, report = Path(root), report or DataReport()
    path = _find_yaml(root)
    if path is None:
        raise ValueError(f"{root}: nothing found; looked for {LAYOUTS['yolo']}")
    content = _load_yaml(path)
    classes = _yolo_classes(content, path)
    entries = _by_split([(key, value) for key, value in content.items() if value], str(path))
    _need_train(root, entries, "yolo")
    pictures = {}
    for split, entry in entries.items():
        paths = _yolo_paths(root, content.get("path"), entry, f"{path}, {split}")
        pictures[split] = [
            _yolo_picture(root, picture, i, len(classes), "kpt_shape" in content, f"{path}, {split}")
            for i, picture in enumerate(paths, start=1)
        ]
    _find_strays(root, [picture.path for members in pictures.values() for picture in members], report)
    return make_samples(classes, range(len(classes)), pictures, val_fraction, test_fraction, seed, strict, report)


def read_voc(
    root: str | Path,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    report: DataReport | None = None,
) -> dict[str, DetectionSamples]:
    """Read Pascal VOC XML: `LAYOUTS["voc"]`.

    Corners are numbers of pixels, counted from 1, and the last pixel belongs to the box: (1, 1, W, H) is the whole
    picture, and becomes (0, 0, W, H); boxes of a tool that counts from 0 begin a pixel early. Difficult objects become
    crowd, since the VOC evaluation neither demands nor punishes them. The classes are the names in train, sorted.
    Without a list of train, trainval is train; without any list, all XML files are. A listed picture without an XML
    file has no boxes.

    Args:
        root: The folder of Annotations/ and JPEGImages/.
        val_fraction: Part of the given train that becomes val if there is none.
        test_fraction: Part of the given train that becomes test if there is none.
        seed: Decides what is split off.
        strict: Refuse data in which anything is wrong.
        report: Is told what was found.

    Raises:
        ValueError: A file is missing or wrong, with its name; or there is nothing to train on.
    """
    root, report = Path(root), report or DataReport()
    lists = _voc_lists(root)
    _need_train(root, lists, "voc")
    files = {path.stem: path for path in find_images(root / "JPEGImages")}
    listed = {stem for rows in lists.values() for stem, _ in rows}
    for path in sorted((root / "Annotations").glob("*.xml")):
        if path.stem not in listed and path.stem not in files:
            report.add(Finding.STRAY, str(path))
    unlabelled = {
        split: [_voc_picture(root, files, stem, i, where) for i, (stem, where) in enumerate(rows, start=1)]
        for split, rows in lists.items()
    }
    classes = sorted({box.given for picture in unlabelled["train"] for box in picture.boxes})
    labels = {name: label for label, name in enumerate(classes)}
    pictures = {split: [_with_labels(picture, labels) for picture in unlabelled[split]] for split in unlabelled}
    return make_samples(
        classes, range(1, len(classes) + 1), pictures, val_fraction, test_fraction, seed, strict, report
    )


READERS: dict[str, Callable[..., dict[str, DetectionSamples]]] = {
    "coco": read_coco,
    "yolo": read_yolo,
    "voc": read_voc,
}


# What the readers share.


def _refuse_forms(root: Path, forms: Sequence[str]) -> NoReturn:
    """Say what was looked for, and where it is if it lies a folder deeper."""
    if forms:
        raise ValueError(
            f"{root} has data in the forms {' and '.join(forms)}; choose one, as in dataset.form={forms[0]}"
        )
    below = next((folder for folder in sorted(root.iterdir()) if folder.is_dir() and find_forms(folder)), None)
    hint = f"did you mean dataset.root={below}? " if below else ""
    looked = "; ".join(f"{form}: {layout}" for form, layout in LAYOUTS.items())
    raise ValueError(f"{root} has no boxes in a form that is known; {hint}looked for {looked}")


def _need_train(root: Path, splits: Mapping[str, object], form: str) -> None:
    if "train" not in splits:
        found = f"{', '.join(splits)} but no train" if splits else "nothing"
        raise ValueError(f"{root}: {found} found; looked for {LAYOUTS[form]}")


def _by_split(entries: Iterable[tuple[str, Value]], where: str) -> dict[str, Value]:
    """Values by split, of those whose name is one of a split."""
    found: dict[str, tuple[str, Value]] = {}
    for name, value in entries:
        split = SPLIT_OF.get(name.lower())
        if split in found:
            raise ValueError(f"{where} has {split} twice, {found[split][0]} and {name}; keep one of them")
        if split is not None:
            found[split] = name, value
    return {split: found[split][1] for split in SPLITS if split in found}


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _inside(root: Path, path: Path) -> Path | None:
    """The path without its dots; None if it leaves the root."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would also follow links)
    base = os.path.abspath(root)  # noqa: PTH100
    return root / absolute.relative_to(base) if absolute.is_relative_to(base) else None


def _need_inside(root: Path, path: Path, where: str) -> Path:
    inside = _inside(root, path)
    if inside is None:
        raise ValueError(f"{where}: {path} is outside of {root}; write paths that stay inside dataset.root")
    return inside


def _refuse_twins(classes: Sequence[str], where: str) -> None:
    twins = sorted({name for name in classes if classes.count(name) > 1})
    if twins:
        raise ValueError(f"{where}: two classes are called {twins[0]!r}; rename one of them")


def _declared_size(height: object, width: object) -> Size | None:
    """Height and width; None if they are missing or no size, such as the 0 that some tools write."""
    try:
        numbers = float(str(height)), float(str(width))
    except ValueError:
        return None
    return (int(numbers[0]), int(numbers[1])) if all(isfinite(number) and number >= 1 for number in numbers) else None


# COCO


def _find_json(root: Path) -> list[tuple[str, Path]]:
    """What may be the file of a split, in either layout, and the name of the split."""
    files = [(path.parent.name, path) for path in root.glob("*/_annotations.coco.json")]
    for path in root.glob("annotations/instances_*.json"):
        files += [(word, path) for word in re.findall(r"^instances_([a-zA-Z]+)", path.name)]
    return sorted((name, path) for name, path in files if name.lower() in SPLIT_OF)


def _load_json(path: Path) -> Mapping[str, Any]:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); export it anew") from error
    for key in ("images", "annotations", "categories"):
        _value(content, key, list, str(path))
    return content  # type: ignore[no-any-return]


def _value(entry: Any, key: str, kind: type, where: str) -> Any:
    """The value of a key, which must be there and of this type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is of type {type(entry).__name__}; expected an object with the key {key!r}")
    if key not in entry:
        raise ValueError(f"{where}: no key {key!r}, only {', '.join(entry) or 'an empty object'}")
    if type(entry[key]) is not kind:
        raise ValueError(f"{where}: {key!r} is of type {type(entry[key]).__name__}; expected {kind.__name__}")
    return entry[key]


def _coco_categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names by category id, ascending; without a parent of others that has no boxes, as Roboflow adds it."""
    names: dict[int, str] = {}
    parents = set()
    for i, entry in enumerate(content["categories"]):
        where = f"{path}, categories[{i}]"
        category_id, name = _value(entry, "id", int, where), _value(entry, "name", str, where)
        if category_id in names:
            raise ValueError(f"{where}: id {category_id} is there twice; give each category its own")
        names[category_id] = name
        if entry.get("supercategory") != name:
            parents.add(str(entry.get("supercategory")))
    used = {
        _value(entry, "category_id", int, f"{path}, annotations[{i}]") for i, entry in enumerate(content["annotations"])
    }
    kept = {
        category_id: names[category_id]
        for category_id in sorted(names)
        if category_id in used or names[category_id] not in parents
    }
    _refuse_twins(list(kept.values()), f"{path}, categories")
    return kept


def _refuse_other_names(content: Mapping[str, Any], path: Path, categories: Mapping[int, str]) -> None:
    """Refuse a file that gives an id of train another name."""
    for i, entry in enumerate(content["categories"]):
        where = f"{path}, categories[{i}]"
        category_id, name = _value(entry, "id", int, where), _value(entry, "name", str, where)
        if categories.get(category_id, name) != name:
            raise ValueError(
                f"{where}: id {category_id} is {name!r}, in train {categories[category_id]!r}; number all files alike"
            )


def _coco_pictures(
    content: Mapping[str, Any], path: Path, root: Path, split: str, labels: Mapping[int, int], report: DataReport
) -> Iterator[SourcePicture]:
    """The pictures of a file, in its order."""
    boxes: dict[int, list[SourceBox]] = {}
    names = []
    for i, entry in enumerate(content["images"]):
        where = f"{path}, images[{i}]"
        image_id = _value(entry, "id", int, where)
        if image_id in boxes:
            raise ValueError(f"{where}: id {image_id} is there twice; give each picture its own")
        boxes[image_id] = []
        names.append(_value(entry, "file_name", str, where).replace("\\", "/"))
    for i, entry in enumerate(content["annotations"]):
        where = f"{path}, annotations[{i}]"
        image_id = _value(entry, "image_id", int, where)
        if image_id in boxes:
            boxes[image_id].append(_coco_box(entry, labels, where))
        else:
            report.add(Finding.STRAY, f"{where}: image_id {image_id}")
    folder = _coco_folder(root, path, split, names)
    for i, (entry, name) in enumerate(zip(content["images"], names, strict=True)):
        where = f"{path}, images[{i}]"
        picture = _need_inside(root, folder / name, where)
        yield SourcePicture(
            path=picture,
            name=picture.relative_to(root).as_posix(),
            image_id=entry["id"],
            where=where,
            boxes=boxes[entry["id"]],
            size=_declared_size(entry.get("height"), entry.get("width")),
        )


def _coco_folder(root: Path, path: Path, split: str, names: Sequence[str]) -> Path:
    """Where the pictures of a file are: the first place that has any of them, or else the root."""
    titles = [path.stem.removeprefix("instances_"), *(name for name in SPLIT_OF if SPLIT_OF[name] == split)]
    places = [path.parent, *(root / above / title for title in titles for above in ("", "images")), root / "images"]
    return next((place for place in places if any((place / name).is_file() for name in names)), root)


def _coco_box(entry: Mapping[str, Any], labels: Mapping[int, int], where: str) -> SourceBox:
    category_id, numbers = _value(entry, "category_id", int, where), _value(entry, "bbox", list, where)
    if len(numbers) != 4 or not all(type(number) in (int, float) for number in numbers):
        raise ValueError(f"{where}: 'bbox' is {str(numbers)[:80]}; expected four numbers, x, y, width, height")
    x, y, width, height = (_float(number) for number in numbers)
    return SourceBox(
        corners=(x, y, x + width, y + height),
        label=labels.get(category_id),
        given=str(category_id),
        where=where,
        crowd=entry.get("iscrowd") == 1,
    )


def _float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return inf


# YOLO


def _find_yaml(root: Path) -> Path | None:
    return next((root / name for name in YAML_NAMES if (root / name).is_file()), None)


def _load_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    text = _read_text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is of type {type(content).__name__}; expected the keys train, val, test and names")
    return {key: value for key, value in content.items() if isinstance(key, str)}


def _yolo_classes(content: Mapping[str, Any], path: Path) -> list[str]:
    """The names; values of a YAML file are shown in no error, since a few bytes of it can stand for gigabytes."""
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{path}: the keys of names are not 0, 1, 2, ... without a gap; number the classes so")
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: names is no list of classes; write it as [cat, dog], or as {{0: cat, 1: dog}}")
    for label, name in enumerate(names):
        if type(name) not in (str, int, float):
            raise ValueError(f"{path}: the name of class {label} is of type {type(name).__name__}; write it in quotes")
    if content.get("nc", len(names)) != len(names):
        raise ValueError(f"{path}: nc is not {len(names)}, the number of names; correct one of them")
    classes = [str(name) for name in names]
    _refuse_twins(classes, f"{path}, names")
    return classes


def _yolo_paths(root: Path, base: object, entry: object, where: str) -> list[Path]:
    """The pictures of an entry: those in a folder, or those that a file lists."""
    bases = [root / base, root] if isinstance(base, str) else [root]
    paths: list[Path] = []
    for item in entry if isinstance(entry, list) else [entry]:
        if not isinstance(item, str):
            raise ValueError(
                f"{where} is of type {type(item).__name__}; expected a folder, or a file that lists pictures"
            )
        # Roboflow writes ../train/images for train/images, and `path` is often the folder on another machine.
        places = [place / item for place in bases] + [root / re.sub(r"^(\.\./)+", "", item)]
        place = next((place for place in (_inside(root, place) for place in places) if place and place.exists()), None)
        if place is None:
            raise ValueError(f"{where}: there is no {item!r} in {root}; correct the entry, or remove it")
        paths += find_images(place) if place.is_dir() else _listed_paths(root, place)
    return paths


def _listed_paths(root: Path, path: Path) -> Iterator[Path]:
    """The pictures that a file lists, relative to its folder or to the root."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        name = line.strip().replace("\\", "/")
        if name:
            beside = path.parent / name
            picture = next((place for place in (beside, root / name) if place.is_file()), beside)
            yield _need_inside(root, picture, f"{path}, line {number}")


def _yolo_picture(
    root: Path, path: Path, image_id: int, num_classes: int, has_keypoints: bool, where: str
) -> SourcePicture:
    labels = _label_path(root, path)
    lines = _read_text(labels).split("\n") if labels.is_file() else []
    return SourcePicture(
        path=path,
        name=path.relative_to(root).as_posix(),
        image_id=image_id,
        where=where,
        boxes=[
            _yolo_box(line, num_classes, has_keypoints, f"{labels}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ],
        unit=Unit.FRACTIONS,
    )


def _label_path(root: Path, picture: Path) -> Path:
    """The file of labels: the last folder called images becomes labels."""
    folders = picture.parent.relative_to(root).parts
    for i in reversed(range(len(folders))):
        if folders[i] == "images":
            return root.joinpath(*folders[:i], "labels", *folders[i + 1 :], f"{picture.stem}.txt")
    return picture.with_suffix(".txt")


def _yolo_box(line: str, num_classes: int, has_keypoints: bool, where: str) -> SourceBox:
    try:
        label, *numbers = map(float, line.split())
    except ValueError:
        label, numbers = inf, []
    if not label.is_integer() or len(numbers) < 4 or not (has_keypoints or len(numbers) % 2 == 0):
        raise ValueError(
            f"{where}: {line[:80]!r}; expected `class cx cy w h`, or a polygon, `class x1 y1 x2 y2 x3 y3 ...`"
        )
    if has_keypoints or len(numbers) == 4:
        x, y, width, height = numbers[:4]
        corners = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    else:
        points = np.reshape(numbers, (-1, 2))
        (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        corners = x1, y1, x2, y2
    is_known = 0 <= label < num_classes
    return SourceBox(corners, int(label) if is_known else None, given=f"{label:.0f}", where=where)


def _find_strays(root: Path, pictures: Iterable[Path], report: DataReport) -> None:
    """Report files of labels without a picture, in folders that hold nothing else."""
    folders = {_label_path(root, picture).parent: picture.parent for picture in pictures}
    for labels, images in sorted(folders.items()):
        stems = {path.stem for path in images.glob("*")}
        for path in sorted(labels.glob("*.txt")) if labels != images else []:
            if path.stem not in stems and path.name != "classes.txt":
                report.add(Finding.STRAY, str(path))


# VOC


def _voc_lists(root: Path) -> dict[str, list[tuple[str, str]]]:
    """For each split the pictures, by the name of their files without an ending, and where each is named."""
    xml = sorted((root / "Annotations").glob("*.xml"))
    if not xml or not (root / "JPEGImages").is_dir():
        return {}
    files = {path.stem: path for path in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    lists = _by_split(files.items(), str(root / "ImageSets" / "Main"))
    if "train" not in lists and "trainval" in files:
        lists = {"train": files["trainval"], **lists}
    if not lists:
        return {"train": [(path.stem, str(path)) for path in xml]}
    return {
        split: [
            (_without_ending(line.strip()), f"{path}, line {number}")
            for number, line in enumerate(_read_text(path).split("\n"), start=1)
            if line.strip()
        ]
        for split, path in lists.items()
    }


def _without_ending(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in EXTENSIONS else name


def _voc_picture(root: Path, files: Mapping[str, Path], stem: str, image_id: int, where: str) -> SourcePicture:
    """A picture whose boxes have no labels yet."""
    path = files.get(stem, root / "JPEGImages" / f"{stem}.jpg")
    xml = root / "Annotations" / f"{stem}.xml"
    content = _load_xml(xml) if xml.is_file() else ElementTree.Element("annotation")
    return SourcePicture(
        path=path,
        name=path.relative_to(root).as_posix(),
        image_id=image_id,
        where=where,
        boxes=[_voc_box(entry, f"{xml}, object {i}") for i, entry in enumerate(content.findall("object"), start=1)],
        unit=Unit.PIXEL_NUMBERS,
        size=_declared_size(content.findtext("size/height"), content.findtext("size/width")),
    )


def _load_xml(path: Path) -> ElementTree.Element:
    text = _read_text(path)
    # Only a document type can declare entities, which can expand to gigabytes or read other files.
    if "<!DOCTYPE" in text:
        raise ValueError(f"{path} has a document type, <!DOCTYPE ...>, which labels do not need; remove it")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no XML ({error}); export it anew") from error


def _voc_box(entry: ElementTree.Element, where: str) -> SourceBox:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{where} has no name; write the name of its class")
    try:
        x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise ValueError(f"{where}: bndbox is not xmin, ymin, xmax, ymax with a number in each; correct it") from error
    is_difficult = entry.findtext("difficult", "").strip() == "1"
    return SourceBox((x1, y1, x2, y2), label=None, given=name, where=where, crowd=is_difficult)


def _with_labels(picture: SourcePicture, labels: Mapping[str, int]) -> SourcePicture:
    return replace(picture, boxes=[replace(box, label=labels.get(box.given)) for box in picture.boxes])

"""Reader of boxes in Pascal VOC XML: a file for each image, and lists of the images of each split."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Unpack
from xml.etree import ElementTree

from vpt.data.image_files import find_images
from vpt.data.images import EXTENSIONS
from vpt.data.readers.annotation_files import (
    by_split,
    numbered_lines,
    read_text,
    require_inside,
    require_train,
    to_numbers,
)
from vpt.data.readers.box_checks import Finding, Problems, Reading, SourceBox, SourceImage, Unit, make_samples
from vpt.data.samples import DetectionSamples
from vpt.data.splits import SPLITS

VOC_LAYOUT = (
    "Annotations/*.xml and JPEGImages/ (or images/), with or without ImageSets/Main/train.txt (also val, test,"
    " trainval), or XML files beside the images; also in train/ (also val/, test/)"
)
ANNOTATION_FOLDERS = ("annotations", "annotation", "xmls", "xml")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")


def read_voc(root: str | Path, **reading: Unpack[Reading]) -> dict[str, DetectionSamples]:
    """Read Pascal VOC XML: `VOC_LAYOUT`.

    Corners are pixel numbers, counted from 1, and the last pixel belongs to the box: (1, 1, W, H) is the whole image,
    and becomes (0, 0, W, H); boxes of a tool that counts from 0 begin a pixel early. Difficult objects become crowd,
    since the VOC evaluation ignores them. The classes are the names in train, sorted. Without a list of train, trainval
    is train; without any list, all XML files are, or those below folders of the splits. A listed image without an XML
    file has no boxes. An XML file is for the image of its name, or else of its <filename>; of several such images its
    relative path, <filename> and <folder> choose one. `reading` is for `make_samples`.

    Raises:
        ValueError: A file is missing or wrong, with its name; or there is nothing to train on.
    """
    root = Path(root)
    problems: Problems = []
    images: dict[str, list[SourceImage]] = {}
    for split, folder in _find_places(root).items():
        place = _Place(root, folder)
        lists = {split: place.all()} if split else place.lists()
        images |= {
            name: [image for i, row in enumerate(rows, start=1) for image in place.read(*row, i, problems)]
            for name, rows in lists.items()
        }
        problems += place.strays(lists)
    names_splits = "" not in images
    images = {split or "train": images[split] for split in ("", *SPLITS) if split in images}
    require_train(root, images, VOC_LAYOUT)
    names = (box.category for image in images["train"] for box in image.boxes if box.category is not None)
    return make_samples(
        dict(enumerate(sorted(set(map(str, names))), start=1)), images, problems, names_splits=names_splits, **reading
    )


def find_xml(root: Path) -> list[Path]:
    """The annotation files, sorted."""
    return [path for folder in _find_places(root).values() for path in _xml_below(_annotation_folder(folder))]


def _find_places(root: Path) -> dict[str, Path]:
    """The folders with annotations by split: the root, for all splits under the key "", or folders of the splits."""
    if _annotation_folder(root) is not None:
        return {"": root}
    children = [child for child in sorted(root.iterdir()) if child.is_dir()]
    return by_split([(child.name, child) for child in children if _annotation_folder(child) is not None], str(root))


def _children(folder: Path, names: Sequence[str]) -> list[Path]:
    """The folders in a folder that have one of these names, in any case, in the order of the names."""
    found = [child for child in folder.iterdir() if child.is_dir() and child.name.lower() in names]
    return sorted(found, key=lambda child: (names.index(child.name.lower()), child.name))


def _annotation_folder(folder: Path) -> Path | None:
    """The folder of the XML files, which is that of the images if they are beside them."""
    if found := next((child for child in _children(folder, ANNOTATION_FOLDERS) if _xml_below(child)), None):
        return found
    places = (folder, *_children(folder, IMAGE_FOLDERS))
    return next((place for place in places if any(map(_is_voc, place.glob("*.xml")))), None)


def _is_voc(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<annotation" in file.read(1000)


def _xml_below(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(path for path in folder.rglob("*.xml") if not path.name.startswith("."))


class _Place:
    """The images and XML files of a folder, and which belong together."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.annotations = _annotation_folder(folder) or folder
        self.images = next(iter(_children(folder, IMAGE_FOLDERS)), folder)
        self.xml = _xml_below(self.annotations)
        self.images_by_name = _by_name(self.images, find_images(self.images))
        self.xml_by_name = _by_name(self.annotations, self.xml)

    def lists(self) -> dict[str, list[tuple[str, str]]]:
        """For each split the names of its images, and where each is named; all under "" where nothing names a split."""
        folder = self.folder / "ImageSets" / "Main"
        files = {path.stem: path for path in sorted(folder.glob("*.txt"))}
        lists = by_split(files.items(), str(folder))
        if "train" not in lists and "trainval" in files:
            lists = {"train": files["trainval"], **lists}
        if lists:
            return {
                split: [(_without_extension(k), where) for k, where in numbered_lines(lists[split])] for split in lists
            }
        rows = self.all()
        folders = sorted({name.partition("/")[0] for name, _ in rows if "/" in name})
        of_split = by_split(zip(folders, folders, strict=True), str(self.annotations))
        if "train" not in of_split:
            return {"": rows}
        return {split: [row for row in rows if row[0].startswith(f"{name}/")] for split, name in of_split.items()}

    def all(self) -> list[tuple[str, str]]:
        """The names of all XML files, relative to their folder, and their paths."""
        return [(_name(self.annotations, path), str(path)) for path in self.xml]

    def strays(self, lists: Mapping[str, Sequence[tuple[str, str]]]) -> Problems:
        """XML files that belong to no image and are in no list."""
        known = {PurePosixPath(name).name for rows in lists.values() for name, _ in rows}.union(self.images_by_name)
        return [(Finding.STRAY, str(path)) for path in self.xml if path.stem not in known]

    def read(self, name: str, where: str, image_id: int, problems: Problems) -> Iterator[SourceImage]:
        """The images of a name, with their boxes."""
        files = self.xml_by_name.get(name) or self.xml_by_name.get(PurePosixPath(name).name, [])
        missing = require_inside(self.root, self.images / f"{name}.jpg", where)
        for path in [] if files else self.images_by_name.get(name, [missing]):
            yield self._source(path, image_id, where, ElementTree.Element("annotation"), "")
        for xml in files:
            content = _load_xml(xml)
            found = self._find_image(xml, content, name)
            if len(found) == 1:
                yield self._source(found[0], image_id, where, content, str(xml))
            else:
                names = ", ".join(path.relative_to(self.root).as_posix() for path in found)
                problems.append((Finding.AMBIGUOUS, f"{xml}: {names}"))

    def _find_image(self, xml: Path, content: ElementTree.Element, name: str) -> list[Path]:
        """The image of an XML file that a list has under a name; several if nothing tells which."""
        named = PurePosixPath(content.findtext("filename", "").strip().replace("\\", "/"))
        folder = content.findtext("folder", "").strip().replace("\\", "/").rpartition("/")[2]
        missing = [self.images / f"{_name(self.annotations, xml)}.jpg"]
        found = self.images_by_name.get(xml.stem) or self.images_by_name.get(named.stem) or missing
        beside = xml.parent.relative_to(self.annotations)
        for is_right in (
            lambda image: image.parent.relative_to(self.images) == beside and beside.parts,
            lambda image: image.name == named.name,
            lambda image: image.parent.name == folder,
            lambda image: image in self.images_by_name.get(name, ()),
        ):
            found = [image for image in found if is_right(image)] or found
        return found

    def _source(self, path: Path, image_id: int, where: str, content: ElementTree.Element, xml: str) -> SourceImage:
        boxes = [_read_box(entry, f"{xml}, object {i}") for i, entry in enumerate(content.findall("object"), start=1)]
        size = content.findtext("size/height"), content.findtext("size/width")
        name = path.relative_to(self.root).as_posix()
        return SourceImage(path, name, image_id, where, boxes, Unit.PIXEL_NUMBERS, size)


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _by_name(folder: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by their stem, and by their path relative to the folder, without the ending."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        for name in {path.stem, _name(folder, path)}:
            found[name].append(path)
    return found


def _without_extension(name: str) -> str:
    return name.removesuffix(Path(name).suffix) if Path(name).suffix.lower() in EXTENSIONS else name


def _load_xml(path: Path) -> ElementTree.Element:
    text = read_text(path)
    # Only a document type can declare entities, which can expand to gigabytes or read other files.
    if "<!DOCTYPE" in text:
        raise ValueError(f"{path}: has a document type, <!DOCTYPE ...>, which is not allowed; remove it")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML ({error}); export it again") from error


def _read_box(entry: ElementTree.Element, where: str) -> SourceBox:
    """A box; without corners if it has neither four numbers nor a polygon."""
    name = (entry.findtext("name") or "").strip()
    is_crowd = entry.findtext("difficult", "").strip() == "1"
    corners, repair = to_numbers(entry.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")), None
    if not corners and (polygon := entry.find("polygon")) is not None:
        xs, ys = (to_numbers(point.text for point in polygon.iter() if point.tag[:1] == axis) for axis in "xy")
        corners, repair = [min(xs), min(ys), max(xs), max(ys)] if xs and ys else [], Finding.POLYGON
    if not (name and corners):
        where = f"{where}: {'no number in each of xmin, ymin, xmax, ymax' if name else 'no name'}"
    x1, y1, x2, y2 = corners or (0.0,) * 4
    return SourceBox((x1, y1, x2, y2) if corners else None, name or None, where, is_crowd, repair)

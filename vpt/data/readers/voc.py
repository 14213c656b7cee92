"""Reader of boxes in Pascal VOC XML: a file for each image, and lists of the images of each split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack
from xml.etree import ElementTree

from vpt.data.images import EXTENSIONS, find_images
from vpt.data.readers.annotation_files import by_split, numbered_lines, read_text, require_train
from vpt.data.readers.box_checks import Finding, Reading, SourceBox, SourceImage, Unit, make_samples
from vpt.data.samples import DetectionSamples

VOC_LAYOUT = "Annotations/*.xml and JPEGImages/, with or without ImageSets/Main/train.txt (also val, test, trainval)"


def read_voc(root: str | Path, **reading: Unpack[Reading]) -> dict[str, DetectionSamples]:
    """Read Pascal VOC XML: `VOC_LAYOUT`.

    Corners are pixel numbers, counted from 1, and the last pixel belongs to the box: (1, 1, W, H) is the whole image,
    and becomes (0, 0, W, H); boxes of a tool that counts from 0 begin a pixel early. Difficult objects become crowd,
    since the VOC evaluation ignores them. The classes are the names in train, sorted. Without a list of train, trainval
    is train; without any list, all XML files are. A listed image without an XML file has no boxes. `reading` is for
    `make_samples`.

    Raises:
        ValueError: A file is missing or wrong, with its name; or there is nothing to train on.
    """
    root = Path(root)
    lists = _read_lists(root)
    require_train(root, lists, VOC_LAYOUT)
    files = {path.stem: path for path in find_images(root / "JPEGImages")}
    images = {
        split: [_read_image(root, files, stem, i, where) for i, (stem, where) in enumerate(rows, start=1)]
        for split, rows in lists.items()
    }
    known = {stem for rows in lists.values() for stem, _ in rows} | set(files)
    strays = [(Finding.STRAY, str(path)) for path in find_xml(root) if path.stem not in known]
    classes = sorted({str(box.category) for image in images["train"] for box in image.boxes})
    return make_samples(dict(enumerate(classes, start=1)), images, strays, **reading)


def find_xml(root: Path) -> list[Path]:
    """The annotation files, sorted."""
    return sorted((root / "Annotations").glob("*.xml"))


def _read_lists(root: Path) -> dict[str, list[tuple[str, str]]]:
    """For each split the stems of its image files, and where each is named."""
    xml = find_xml(root)
    if not xml or not (root / "JPEGImages").is_dir():
        return {}
    files = {path.stem: path for path in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    lists = by_split(files.items(), str(root / "ImageSets" / "Main"))
    if "train" not in lists and "trainval" in files:
        lists = {"train": files["trainval"], **lists}
    if not lists:
        return {"train": [(path.stem, str(path)) for path in xml]}
    return {
        split: [(_without_extension(line), where) for line, where in numbered_lines(path)]
        for split, path in lists.items()
    }


def _without_extension(name: str) -> str:
    return Path(name).stem if Path(name).suffix.lower() in EXTENSIONS else name


def _read_image(root: Path, files: Mapping[str, Path], stem: str, image_id: int, where: str) -> SourceImage:
    path = files.get(stem, root / "JPEGImages" / f"{stem}.jpg")
    xml = root / "Annotations" / f"{stem}.xml"
    content = _load_xml(xml) if xml.is_file() else ElementTree.Element("annotation")
    boxes = [_read_box(entry, f"{xml}, object {i}") for i, entry in enumerate(content.findall("object"), start=1)]
    size = content.findtext("size/height"), content.findtext("size/width")
    return SourceImage(path, path.relative_to(root).as_posix(), image_id, where, boxes, Unit.PIXEL_NUMBERS, size)


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
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{where}: no name; write the name of its class")
    try:
        x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise ValueError(f"{where}: bndbox must have a number in each of xmin, ymin, xmax, ymax") from error
    return SourceBox((x1, y1, x2, y2), name, where, crowd=entry.findtext("difficult", "").strip() == "1")

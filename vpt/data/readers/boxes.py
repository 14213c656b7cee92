"""Reader of images with boxes, in the format that a folder has: COCO JSON, YOLO text files or Pascal VOC XML.

Every reader returns `dict[str, DetectionSamples]` with keys among train, val and test. Files are read as data only;
`box_checks.py` checks their content, and counts what is wrong with it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Unpack

from vpt.data.readers.box_checks import Reading
from vpt.data.readers.coco import COCO_LAYOUT, find_json, read_coco
from vpt.data.readers.voc import VOC_LAYOUT, find_xml, read_voc
from vpt.data.readers.yolo import YOLO_LAYOUT, find_yolo, read_yolo
from vpt.data.samples import DetectionSamples

LAYOUTS = {"coco": COCO_LAYOUT, "yolo": YOLO_LAYOUT, "voc": VOC_LAYOUT}
READERS: dict[str, Callable[..., dict[str, DetectionSamples]]] = {"coco": read_coco, "yolo": read_yolo, "voc": read_voc}


def read_detection(root: str | Path, format: str = "auto", **reading: Unpack[Reading]) -> dict[str, DetectionSamples]:
    """Read images with boxes: coco, yolo or voc; auto detects the format. `reading` is for `make_samples`.

    Raises:
        ValueError: None of the formats is found, or more than one; or what the reader of the format refuses.
    """
    if format != "auto" and format not in READERS:
        raise ValueError(f"format={format!r}: must be one of auto, {', '.join(READERS)}")
    if format == "auto":
        formats = find_formats(root)
        if len(formats) != 1:
            _refuse_formats(Path(root), formats)
        format = formats[0]
    return READERS[format](root, **reading)


def trees_root() -> Path:
    """The folder of the aerial images of trees of the package, for `read_coco`.

    Example:
        >>> sorted(read_coco(trees_root()))
        ['test', 'train', 'val']
    """
    return Path(__file__).parents[1] / "trees"


def find_formats(root: str | Path) -> list[str]:
    """The formats among coco, yolo and voc whose files a folder has; a `ValueError` if it is no folder."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root={root} is no folder")
    found = {"coco": find_json(root), "yolo": find_yolo(root), "voc": find_xml(root)}
    return [format for format, files in found.items() if files]


def _refuse_formats(root: Path, formats: Sequence[str]) -> NoReturn:
    """Raise an error that names the expected files, and a subfolder that has them."""
    if formats:
        raise ValueError(f"{root}: files of the formats {' and '.join(formats)} found; use format={formats[0]!r}")
    below = next((folder for folder in sorted(root.iterdir()) if folder.is_dir() and find_formats(folder)), None)
    hint = f"did you mean root={below}? " if below else ""
    expected = "; ".join(f"{format}: {layout}" for format, layout in LAYOUTS.items())
    raise ValueError(f"{root}: no boxes in a known format; {hint}expected {expected}")

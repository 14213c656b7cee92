"""Read pictures with boxes, in the form that is there: COCO JSON, YOLO text files or Pascal VOC XML.

Every reader returns `dict[str, DetectionSamples]` with keys among train, val and test. The class map is made once, and
holds for all splits. Files are read as data only; `boxes.py` checks what they say, and counts what is wrong with it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Unpack

from vpt.data.readers.box_checks import Reading
from vpt.data.readers.coco import COCO_LAYOUT, find_json, read_coco
from vpt.data.readers.voc import VOC_LAYOUT, find_xml, read_voc
from vpt.data.readers.yolo import YOLO_LAYOUT, find_yaml, read_yolo
from vpt.data.samples import DetectionSamples

LAYOUTS = {"coco": COCO_LAYOUT, "yolo": YOLO_LAYOUT, "voc": VOC_LAYOUT}
READERS: dict[str, Callable[..., dict[str, DetectionSamples]]] = {
    "coco": read_coco,
    "yolo": read_yolo,
    "voc": read_voc,
}


def read_detection(root: str | Path, form: str = "auto", **reading: Unpack[Reading]) -> dict[str, DetectionSamples]:
    """Read pictures with boxes, in the form that is there.

    A missing val is split off train, and so is test if `test_fraction` is not 0.

    Args:
        root: The folder.
        form: One of coco, yolo, voc; auto looks which of them is there.
        reading: val_fraction, test_fraction, seed, strict and report, see `make_samples`.

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
    return READERS[form](root, **reading)


def trees_root() -> Path:
    """The folder of the aerial pictures of trees that ship in the package, for `read_coco`.

    Example:
        >>> sorted(read_coco(trees_root()))
        ['test', 'train', 'val']
    """
    return Path(__file__).parents[1] / "trees"


def find_forms(root: str | Path) -> list[str]:
    """Which of the forms coco, yolo and voc a folder seems to have, by the names of its files.

    Raises:
        ValueError: It is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"dataset.root={root} is no folder")
    found = {"coco": find_json(root), "yolo": find_yaml(root), "voc": find_xml(root)}
    return [form for form, files in found.items() if files]


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

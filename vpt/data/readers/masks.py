"""Reader of images with masks: a mask file for each image, in the layouts that tools write.

Every mask is read once when the data are read, to count the pixels of each class and to find wrong values.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Unpack

import numpy as np

from vpt.data.image_files import find_images
from vpt.data.images import DEFAULT_DECODING, Decoding, ImageError, read_header
from vpt.data.masks import UNKNOWN, MaskReader, SegmentationSamples, fit_to_image, read_mask
from vpt.data.readers.annotation_files import by_split, divide_aloud, numbered_lines, require_train
from vpt.data.readers.box_checks import DataReport
from vpt.data.readers.mask_classes import MaskClasses, Meaning
from vpt.data.samples import FileReader, Size, format_size, refuse_unreadable
from vpt.data.splits import Division

MASKS_LAYOUT = (
    "<root>/train/images/a.jpg and <root>/train/masks/a.png (also val/, test/; or without splits; or images/train/ and "
    "masks/train/), JPEGImages/ and SegmentationClass/ of VOC, leftImg8bit/ and gtFine/ of Cityscapes, or a.jpg beside "
    "a_mask.png"
)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages", "leftImg8bit")
MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "annotations", "SegmentationClass", "gtFine", "gt", "ground_truth",
    "segmentation",
)  # fmt: skip
IMAGE_ENDING = re.compile(r"_(leftImg8bit|image|img|rgb|sat)$", re.IGNORECASE)
MASK_ENDING = re.compile(r"_(gtFine_labelIds|gtFine_labelTrainIds|masks?|labels?|gt|seg|segmentation)$", re.IGNORECASE)
OTHER_MASK = re.compile(r"_gtFine_(color|instanceIds|polygons)$")  # further files of Cityscapes


class MaskFinding(Enum):
    """A type of problem, and what is done about it."""

    MISSING = "images without a mask", "left out"
    UNREADABLE = "images or masks that cannot be read", "left out"
    STRAY = "masks without an image", "left out"
    SIZE = "masks of another size than their image", "resized to the nearest value"
    SHAPE = "masks of another shape than their image", "left out"
    TURNED = "masks stored on their side, as their images", "turned upright"
    UNKNOWN = "masks with values of no class", "these pixels are ignored"
    EMPTY = "masks without a pixel of any class", "used, and nothing is learned from them"

    @property
    def is_error(self) -> bool:
        """Whether something is wrong; other findings are information."""
        return self not in (MaskFinding.TURNED, MaskFinding.EMPTY)


@dataclass(frozen=True)
class Pair:
    """An image file, its mask file, and the name of the image: its path below the root."""

    image: Path
    mask: Path
    name: str


@dataclass(frozen=True)
class Scanned:
    """Sizes and turn of an image, the number of pixels of each value in its mask, and a digest of the mask."""

    pair: Pair
    size: Size
    stored: Size
    turn: int
    values: Mapping[int, int]
    digest: str


def pebbles_root() -> Path:
    """The folder of the pebbles data set of the package: two classes, for `read_masks`.

    Example:
        >>> {split: len(samples) for split, samples in read_masks(pebbles_root()).items()}
        {'train': 64, 'val': 16, 'test': 32}
    """
    return Path(__file__).parents[1] / "pebbles"


def read_masks(
    root: str | Path,
    meaning: Meaning | None = None,
    strict: bool = False,
    report: DataReport | None = None,
    decoding: Decoding = DEFAULT_DECODING,
    **division: Unpack[Division],
) -> dict[str, SegmentationSamples]:
    """Read images and masks in one of the layouts `MASKS_LAYOUT`.

    Classes are those that `meaning` names, or a file in the root, see `classes_of_folder`; or else the values in the
    masks of train. `strict` refuses data in which anything is wrong; otherwise it is repaired, left out or ignored, and
    counted in `report`. `division` says how val and test are split off train where there is none.

    Raises:
        ImageError: An image or mask of a given val or test cannot be read; those of train are left out.
        ValueError: No known layout, two images with one mask, one class only, or anything wrong if `strict`.
    """
    root, report, meaning = Path(root), report or DataReport(kinds=MaskFinding), meaning or Meaning()
    if not root.is_dir():
        raise ValueError(f"root={root} is no folder; expected {MASKS_LAYOUT}")
    folders = _find_folders(root)
    pairs = {split: list(_pairs(root, *both, report)) for split, both in folders.items()}
    pairs = pairs or _by_lists(root, list(_pairs(root, *(_image_and_mask(root) or (root, root)), report)))
    pairs = {split: members for split, members in pairs.items() if members}
    require_train(root, pairs, MASKS_LAYOUT)
    classes = meaning.named(root, pairs["train"][0].mask)
    has_colours = classes is not None and classes.has_colours
    scanned = {split: _scan(split, members, has_colours, report, decoding) for split, members in pairs.items()}
    if classes is None:
        values = Counter[int]()
        for of_image in scanned["train"]:
            values.update(of_image.values)
        classes = meaning.found(values, str(root))
    splits = {split: _samples(members, classes, report, decoding) for split, members in scanned.items()}
    if strict:
        report.refuse_errors()
    splits = divide_aloud(splits, report.notes, names_splits=set(pairs) != {"train"} or bool(folders), **division)
    for split, samples in splits.items():
        report.splits[split] = f"{len(samples):,} images, {len(classes.names)} classes"
    return splits


def _find_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks of each split; empty where no folder is named as a split."""
    of_splits = by_split([(folder.name, folder) for folder in _folders(root)], str(root))
    if of_splits:
        return {split: _image_and_mask(folder) or (folder, folder) for split, folder in of_splits.items()}
    if (both := _image_and_mask(root)) is None:
        return {}
    images, masks = (by_split([(folder.name, folder) for folder in _folders(one)], str(one)) for one in both)
    return {split: (images[split], masks[split]) for split in images if split in masks}


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_and_mask(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and of masks inside a folder, if both are there."""
    by_name = {entry.name.lower(): entry for entry in _folders(folder)}
    images = [by_name[name.lower()] for name in IMAGE_FOLDERS if name.lower() in by_name]
    masks = [by_name[name.lower()] for name in MASK_FOLDERS if name.lower() in by_name]
    return (images[0], masks[0]) if images and masks else None


def _pairs(root: Path, images: Path, masks: Path, report: DataReport) -> Iterator[Pair]:
    """Images and masks of the same path below their folder, without their usual endings."""
    are_mixed = images == masks
    files = [path for path in find_images(images) if not (are_mixed and MASK_ENDING.search(path.stem))]
    of_masks = [
        path
        for path in find_images(masks)
        if not OTHER_MASK.search(path.stem) and not (are_mixed and not MASK_ENDING.search(path.stem))
    ]
    by_key = _by_key(masks, of_masks, MASK_ENDING)
    keys = _by_key(images, files, IMAGE_ENDING)
    for key, path in keys.items():
        if key in by_key:
            yield Pair(path, by_key[key], path.relative_to(root).as_posix())
        else:
            report.add(MaskFinding.MISSING, str(path))
    for key in by_key.keys() - keys.keys():
        report.add(MaskFinding.STRAY, str(by_key[key]))


def _by_key(folder: Path, paths: Iterable[Path], ending: "re.Pattern[str]") -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        key = ending.sub("", path.relative_to(folder).with_suffix("").as_posix())
        if (other := found.setdefault(key, path)) is not path:
            raise ValueError(f"{path}: {other.name} in its folder has the same name but for the ending; rename one")
    return found


def _by_lists(root: Path, pairs: list[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each split that the lists of VOC, ImageSets/Segmentation/*.txt, name; train without lists."""
    files = sorted((root / "ImageSets" / "Segmentation").glob("*.txt"))
    by_stem, found = {pair.image.stem: pair for pair in pairs}, {}
    for split, path in by_split([(path.stem, path) for path in files], str(root)).items():
        lines = numbered_lines(path)
        if unknown := [where for stem, where in lines if stem not in by_stem]:
            raise ValueError(f"{unknown[0]}: no image and mask of this name; correct the list")
        found[split] = [by_stem[stem] for stem, _ in lines]
    return found or {"train": pairs}


def _scan(
    split: str, pairs: Sequence[Pair], has_colours: bool, report: DataReport, decoding: Decoding
) -> list[Scanned]:
    """Size of each image and the values of its mask; images of train that cannot be read are left out."""
    found, num_left_out = [], len(report.left_out)
    for pair in pairs:
        try:
            size, stored, turn = read_header(pair.image, decoding)
            values, orientation = read_mask(pair.mask, has_colours, decoding)
        except ImageError as error:
            report.add(MaskFinding.UNREADABLE, str(error))
            report.left_out.append((pair.name, str(error)))
            continue
        if values.shape == stored != size and orientation == 1:
            report.add(MaskFinding.TURNED, str(pair.mask))
        elif values.shape not in (size, stored):
            where = f"{pair.mask}: {format_size(values.shape)} for {format_size(size)}"
            try:
                values = fit_to_image(values, orientation, size, stored, turn)
                report.add(MaskFinding.SIZE, where)
            except ValueError:
                report.add(MaskFinding.SHAPE, where)
                report.left_out.append((pair.name, where))
                continue
        numbers, counts = np.unique(values, return_counts=True)
        counted = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        digest = hashlib.sha256(values.tobytes()).hexdigest()[:8]
        found.append(Scanned(pair, size, stored, turn, counted, digest))
    if split != "train":
        refuse_unreadable([reason for _, reason in report.left_out[num_left_out:]])
    if pairs and not found:
        raise ValueError(f"{split} has no usable image; {'; '.join(report.lines())}")
    return found


def _samples(
    scanned: Sequence[Scanned], classes: MaskClasses, report: DataReport, decoding: Decoding
) -> SegmentationSamples:
    """Samples, with the number of pixels of each class in each image."""
    pixels, values = [], classes.mapping
    for of_image in scanned:
        numbers = np.array(list(of_image.values), np.int32)
        labels, counts = values.to_labels(numbers), np.array(list(of_image.values.values()))
        if (labels == UNKNOWN).any():
            unknown = {
                int(value): int(num) for value, num in zip(numbers, counts * (labels == UNKNOWN), strict=True) if num
            }
            report.add(MaskFinding.UNKNOWN, f"{of_image.pair.mask}: {_shown(unknown, values.has_colours)}")
        num = len(classes.names)
        of_class = np.bincount(np.where(labels < 0, num, labels), weights=counts, minlength=num + 1).astype(int)
        if not of_class[:-1].any():
            report.add(MaskFinding.EMPTY, str(of_image.pair.mask))
        pixels.append(tuple(of_class.tolist()))
    paths, sizes = tuple(one.pair.image for one in scanned), tuple(one.size for one in scanned)
    return SegmentationSamples(
        classes=classes.names,
        category_ids=tuple(of_class[0] for of_class in classes.values),
        names=tuple(one.pair.name for one in scanned),
        reader=FileReader(paths, decoding, sizes),
        paths=paths,
        sizes=sizes,
        masks=MaskReader(
            tuple(one.pair.mask for one in scanned),
            values,
            sizes,
            tuple(one.stored for one in scanned),
            tuple(one.turn for one in scanned),
            decoding,
        ),
        pixels=tuple(pixels),
        digests=tuple(one.digest for one in scanned),
    )


def _shown(values: Mapping[int, int], has_colours: bool, most: int = 3) -> str:
    names = [f"#{value:06X}" if has_colours else str(value) for value in values]
    return f"{', '.join(names[:most])}{' and more' if len(names) > most else ''} ({sum(values.values()):,} pixels)"

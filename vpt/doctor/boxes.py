"""Boxes: what the reader found, and which are too small to be found at the size of the input."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.readers import box_checks as sources
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.doctor.findings import File, Finding, Level, share
from vpt.doctor.reading import FullReport

MUCH = 0.05  # of all boxes
TOO_FAR = 4  # times the input, beyond which pictures had better be cut into tiles


def find_box_problems(splits: Mapping[str, Any], report: FullReport, is_strict: bool) -> Iterator[Finding]:
    """What the reader counted, each with all places; errors if the reader is told to refuse them."""
    pictures: dict[str, File] = {}
    if report.places:
        for split, samples in splits.items():
            pictures |= {str(path): File(name, split) for path, name in zip(samples.paths, samples.names, strict=True)}
    for finding in sources.Finding:
        places = report.places.get(finding)
        if places and finding not in (sources.Finding.MISSING, sources.Finding.UNREADABLE):  # told as pictures
            what, fate = finding.value
            bad = Level.error if is_strict else Level.warning
            level = bad if finding.is_error else Level.note
            message = f"{what}: {len(places):,}, " + (
                "refused by dataset.strict=true" if level is Level.error else fate
            )
            files = tuple(pictures.get(at) or File(None, detail=at) for at in places)
            yield Finding(level, _code(finding), message, None, files)


def _code(finding: sources.Finding) -> str:
    """boxes_small for SMALL, and so on; missing, unreadable and the others that are about pictures keep their names."""
    prefix = "boxes_" if finding.value[0].startswith("boxes") else ""
    return prefix + finding.name.lower()


def find_small_boxes(
    splits: Mapping[str, Any], preprocessing: Preprocessing, strides: tuple[int, ...]
) -> list[Finding]:
    """Boxes whose shorter side is less than the finest stride of the head when their picture fills the input."""
    findings = []
    for split, samples in splits.items():
        sides = short_sides(samples, preprocessing)
        small = int((sides < min(strides)).sum())
        if small:
            height, width = preprocessing.size
            is_much = small > MUCH * len(sides)
            message = f"{share(small, len(sides))} boxes are narrower than {min(strides)} px, the finest stride of the "
            message += f"head, at the input of {width} x {height} px, and are hardly found"
            if is_much and split == "train":
                message += f"; {_advise(sides, preprocessing, strides)}"
            level = Level.warning if is_much else Level.note
            findings.append(Finding(level, "small_boxes", message, split, count=small))
    return findings


def short_sides(samples: Any, preprocessing: Preprocessing) -> NDArray[np.float64]:
    """The shorter side of each box that is no crowd, in pixels of the input, (num boxes,)."""
    sides = []
    for size, boxes, crowd in zip(samples.sizes, samples.boxes, samples.crowd, strict=True):
        fitted = letterboxed_size(size, preprocessing)
        kept = boxes[~crowd].astype(float)
        wide, high = (kept[:, 2] - kept[:, 0]) * fitted[1] / size[1], (kept[:, 3] - kept[:, 1]) * fitted[0] / size[0]
        sides.append(np.minimum(wide, high))
    return np.concatenate(sides) if sides else np.zeros(0)


def _advise(sides: NDArray[np.float64], preprocessing: Preprocessing, strides: tuple[int, ...]) -> str:
    """The size of input at which all but a few boxes are large enough."""
    factor = min(strides) / np.quantile(sides, MUCH)
    side = math.ceil(max(preprocessing.size) * factor / max(strides)) * max(strides)
    if factor > TOO_FAR:
        return f"it would take an input of {side} px, so cut the pictures into tiles"
    return f"backbone.img_size={side} would leave {100 * MUCH:.0f} %"

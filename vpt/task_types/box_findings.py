"""Problems with boxes: what the reader repaired or dropped, and boxes too small for the input size."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.readers import box_checks as sources
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.task_types.findings import File, Finding, Level, share

MUCH = 0.05  # of all boxes
TOO_FAR = 4  # times the input size, beyond which tiles are better than a larger input
ABOUT_IMAGES = ("MISSING", "UNREADABLE")  # the doctor reports those with all other images


@dataclass
class FullReport(sources.DataReport):
    """A report that stores every place of a problem, not only the first."""

    places: dict[Any, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, finding: Any, where: str) -> None:
        """Count a problem and store its place."""
        super().add(finding, where)
        self.places[finding].append(where)


def find_box_problems(
    splits: Mapping[str, Any], places: Mapping[Any, list[str]], is_strict: bool, kinds: Any = sources.Finding
) -> Iterator[Finding]:
    """The reader's findings with all their places; errors if the reader is strict, and would refuse them."""
    images: dict[str, File] = {}
    if places:
        for split, samples in splits.items():
            images |= {str(path): File(name, split) for path, name in zip(samples.paths, samples.names, strict=True)}
    for finding in kinds:
        if places.get(finding) and finding.name not in ABOUT_IMAGES:
            what, fate = finding.value
            level = (Level.error if is_strict else Level.warning) if finding.is_error else Level.note
            fate = "refused by dataset.strict=true" if level is Level.error else fate
            files = tuple(images.get(place) or File(None, detail=place) for place in places[finding])
            yield Finding(level, code_of(finding), f"{what}: {len(files):,}, {fate}", None, files)


def code_of(finding: Any) -> str:
    """`boxes_small` for SMALL, and so on; findings about images have no prefix."""
    return f"{'boxes_' if finding.value[0].startswith('boxes') else ''}{finding.name.lower()}"


def find_small_boxes(
    splits: Mapping[str, Any], preprocessing: Preprocessing, strides: tuple[int, ...]
) -> Iterator[Finding]:
    """Boxes whose shorter side at the input size is less than the finest stride of the head."""
    for split, samples in splits.items():
        sides = short_sides(samples, preprocessing)
        if small := int((sides < min(strides)).sum()):
            height, width = preprocessing.size
            is_much = small > MUCH * len(sides)
            message = (
                f"{share(small, len(sides))} boxes are narrower than {min(strides)} px, the finest stride of the head, "
                f"at an input of {width} x {height} px, and are unlikely to be detected"
            )
            if is_much and split == "train":
                message += f"; {_advise(sides, preprocessing, strides)}"
            yield Finding(Level.warning if is_much else Level.note, "small_boxes", message, split, count=small)


def short_sides(samples: Any, preprocessing: Preprocessing) -> NDArray[np.float64]:
    """The shorter side of each box that is not a crowd, in pixels of the input, (num boxes,)."""
    sides = [np.zeros(0)]
    for size, boxes, crowd in zip(samples.sizes, samples.boxes, samples.crowd, strict=True):
        fitted = letterboxed_size(size, preprocessing)
        kept = boxes[~crowd].astype(float)
        wide, high = (kept[:, 2] - kept[:, 0]) * fitted[1] / size[1], (kept[:, 3] - kept[:, 1]) * fitted[0] / size[0]
        sides.append(np.minimum(wide, high))
    return np.concatenate(sides)


def _advise(sides: NDArray[np.float64], preprocessing: Preprocessing, strides: tuple[int, ...]) -> str:
    """The input size at which all but a few boxes are large enough."""
    factor = min(strides) / np.quantile(sides, MUCH)
    side = math.ceil(max(preprocessing.size) * factor / max(strides)) * max(strides)
    if factor > TOO_FAR:
        return f"an input of {side} px would be needed; cut the images into tiles instead"
    return f"backbone.img_size={side} would leave {100 * MUCH:.0f} %"

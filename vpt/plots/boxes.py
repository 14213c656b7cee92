"""Boxes drawn on images.

Shapes: `H, W` pixels, `n` boxes of an image, `G` true boxes of it, `K` classes. Boxes are (x1, y1, x2, y2) in pixels.
"""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vpt.engine.metrics.detection import MIN_SCORE
from vpt.plots.figure import INK, Pixels, check_image, one_line, pixel_axes, place, render

MAX_IMAGES = 8

_SAFE = ("#1845fb", "#ff5e02", "#c91f16", "#c849a9", "#adad7d", "#86c8dd", "#578dff", "#656364")
_TURN = 0.5698403  # of the circle of hues; the colours of 80 classes stay distinct (9.4 in CIELAB)
_GAP = 8
_TILE = 480  # pixels of the longer side of an image on a page
_HEADING = 20

Labels = Sequence[int] | NDArray[np.int64] | Tensor


def class_colour(label: int) -> str:
    """The colour of a class, which depends on its number only; no two of the first 500 are equal.

    References:
        Accessible Color Sequences for Data Visualization (Petroff, 2021), https://arxiv.org/abs/2107.02270: the first
        8, which are distinct with any of the common colour vision deficiencies.

    Example:
        >>> class_colour(0), class_colour(1)
        ('#1845fb', '#ff5e02')
    """
    if label < len(_SAFE):
        return _SAFE[label]
    step = label - len(_SAFE)
    lightness, saturation = (0.5, 0.3, 0.7)[step % 3], (1.0, 0.5, 0.75)[step // 3 % 3]
    return to_hex(colorsys.hls_to_rgb(step * _TURN % 1, lightness, saturation))


def draw_boxes(
    image: Pixels,
    boxes: ArrayLike | Tensor,
    labels: Labels,
    classes: Sequence[str],
    scores: ArrayLike | Tensor | None = None,
    crowd: Sequence[bool] | NDArray[np.bool_] | Tensor | None = None,
) -> Pixels:
    """Draw boxes on a copy of an image, each with the name of its class and its score.

    Lines and letters grow with the image. A name is above its box, or inside where there is no room; names of better
    boxes are on top. Crowds are dashed. Boxes are clipped to the image; one that is nan or infinite is left out.

    Args:
        image: (H, W, 3) uint8.
        boxes: (n, 4), the best first.
        labels: (n,) numbers of classes.
        classes: K names.
        scores: (n,) in [0, 1], or None for true boxes.
        crowd: (n,) whether a box is a crowd, or None if none is.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: If the image is not of this shape or type, or the lengths differ.

    Example:
        >>> drawn = draw_boxes(np.zeros((64, 96, 3), np.uint8), [[10, 20, 50, 60]], [0], ["pear"], [0.9])
        >>> drawn.shape, drawn[40, 10].tolist()
        ((64, 96, 3), [24, 69, 251])
    """
    check_image(image)
    H, W, _ = image.shape
    axes = pixel_axes(W, H)
    place(axes, image, 0, 0, W, H)
    _add_boxes(axes, (0, 0, W, H), 1, boxes, labels, classes, scores, crowd)
    return render(axes)


def boxes_page(
    images: Sequence[Pixels],
    targets: Sequence[Mapping[str, Tensor]],
    detections: Sequence[Mapping[str, Tensor]],
    classes: Sequence[str],
    captions: Sequence[str] | None = None,
    min_score: float = MIN_SCORE,
) -> Pixels:
    """Draw a row for each of the first 8 images: true boxes on the left, detected ones on the right.

    Args:
        images: Each (H, W, 3) uint8, of any sizes; they are resized to one length of the longer side.
        targets: For each image "boxes" (G, 4) in pixels, "labels" (G,) and optionally "crowd" (G,).
        detections: For each image "boxes" (n, 4) in pixels, "scores" (n,) and "labels" (n,).
        classes: K names.
        captions: A heading for each row, such as the name of the file, or None.
        min_score: Lowest score of a detection that is drawn.

    Returns:
        (H', W', 3) uint8.

    Raises:
        ValueError: If there is no image, or the lengths differ.
    """
    names = [""] * len(images) if captions is None else captions
    if not images or not len(images) == len(targets) == len(detections) == len(names):
        raise ValueError(
            f"{len(images)} images came with {len(targets)} targets, {len(detections)} detections and {len(names)} "
            "captions; pass as many of each, and at least one"
        )
    scales = [_TILE / max(image.shape) for image in images[:MAX_IMAGES]]
    steps = [round(image.shape[0] * scale) + _HEADING + _GAP for image, scale in zip(images, scales, strict=False)]
    axes = pixel_axes(2 * _TILE + 3 * _GAP, sum(steps) + _GAP)
    for i, scale in enumerate(scales):
        found, target, top = detections[i], targets[i], _GAP + sum(steps[:i])
        height, width = (round(side * scale) for side in images[i].shape[:2])
        good = found["scores"] >= min_score
        parts = (
            ("true", target["boxes"], target["labels"], None, target.get("crowd")),
            ("detected", found["boxes"][good], found["labels"][good], found["scores"][good], None),
        )
        for column, (title, *values) in enumerate(parts):
            left, (boxes, labels, scores, crowd) = _GAP + column * (_TILE + _GAP), values
            heading = one_line(f"{names[i]}: {title}" if names[i] else title, 64)
            axes.text(left, top, heading, color=INK, fontsize=13, va="top")
            area = (left, top + _HEADING, width, height)
            place(axes, images[i], *area)
            _add_boxes(axes, area, scale, boxes, labels, classes, scores, crowd)
    return render(axes)


def _add_boxes(
    axes: Axes,
    area: tuple[float, float, float, float],
    scale: float,
    boxes: ArrayLike | Tensor,
    labels: Labels,
    classes: Sequence[str],
    scores: ArrayLike | Tensor | None,
    crowd: Sequence[bool] | NDArray[np.bool_] | Tensor | None,
) -> None:
    """Draw boxes, scaled, in an area (left, top, width, height) of pixel axes."""
    left, top, W, H = area
    corners, n = _array(boxes).reshape(-1, 4), len(labels)
    values = [None] * n if scores is None else _array(scores).tolist()
    dashed = [False] * n if crowd is None else [bool(value) for value in crowd]
    if not len(corners) == len(values) == len(dashed) == n:
        raise ValueError(f"{len(corners)} boxes came with {n} labels, {len(values)} scores, {len(dashed)} crowds")
    line, font = max(1, round((H + W) * 0.002)), max(9, round((H + W) * 0.01))
    for box, label, score, is_crowd in reversed(list(zip(corners, labels, values, dashed, strict=True))):
        if not np.isfinite(box).all():
            continue
        (x1, x2), (y1, y2) = (
            np.sort(np.clip((box[axis::2] * scale).round(), 0, side)) for axis, side in enumerate((W, H))
        )
        colour = class_colour(int(label))
        frame = Rectangle(
            (left + x1 + line / 2, top + y1 + line / 2), max(0, x2 - x1 - line), max(0, y2 - y1 - line), fill=False
        )
        frame.set(edgecolor=colour, linewidth=line, linestyle=(0, (4, 3)) if is_crowd else "solid")
        axes.add_patch(frame)
        mark = ("" if score is None else f" {score:.2f}") + (", crowd" if is_crowd else "")
        name = one_line(classes[int(label)], max(6, W / 2 / (0.6 * font) - len(mark))) + mark
        red, green, blue = to_rgb(colour)
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        side, x = ("left", x1 + line) if x1 <= W / 2 else ("right", x2 - line)
        room = y1 >= 1.6 * font
        y = y1 - 2 * line if room else min(y1 + 2 * line, H - 1.6 * font)
        if not name:
            continue
        axes.text(left + x, top + y, name, color=ink, fontsize=font, ha=side, va="bottom" if room else "top").set_bbox(
            {"facecolor": colour, "edgecolor": "none", "boxstyle": "square", "pad": line / font}
        )


def _array(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)

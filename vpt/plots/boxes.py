"""Boxes drawn on images.

Shapes: `H, W` pixels, `n` boxes of an image, `G` true boxes of it, `K` classes. Boxes are (x1, y1, x2, y2) in pixels.
"""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from vpt.engine.metrics.detection import MIN_SCORE
from vpt.plots.figure import Pixels, fit, legible_name, pixel_axes, render, show, text_width
from vpt.plots.grid import tile_grid

MAX_IMAGES = 8

# Distinct with the common colour vision deficiencies: Accessible Color Sequences (Petroff, 2021), arXiv:2107.02270.
_SAFE = ("#1845fb", "#ff5e02", "#c91f16", "#c849a9", "#adad7d", "#86c8dd", "#578dff", "#656364")
_TURN = 0.5698403  # of the circle of hues; the colours of 80 classes stay distinct (9.4 in CIELAB)
_TILE = 480  # pixels of the longer side of an image on a page


def class_colour(label: int) -> str:
    """The colour of a class, which depends on its number only; no two of the first 500 are equal.

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
    labels: Sequence[int] | NDArray[np.int64] | Tensor,
    classes: Sequence[str],
    scores: Sequence[float] | NDArray[np.float32] | Tensor | None = None,
    crowd: Sequence[bool] | NDArray[np.bool_] | Tensor | None = None,
) -> Pixels:
    """Draw boxes on a copy of an image, each with the name of its class and its score.

    Lines and letters grow with the image. A name is above its box, or inside where there is no room; names of better
    boxes are on top. A name in letters that the font lacks becomes the number of its class. Crowds are dashed. Boxes
    are clipped to the image; one that is nan or infinite is left out.

    Args:
        image: (H, W, 3) uint8.
        boxes: (n, 4), the best first.
        labels: (n,) numbers of classes.
        classes: K names.
        scores: (n,) in [0, 1], or None for true boxes.
        crowd: (n,) whether a box is a crowd, or None if none is.

    Raises:
        ValueError: The image is not of this shape or type, or the lengths differ.

    Example:
        >>> drawn = draw_boxes(np.zeros((64, 96, 3), np.uint8), [[10, 20, 50, 60]], [0], ["pear"], [0.9])
        >>> drawn.shape, drawn[40, 10].tolist()
        ((64, 96, 3), [24, 69, 251])
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")
    H, W, _ = image.shape
    corners, n = torch.as_tensor(boxes).detach().cpu().double().reshape(-1, 4).numpy(), len(labels)
    values = [None] * n if scores is None else [float(score) for score in scores]
    dashed = [False] * n if crowd is None else [bool(value) for value in crowd]
    if not len(corners) == len(values) == len(dashed) == n:
        raise ValueError(f"{len(corners)} boxes came with {n} labels, {len(values)} scores, {len(dashed)} crowds")
    line, font = max(1, round((H + W) * 0.002)), max(9, round((H + W) * 0.01))
    axes = pixel_axes(W, H)
    show(axes, image, 0, 0, W, H)
    for box, label, score, is_crowd in reversed(list(zip(corners, labels, values, dashed, strict=True))):
        if not np.isfinite(box).all():
            continue
        (x1, x2), (y1, y2) = (np.sort(box[axis::2].round().clip(0, side)) for axis, side in enumerate((W, H)))
        colour, sides = class_colour(int(label)), (max(0, x2 - x1 - line), max(0, y2 - y1 - line))
        frame = Rectangle((x1 + line / 2, y1 + line / 2), *sides, fill=False, edgecolor=colour, linewidth=line)
        # The edges are on whole pixels already; snapping would shift odd lines by one, antialiasing blur corners.
        frame.set(snap=False, antialiased=False, linestyle=(0, (4, 3)) if is_crowd else "solid")
        axes.add_patch(frame)
        mark = ("" if score is None else f" {score:.2f}") + (", crowd" if is_crowd else "")
        name = fit(legible_name(classes[int(label)], int(label)), W - 4 * line - text_width(mark, font), font) + mark
        if name:
            is_above = y1 >= 1.6 * font
            y = y1 - 2 * line if is_above else min(y1 + 2 * line, H - 1.6 * font)
            x = max(line, min(x1 + line, W - 2 * line - text_width(name, font)))
            text = axes.text(x, y, name, fontsize=font, va="bottom" if is_above else "top")
            text.set_color("black" if np.dot(to_rgb(colour), (0.3, 0.59, 0.11)) > 0.5 else "white")
            text.set_bbox({"facecolor": colour, "edgecolor": "none", "boxstyle": "square", "pad": line / font})
    return render(axes.figure)


def boxes_page(
    images: Sequence[Pixels],
    targets: Sequence[Mapping[str, Tensor]],
    detections: Sequence[Mapping[str, Tensor]],
    classes: Sequence[str],
    captions: Sequence[str] | None = None,
    min_score: float = MIN_SCORE,
) -> Pixels:
    """Draw a row for each of the first 8 images: true boxes on the left, detected ones on the right.

    Images (H, W, 3) uint8 of any sizes are resized to one length of the longer side. Targets have "boxes" (G, 4) in
    pixels, "labels" (G,) and optionally "crowd" (G,), detections "boxes" (n, 4), "scores" (n,) and "labels" (n,); those
    below `min_score` are not drawn. `captions` has a heading for each row. No image, or lengths that differ, raise a
    ValueError.
    """
    names = [""] * len(images) if captions is None else captions
    if not images or not len(images) == len(targets) == len(detections) == len(names):
        counts = f"{len(targets)} targets, {len(detections)} detections and {len(names)} captions"
        raise ValueError(f"{len(images)} images came with {counts}; pass as many of each, and at least one")
    tiles, headings = [], []
    for image, target, found, name in list(zip(images, targets, detections, names, strict=True))[:MAX_IMAGES]:
        scale, good = _TILE / max(image.shape), found["scores"] >= min_score
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS  # small images stay sharp
        tile = np.asarray(Image.fromarray(image).resize((width, height), method))
        true = draw_boxes(tile, target["boxes"] * scale, target["labels"], classes, crowd=target.get("crowd"))
        boxes, labels, scores = (found[key][good] for key in ("boxes", "labels", "scores"))
        tiles += [true, draw_boxes(tile, boxes * scale, labels, classes, scores)]
        headings += [f"{name}: true" if name else "true", "detected"]
    return tile_grid(tiles, headings, columns=2)

"""Pictures of boxes, drawn with Pillow: boxes in a picture, truth beside what was found, precision over recall.

Not with `torchvision.utils.draw_bounding_boxes`: without a font file, which no package brings, it writes 10 pixels high
in a picture of any size, and what leaves the picture at its right is lost. Pillow's own font has every size.

Shapes: `H, W` pixels, `n` boxes of a picture, `G` true boxes of it, `K` classes, `R` points of recall. Boxes are
(x1, y1, x2, y2) in pixels. Every picture that goes in or out is uint8 RGB.
"""

import colorsys
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vpt.engine.metrics.detection import MIN_SCORE
from vpt.plots.grid import INK, PAPER, Colour, draw_upright, shortened, without_accents

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom

MAX_PICTURES = 8
_SAFE = ("1845fb", "ff5e02", "c91f16", "c849a9", "adad7d", "86c8dd", "578dff", "656364")
_TURN = 0.5698403  # of the circle of hues; it comes back to none, and 80 classes keep apart (9.4 in CIELAB)
_GRID: Colour = (228, 230, 233)
_FRAME: Colour = (160, 164, 168)
_REST: Colour = (205, 208, 212)
_GAP = 8
_TILE = 480  # pixels of a picture's longer side on a page
_PLOT = 480
_MAX_NAME = 180
_FINE = 3  # curves are drawn this many times larger, then averaged
_MAX_CURVES = 10


def class_colour(label: int) -> Colour:
    """The colour of a class: always the same for its number; no two of the first 500 are equal.

    References:
        Accessible Color Sequences for Data Visualization (Petroff, 2021), https://arxiv.org/abs/2107.02270: the first
        8, which people with any of the common colour vision deficiencies can tell apart.

    Example:
        >>> class_colour(0), class_colour(1)
        ((24, 69, 251), (255, 94, 2))
    """
    if label < len(_SAFE):
        red, green, blue = bytes.fromhex(_SAFE[label])
        return red, green, blue
    step = label - len(_SAFE)
    hue, lightness, saturation = step * _TURN % 1, (0.5, 0.3, 0.7)[step % 3], (1.0, 0.5, 0.75)[step // 3 % 3]
    red, green, blue = (round(255 * value) for value in colorsys.hls_to_rgb(hue, lightness, saturation))
    return red, green, blue


def draw_boxes(
    picture: NDArray[np.uint8],
    boxes: ArrayLike | Tensor,
    labels: Sequence[int] | NDArray[np.int64] | Tensor,
    classes: Sequence[str],
    scores: Sequence[float] | NDArray[np.float32] | Tensor | None = None,
    crowd: Sequence[bool] | NDArray[np.bool_] | Tensor | None = None,
) -> NDArray[np.uint8]:
    """Draw boxes into a copy of a picture, each with the name of its class and its score.

    Lines and letters grow with the picture. A name stands above its box, or inside or below it where there is no room,
    never outside of the picture, nor over the name of a better box: where there is no place left, a box has its colour
    alone. Crowds are dashed. A name in letters that Pillow's font does not have becomes the number of the class. Boxes
    are clipped to the picture; one that is nan or infinite is left out.

    Args:
        picture: (H, W, 3) uint8.
        boxes: (n, 4), the best first.
        labels: (n,) numbers of classes.
        classes: K names.
        scores: (n,) in [0, 1], or None for true boxes.
        crowd: (n,) whether a box is of a crowd, or None if none is.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: If the picture is not of this shape or type, or the lengths differ.

    Example:
        >>> drawn = draw_boxes(np.zeros((64, 96, 3), np.uint8), [[10, 20, 50, 60]], [0], ["pear"], [0.9])
        >>> drawn.shape, drawn[40, 10].tolist()
        ((64, 96, 3), [24, 69, 251])
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or 0 in picture.shape:
        raise ValueError(f"A picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}.")
    numbers = [int(label) for label in labels]
    n = len(numbers)
    corners = _array(boxes).reshape(-1, 4)
    values = [None] * n if scores is None else _array(scores).tolist()
    dashed = [False] * n if crowd is None else [bool(value) for value in crowd]
    if not len(corners) == len(values) == len(dashed) == n:
        raise ValueError(f"{len(corners)} boxes came with {n} labels, {len(values)} scores, {len(dashed)} crowds.")
    H, W, _ = picture.shape
    width = max(1, round((H + W) / 2 * 0.004))
    font = ImageFont.load_default(size=max(9, round((H + W) / 2 * 0.02)))
    names = _legible(classes)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    rows = [
        (_clipped(box, (W, H)), class_colour(label), names[label], _mark(score, is_crowd), is_crowd)
        for box, label, score, is_crowd in zip(corners, numbers, values, dashed, strict=True)
        if np.isfinite(box).all()
    ]
    for box, colour, *_, is_crowd in reversed(rows):
        _draw_frame(draw, box, colour, width, is_crowd)
    _, ascent, _, descent = draw.textbbox((0, 0), "Ag", font=font)
    line_h = math.ceil(descent - ascent)
    placed: list[Rectangle] = []
    for box, colour, name, mark, _ in rows:
        text = shortened(name, font, W - 4 * width - font.getlength(mark)) + mark
        place = _place(box, math.ceil(font.getlength(text)) + 4 * width, line_h + 3 * width, (W, H), placed)
        if place is None:
            continue
        placed.append(place)
        draw.rectangle(place, fill=colour)
        middle = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
        draw.text(middle, text, fill=_ink_on(colour), font=font, anchor="mm")
    return np.asarray(canvas)


def truth_and_found_page(
    pictures: Sequence[NDArray[np.uint8]],
    targets: Sequence[Mapping[str, Tensor]],
    detections: Sequence[Mapping[str, Tensor]],
    classes: Sequence[str],
    captions: Sequence[str] | None = None,
    min_score: float = MIN_SCORE,
) -> NDArray[np.uint8]:
    """Draw a row for each picture: its true boxes at the left, what was found at the right.

    Pictures are brought to one length of their longer side. The first 8 are shown.

    Args:
        pictures: Of each image (H, W, 3) uint8, of any sizes.
        targets: Of each image "boxes" (G, 4) in pixels of its picture, "labels" (G,) and maybe "crowd" (G,).
        detections: Of each image "boxes" (n, 4) in pixels of its picture, "scores" (n,) and "labels" (n,).
        classes: K names.
        captions: What stands over each row, such as the name of the file, or None.
        min_score: Detections that score less are left out.

    Returns:
        (H', W', 3) uint8.

    Raises:
        ValueError: If there is no picture, or the lengths differ.
    """
    names = [""] * len(pictures) if captions is None else captions
    if not pictures or not len(pictures) == len(targets) == len(detections) == len(names):
        raise ValueError(
            f"{len(pictures)} pictures came with {len(targets)} targets, {len(detections)} detections and {len(names)} "
            "captions; must be as many, and at least one."
        )
    images = zip(pictures, targets, detections, names, strict=True)
    rows = [_truth_and_found(*image, classes, min_score) for image in list(images)[:MAX_PICTURES]]
    size = 2 * _TILE + 3 * _GAP, sum(row.height + _GAP for row in rows) + _GAP
    canvas = Image.new("RGB", size, PAPER)
    top = _GAP
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height + _GAP
    return np.asarray(canvas)


def precision_recall_picture(curves: NDArray[np.float64], classes: Sequence[str]) -> NDArray[np.uint8]:
    """Draw precision over recall, a line for each class and one for their mean, with the average precision of each.

    Of more than 10 classes the 5 best and the 5 worst have their colours and names; the others are grey.

    Args:
        curves: (K, R) precision at equal steps of recall from 0 to 1; nan in all of a row: no true boxes, no line.
        classes: K names.

    Returns:
        (H', W', 3) uint8.

    Raises:
        ValueError: If there is no curve for each class.
    """
    if curves.ndim != 2 or len(curves) != len(classes) or curves.shape[1] < 2:
        raise ValueError(f"Curves of {len(classes)} classes are ({len(classes)}, R), not {curves.shape}.")
    known = [label for label in range(len(classes)) if not np.isnan(curves[label]).any()]
    order = sorted(known, key=lambda label: -curves[label].mean())
    half = _MAX_CURVES // 2
    named = order if len(order) <= _MAX_CURVES else order[:half] + order[-half:]
    lines = [(curves[label], _REST, 1.0) for label in order if label not in named]
    lines += [(curves[label], class_colour(label), 2.0) for label in reversed(named)]
    lines += [(curves[known].mean(axis=0), INK, 3.5)] if known else []
    names = _legible(classes)
    legend: list[tuple[str, str, Colour | None]] = [
        (names[label], f"{curves[label].mean():.3f}", class_colour(label)) for label in named
    ]
    if len(named) < len(order):
        legend.insert(half, (f"{len(order) - len(named)} between", "", _REST))
    mean = f"{curves[known].mean():.3f}" if known else ""
    legend.insert(0, (f"mean of {len(known)} classes" if known else "no true boxes", mean, INK if known else None))
    return _with_scales(_plot(lines), legend)


def _truth_and_found(
    picture: NDArray[np.uint8],
    target: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    name: str,
    classes: Sequence[str],
    min_score: float,
) -> Image.Image:
    tile, scale = _scaled(picture)
    is_shown = found["scores"] >= min_score
    scores = found["scores"][is_shown]
    left = draw_boxes(tile, _array(target["boxes"]) * scale, target["labels"], classes, crowd=target.get("crowd"))
    right = draw_boxes(tile, _array(found["boxes"][is_shown]) * scale, found["labels"][is_shown], classes, scores)
    font = ImageFont.load_default(size=14)
    row = Image.new("RGB", (2 * _TILE + 3 * _GAP, len(tile) + 22), PAPER)
    draw = ImageDraw.Draw(row)
    texts = f"truth: {len(target['boxes'])}", f"found with a score of {min_score:g} or more: {len(scores)}"
    for column, (drawn, text) in enumerate(zip((left, right), texts, strict=True)):
        x = _GAP + column * (_TILE + _GAP)
        row.paste(Image.fromarray(drawn), (x, 22))
        draw.text((x + _TILE, 10), text, fill=INK, font=font, anchor="rm")
    draw.text((_GAP, 10), shortened(name, font, _TILE - 90), fill=INK, font=font, anchor="lm")
    return row


def _scaled(picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The picture in the size of a tile, and the factors (4,) for its boxes; pixels of a small one stay sharp."""
    H, W, _ = picture.shape
    scale = _TILE / max(H, W)
    size = (W * int(scale), H * int(scale)) if scale > 1 else (max(1, round(W * scale)), max(1, round(H * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize(size, method)), np.array([size[0] / W, size[1] / H] * 2)


def _clipped(box: NDArray[np.float64], size: tuple[int, int]) -> Rectangle:
    """Left, top, right and bottom pixel of a box, in the picture."""
    W, H = size
    x1, y1, x2, y2 = box
    left, right = sorted((min(max(x1, 0), W - 1), min(max(x2 - 1, 0), W - 1)))
    top, bottom = sorted((min(max(y1, 0), H - 1), min(max(y2 - 1, 0), H - 1)))
    return round(left), round(top), round(right), round(bottom)


def _draw_frame(draw: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, width: int, is_dashed: bool) -> None:
    """Lines inside of a box, with a thin one of black or white around them that parts them from any picture."""
    left, top, right, bottom = box
    w = width - 1
    edges = [(left, top, right, top + w), (left, bottom - w, right, bottom)]
    edges += [(left, top, left + w, bottom), (right - w, top, right, bottom)]
    strokes = [stroke for edge in edges for stroke in (_dashes(edge, 4 * width) if is_dashed else [edge])]
    border = width // 3
    for x1, y1, x2, y2 in strokes if border else []:
        draw.rectangle((x1 - border, y1 - border, x2 + border, y2 + border), fill=_ink_on(colour))
    for stroke in strokes:
        draw.rectangle(stroke, fill=colour)


def _dashes(edge: Rectangle, length: int) -> list[Rectangle]:
    left, top, right, bottom = edge
    if right - left > bottom - top:
        return [(x, top, min(x + length, right), bottom) for x in np.arange(left, right, 2 * length)]
    return [(left, y, right, min(y + length, bottom)) for y in np.arange(top, bottom, 2 * length)]


def _place(
    box: Rectangle, width: int, height: int, size: tuple[int, int], placed: Sequence[Rectangle]
) -> Rectangle | None:
    """Where a name of this size stands: above its box, or inside, or below; None if others stand everywhere."""
    W, H = size
    left = max(0, min(box[0], W - width))
    tops = box[1] - height, box[1], box[3] + 1, box[3] + 1 - height
    inside = [top for top in tops if 0 <= top <= H - height] or [max(0, min(box[1], H - height))]
    places = [(left, top, left + width - 1, top + height - 1) for top in inside]
    return next((place for place in places if not any(_overlap(place, other) for other in placed)), None)


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _mark(score: float | None, is_crowd: bool) -> str:
    return ("" if score is None else f" {score:.2f}") + (", crowd" if is_crowd else "")


def _legible(classes: Sequence[str]) -> list[str]:
    """Names, or numbers for those in letters that Pillow's font does not have: it would write empty squares."""
    return [
        name if any(letter.isascii() and letter.isalnum() for letter in without_accents(name)) else f"class {label}"
        for label, name in enumerate(classes)
    ]


def _ink_on(colour: Colour) -> Colour:
    """Black or white, whatever has more contrast (WCAG 2, relative luminance)."""
    shares = np.divide(colour, 255)
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return (0, 0, 0) if np.dot((0.2126, 0.7152, 0.0722), linear) > 0.179 else PAPER


def _array(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _plot(lines: Sequence[tuple[NDArray[np.float64], Colour, float]]) -> Image.Image:
    """Lines over a grid; each has its values in [0, 1] at equal steps, colour and width in pixels, the last on top."""
    side = _PLOT * _FINE
    canvas = Image.new("RGB", (side, side), PAPER)
    draw = ImageDraw.Draw(canvas)
    for at in np.linspace(0, side, 6)[1:-1]:
        draw.line((at, 0, at, side), fill=_GRID, width=_FINE)
        draw.line((0, at, side, at), fill=_GRID, width=_FINE)
    for values, colour, width in lines:
        # A curve ends where it meets 0: what nobody found has no precision.
        end = next((i + 1 for i, value in enumerate(values) if value <= 0), len(values))
        x = np.linspace(0, side, len(values))[:end]
        points = np.stack([x, (1 - values[:end]) * side], axis=1).ravel().tolist()
        draw.line(points, fill=colour, width=round(width * _FINE), joint="curve")
    return canvas.reduce(_FINE)


def _with_scales(plot: Image.Image, legend: Sequence[tuple[str, str, Colour | None]]) -> NDArray[np.uint8]:
    """Frame a plot, with scales from 0 to 1, and a legend of names, numbers and colours at its right."""
    font, title = ImageFont.load_default(size=13), ImageFont.load_default(size=16)
    left, top, side = 64, 16, plot.width
    right = left + side + 20
    canvas = Image.new("RGB", (right + 24 + _MAX_NAME + 64, top + side + 56), PAPER)
    canvas.paste(plot, (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=_FRAME)
    for at in np.linspace(0, 1, 6):
        draw.text((left + at * side, top + side + 6), f"{at:.1f}", fill=INK, font=font, anchor="mt")
        draw.text((left - 6, top + (1 - at) * side), f"{at:.1f}", fill=INK, font=font, anchor="rm")
    draw.text((left + side / 2, canvas.height - 14), "recall", fill=INK, font=title, anchor="mm")
    draw_upright(canvas, "precision", title, top=(14, top + side / 2 - title.getlength("precision") / 2))
    draw.text((right, top + 8), "AP at an overlap of 0.5", fill=INK, font=font, anchor="lm")
    for row, (name, value, colour) in enumerate(legend, start=1):
        middle = top + 8 + row * 24
        if colour:
            draw.rectangle((right, middle - 3, right + 16, middle + 3), fill=colour)
        draw.text((right + 24, middle), shortened(name, font, _MAX_NAME), fill=INK, font=font, anchor="lm")
        draw.text((canvas.width - 12, middle), value, fill=INK, font=font, anchor="rm")
    return np.asarray(canvas)

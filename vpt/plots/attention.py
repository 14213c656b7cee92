"""Figures of attention and prompt tokens: maps over an image, charts over blocks, matrices, patches.

Shapes: `h, w` pixels of an image, which is the upper left part of a model's input of `H, W` pixels; `P` prompt tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from vpt.plots.figure import GREY, INK, PALE, Pixels, new_figure, one_line, pixel_axes, place, render

Values = NDArray[np.float64]

_OPACITY = 0.6
_GAP = 10
_LEFT = 84  # names of rows
_LINE = 18
_TILE = 224  # pixels of the longer side of a map, and of a matrix
_PATCH = 72
_SCALE = 120


@dataclass(frozen=True)
class MapRow:
    """A row of maps over one image.

    Args:
        name: On the left.
        maps: Each (rows, columns) in [0, 1], over the whole input.
        captions: One for each map.
    """

    name: str
    maps: Sequence[Values]
    captions: Sequence[str]


@dataclass(frozen=True)
class Curve:
    """A line over the blocks of a chart.

    Args:
        name: In the legend.
        values: By block; the line has gaps where blocks are missing.
        colour: Of line and points.
        dots: By block, further values that are drawn as small points.
        is_dashed: Draw dashes without points.
    """

    name: str
    values: Mapping[int, float]
    colour: str
    dots: Mapping[int, Sequence[float]] = field(default_factory=dict)
    is_dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the blocks of a backbone.

    Args:
        title: Above the chart.
        curves: The last one on top.
        num_blocks: Blocks of the backbone.
        is_share: Whether values are shares, labelled in percent.
    """

    title: str
    curves: Sequence[Curve]
    num_blocks: int
    is_share: bool = False


def attention_page(
    image: Pixels,
    size: tuple[int, int],
    lines: Sequence[str],
    headings: Sequence[str],
    rows: Sequence[MapRow],
    frames: Sequence[tuple[Sequence[float], str]] = (),
) -> Pixels:
    """Draw an image with a description, and rows of maps over the image in grey.

    Args:
        image: (h, w, 3) uint8.
        size: H and W of the input that the maps cover.
        lines: Text beside the image, the first its title.
        headings: Above the columns of maps; there may be fewer than columns.
        rows: At least one.
        frames: Boxes (x1, y1, x2, y2) in pixels of the image, with their colours.
    """
    scale = _TILE / max(image.shape[:2])
    h, w = (max(1, round(side * scale)) for side in image.shape[:2])
    step, top = _TILE + _GAP, 3 * _GAP + max(h, _LINE * (len(lines) + 3))
    row_step = h + _LINE + _GAP
    width = _LEFT + max(3, *(len(row.maps) for row in rows)) * step
    axes = pixel_axes(width, top + _LINE + len(rows) * row_step + _GAP)
    place(axes, image, _LEFT, _GAP, w, h)
    for (x1, y1, x2, y2), colour in frames:
        corner, sides = (_LEFT + x1 * scale, _GAP + y1 * scale), ((x2 - x1) * scale, (y2 - y1) * scale)
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=2))
    _write(axes, lines, _LEFT + step + _GAP, width)
    _draw_scale(axes, _LEFT + step + _GAP, _GAP + _LINE * (len(lines) + 1), "viridis", "0", "maximum: see captions")
    for column, heading in enumerate(headings):
        axes.text(_LEFT + column * step, top, one_line(heading, _TILE / 7), color=INK, fontsize=13, va="top")
    grey = np.broadcast_to(image.mean(axis=2, keepdims=True), image.shape).astype(np.uint8)
    for number, row in enumerate(rows):
        y = top + _LINE + 4 + number * row_step
        axes.text(_GAP, y + h / 2, row.name, color=INK, fontsize=13, va="center")
        for column, (values, caption) in enumerate(zip(row.maps, row.captions, strict=True)):
            x = _LEFT + column * step
            place(axes, grey, x, y, w, h)
            cover = (x, y, size[1] * scale, size[0] * scale)
            colours = place(axes, values, *cover, cmap="viridis", vmin=0, vmax=1, alpha=_OPACITY)
            colours.set_clip_path(Rectangle((x, y), w, h, transform=axes.transData))
            axes.text(x, y + h + 3, one_line(caption, _TILE / 6), color=GREY, fontsize=11, va="top")
    return render(axes)


def line_charts(charts: Sequence[Chart]) -> Pixels:
    """Draw charts side by side, each with its legend below; values that are not finite are left out."""
    height = 360 + 20 * max(len(chart.curves) for chart in charts)
    figure = new_figure(500 * len(charts), height, layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        for curve in chart.curves:
            for block, values in curve.dots.items():
                axes.scatter([block] * len(values), values, s=6, color=curve.colour, alpha=0.4, linewidths=0)
            heights = [curve.values.get(block, math.nan) for block in range(chart.num_blocks)]
            style = "--" if curve.is_dashed else "o-"
            axes.plot(heights, style, label=curve.name, color=curve.colour, linewidth=1 if curve.is_dashed else 2)
        axes.set_title(chart.title, fontsize=14, loc="left")
        axes.set_xlabel("block", fontsize=13)
        axes.set(xlim=(-0.5, chart.num_blocks - 0.5), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if chart.is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelsize=12)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False, fontsize=12)
    return render(figure)


def similarity_matrices(matrices: Sequence[Values], captions: Sequence[str], columns: int = 4) -> Pixels:
    """Draw matrices of cosines (P, P), -1 blue, 0 white, 1 red, each with its caption of some lines, and the scale."""
    columns, step = min(columns, len(matrices)), _TILE + 2 * _GAP
    heading = _LINE * max(caption.count("\n") + 1 for caption in captions)
    rows, row_step = math.ceil(len(matrices) / columns), step + heading
    axes = pixel_axes(max(columns * step, 400) + 2 * _GAP, rows * row_step + 3 * _GAP)
    for number, (matrix, caption) in enumerate(zip(matrices, captions, strict=True)):
        x, y = 2 * _GAP + number % columns * step, _GAP + number // columns * row_step
        for line, text in enumerate(caption.split("\n")):
            axes.text(x, y + line * _LINE, one_line(text, _TILE / 6.5), color=INK, fontsize=12, va="top")
        place(axes, matrix, x, y + heading, _TILE, _TILE, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.add_patch(Rectangle((x, y + heading), _TILE, _TILE, fill=False, edgecolor=GREY, linewidth=1))
    _draw_scale(axes, 2 * _GAP, rows * row_step + _GAP / 2, "RdBu_r", "-1", "1, cosine of two tokens")
    return render(axes)


def nearest_patches_page(
    lines: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[Pixels, tuple[int, int, int, int], str]]]]
) -> Pixels:
    """Draw rows of patches, each with a frame and as much around it on each side; white is outside of the image.

    Args:
        lines: Text above, the first its title.
        rows: Name, and for each patch: its image (h, w, 3) uint8, its box (left, top, right, bottom) in pixels, and a
            caption.
    """
    step, top = _PATCH + _GAP, 3 * _GAP + _LINE * len(lines)
    width = _LEFT + max(max(len(patches) for _, patches in rows) * step, 560)
    axes = pixel_axes(width, top + len(rows) * (_PATCH + 3 * _GAP))
    _write(axes, lines, _GAP, width)
    for number, (name, patches) in enumerate(rows):
        y, third = top + number * (_PATCH + 3 * _GAP), _PATCH / 3
        axes.text(_GAP, y + _PATCH / 2, name, color=INK, fontsize=13, va="center")
        for column, (image, (left, upper, right, lower), caption) in enumerate(patches):
            x, (w, h) = _LEFT + column * step, (right - left, lower - upper)
            padded = np.pad(image, ((h, h), (w, w), (0, 0)), constant_values=255)
            place(
                axes, padded[upper : upper + 3 * h, left : left + 3 * w], x, y, _PATCH, _PATCH, interpolation="bicubic"
            )
            for edge, colour in ((1.5, INK), (0.5, "white")):
                corner, side = (x + third - edge, y + third - edge), third + 2 * edge
                axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1))
            axes.text(x, y + _PATCH + 3, one_line(caption, 14), color=GREY, fontsize=11, va="top")
    return render(axes)


def _write(axes: Axes, lines: Sequence[str], left: float, width: float) -> None:
    """Write lines from the top, the first of them larger."""
    for number, line in enumerate(lines):
        text, size = one_line(line, (width - left) / (6.5 if number else 8.5)), 12 if number else 15
        axes.text(left, _GAP + number * _LINE + (6 if number else 0), text, color=INK, fontsize=size, va="top")


def _draw_scale(axes: Axes, left: float, top: float, cmap: str, low: str, high: str) -> None:
    """A bar of colours with the values at its ends."""
    place(axes, np.linspace(0, 1, _SCALE)[None], left + 20, top, _SCALE, 12, cmap=cmap)
    axes.text(left, top + 6, low, color=GREY, fontsize=12, va="center")
    axes.text(left + 28 + _SCALE, top + 6, high, color=GREY, fontsize=12, va="center")

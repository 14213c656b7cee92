"""Figures of attention and prompt tokens: maps over an image, charts over blocks, matrices, patches.

Shapes: `h, w` pixels of an image, which is the upper left part of a model's input of `H, W` pixels; `P` prompt tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vpt.plots.figure import PALE, Pixels, new_figure, render
from vpt.plots.grid import image_grid

Values = NDArray[np.float64]

_OPACITY = 0.6
_TILE = 224  # least width of a map and of a matrix


@dataclass(frozen=True)
class Curve:
    """A line over the blocks of a chart."""

    name: str  # in the legend
    values: Mapping[int, float]  # by block; the line has gaps where blocks are missing or values not finite
    colour: str
    dots: Mapping[int, Sequence[float]] = field(default_factory=dict)  # by block, further values, as small points
    is_dashed: bool = False  # without points


def attention_map(image: Pixels, values: Values, size: tuple[int, int]) -> Pixels:
    """Lay the colours of a map over an image in grey, from dark (0) to bright (1).

    Args:
        image: (h, w, 3) uint8.
        values: (rows, columns) in [0, 1], over the whole input; higher values have the colour of 1.
        size: H and W, multiples of rows and columns.

    Example:
        >>> attention_map(np.zeros((32, 64, 3), np.uint8), np.eye(2), (64, 64)).shape
        (32, 64, 3)
    """
    h, w, _ = image.shape
    whole = values.repeat(size[0] // len(values), axis=0).repeat(size[1] // values.shape[1], axis=1)
    colours = 255 * colormaps["viridis"](whole[:h, :w])[..., :3]
    grey = image @ (0.299, 0.587, 0.114)
    return ((1 - _OPACITY) * grey[..., None] + _OPACITY * colours).round().astype(np.uint8)


def attention_page(
    image: Pixels, size: tuple[int, int], title: str, rows: Sequence[tuple[str, Sequence[tuple[Values, str]]]]
) -> Pixels:
    """Draw rows of an image and its maps; see `attention_map`.

    A row is the caption of the image, and maps with their captions, as many in each row.
    """
    cells: list[tuple[Pixels, str]] = []
    for name, maps in rows:
        cells += [(image, name), *((attention_map(image, values, size), caption) for values, caption in maps)]
    images, captions = zip(*cells, strict=True)
    return image_grid(np.stack(images), captions, 1 + len(rows[0][1]), title=title, min_width=_TILE)


def line_charts(charts: Mapping[str, Sequence[Curve]], num_blocks: int) -> Pixels:
    """Draw charts over the blocks side by side, each with its title and its legend; the last curve is on top."""
    height = 360 + 20 * max(map(len, charts.values()))
    figure = new_figure(500 * len(charts), height, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts.items(), strict=True):
        for curve in curves:
            for block, values in curve.dots.items():
                axes.scatter([block] * len(values), values, s=6, color=curve.colour, alpha=0.4, linewidths=0)
            heights = [curve.values.get(block, math.nan) for block in range(num_blocks)]
            style, width = ("--", 1) if curve.is_dashed else ("o-", 2)
            axes.plot(heights, style, label=curve.name, color=curve.colour, linewidth=width)
        axes.set_title(title, fontsize=14, loc="left")
        axes.set_xlabel("block", fontsize=13)
        axes.set(xlim=(-0.5, num_blocks - 0.5), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=12)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False, fontsize=12)
    return render(figure)


def similarity_matrices(matrices: Sequence[Values], captions: Sequence[str], title: str = "") -> Pixels:
    """Draw matrices of cosines, (P, P) each: -1 is blue, 0 white, 1 red."""
    images = colormaps["RdBu_r"]((np.stack(matrices) + 1) / 2, bytes=True)[..., :3]
    return image_grid(images, captions, columns=4, title=title, min_width=_TILE)


def patch_with_surroundings(image: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """Cut a patch out of an image, in a frame, with as much around it on each side; outside of the image is white.

    Args:
        image: (h, w, 3) uint8.
        box: Left, top, right and bottom of the patch in pixels; the result has three times its height and width.
    """
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    padded = np.pad(image, ((h, 2 * h), (w, 2 * w), (0, 0)), constant_values=255)
    part = padded[top : top + 3 * h, left : left + 3 * w]
    patch = part[h : 2 * h, w : 2 * w].copy()
    for edge, colour in ((2, 32), (1, 255), (0, patch)):
        part[h - edge : 2 * h + edge, w - edge : 2 * w + edge] = colour
    return part

"""A grid of images with captions."""

import math
from collections.abc import Sequence

import numpy as np

from vpt.plots.figure import INK, Pixels, fit, pixel_axes, render, show

RIGHT = "#188038"  # the caption of a right prediction
WRONG = "#c5221f"  # of a wrong one
_GAP = 6
_LINE = 16


def image_grid(
    images: Pixels,
    captions: Sequence[str] | None = None,
    columns: int = 8,
    colours: Sequence[str] | None = None,
    title: str = "",
    min_width: int = 128,
) -> Pixels:
    """Put images side by side, each with its caption below; a line that is too long is cut.

    Images (B, H, W, 3) uint8 below `min_width` pixels are enlarged by an integer factor; a caption has about 18 letters
    in 128 pixels. Captions and the title above all images may have several lines; `colours` are those of the captions.
    No image, another shape or type, or lengths that differ, raise a ValueError.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != "uint8" or 0 in images.shape:
        raise ValueError(f"images must be (B, H, W, 3) uint8 with B > 0, not {images.shape} {images.dtype}")
    if columns < 1:
        raise ValueError(f"columns={columns}: must be at least 1")
    B, H, W, _ = images.shape
    for name, values in (("captions", captions), ("colours", colours)):
        if values is not None and len(values) != B:
            raise ValueError(f"{B} images came with {len(values)} {name}")
    scale, columns = max(1, math.ceil(min_width / W)), min(columns, B)
    height, width = H * scale, W * scale
    texts, headings = [caption.split("\n") for caption in captions or [""] * B], title.splitlines()
    step = height + _GAP + (4 + _LINE * max(map(len, texts)) if captions else 0)
    start, total = _GAP + (_LINE * len(headings) + _GAP if headings else 0), columns * (width + _GAP) + _GAP
    axes = pixel_axes(total, start + math.ceil(B / columns) * step)
    for row, line in enumerate(headings):
        axes.text(_GAP, 3 + row * _LINE, fit(line, total - 2 * _GAP, 12), color=INK, fontsize=12, va="top")
    for i, image in enumerate(images):
        left, top = _GAP + i % columns * (width + _GAP), start + i // columns * step
        show(axes, image, left, top, width, height)
        for row, line in enumerate(texts[i]):
            at, colour = top + height + 3 + row * _LINE, colours[i] if colours else INK
            axes.text(left, at, fit(line, width, 12), color=colour, fontsize=12, va="top")
    return render(axes.figure)


def tile_grid(tiles: Sequence[Pixels], captions: Sequence[str], columns: int) -> Pixels:
    """An `image_grid` of images (H, W, 3) of any sizes, on white, each at the lower left of its place."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    page = np.full((len(tiles), height, width, 3), 255, np.uint8)
    for place, tile in zip(page, tiles, strict=True):
        place[-tile.shape[0] :, : tile.shape[1]] = tile
    return image_grid(page, captions, columns=columns)

"""A grid of images with captions."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vpt.plots.figure import INK, Pixels, one_line, pixel_axes, place, render

RIGHT = "#188038"
"""Colour of the caption of a right prediction."""
WRONG = "#c5221f"
"""Colour of the caption of a wrong prediction."""

_MIN_TILE = 128  # pixels; room for a caption of 18 letters
_GAP = 6
_LINE = 15


def image_grid(
    images: NDArray[np.uint8],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    colours: Sequence[str] | None = None,
) -> Pixels:
    """Put images side by side, each with its caption below.

    Small images are enlarged by an integer factor. A caption may have several lines; a line that is too long for its
    image is cut.

    Args:
        images: (B, H, W, 3) uint8.
        captions: B texts, or None.
        columns: Images in a row.
        colours: B colours of the captions, or None for dark grey.

    Returns:
        (H', W', 3) uint8.

    Raises:
        ValueError: If the images are not of this shape or type, there is none, or the lengths differ.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"images must be (B, H, W, 3) uint8 with B > 0, not {images.shape} {images.dtype}")
    if columns < 1:
        raise ValueError(f"columns={columns}: must be at least 1")
    B, H, W, _ = images.shape
    for name, values in (("captions", captions), ("colours", colours)):
        if values is not None and len(values) != B:
            raise ValueError(f"{B} images came with {len(values)} {name}")
    scale = max(1, math.ceil(_MIN_TILE / W))
    texts = [caption.split("\n") for caption in captions or ()]
    height, width = H * scale, W * scale
    step = height + _GAP + (4 + _LINE * max(map(len, texts)) if texts else 0)
    columns = min(columns, B)
    axes = pixel_axes(columns * (width + _GAP) + _GAP, math.ceil(B / columns) * step + _GAP)
    for i, image in enumerate(images):
        left, top = _GAP + i % columns * (width + _GAP), _GAP + i // columns * step
        place(axes, image, left, top, width, height)
        for row, line in enumerate(texts[i] if texts else ()):
            at, colour = top + height + 3 + row * _LINE, colours[i] if colours else INK
            axes.text(left, at, one_line(line, width / 7), color=colour, fontsize=12, va="top")
    return render(axes)

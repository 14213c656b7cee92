"""Pictures for TensorBoard, drawn with Pillow: a grid of captioned tiles, a confusion matrix.

Shapes: `B` batch, `H, W` pixels, `K` classes. Every picture that goes in or out is uint8 RGB.
"""

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK: Colour = (32, 33, 36)
PAPER: Colour = (255, 255, 255)
RIGHT: Colour = (24, 128, 56)
"""Colour of a caption under a picture that was predicted right."""
WRONG: Colour = (197, 34, 31)
"""Colour of a caption under a picture that was predicted wrong."""

# From white to dark blue: the darker, the more; also legible when printed in grey.
BLUES = np.array([(255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)], dtype=np.float64)
_GRID = (228, 230, 233)
_MIN_TILE = 128  # pixels that a caption of about 18 letters needs
_GAP = 6
_MAX_MATRIX = 960
_MAX_CELL = 64
_MAX_NAME = 160
_MAX_COUNTED = 20  # classes up to which counts are written into the cells


def picture_grid(
    pictures: NDArray[np.uint8],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    colours: Sequence[Colour] | None = None,
) -> NDArray[np.uint8]:
    """Put pictures side by side, each with its caption below.

    Small pictures are enlarged by an integer factor, pixels staying sharp, so that captions have room. A caption may
    have several lines; a line that is too long for its tile is shortened.

    Args:
        pictures: (B, H, W, 3) uint8.
        captions: B texts, or None.
        columns: Tiles in a row.
        colours: B colours for the captions, (red, green, blue) in [0, 255], or None for dark grey.

    Returns:
        (H', W', 3) uint8.

    Raises:
        ValueError: If the pictures are not of this shape or type, none is given, or the lengths differ.
    """
    _check_grid(pictures, captions, columns, colours)
    B, H, W, _ = pictures.shape
    scale = max(1, math.ceil(_MIN_TILE / W))
    tile_h, tile_w = H * scale, W * scale
    font = ImageFont.load_default(size=13)
    line_h = 16
    texts = captions or [""] * B
    caption_h = line_h * max(caption.count("\n") + 1 for caption in texts) + 4 if captions else 0
    columns = min(columns, B)
    rows = math.ceil(B / columns)
    size = (columns * (tile_w + _GAP) + _GAP, rows * (tile_h + caption_h + _GAP) + _GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (picture, caption) in enumerate(zip(pictures, texts, strict=True)):
        x = _GAP + i % columns * (tile_w + _GAP)
        y = _GAP + i // columns * (tile_h + caption_h + _GAP)
        tile = Image.fromarray(picture).resize((tile_w, tile_h), Image.Resampling.NEAREST)
        canvas.paste(tile, (x, y))
        for number, line in enumerate(caption.split("\n")):
            position = (x, y + tile_h + 3 + number * line_h)
            draw.text(position, shortened(line, font, tile_w), fill=colours[i] if colours else INK, font=font)
    return np.asarray(canvas)


def confusion_picture(confusion: ArrayLike, classes: Sequence[str]) -> NDArray[np.uint8]:
    """Draw a confusion matrix: rows are targets, columns are predictions, dark cells hold much of their row.

    The colour follows the square root of a cell's share of its row, so that rare confusions stay visible. Counts
    stand in the cells up to 20 classes, names at the axes as long as they are legible.

    Args:
        confusion: (K, K) counts.
        classes: K names.

    Returns:
        (H', W', 3) uint8, at most about 1,200 pixels wide up to 1,000 classes.

    Raises:
        ValueError: If the counts are not a square of K by K.
    """
    counts = np.asarray(confusion)
    K = len(classes)
    if K == 0 or counts.shape != (K, K):
        raise ValueError(f"A confusion matrix of {K} classes is ({K}, {K}), not {counts.shape}.")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = max(1, min(_MAX_CELL, _MAX_MATRIX // K))
    matrix = Image.fromarray(colour_map(np.sqrt(shares)).repeat(cell, axis=0).repeat(cell, axis=1))
    if K <= _MAX_COUNTED:
        _write_counts(matrix, counts, shares, cell)
    return _with_axes(matrix, classes, cell)


def _write_counts(matrix: Image.Image, counts: NDArray[np.int64], shares: NDArray[np.float64], cell: int) -> None:
    draw = ImageDraw.Draw(matrix)
    font = _fitting_font(str(counts.max()), cell - 6, largest=16)
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            centre = ((column + 0.5) * cell, (row + 0.5) * cell)
            ink = PAPER if shares[row, column] > 0.35 else INK
            draw.text(centre, str(counts[row, column]), fill=ink, font=font, anchor="mm")


def _with_axes(matrix: Image.Image, classes: Sequence[str], cell: int) -> NDArray[np.uint8]:
    """Frame the matrix; names and the title "target" on the left, names and the title "prediction" below."""
    font = ImageFont.load_default(size=min(14, max(8, cell - 2)))
    names = [shortened(name, font, _MAX_NAME) for name in classes] if cell >= 11 else []
    names_w = math.ceil(max((font.getlength(name) for name in names), default=0))
    side = matrix.width
    left = 28 + names_w + 8  # the title's line, the names, a gap
    canvas = Image.new("RGB", (left + side + 12, 12 + side + left), PAPER)
    canvas.paste(matrix, (left, 12))
    draw = ImageDraw.Draw(canvas)
    if names:
        for offset in range(cell, side, cell):
            draw.line((left, 12 + offset, left + side - 1, 12 + offset), fill=_GRID)
            draw.line((left + offset, 12, left + offset, 11 + side), fill=_GRID)
    draw.rectangle((left - 1, 11, left + side, 12 + side), outline=(160, 164, 168))
    for i, name in enumerate(names):
        middle = (i + 0.5) * cell
        draw.text((left - 6, 12 + middle), name, fill=INK, font=font, anchor="rm")
        draw_upright(canvas, name, font, top=(left + middle, 12 + side + 6))
    title = ImageFont.load_default(size=16)
    draw.text((left + side / 2, canvas.height - 14), "prediction", fill=INK, font=title, anchor="mm")
    draw_upright(canvas, "target", title, top=(14, 12 + side / 2 - title.getlength("target") / 2))
    return np.asarray(canvas)


def draw_upright(canvas: Image.Image, text: str, font: Font, top: tuple[float, float]) -> None:
    """Write upwards, centred on the column of `top`; the text ends at its height."""
    size = math.ceil(font.getlength(text)), 24
    stencil = Image.new("L", size)  # neighbours overlap: only the ink may be pasted
    ImageDraw.Draw(stencil).text((0, 12), text, fill=255, font=font, anchor="lm")
    x, y = top
    canvas.paste(INK, (round(x - 12), round(y)), stencil.transpose(Image.Transpose.ROTATE_90))


def colour_map(values: NDArray[np.float64], table: NDArray[np.float64] = BLUES) -> NDArray[np.uint8]:
    """Values in [0, 1] of any shape -> colours with a last axis of 3, uint8, between evenly spread ones of a table."""
    stops = np.linspace(0, 1, len(table))
    colours = np.stack([np.interp(values, stops, channel) for channel in table.T], axis=-1)
    return colours.round().astype(np.uint8)


def _fitting_font(text: str, width: float, largest: int) -> Font:
    sizes = range(largest, 7, -1)
    fonts = (ImageFont.load_default(size=size) for size in sizes)
    return next((font for font in fonts if font.getlength(text) <= width), ImageFont.load_default(size=7))


def shortened(text: str, font: Font, width: float) -> str:
    """One line of text without accents, cut to a width in pixels."""
    text = without_accents(" ".join(text.split()))
    if font.getlength(text) <= width:
        return text
    end = next((end for end in range(len(text), 0, -1) if font.getlength(text[:end] + "…") <= width), 0)
    return text[:end].rstrip() + "…"


def without_accents(text: str) -> str:
    """The text without accents, which Pillow's own font does not have; it has the letters of ASCII."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def _check_grid(
    pictures: NDArray[np.uint8], captions: Sequence[str] | None, columns: int, colours: Sequence[Colour] | None
) -> None:
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8 or 0 in pictures.shape:
        raise ValueError(f"Pictures are (B, H, W, 3) uint8 with B > 0, not {pictures.shape} {pictures.dtype}.")
    if columns < 1:
        raise ValueError(f"columns={columns}: must be at least 1.")
    for name, given in (("captions", captions), ("colours", colours)):
        if given is not None and len(given) != len(pictures):
            raise ValueError(f"{len(pictures)} pictures came with {len(given)} {name}.")

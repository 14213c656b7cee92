"""Pictures of what a model looks at, drawn with Pillow: maps over a picture, curves over blocks, matrices, patches.

Shapes: `h, w` pixels of a picture, `H, W` of the model's input, whose upper left part the picture is; `P` prompt
tokens. Every picture that goes in or out is (height, width, 3) uint8 RGB.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vpt.plots.grid import INK, PAPER, Colour, colour_map, shortened

Picture = NDArray[np.uint8]
Values = NDArray[np.float64]


def _colours(codes: str) -> Values:
    return np.array([list(bytes.fromhex(code)) for code in codes.split()], dtype=np.float64)


VIRIDIS = _colours("440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725")
"""Even steps look even, also to people who confuse colours: every 32nd colour of matplotlib's viridis (CC0)."""
SIGNED = _colours("053061 2a71b2 6bacd1 c2ddec f7f6f6 fbccb4 e48066 ba2832 67001f")
"""From blue over white to red: ColorBrewer's RdBu."""

_OPACITY = 0.6
_GREY: Colour = (95, 99, 104)
_GRID: Colour = (228, 230, 233)
_FRAME: Colour = (160, 164, 168)
_MARK: Colour = (255, 255, 255)
_GAP = 10
_TILE = 224  # pixels of the longer side of a map
_MATRIX = 224
_PATCH = 72
_PLOT = (420, 260)
_FINE = 3  # curves are drawn this many times larger, then averaged


@dataclass(frozen=True)
class MapRow:
    """A row of maps over one picture.

    Args:
        name: What stands at its left.
        maps: (rows, columns) in [0, 1] each, over the whole input.
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
        dots: By block, further values that are shown as small points.
        is_dashed: Whether it is, and then without points.
    """

    name: str
    values: Mapping[int, float]
    colour: Colour
    dots: Mapping[int, Sequence[float]] = field(default_factory=dict)
    is_dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the blocks of a backbone.

    Args:
        title: Over the chart.
        curves: The last one on top.
        num_blocks: Blocks of the backbone.
        is_share: Whether values are shares, written in percent.
    """

    title: str
    curves: Sequence[Curve]
    num_blocks: int
    is_share: bool = False


def over_picture(picture: Picture, values: Values, size: tuple[int, int]) -> Picture:
    """Lay the colours of a map over a picture, which is made grey and brought to the size of a tile.

    Args:
        picture: (h, w, 3).
        values: (rows, columns) in [0, 1], over the whole input; each keeps its square.
        size: H and W.

    Example:
        >>> over_picture(np.zeros((32, 64, 3), np.uint8), np.eye(2), (64, 64)).shape
        (112, 224, 3)
    """
    tile = _tile(picture)
    scale = tile.width / picture.shape[1], tile.height / picture.shape[0]
    whole = max(1, round(size[1] * scale[0])), max(1, round(size[0] * scale[1]))
    colours = Image.fromarray(colour_map(values, VIRIDIS)).resize(whole, Image.Resampling.NEAREST)
    return np.asarray(Image.blend(tile.convert("L").convert("RGB"), colours.crop((0, 0, *tile.size)), _OPACITY))


def maps_page(
    picture: Picture,
    size: tuple[int, int],
    lines: Sequence[str],
    headings: Sequence[str],
    rows: Sequence[MapRow],
    boxes: Sequence[tuple[Sequence[float], Colour]] = (),
) -> Picture:
    """A page of one picture: itself, what is to be said of it, and rows of maps over it.

    Args:
        picture: (h, w, 3).
        size: H and W of the input that the maps are of.
        lines: Text beside the picture, the first of it its title.
        headings: Over the columns of maps; there may be fewer than columns.
        rows: At least one.
        boxes: x1, y1, x2, y2 in pixels of the picture, and the colour of their frame.
    """
    tile, left, head, line_h = _tile(picture), 84, 28, 18
    beside, step = left + _TILE + 2 * _GAP, _TILE + _GAP
    body = max(tile.height, 40 + line_h * (len(lines) + 1))
    row_h = tile.height + line_h + _GAP
    width = left + max(3, *(len(row.maps) for row in rows)) * step
    canvas = Image.new("RGB", (width, 2 * _GAP + body + head + len(rows) * row_h), PAPER)
    draw = ImageDraw.Draw(canvas)
    canvas.paste(_framed(tile, boxes, tile.width / picture.shape[1]), (left, _GAP))
    _write_lines(canvas, lines, (beside, _GAP), line_h)
    _draw_scale(canvas, (beside, _GAP + 20 + line_h * len(lines)), VIRIDIS, "0", "upper end: below each map")
    top = 2 * _GAP + body
    for column, heading in enumerate(headings):
        draw.text((left + column * step, top), shortened(heading, _font(14), _TILE), fill=INK, font=_font(14))
    for number, row in enumerate(rows):
        y = top + head + number * row_h
        draw.text((_GAP, y + tile.height / 2), row.name, fill=INK, font=_font(14), anchor="lm")
        for column, (values, caption) in enumerate(zip(row.maps, row.captions, strict=True)):
            x = left + column * step
            canvas.paste(Image.fromarray(over_picture(picture, values, size)), (x, y))
            text = shortened(caption, _font(12), _TILE)
            draw.text((x, y + tile.height + 3), text, fill=_GREY, font=_font(12))
    return np.asarray(canvas)


def charts_picture(charts: Sequence[Chart]) -> Picture:
    """Charts side by side, each with its scale, its legend below."""
    drawn = [_draw_chart(chart) for chart in charts]
    canvas = Image.new("RGB", (sum(part.width for part in drawn), max(part.height for part in drawn)), PAPER)
    x = 0
    for part in drawn:
        canvas.paste(part, (x, 0))
        x += part.width
    return np.asarray(canvas)


def matrices_page(matrices: Sequence[Values], captions: Sequence[str], columns: int = 4) -> Picture:
    """Matrices of cosines (P, P), -1 blue, 0 white, 1 red, each with its caption of some lines, and the scale."""
    columns, line_h = min(columns, len(matrices)), 16
    text_h = line_h * max(caption.count("\n") + 1 for caption in captions) + 6
    step = _MATRIX + 2 * _GAP
    rows = math.ceil(len(matrices) / columns)
    canvas = Image.new("RGB", (max(columns * step, step) + 2 * _GAP, rows * (step + text_h) + 46), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (matrix, caption) in enumerate(zip(matrices, captions, strict=True)):
        x, y = 2 * _GAP + number % columns * step, _GAP + number // columns * (step + text_h)
        for line, text in enumerate(caption.split("\n")):
            draw.text((x, y + line * line_h), shortened(text, _font(13), _MATRIX), fill=INK, font=_font(13))
        cells = Image.fromarray(colour_map((np.clip(matrix, -1, 1) + 1) / 2, SIGNED))
        method = Image.Resampling.NEAREST if len(matrix) <= _MATRIX else Image.Resampling.BOX
        canvas.paste(cells.resize((_MATRIX, _MATRIX), method), (x, y + text_h))
        draw.rectangle((x - 1, y + text_h - 1, x + _MATRIX, y + text_h + _MATRIX), outline=_FRAME)
    _draw_scale(canvas, (2 * _GAP, canvas.height - 34), SIGNED, "-1", "1, cosine of two tokens")
    return np.asarray(canvas)


def patches_page(lines: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[Picture, str]]]]) -> Picture:
    """Rows of small pictures, each row with its name, each picture with its caption, some lines above.

    Args:
        lines: The title, and what is to be said.
        rows: Name, and pictures with captions, of any sizes; each row has as many.
    """
    left, step, row_h, line_h = 84, _PATCH + _GAP, _PATCH + 34, 18
    top = _GAP + 8 + line_h * len(lines) + _GAP
    width = left + max(max(len(pictures) for _, pictures in rows) * step, 560)
    canvas = Image.new("RGB", (width, top + len(rows) * row_h + _GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    _write_lines(canvas, lines, (_GAP, _GAP), line_h)
    for number, (name, pictures) in enumerate(rows):
        y = top + number * row_h
        draw.text((_GAP, y + _PATCH / 2), name, fill=INK, font=_font(14), anchor="lm")
        for column, (picture, caption) in enumerate(pictures):
            x = left + column * step
            canvas.paste(Image.fromarray(picture).resize((_PATCH, _PATCH), Image.Resampling.NEAREST), (x, y))
            draw.text((x, y + _PATCH + 3), shortened(caption, _font(11), step - 2), fill=_GREY, font=_font(11))
    return np.asarray(canvas)


def framed_patch(picture: Picture, box: tuple[int, int, int, int]) -> Picture:
    """A patch of a picture with as much around it on each side, and a frame that shows where it ends.

    Args:
        picture: (h, w, 3).
        box: Left, top, right and bottom of the patch in pixels; what is outside of the picture is white.
    """
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    around = Image.new("RGB", (3 * width, 3 * height), PAPER)
    around.paste(Image.fromarray(picture), (width - left, height - top))
    third = _PATCH // 3
    tile = around.resize((3 * third, 3 * third), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(tile)
    draw.rectangle((third - 2, third - 2, 2 * third + 1, 2 * third + 1), outline=INK)
    draw.rectangle((third - 1, third - 1, 2 * third, 2 * third), outline=_MARK)
    return np.asarray(tile)


def _tile(picture: Picture) -> Image.Image:
    """A picture in the size of a tile; pixels of a small one stay sharp."""
    h, w, _ = picture.shape
    scale = _TILE / max(h, w)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((max(1, round(w * scale)), max(1, round(h * scale))), method)


def _framed(tile: Image.Image, boxes: Sequence[tuple[Sequence[float], Colour]], scale: float) -> Image.Image:
    """A tile with frames of boxes, which are in pixels before it was scaled."""
    draw = ImageDraw.Draw(tile)
    for box, colour in boxes:
        x1, y1, x2, y2 = (scale * side for side in box)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
    return tile


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _write_lines(canvas: Image.Image, lines: Sequence[str], at: tuple[int, int], line_h: int) -> None:
    """Lines of text from a corner on, the first of them larger."""
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        font = _font(13 if number else 16)
        top = at[1] + (8 if number else 0) + number * line_h
        draw.text((at[0], top), shortened(line, font, canvas.width - at[0] - _GAP), fill=INK, font=font)


def _draw_scale(canvas: Image.Image, at: tuple[int, int], table: Values, low: str, high: str) -> None:
    """A bar of colours with what its ends mean."""
    draw = ImageDraw.Draw(canvas)
    bar = Image.fromarray(colour_map(np.linspace(0, 1, 120)[None].repeat(12, axis=0), table))
    x = at[0] + math.ceil(_font(12).getlength(low)) + 8
    draw.text((at[0], at[1] + 6), low, fill=_GREY, font=_font(12), anchor="lm")
    canvas.paste(bar, (x, at[1]))
    draw.text((x + bar.width + 8, at[1] + 6), high, fill=_GREY, font=_font(12), anchor="lm")


def _draw_chart(chart: Chart) -> Image.Image:
    """One chart: title, plot with scales, legend."""
    width, height = _PLOT
    left, top = 64, 40
    canvas = Image.new("RGB", (left + width + 24, top + height + 50 + 20 * len(chart.curves)), PAPER)
    every = [value for curve in chart.curves for value in _all_values(curve)]
    step = _nice_step(max(every, default=1.0))
    highest = step * max(1, math.ceil(1.02 * max(every, default=1.0) / step))
    highest = min(highest, 1.0) if chart.is_share else highest
    canvas.paste(_plot(chart, highest, step), (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 12), chart.title, fill=INK, font=_font(15))
    draw.rectangle((left - 1, top - 1, left + width, top + height), outline=_FRAME)
    for number in range(round(highest / step) + 1):
        y = top + height * (1 - number * step / highest)
        text = f"{100 * number * step:g} %" if chart.is_share else f"{number * step:g}"
        draw.text((left - 6, y), text, fill=INK, font=_font(12), anchor="rm")
    for block in range(0, chart.num_blocks, math.ceil(chart.num_blocks / 16)):
        draw.text((left + _across(chart, block), top + height + 6), str(block), fill=INK, font=_font(12), anchor="mt")
    draw.text((left + width / 2, top + height + 30), "block", fill=INK, font=_font(13), anchor="mm")
    for row, curve in enumerate(chart.curves):
        y = top + height + 52 + 20 * row
        for start in range(0, 24, 8) if curve.is_dashed else ():
            draw.line((left + start, y, left + start + 4, y), fill=curve.colour)
        if not curve.is_dashed:
            draw.line((left, y, left + 24, y), fill=curve.colour, width=3)
        draw.text((left + 32, y), curve.name, fill=INK, font=_font(13), anchor="lm")
    return canvas


def _plot(chart: Chart, highest: float, step: float) -> Image.Image:
    width, height = (_FINE * side for side in _PLOT)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for value in np.arange(step, highest - step / 2, step):
        y = height * (1 - value / highest)
        draw.line((0, y, width, y), fill=_GRID, width=_FINE)

    def at(block: int, value: float) -> tuple[float, float]:
        return _FINE * _across(chart, block), height * (1 - value / highest)

    for curve in chart.curves:
        for block, values in curve.dots.items():
            for value in values:
                draw.circle(at(block, value), 1.5 * _FINE, fill=_pale(curve.colour))
        known = {block: at(block, value) for block, value in curve.values.items() if math.isfinite(value)}
        pairs = [(known[block], known[block + 1]) for block in known if block + 1 in known]
        for one, other in pairs:
            for start, end in _dashes(one, other) if curve.is_dashed else [(one, other)]:
                draw.line((*start, *end), fill=curve.colour, width=_FINE * (1 if curve.is_dashed else 2))
        for point in () if curve.is_dashed else known.values():
            draw.circle(point, 4 * _FINE, fill=curve.colour)
    return canvas.reduce(_FINE)


def _all_values(curve: Curve) -> list[float]:
    values = [*curve.values.values(), *(value for dots in curve.dots.values() for value in dots)]
    return [value for value in values if math.isfinite(value)]


def _across(chart: Chart, block: int) -> float:
    """Pixels from the left of the plot to a block."""
    return (block + 0.5) / chart.num_blocks * _PLOT[0]


def _nice_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, so that at most six steps reach a value.

    Example:
        >>> _nice_step(0.23), _nice_step(10), _nice_step(0)
        (0.05, 2.0, 1.0)
    """
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest / 6))
    return float(next(power * factor for factor in (1, 2, 5, 10) if highest / (power * factor) <= 6))


def _dashes(one: tuple[float, float], other: tuple[float, float]) -> list[tuple[tuple[float, float], ...]]:
    length = math.dist(one, other)
    ends = np.linspace(one, other, 2 * max(1, round(length / (10 * _FINE))) + 1).tolist()
    return [(tuple(start), tuple(end)) for start, end in zip(ends[::2], ends[1::2], strict=False)]


def _pale(colour: Colour) -> Colour:
    red, green, blue = (round(0.4 * part + 0.6 * 255) for part in colour)
    return red, green, blue

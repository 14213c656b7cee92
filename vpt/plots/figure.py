"""Matplotlib figures as arrays, without pyplot and its global state. Colours are strings, such as "#188038"."""

import functools
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

INK = "#202124"
PALE = "#cdd0d4"

MAX_LETTERS = 500  # of a line that is drawn
_DPI = 72  # sizes of fonts and lines in points are pixels


def new_figure(width: int, height: int, **settings: Any) -> Figure:
    """A figure of a size in pixels."""
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, **settings)


def pixel_axes(width: int, height: int) -> Axes:
    """Axes over the whole of a new figure, in pixels from the upper left corner."""
    axes = new_figure(width, height).add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return axes


def show(axes: Axes, image: Pixels, left: float, top: float, width: float, height: float) -> None:
    """Show an image in a part of pixel axes."""
    axes.imshow(image, extent=(left, left + width, top + height, top), aspect="auto", interpolation="nearest")


def one_line(text: str, max_letters: int) -> str:
    """Text without line breaks, cut to a number of letters; letters that the font lacks are question marks."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    text = "".join(letter if ord(letter) in _letters() else "?" for letter in text)
    return text if len(text) <= max_letters else text[: max(1, max_letters - 1)].rstrip() + "…"


def fit(text: str, width: float, size: float) -> str:
    """The longest `one_line` of a text that fits into a width in pixels; at least one letter."""
    text = one_line(text[:MAX_LETTERS], MAX_LETTERS)
    if text_width(text, size) <= width:
        return text
    num = bisect_right(range(2, len(text)), width, key=lambda num: text_width(one_line(text, num), size)) + 1
    return one_line(text, num)


def text_width(text: str, size: float) -> float:
    """Pixels of a line in a font of a size, as the renderer rounds them."""
    renderer = cast(Any, RendererAgg)(1, 1, _DPI)
    return float(renderer.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def legible_names(classes: Sequence[str], max_letters: int = 200) -> list[str]:
    """Names of classes as `legible_name`."""
    return [legible_name(name, label, max_letters) for label, name in enumerate(classes)]


def legible_name(given: str, label: int, max_letters: int = 200) -> str:
    """The name of a class as `one_line`; "class 3" for one with letters that the font lacks, which would look alike."""
    given = given[: 2 * max_letters]
    name = one_line(given, max_letters)
    return f"class {label}" if name.count("?") > given.count("?") else name


@functools.cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def render(figure: Figure | SubFigure) -> Pixels:
    """Draw a figure, (H, W, 3); dollar signs are not formulas."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    canvas: Any = FigureCanvasAgg(cast(Figure, figure))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

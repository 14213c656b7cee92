"""Matplotlib figures as arrays, without pyplot and its global state. Colours are strings, such as "#188038"."""

import threading
import warnings
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

INK = "#202124"
PALE = "#cdd0d4"

_DPI = 72  # sizes of fonts and lines in points are pixels
_lock = threading.Lock()  # filters of warnings are global


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


def one_line(text: str, max_letters: float) -> str:
    """Text without line breaks and lone surrogates, cut to a number of letters."""
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= max_letters else text[: max(1, int(max_letters) - 1)].rstrip() + "…"


def render(figure: Figure | SubFigure) -> Pixels:
    """Draw a figure, (H, W, 3): dollar signs are not formulas, letters that the font does not have are boxes."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    canvas: Any = FigureCanvasAgg(cast(Figure, figure))
    with _lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""Matplotlib figures as arrays, without pyplot and its global state.

Coordinates of `pixel_axes` are pixels from the upper left corner. Colours are those of matplotlib, such as "#188038".
"""

import threading
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

INK = "#202124"
GREY = "#5f6368"
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


def place(
    axes: Axes, image: NDArray[Any], left: float, top: float, width: float, height: float, **settings: Any
) -> Any:
    """Show an image in a rectangle of pixel axes; enlarged pixels stay sharp."""
    settings.setdefault("interpolation", "nearest" if width >= image.shape[1] else "antialiased")
    return axes.imshow(image, extent=(left, left + width, top + height, top), aspect="auto", **settings)


def one_line(text: str, max_letters: float = 60) -> str:
    """Text without line breaks and lone surrogates, cut to a number of letters."""
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= max_letters else text[: max(1, int(max_letters) - 1)].rstrip() + "…"


def render(figure: Any) -> Pixels:
    """Draw a figure, or that of axes.

    Dollar signs are not read as formulas. A letter that the font does not have is drawn as a box.

    Returns:
        (H, W, 3) uint8.
    """
    figure = figure.get_figure() if isinstance(figure, Axes) else figure
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    canvas = FigureCanvasAgg(figure)
    with _lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def check_image(image: Pixels) -> None:
    """Raise ValueError if an image is not (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")

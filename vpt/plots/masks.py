"""Masks laid over images.

Shapes: H, W pixels. A label map is (H, W): numbers of classes, negative where ignored.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from vpt.plots.boxes import class_colour
from vpt.plots.figure import Pixels
from vpt.plots.grid import tile_grid

OPACITY = 0.55
MAX_IMAGES = 8
_TILE = 320  # pixels of the longer side of an image on a page
_WRONG = (217, 48, 37)


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Red, green and blue of each class, (K, 3)."""
    colours = [to_rgb(class_colour(label)) for label in range(num_classes)]
    return (np.array(colours) * 255).round().astype(np.uint8)


def draw_mask(image: Pixels, labels: NDArray[np.integer], num_classes: int) -> Pixels:
    """Lay the colours of classes over an image (H, W, 3); ignored pixels stay as they are.

    Example:
        >>> draw_mask(np.zeros((1, 2, 3), np.uint8), np.array([[0, -1]]), num_classes=1).tolist()
        [[[13, 38, 138], [0, 0, 0]]]
    """
    colours = palette(num_classes)[labels.clip(min=0)]
    mixed = (OPACITY * colours + (1 - OPACITY) * image).round().astype(np.uint8)
    return np.where((labels >= 0)[..., None], mixed, image)


def masks_page(
    images: Sequence[Pixels],
    truths: Sequence[NDArray[np.integer]],
    found: Sequence[NDArray[np.integer]],
    num_classes: int,
    captions: Sequence[str],
) -> Pixels:
    """Draw a row for each of the first 8 images: the image, its true mask, the mask found, and wrong pixels in red.

    Images (H, W, 3) uint8 of any sizes are resized to one length of the longer side.
    """
    tiles: list[Pixels] = []
    headings: list[str] = []
    for image, truth, labels, name in list(zip(images, truths, found, captions, strict=True))[:MAX_IMAGES]:
        wrong = np.where(((truth >= 0) & (truth != labels))[..., None], np.array(_WRONG, np.uint8), image)
        row = [image, draw_mask(image, truth, num_classes), draw_mask(image, labels, num_classes), wrong]
        scale = _TILE / max(image.shape)
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        tiles += [np.asarray(Image.fromarray(tile).resize(size)) for tile in row]
        headings += [name, "true", "found", "wrong"]
    return tile_grid(tiles, headings, columns=4)

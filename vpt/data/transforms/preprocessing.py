"""Preprocessing of a backbone: resize, crop or letterbox, and normalise.

Shapes: B batch, H, W pixels, n boxes. Boxes are corners x1, y1, x2, y2 in pixels, (n, 4) float32.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.data.images import Decoding

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}
CROP_MODES = ("center", "squash", "letterbox")
MAX_SIZE = 4096  # pixels; a preprocessing may come from an untrusted task file
MIN_CROP_PCT = 0.1
MAX_ENLARGED = 400  # times the pixels of the input, before the crop: at crop_pct 0.9 an image of 1 : 300

DECODING = {"background": "white", "range": None, "bands": None}  # the fields of `Decoding` and their defaults

Boxes = NDArray[np.float32]
NO_BOXES = np.zeros((0, 4), dtype=np.float32)


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone expects its images: everything between an image file and a normalised tensor.

    Args:
        size: (height, width) in pixels.
        mean: Three floats, of values in [0, 1].
        std: Three positive floats.
        interpolation: One of nearest, bilinear, bicubic, box, hamming, lanczos.
        crop_pct: The part of the resized image's side that the centre crop keeps, in [0.1, 1].
        crop_mode: "center" resizes the short side and keeps the aspect ratio; "squash" resizes both sides; "letterbox"
            keeps the whole image and its aspect ratio, as detection does, see `letterbox`.
        background, range, bands: How files become RGB images, see `vpt.data.images.Decoding`.

    Raises:
        ValueError: A value is out of range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"
    background: str = "white"
    range: tuple[float, float] | None = None
    bands: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        _check("size", self.size, _are_numbers(self.size, 2, int, 1, MAX_SIZE), f"2 integers in [1, {MAX_SIZE}]")
        _check("mean", self.mean, _are_numbers(self.mean, 3, float, -math.inf, math.inf), "3 finite numbers")
        _check("std", self.std, _are_numbers(self.std, 3, float, 1e-6, math.inf), "3 positive finite numbers")
        is_known = self.interpolation in tuple(INTERPOLATIONS)
        _check("interpolation", self.interpolation, is_known, ", ".join(INTERPOLATIONS))
        is_crop_pct = _are_numbers((self.crop_pct,), 1, float, MIN_CROP_PCT, 1.0)
        _check("crop_pct", self.crop_pct, is_crop_pct, f"a number in [{MIN_CROP_PCT}, 1]")
        _check("crop_mode", self.crop_mode, self.crop_mode in CROP_MODES, ", ".join(CROP_MODES))
        _check("background", self.background, isinstance(self.background, str), "the name of a colour")
        is_range = self.range is None or _are_numbers(self.range, 2, float, -math.inf, math.inf)
        _check("range", self.range, is_range, "null, or 2 finite numbers")
        _check(
            "bands", self.bands, self.bands is None or _are_numbers(self.bands, 3, int, 1, 4), "null, or 3 of 1 to 4"
        )
        assert self.decoding  # is checked when it is made

    @property
    def decoding(self) -> Decoding:
        """How the files of images are read."""
        return Decoding(background=self.background, range=self.range, bands=self.bands)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values: lists, numbers, strings; those in `DECODING` only if they differ from it."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if key not in DECODING or value != DECODING[key]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Read the result of `to_dict`; a `ValueError` if a key is missing or unknown, or a value is out of range."""
        keys = {field.name for field in fields(cls)}
        if not keys - set(DECODING) <= set(values) <= keys:
            missing, unknown = sorted(keys - set(DECODING) - set(values)), sorted(set(values) - keys)
            raise ValueError(f"preprocessing: missing keys {missing}, unknown keys {unknown}; allowed: {sorted(keys)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def _check(key: str, value: object, is_valid: bool, allowed: str) -> None:
    if not is_valid:
        raise ValueError(f"preprocessing.{key} is {value!r}; allowed: {allowed}")


def _are_numbers(values: object, count: int, number: type, low: float, high: float) -> bool:
    """Whether this is a tuple of `count` finite numbers in [low, high]."""
    if not isinstance(values, tuple) or len(values) != count:
        return False
    types = (int, float) if number is float else (number,)
    return all(type(value) in types and math.isfinite(value) and low <= value <= high for value in values)


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize so that the centre crop keeps `crop_pct` of the side, then crop to `size`; antialiased."""
    if preprocessing.crop_mode == "letterbox":
        return letterbox(image, NO_BOXES, preprocessing)[0]
    height, width = preprocessing.size
    resized = _resized_size(image.height, image.width, preprocessing)
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    interpolation = INTERPOLATIONS[preprocessing.interpolation]
    if resized[0] * resized[1] <= MAX_ENLARGED * height * width:
        return image.resize(resized[::-1], interpolation).crop((left, top, left + width, top + height))
    # A line: enlarged it could take all memory, so only the part that the crop keeps is computed.
    y, x = image.height / resized[0], image.width / resized[1]
    box = left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height)
    return image.resize((width, height), interpolation, box)


def _resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width before the crop, rounded as timm rounds them."""
    target_height, target_width = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.size)
    if preprocessing.crop_mode == "squash":
        return target_height, target_width
    if target_height != target_width:
        ratio = min(height / target_height, width / target_width)
        return round(height / ratio), round(width / ratio)
    if height <= width:
        return target_height, int(target_height * width / height)
    return int(target_width * height / width), target_width


def to_tensor(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """Normalise pixels (H, W, 3) uint8 to a float32 tensor (3, H, W)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return torch.tensor(pixels).permute(2, 0, 1).contiguous().float().div_(255).sub_(mean).div_(std)


def denormalise(images: Tensor, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Convert normalised images (B, 3, H, W) to pixels (B, H, W, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = images.detach().float().cpu().mul(std).add(mean).mul(255).round().clamp(0, 255)
    values: NDArray[np.uint8] = pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return values


def letterbox(image: Image.Image, boxes: Boxes, preprocessing: Preprocessing) -> tuple[Image.Image, Boxes]:
    """Resize an image, antialiased, to the largest size that fits into the input, at its upper left corner.

    The aspect ratio stays. The rest is filled with the mean colour, which is zero after normalisation but for rounding.
    `crop_pct` and `crop_mode` are not used: a detector sees the whole image. The boxes, (n, 4) float32, are in pixels
    of the image before, and of the input after; `unletterbox` inverts this.
    """
    resized, boxes = fit_into(image, boxes, preprocessing.size, preprocessing)
    filled = Image.new("RGB", preprocessing.size[::-1], mean_colour(preprocessing))
    filled.paste(resized, (0, 0))
    return filled, boxes


def unletterbox(boxes: Boxes, size: tuple[int, int], preprocessing: Preprocessing) -> Boxes:
    """Convert boxes (n, 4) in pixels of the input to pixels of the image of this height and width, and clip them to it.

    Example:
        >>> preprocessing = Preprocessing(size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> _, boxes = letterbox(Image.new("RGB", (100, 80)), np.float32([[10, 20, 30, 80]]), preprocessing)
        >>> unletterbox(boxes, (80, 100), preprocessing).round(3).tolist()
        [[10.0, 20.0, 30.0, 80.0]]
    """
    boxes = _scale(boxes, letterboxed_size(size, preprocessing), size)
    return boxes.clip(0, np.array([*size[::-1], *size[::-1]], dtype=np.float32))


def letterboxed_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width in the input of an image of this height and width; the rest of the input is filled."""
    return _fitted_size(size, preprocessing.size)


def mean_colour(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Red, green and blue of the mean, in 0 to 255."""
    return tuple(min(max(round(255 * value), 0), 255) for value in preprocessing.mean)


def _fitted_size(size: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    """The largest height and width of the same ratio that fit, at least a pixel each."""
    ratio = min(limit[0] / size[0], limit[1] / size[1])
    return max(round(size[0] * ratio), 1), max(round(size[1] * ratio), 1)


def fit_into(
    image: Image.Image, boxes: Boxes, limit: tuple[int, int], preprocessing: Preprocessing
) -> tuple[Image.Image, Boxes]:
    """Resize an image and its boxes to the largest size that fits into a height and width; the aspect ratio stays."""
    size = image.height, image.width
    fitted = _fitted_size(size, limit)
    return image.resize(fitted[::-1], INTERPOLATIONS[preprocessing.interpolation]), _scale(boxes, size, fitted)


def _scale(boxes: Boxes, old: tuple[int, int], new: tuple[int, int]) -> Boxes:
    """Boxes in an image of height and width `old` -> boxes in the same image of `new`; the ratio may differ."""
    x, y = new[1] / old[1], new[0] / old[0]
    # in float64, so that a box at the border stays there
    scaled: Boxes = (boxes * np.array([x, y, x, y])).astype(np.float32)
    return scaled

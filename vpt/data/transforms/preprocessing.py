"""From a picture to a tensor; the only file that knows albumentations.

`EvalTransform` is what the backbone was trained to see: resize, crop, normalise. `TrainTransform` puts random
augmentation between picture and tensor. Both are called with a picture and a seed, and nothing else decides the result:
not the global random state, not the number of workers, not the order of calls.

Shapes: B batch, C channels, H, W pixels.
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

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


CROP_MODES = ("center", "squash", "letterbox")


MAX_SIZE = 4096  # pixels; a preprocessing may come from a stranger's task file


MIN_CROP_PCT = 0.1


MAX_ENLARGED = (
    400  # times the pixels of the input that a picture may have before the crop; at crop_pct 0.9 one of 1 : 300
)


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone wants its pictures: everything between an RGB picture and a normalised tensor.

    Args:
        size: (height, width) in pixels.
        mean: Three floats, of values in [0, 1].
        std: Three positive floats.
        interpolation: One of nearest, bilinear, bicubic, box, hamming, lanczos.
        crop_pct: The part of the resized picture's side that the centre crop keeps, in [0.1, 1].
        crop_mode: "center" resizes the short side and keeps the aspect ratio; "squash" resizes both sides; "letterbox"
            keeps all of the picture and its aspect ratio, as detection does, see `letterbox`.

    Raises:
        ValueError: A value is out of range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        _check("size", self.size, _are_numbers(self.size, 2, int, 1, MAX_SIZE), f"2 integers in [1, {MAX_SIZE}]")
        _check("mean", self.mean, _are_numbers(self.mean, 3, float, -math.inf, math.inf), "3 finite numbers")
        _check("std", self.std, _are_numbers(self.std, 3, float, 1e-6, math.inf), "3 positive finite numbers")
        _check(
            "interpolation", self.interpolation, self.interpolation in tuple(INTERPOLATIONS), ", ".join(INTERPOLATIONS)
        )
        is_crop_pct = _are_numbers((self.crop_pct,), 1, float, MIN_CROP_PCT, 1.0)
        _check("crop_pct", self.crop_pct, is_crop_pct, f"a number in [{MIN_CROP_PCT}, 1]")
        _check("crop_mode", self.crop_mode, self.crop_mode in CROP_MODES, ", ".join(CROP_MODES))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them: lists, numbers, strings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Read what `to_dict` wrote; every field must be there, and nothing else.

        Raises:
            ValueError: A key is missing or unknown, or a value is out of range.
        """
        keys = {field.name for field in fields(cls)}
        if set(values) != keys:
            missing, unknown = sorted(keys - set(values)), sorted(set(values) - keys)
            raise ValueError(f"preprocessing: missing keys {missing}, unknown keys {unknown}; allowed: {sorted(keys)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def _check(key: str, value: object, is_valid: bool, allowed: str) -> None:
    if not is_valid:
        raise ValueError(f"preprocessing.{key} is {value!r}; allowed: {allowed}")


def _are_numbers(values: object, count: int, kind: type, low: float, high: float) -> bool:
    """Is this a tuple of `count` finite numbers in [low, high]?"""
    if not isinstance(values, tuple) or len(values) != count:
        return False
    kinds = (int, float) if kind is float else (kind,)
    return all(type(value) in kinds and math.isfinite(value) and low <= value <= high for value in values)


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
    # A line, not a picture: enlarged it could take all memory, so that only what is seen of it is computed.
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
    """Turn normalised images (B, 3, H, W) back into pixels (B, H, W, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = images.detach().float().cpu().mul(std).add(mean).mul(255).round().clamp(0, 255)
    values: NDArray[np.uint8] = pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return values


# Pictures with boxes. Boxes are corners x1, y1, x2, y2 in pixels, (n, 4) float32, n of them.

NO_BOXES = np.zeros((0, 4), dtype=np.float32)


Boxes = NDArray[np.float32]


def letterbox(image: Image.Image, boxes: Boxes, preprocessing: Preprocessing) -> tuple[Image.Image, Boxes]:
    """Resize a picture until it just fits into the input, antialiased, and put it into the upper left corner.

    The aspect ratio stays. The rest is filled with the mean of the backbone's pictures, so that it is zero to the
    backbone but for rounding. `crop_pct` and `crop_mode` are not used: a detector sees the whole picture.

    Args:
        image: An RGB picture.
        boxes: (n, 4) float32 in its pixels.
        preprocessing: Says the size of the input, the interpolation and the mean.

    Returns:
        The input picture, and the boxes (n, 4) float32 in its pixels; `unletterbox` takes boxes back.
    """
    height, width = preprocessing.size
    resized, boxes = _resize(image, boxes, _fitted_size(image.height, image.width, height, width), preprocessing)
    filled = Image.new("RGB", (width, height), _mean_colour(preprocessing))
    filled.paste(resized, (0, 0))
    return filled, boxes


def unletterbox(boxes: Boxes, size: tuple[int, int], preprocessing: Preprocessing) -> Boxes:
    """Take boxes (n, 4) from the pixels of the input back to those of a picture, and clip them to it.

    Args:
        boxes: In pixels of the input.
        size: Height and width of the picture before `letterbox`.
        preprocessing: As `letterbox` had it.

    Example:
        >>> preprocessing = Preprocessing(size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> _, boxes = letterbox(Image.new("RGB", (100, 80)), np.float32([[10, 20, 30, 80]]), preprocessing)
        >>> unletterbox(boxes, (80, 100), preprocessing).round(3).tolist()
        [[10.0, 20.0, 30.0, 80.0]]
    """
    height, width = size
    boxes = _scale(boxes, _fitted_size(height, width, *preprocessing.size), size)
    return boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))


def letterboxed_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width that a picture of this height and width has in the input; the rest of the input is fill."""
    return _fitted_size(*size, *preprocessing.size)


def _mean_colour(preprocessing: Preprocessing) -> tuple[int, ...]:
    return tuple(min(max(round(255 * value), 0), 255) for value in preprocessing.mean)


def _fitted_size(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """The largest height and width of the same ratio that fit, at least a pixel each."""
    ratio = min(max_height / height, max_width / width)
    return max(round(height * ratio), 1), max(round(width * ratio), 1)


def _resize(
    image: Image.Image, boxes: Boxes, size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[Image.Image, Boxes]:
    """Resize a picture to a height and width, and its boxes with it."""
    resized = image.resize(size[::-1], INTERPOLATIONS[preprocessing.interpolation])
    return resized, _scale(boxes, (image.height, image.width), size)


def _scale(boxes: Boxes, old: tuple[int, int], new: tuple[int, int]) -> Boxes:
    """Boxes in a picture of height and width `old` -> boxes in the same one of `new`; sides may differ in ratio."""
    x, y = new[1] / old[1], new[0] / old[0]
    scaled: Boxes = (boxes * np.array([x, y, x, y])).astype(np.float32)  # by float64, so that a border stays one
    return scaled

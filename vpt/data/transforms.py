"""From a picture to a tensor; the only file that knows albumentations.

`EvalTransform` is what the backbone was trained to see: resize, crop, normalise. `TrainTransform` puts random
augmentation between picture and tensor. Both are called with a picture and a seed, and nothing else decides the result:
not the global random state, not the number of workers, not the order of calls.

Shapes: B batch, C channels, H, W pixels.
"""

import inspect
import math
import os
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from types import ModuleType
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

STEP_FORM = "write {name: HorizontalFlip, p: 0.5}"

# Bases, and what takes functions or makes no 8-bit picture.
NOT_FOR_AUGMENT = {
    "BasicTransform", "DualTransform", "FromFloat", "ImageOnlyTransform", "Lambda", "Normalize", "ToFloat",
    "ToTensor3D", "ToTensorV2", "Transform3D",
}  # fmt: skip


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


class EvalTransform:
    """Resize, crop and normalise, as timm does for evaluation.

    Args:
        preprocessing: What the backbone wants.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> transform = EvalTransform(Preprocessing(size=(64, 64), mean=half, std=half))
        >>> transform(Image.new("RGB", (100, 80))).shape
        torch.Size([3, 64, 64])
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Turn an RGB picture into a normalised float32 tensor (3, H, W); the seed is not used."""
        return to_tensor(np.asarray(resize_and_crop(image, self.preprocessing)), self.preprocessing)

    def __repr__(self) -> str:
        return f"EvalTransform({self.preprocessing})"


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


class TrainTransform:
    """Random augmentation by albumentations, then normalisation.

    A list whose steps always end at `preprocessing.size` (a `RandomResizedCrop`, say) gets the picture as it is;
    before any other list comes the resize and crop of evaluation. With an empty list this is `EvalTransform`.

    Args:
        preprocessing: What the backbone wants.
        augment: Steps in order, each `{"name": a transform of albumentations, **its arguments}`. `RandomResizedCrop`
            takes its size from `preprocessing`, and averages areas when it shrinks a picture.

    Raises:
        ValueError: A name or an argument that albumentations does not know, or a value that it refuses.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> augment = [{"name": "RandomResizedCrop", "scale": [0.3, 1.0]}, {"name": "HorizontalFlip", "p": 0.5}]
        >>> transform = TrainTransform(Preprocessing(size=(64, 64), mean=half, std=half), augment)
        >>> transform(Image.new("RGB", (100, 80)), seed=7).shape
        torch.Size([3, 64, 64])
    """

    def __init__(self, preprocessing: Preprocessing, augment: Sequence[Mapping[str, Any]] = ()) -> None:
        self.preprocessing = preprocessing
        self._steps = [_build_step(step, f"augment.transforms[{i}]", preprocessing) for i, step in enumerate(augment)]
        self.augment = tuple(dict(step) for step in augment)
        self._crops = self._always_crops()

    @property
    def is_random(self) -> bool:
        """Whether a picture may look different in each epoch; what a step draws is not known, so any step counts."""
        return bool(self._steps)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Augment an RGB picture; the normalised float32 tensor (3, H, W) depends on nothing but picture and seed."""
        if not self._crops:
            image = resize_and_crop(image, self.preprocessing)
        pixels = self._apply(self._steps, np.asarray(image), seed)
        shape = (*self.preprocessing.size, 3)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            raise ValueError(
                f"augment.transforms gave {pixels.dtype} pixels of shape {pixels.shape}, not uint8 of {shape}; "
                "add {name: RandomResizedCrop}, or set p: 1 on the step that crops"
            )
        return to_tensor(pixels, self.preprocessing)

    def __repr__(self) -> str:
        return f"TrainTransform({self.preprocessing}, augment={list(self.augment)})"

    def _always_crops(self) -> bool:
        """Do the steps that are always taken turn a picture of another size into one of `size`?"""
        height, width = self.preprocessing.size
        certain = [step for step in self._steps if step.p >= 1]
        pixels = np.zeros((2 * height + 1, 3 * width + 1, 3), dtype=np.uint8)
        return self._apply(certain, pixels, seed=0).shape[:2] == (height, width)

    def _apply(self, steps: Sequence[Any], pixels: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Take the steps on pixels (H, W, 3), all of them drawing from two generators made of the seed."""
        if steps:
            import cv2

            cv2.setNumThreads(0)  # a worker is one process of many; threads of its own would slow them all
        # One pair of generators for all steps: with `set_random_seed` each step would own equal ones, so that a flip
        # and a blur of equal probability always happened together.
        generators = np.random.default_rng(seed), random.Random(seed)
        for step in steps:
            step.set_random_state(*generators)
            try:
                pixels = step(image=pixels)["image"]
            except Exception as error:  # albumentations and OpenCV raise almost anything
                raise ValueError(
                    f"augment.transforms: {type(step).__name__} cannot be applied to "
                    f"{pixels.shape[0]} x {pixels.shape[1]} pixels ({error!r}); change its arguments, or remove it"
                ) from error
        return pixels


def _build_step(step: object, where: str, preprocessing: Preprocessing) -> Any:
    """Build one transform of albumentations; its warnings about arguments are errors here."""
    if not isinstance(step, Mapping):
        raise ValueError(f"{where} is {step!r}, no mapping; {STEP_FORM}")
    arguments = dict(step)
    name = arguments.pop("name", None)
    transform = _find_transform(name, where)
    allowed = list(inspect.signature(transform).parameters)
    for key in arguments:
        if key not in allowed:
            hint = _did_you_mean(str(key), allowed)
            raise ValueError(f"{where}: {name} has no argument {key!r}{hint}; it has {allowed}")
    if name == "RandomResizedCrop":
        arguments = {"size": preprocessing.size, "area_for_downscale": "image"} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return transform(**arguments)
        except (TypeError, ValueError, UserWarning) as error:
            raise ValueError(f"{where}: {name} refuses {arguments}: {_one_line(error)}") from error


def _find_transform(name: object, where: str) -> Any:
    """Look a transform up by name; nothing but a transform of albumentations is ever found."""
    library = _albumentations()
    valid = [
        key
        for key, value in vars(library).items()
        if isinstance(value, type) and issubclass(value, library.BasicTransform) and key not in NOT_FOR_AUGMENT
    ]
    if name not in valid:
        raise ValueError(
            f"{where}: {name!r} is no transform of albumentations{_did_you_mean(str(name), valid)}; {STEP_FORM}"
        )
    return getattr(library, str(name))


def _one_line(error: Exception) -> str:
    """What an error says, in one line: pydantic's has many, the first a count and the last a link."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not re.match(r"\d+ validation error|For further information", line))


def _did_you_mean(word: str, valid: Sequence[str]) -> str:
    nearest = get_close_matches(word, valid, n=1, cutoff=0.3)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _albumentations() -> ModuleType:
    """Import albumentations, late because it takes seconds, and without its query for a newer version."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    return albumentations  # type: ignore[no-any-return]


# Pictures with boxes. Boxes are corners x1, y1, x2, y2 in pixels, (n, 4) float32, n of them.

NO_BOXES = np.zeros((0, 4), dtype=np.float32)
MIN_VISIBILITY = 0.2
MIN_SIDE = 1.0  # pixels
ROOM = 2  # how many times the input a picture may be large while it is augmented

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


class DetectionEvalTransform:
    """Letterbox and normalise: the same square for every picture, in training, evaluation and use.

    Args:
        preprocessing: What the backbone wants.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> transform = DetectionEvalTransform(Preprocessing(size=(64, 64), mean=half, std=half))
        >>> image, boxes, kept = transform(Image.new("RGB", (100, 80)), np.float32([[0, 0, 50, 80]]))
        >>> image.shape, boxes.tolist(), kept.tolist()
        (torch.Size([3, 64, 64]), [[0.0, 0.0, 32.0, 51.0]], [0])
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(
        self, image: Image.Image, boxes: Boxes = NO_BOXES, seed: int = 0
    ) -> tuple[Tensor, Boxes, NDArray[np.int64]]:
        """Turn an RGB picture into a normalised float32 tensor (3, H, W).

        Returns:
            The tensor; the boxes (n, 4) float32 in its pixels; their indices (n,) int64, since all of them stay. The
            seed is not used.
        """
        image, boxes = letterbox(image, boxes, self.preprocessing)
        return to_tensor(np.asarray(image), self.preprocessing), boxes, np.arange(len(boxes))

    def __repr__(self) -> str:
        return f"DetectionEvalTransform({self.preprocessing})"


class DetectionTrainTransform:
    """Random augmentation of a picture and its boxes by albumentations, then letterbox and normalisation.

    Steps see the picture as it is, or shrunk to twice the input if it is larger, so that a crop can enlarge what it
    keeps. A box is clipped to what is left of it after each step, and goes with less than `min_visibility` of its area,
    or under a pixel. With an empty list this is `DetectionEvalTransform`.

    Args:
        preprocessing: What the backbone wants.
        augment: Steps in order, each `{"name": a transform of albumentations, **its arguments}`. A step that fills what
            is not picture takes a grey as bright as the mean, if it is given no `fill`.
        min_visibility: The part of a box that must be left of it for the box to stay, in [0, 1).

    Raises:
        ValueError: A name or an argument that albumentations does not know, a value that it refuses, or a step that
            would leave the boxes where they are.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> augment = [
        ...     {"name": "ColorJitter", "p": 0.5},  # first, so that it leaves the grey of the next ones alone
        ...     {"name": "HorizontalFlip", "p": 0.5},
        ...     {"name": "CropAndPad", "percent": [-0.25, 0.25], "keep_size": False},  # twice to 2/3 as large
        ... ]
        >>> transform = DetectionTrainTransform(Preprocessing(size=(64, 64), mean=half, std=half), augment)
        >>> image, boxes, kept = transform(Image.new("RGB", (100, 80)), np.float32([[20, 20, 50, 60]]), seed=7)
        >>> image.shape, boxes.shape, kept.tolist()
        (torch.Size([3, 64, 64]), (1, 4), [0])
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        augment: Sequence[Mapping[str, Any]] = (),
        min_visibility: float = MIN_VISIBILITY,
    ) -> None:
        if not 0 <= min_visibility < 1:
            raise ValueError(f"augment.min_visibility is {min_visibility}; allowed: 0 <= min_visibility < 1")
        self.preprocessing = preprocessing
        self.min_visibility = min_visibility
        self._steps = [
            _build_box_step(step, f"augment.transforms[{i}]", preprocessing, min_visibility)
            for i, step in enumerate(augment)
        ]
        self.augment = tuple(dict(step) for step in augment)

    @property
    def is_random(self) -> bool:
        """Whether a picture may look different in each epoch."""
        return bool(self._steps)

    def __call__(self, image: Image.Image, boxes: Boxes, seed: int) -> tuple[Tensor, Boxes, NDArray[np.int64]]:
        """Augment an RGB picture and its boxes; the result depends on nothing but these and the seed.

        Returns:
            The normalised float32 tensor (3, H, W); the boxes (m, 4) float32 that stay, in its pixels; the indices (m,)
            int64 that they had.
        """
        kept = np.arange(len(boxes))
        if self._steps:
            image, boxes = self._shrink(image, boxes)
            # The fifth column goes with its box; albumentations would turn labels into floats in the same way.
            pixels, rows = self._apply(np.asarray(image), np.column_stack([boxes, kept]), seed)
            image, boxes, kept = Image.fromarray(pixels), rows[:, :4].astype(np.float32), rows[:, 4].astype(np.int64)
        image, boxes = letterbox(image, boxes, self.preprocessing)
        return to_tensor(np.asarray(image), self.preprocessing), boxes, kept

    def __repr__(self) -> str:
        return f"DetectionTrainTransform({self.preprocessing}, augment={list(self.augment)})"

    def _shrink(self, image: Image.Image, boxes: Boxes) -> tuple[Image.Image, Boxes]:
        height, width = (ROOM * side for side in self.preprocessing.size)
        if image.height <= height and image.width <= width:
            return image, boxes
        return _resize(image, boxes, _fitted_size(image.height, image.width, height, width), self.preprocessing)

    def _apply(
        self, pixels: NDArray[np.uint8], rows: NDArray[Any], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Take the steps on pixels (H, W, 3) and rows (n, 5), all drawing from two generators made of the seed."""
        import cv2

        cv2.setNumThreads(0)  # a worker is one process of many; threads of its own would slow them all
        generators = np.random.default_rng(seed), random.Random(seed)
        for name, step in self._steps:
            step.set_random_state(*generators)
            try:
                result = step(image=pixels, bboxes=rows)
            except Exception as error:  # albumentations and OpenCV raise almost anything
                raise ValueError(
                    f"augment.transforms: {name} cannot be applied to {pixels.shape[0]} x {pixels.shape[1]} pixels and "
                    f"{len(rows)} boxes ({error!r}); change its arguments, or remove it"
                ) from error
            pixels, rows = result["image"], np.reshape(result["bboxes"], (-1, 5))
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise ValueError(
                    f"augment.transforms: {name} gave {pixels.dtype} pixels of shape {pixels.shape}, not uint8 of "
                    "(height, width, 3); change its arguments, or remove it"
                )
        return pixels, rows


def _build_box_step(step: object, where: str, preprocessing: Preprocessing, min_visibility: float) -> tuple[str, Any]:
    """Build one transform of albumentations that takes boxes along: its name, and what to call."""
    built = _build_step(_with_fill(step, where, preprocessing), where, preprocessing)
    name = type(built).__name__
    library = _albumentations()
    if not isinstance(built, library.DualTransform):
        return name, built
    if "bboxes" not in built.available_keys:
        raise ValueError(f"{where}: {name} leaves boxes where they are; remove it")
    parameters = library.BboxParams(
        format="pascal_voc",
        clip=True,
        filter_invalid_bboxes=True,
        min_visibility=min_visibility,
        min_width=MIN_SIDE,
        min_height=MIN_SIDE,
    )
    return name, library.Compose([built], bbox_params=parameters)


def _with_fill(step: object, where: str, preprocessing: Preprocessing) -> object:
    """The step with grey as its `fill`, if it moves pixels and knows that argument."""
    if not isinstance(step, Mapping):
        return step
    transform = _find_transform(step.get("name"), where)
    takes_fill = "fill" in inspect.signature(transform).parameters
    if not takes_fill or not issubclass(transform, _albumentations().DualTransform):
        return step
    # One number, and no colour: CropAndPad would draw one of the three, for all channels.
    return {"fill": round(sum(_mean_colour(preprocessing)) / 3)} | dict(step)


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

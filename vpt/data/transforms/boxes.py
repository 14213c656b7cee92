"""From a picture to a tensor; the only file that knows albumentations.

`EvalTransform` is what the backbone was trained to see: resize, crop, normalise. `TrainTransform` puts random
augmentation between picture and tensor. Both are called with a picture and a seed, and nothing else decides the result:
not the global random state, not the number of workers, not the order of calls.

Shapes: B batch, C channels, H, W pixels.
"""

import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.data.transforms.preprocessing import (
    NO_BOXES,
    Boxes,
    Preprocessing,
    _fitted_size,
    _mean_colour,
    _resize,
    letterbox,
    to_tensor,
)
from vpt.data.transforms.steps import _albumentations, _build_step, _find_transform

MIN_VISIBILITY = 0.2


MIN_SIDE = 1.0  # pixels


ROOM = 2  # how many times the input a picture may be large while it is augmented


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

"""Transforms of images with boxes for detection, for evaluation and for training.

As in `images.py`, the result depends on the image, its boxes and the seed alone.

Shapes: H, W pixels, n boxes before and m after a transform.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.data.transforms.preprocessing import NO_BOXES, Boxes, Preprocessing, fit_into, letterbox, to_tensor
from vpt.data.transforms.steps import Augmentation

MIN_VISIBILITY = 0.2
ROOM = 2  # an image is shrunk to this multiple of the input before it is augmented


class DetectionEvalTransform:
    """Letterbox and normalise: the same square for every image.

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
        """The normalised float32 tensor (3, H, W), the boxes (n, 4) float32 in its pixels, their indices (n,) int64.

        The seed is not used.
        """
        image, boxes = letterbox(image, boxes, self.preprocessing)
        return to_tensor(np.asarray(image), self.preprocessing), boxes, np.arange(len(boxes))

    def __repr__(self) -> str:
        return f"DetectionEvalTransform({self.preprocessing})"


class DetectionTrainTransform:
    """Random augmentation of an image and its boxes by albumentations, then letterbox and normalisation.

    The steps get the original image, or one shrunk to twice the input if it is larger, so that a crop can enlarge its
    content. A box is clipped after each step, and dropped with less than `min_visibility` of its area, or a side under
    a pixel. With an empty list this is `DetectionEvalTransform`. `augment` has the steps in order, as `TrainTransform`.
    Empty areas are filled with a grey as bright as the mean, unless a step has `fill`.

    Raises:
        ValueError: A `min_visibility` outside of [0, 1), an unknown name or argument, a value that albumentations
            refuses, or a step that would not move boxes with the image.

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
            raise ValueError(f"min_visibility={min_visibility}: must be in [0, 1)")
        self.preprocessing = preprocessing
        self.augment = Augmentation(augment, preprocessing, min_visibility)

    @property
    def is_random(self) -> bool:
        """Whether an image may differ between epochs."""
        return bool(self.augment.steps)

    def __call__(self, image: Image.Image, boxes: Boxes, seed: int) -> tuple[Tensor, Boxes, NDArray[np.int64]]:
        """Augment an RGB image and its boxes; the result depends on these and the seed alone.

        Returned are the normalised float32 tensor (3, H, W), the boxes (m, 4) float32 that remain, in its pixels, and
        the indices (m,) int64 that they had.
        """
        kept = np.arange(len(boxes))
        if self.augment.steps:
            height, width = (ROOM * side for side in self.preprocessing.size)
            if image.height > height or image.width > width:
                image, boxes = fit_into(image, boxes, (height, width), self.preprocessing)
            # The fifth column stays with its box; albumentations would turn labels into floats in the same way.
            pixels, rows = self.augment(np.asarray(image), seed, np.column_stack([boxes, kept]))
            image, boxes, kept = Image.fromarray(pixels), rows[:, :4].astype(np.float32), rows[:, 4].astype(np.int64)
        image, boxes = letterbox(image, boxes, self.preprocessing)
        return to_tensor(np.asarray(image), self.preprocessing), boxes, kept

    def __repr__(self) -> str:
        return f"DetectionTrainTransform({self.preprocessing}, augment={self.augment.config})"

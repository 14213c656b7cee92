"""Transforms of images for classification, for evaluation and for training.

The result depends on the image and the seed alone: not on the global random state, the number of loader processes or
the order of calls.

Shapes: H, W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vpt.data.transforms.preprocessing import Preprocessing, resize_and_crop, to_tensor
from vpt.data.transforms.steps import Augmentation


class EvalTransform:
    """Resize, crop and normalise, as timm does for evaluation.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> transform = EvalTransform(Preprocessing(size=(64, 64), mean=half, std=half))
        >>> transform(Image.new("RGB", (100, 80))).shape
        torch.Size([3, 64, 64])
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Convert an RGB image to a normalised float32 tensor (3, H, W); the seed is not used."""
        return to_tensor(np.asarray(resize_and_crop(image, self.preprocessing)), self.preprocessing)

    def __repr__(self) -> str:
        return f"EvalTransform({self.preprocessing})"


class TrainTransform:
    """Random augmentation by albumentations, then normalisation.

    If the steps always end at `preprocessing.size` (a `RandomResizedCrop`, say), they get the original image; otherwise
    the resize and crop of evaluation come first. With an empty list this is `EvalTransform`. `augment` has the steps in
    order, each `{"name": a transform of albumentations, **its arguments}`. `RandomResizedCrop` takes its size from
    `preprocessing`, and averages areas when it shrinks an image.

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
        self.augment = Augmentation(augment, preprocessing)
        height, width = preprocessing.size
        other_size = np.zeros((2 * height + 1, 3 * width + 1, 3), dtype=np.uint8)
        self._crops = self.augment(other_size, 0, only_certain=True)[0].shape[:2] == (height, width)

    @property
    def is_random(self) -> bool:
        """Whether an image may differ between epochs; any step counts."""
        return bool(self.augment.steps)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Augment an RGB image; the normalised float32 tensor (3, H, W) depends on image and seed alone."""
        if not self._crops:
            image = resize_and_crop(image, self.preprocessing)
        pixels, _ = self.augment(np.asarray(image), seed)
        shape = (*self.preprocessing.size, 3)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            raise ValueError(
                f"augment: returned {pixels.dtype} pixels of shape {pixels.shape}, not uint8 of {shape}; "
                "add {name: RandomResizedCrop}, or set p: 1 on the step that crops"
            )
        return to_tensor(pixels, self.preprocessing)

    def __repr__(self) -> str:
        return f"TrainTransform({self.preprocessing}, augment={self.augment.config})"

"""Transforms of images with masks for segmentation, for evaluation and for training.

As in `images.py`, the result depends on the image, its mask and the seed alone. Masks are resized to the nearest value.

Shapes: H, W pixels. A label map is (H, W) int16, see `vpt.data.masks`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vpt.data.masks import IGNORE, LabelMap
from vpt.data.transforms.boxes import ROOM
from vpt.data.transforms.preprocessing import NO_BOXES, Preprocessing, fit_into, letterbox, letterboxed_size, to_tensor
from vpt.data.transforms.steps import Augmentation


class SegmentationEvalTransform:
    """Letterbox and normalise: the same square for every image; the mask of the filled part is ignored.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> transform = SegmentationEvalTransform(Preprocessing(size=(64, 64), mean=half, std=half))
        >>> image, mask = transform(Image.new("RGB", (100, 80)), np.ones((80, 100), np.int16))
        >>> image.shape, mask.shape, mask[50, 0], mask[51, 0]
        (torch.Size([3, 64, 64]), (64, 64), np.int16(1), np.int16(-1))
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: Image.Image, mask: LabelMap, seed: int = 0) -> tuple[Tensor, LabelMap]:
        """The normalised float32 tensor (3, H, W), and the label map of its size; the seed is not used."""
        filled = letterbox(image, NO_BOXES, self.preprocessing)[0]
        return to_tensor(np.asarray(filled), self.preprocessing), letterbox_mask(mask, self.preprocessing)

    def __repr__(self) -> str:
        return f"SegmentationEvalTransform({self.preprocessing})"


class SegmentationTrainTransform:
    """Random augmentation of an image and its mask by albumentations, then letterbox and normalisation.

    The steps get the original image, or one shrunk to twice the input if it is larger. What a step fills in is ignored
    in the mask. With an empty list this is `SegmentationEvalTransform`.

    Raises:
        ValueError: An unknown name or argument, a value that albumentations refuses, or a step that would not move the
            mask with the image.
    """

    def __init__(self, preprocessing: Preprocessing, augment: Sequence[Mapping[str, Any]] = ()) -> None:
        self.preprocessing = preprocessing
        self.augment = Augmentation(augment, preprocessing, moves_masks=True)

    @property
    def is_random(self) -> bool:
        """Whether an image may differ between epochs."""
        return bool(self.augment.steps)

    def __call__(self, image: Image.Image, mask: LabelMap, seed: int) -> tuple[Tensor, LabelMap]:
        """Augment an RGB image and its mask; the result depends on these and the seed alone."""
        if self.augment.steps:
            height, width = (ROOM * side for side in self.preprocessing.size)
            if image.height > height or image.width > width:
                image, _ = fit_into(image, NO_BOXES, (height, width), self.preprocessing)
                mask = resize_mask(mask, (image.height, image.width))
            pixels, mask = self.augment(np.asarray(image), seed, mask)
            image = Image.fromarray(pixels)
        filled = letterbox(image, NO_BOXES, self.preprocessing)[0]
        return to_tensor(np.asarray(filled), self.preprocessing), letterbox_mask(mask, self.preprocessing)

    def __repr__(self) -> str:
        return f"SegmentationTrainTransform({self.preprocessing}, augment={self.augment.config})"


def letterbox_mask(mask: LabelMap, preprocessing: Preprocessing) -> LabelMap:
    """A label map as `letterbox` resizes its image; what is filled is `IGNORE`."""
    height, width = letterboxed_size((mask.shape[0], mask.shape[1]), preprocessing)
    filled = np.full(preprocessing.size, IGNORE, np.int16)
    filled[:height, :width] = resize_mask(mask, (height, width))
    return filled


def resize_mask(mask: LabelMap, size: tuple[int, int]) -> LabelMap:
    """Resize a label map to a height and width, by nearest values."""
    resized = Image.fromarray(mask.astype(np.int32)).resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(resized).astype(np.int16)

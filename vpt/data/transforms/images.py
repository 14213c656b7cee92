"""From a picture to a tensor; the only file that knows albumentations.

`EvalTransform` is what the backbone was trained to see: resize, crop, normalise. `TrainTransform` puts random
augmentation between picture and tensor. Both are called with a picture and a seed, and nothing else decides the result:
not the global random state, not the number of workers, not the order of calls.

Shapes: B batch, C channels, H, W pixels.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.data.transforms.preprocessing import Preprocessing, resize_and_crop, to_tensor
from vpt.data.transforms.steps import _build_step


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

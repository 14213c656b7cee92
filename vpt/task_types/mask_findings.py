"""Problems with masks that show only over the whole data set: classes without pixels, and cells that are too large."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from vpt.build import spread
from vpt.data.masks import SegmentationSamples
from vpt.data.transforms.masks import letterbox_mask
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.engine.metrics.segmentation import SegmentationMetrics
from vpt.predictions.masks import to_label_map
from vpt.task_types.findings import Finding, Level

WEIGHT_RANGE = 0.1, 10.0  # of a class
LOW_CEILING = 0.8  # mIoU
NUM_IMAGES = 50  # that `grid_ceiling` looks at


def find_mask_problems(
    splits: Mapping[str, Any], preprocessing: Preprocessing | None, strides: tuple[int, ...]
) -> Iterator[Finding]:
    """Classes without a pixel in train, and the mIoU that the cells of the head allow on val."""
    train = splits["train"]
    for name, part in zip(train.classes, pixel_shares(train), strict=True):
        if part == 0:
            yield Finding(Level.warning, "empty_class", f"no pixel is {name}, so it is never learned", "train")
    if preprocessing is not None and "val" in splits:
        ceiling, (height, width) = grid_ceiling(splits["val"], preprocessing, min(strides)), preprocessing.size
        message = (
            f"at an input of {width} x {height} px, cells of {min(strides)} px can show these masks with a mIoU of "
            f"{100 * ceiling:.1f} % at most; a larger backbone.img_size raises it"
        )
        yield Finding(Level.warning if ceiling < LOW_CEILING else Level.note, "ceiling", message, "val")


def pixel_shares(samples: SegmentationSamples) -> NDArray[np.float64]:
    """Part of the valid pixels that each class has, (K,)."""
    counts = samples.class_counts()
    shares: NDArray[np.float64] = counts / max(int(counts.sum()), 1)
    return shares


def class_weights(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (K,) of classes with these shares of pixels: the median share over the own one, in [0.1, 10].

    They are scaled to a mean of 1 over pixels; a class without pixels has 0. This is the median frequency balancing of
    Eigen and Fergus (2015), https://arxiv.org/abs/1411.4734, section 6.3.2, with limits.

    Example:
        >>> class_weights(np.array([0.8, 0.2, 0.0])).round(3).tolist()
        [0.625, 2.5, 0.0]
    """
    is_present = shares > 0
    weights = np.zeros(len(shares))
    weights[is_present] = (np.median(shares[is_present]) / shares[is_present]).clip(*WEIGHT_RANGE)
    scaled: NDArray[np.float64] = weights / (weights * shares).sum()
    return scaled


def grid_ceiling(samples: SegmentationSamples, preprocessing: Preprocessing, stride: int) -> float:
    """The mIoU of a model that knows the share of each class in each cell, over at most 50 images.

    A cell is a square of `stride` pixels of the input; the shares are interpolated as logits are.
    """
    num_classes = len(samples.classes)
    metrics = SegmentationMetrics(num_classes)
    for index in spread(len(samples), NUM_IMAGES):
        mask = samples.masks(index)
        small = torch.tensor(letterbox_mask(mask, preprocessing)).long()
        shares = F.one_hot(small.clamp(min=0), num_classes).movedim(-1, 0).float() * (small >= 0)
        cells = F.avg_pool2d(shares[None], stride)[0]
        labels, _ = to_label_map(cells, (mask.shape[0], mask.shape[1]), preprocessing)
        metrics.update(mask, labels.numpy())
    return metrics.compute()["miou"]

"""Metrics of segmentation, fractions in [0, 1], from one confusion matrix over all valid pixels of a split.

Shapes: H, W pixels, K classes.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def confusion_of(truth: NDArray[np.integer], found: NDArray[np.integer], num_classes: int) -> Counts:
    """Counts of pixels, (K, K): rows are true classes, columns found ones; pixels whose truth is negative do not count.

    Example:
        >>> confusion_of(np.array([[0, 1, -1]]), np.array([[0, 0, 1]]), num_classes=2).tolist()
        [[1, 0], [1, 0]]
    """
    is_valid = truth >= 0
    pairs = truth[is_valid].astype(np.int64) * num_classes + found[is_valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(confusion: Counts) -> NDArray[np.float64]:
    """IoU of each class, (K,), nan for a class that is neither true nor found anywhere."""
    hits, union = confusion.diagonal(), confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    iou: NDArray[np.float64] = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
    return iou


class SegmentationMetrics:
    """Metrics of a split, accumulated over images; they depend neither on their order nor on batches."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Clear everything."""
        self.confusion = np.zeros((self.num_classes, self.num_classes), np.int64)
        self._losses: dict[str, float] = {}
        self._num_images = 0

    def add_losses(self, losses: Mapping[str, float], num_images: int) -> None:
        """Add the mean losses over some images."""
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + value * num_images
        self._num_images += num_images

    def update(self, truth: NDArray[np.integer], found: NDArray[np.integer]) -> float:
        """Add true classes (H, W) of an image, negative where ignored, and found ones; return its mean IoU, or nan."""
        of_image = confusion_of(truth, found, self.num_classes)
        self.confusion += of_image
        values = intersection_over_union(of_image)
        return float(np.nanmean(values)) if of_image.any() else float("nan")

    def compute(self) -> dict[str, float]:
        """Return loss, miou, pixel_accuracy, mean_accuracy and dice; ValueError if no valid pixel was added.

        `miou` is the mean over classes that are true or found somewhere; `mean_accuracy` over those that are true;
        `dice`, 2 IoU / (1 + IoU), as `miou`.
        """
        total = self.confusion.sum()
        if total == 0:
            raise ValueError("no pixel was evaluated: the split is empty, or all its pixels are ignored")
        iou, rows = self.per_class(), self.confusion.sum(axis=1)
        accuracy = self.confusion.diagonal()[rows > 0] / rows[rows > 0]
        return {
            "loss": sum(self._losses.values()) / max(self._num_images, 1),
            "miou": float(np.nanmean(iou)),
            "pixel_accuracy": float(self.confusion.trace() / total),
            "mean_accuracy": float(accuracy.mean()),
            "dice": float(np.nanmean(2 * iou / (1 + iou))),
        }

    def per_class(self) -> NDArray[np.float64]:
        """IoU of each class, (K,), nan for a class that is neither true nor found."""
        return intersection_over_union(self.confusion)

"""Metrics of detection: the numbers of the COCO evaluation, from the boxes of a whole split.

Shapes: `B` images, `n` detections of an image, `G` true boxes of it, `K` classes, `T` thresholds of overlap (.5, .55 ..
.95), `R` points of recall (0, .01 .. 1), `A` ranges of area (AREAS), `M` numbers of detections (NUMBERS). Boxes are
(x1, y1, x2, y2) in pixels. Metrics are fractions in [0, 1].
"""

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AREAS = ("map", "map_small", "map_medium", "map_large")
NUMBERS = ("ar1", "ar10", "ar100")
Backend = Literal["auto", "pycocotools", "faster-coco-eval"]
Curves = tuple[NDArray[np.float64], NDArray[np.float64]]  # precision (T, R, K, A, M), recall (T, K, A, M); -1: no box


class DetectionMetrics:
    """Remembers the boxes of every image; mean average precision (map) and average recall (ar) follow from all of them.

    Small, medium and large are true boxes of up to 32², up to 96² and more pixels: give boxes in pixels of the original
    pictures, or these three compare with nobody else's. The area is that of the box, where COCO itself takes that of
    the mask. Per image and class the 100 detections of the highest score count; of equal scores the earlier. What falls
    on a crowd is neither right nor wrong. A box that is nan or infinite is wrong; a score that is counts as 0.

    Args:
        num_classes: Number of classes, K.
        backend: "auto" takes faster-coco-eval where it is installed: the same numbers, several times faster.

    Raises:
        ValueError: If `num_classes` is below 1, or `backend` is unknown or not installed.

    References:
        Microsoft COCO: Common Objects in Context (Lin et al., 2014), and its evaluation code, pycocotools.

    Example:
        >>> metrics = DetectionMetrics(num_classes=2)
        >>> boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [30.0, 30.0, 50.0, 50.0]])
        >>> found = {"boxes": boxes[:1], "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
        >>> metrics.update([found], [{"boxes": boxes, "labels": torch.tensor([1, 1])}])
        >>> {name: round(value, 3) for name, value in metrics.compute().items() if name in ("map", "map50", "ar100")}
        {'map': 0.505, 'map50': 0.505, 'ar100': 0.5}
    """

    def __init__(self, num_classes: int, *, backend: Backend = "auto") -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: must be at least 1.")
        if backend not in get_args(Backend):
            raise ValueError(f"backend={backend!r}: must be one of {', '.join(get_args(Backend))}.")
        is_installed = importlib.util.find_spec("faster_coco_eval") is not None
        if backend == "faster-coco-eval" and not is_installed:
            raise ValueError('backend="faster-coco-eval": not installed.\nType: pip install "vpt[fast-eval]"')
        self.num_classes = num_classes
        self.is_fast = is_installed and backend != "pycocotools"
        self.reset()

    def reset(self) -> None:
        """Forget everything, to start another evaluation."""
        self._detections: list[Tensor] = []  # of an image each: rows of x, y, width, height, label, crowd, score
        self._targets: list[Tensor] = []
        self._losses: dict[str, list[tuple[float, int]]] = {}  # by name, of a batch each: mean, number of images
        self._curves: Curves | None = None

    @torch.no_grad()
    def update(self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the boxes of B images, on any device; an image may have none.

        Args:
            detections: For each image "boxes" (n, 4), "scores" (n,) and "labels" (n,), integers in [0, K).
            targets: For each image "boxes" (G, 4), "labels" (G,) and, if there are crowds, "crowd" (G,) bool.

        Raises:
            ValueError: If a shape, a label or a true box does not fit; then nothing of the batch is added.
        """
        if len(detections) != len(targets):
            raise ValueError(f"{len(detections)} images with detections, {len(targets)} with targets: must be as many.")
        found = [self._rows(image["boxes"], image["labels"], scores=image["scores"]) for image in detections]
        true = [self._rows(image["boxes"], image["labels"], crowd=image.get("crowd")) for image in targets]
        if not all(rows.isfinite().all() for rows in true):
            raise ValueError("A true box is nan or infinite.")
        self._detections += found
        self._targets += true
        self._curves = None

    def add_losses(self, losses: Mapping[str, float], num_images: int) -> None:
        """Add the losses of a batch by name ("class", "box"), means over its `num_images`; ValueError if below 1."""
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: must be at least 1.")
        for name, value in losses.items():
            self._losses.setdefault(name, []).append((float(value), num_images))

    def compute(self) -> dict[str, float]:
        """The metrics of everything that was added; nan where no true box says anything; ValueError without images.

        Returns:
            map (over T), map_small, map_medium, map_large, map50, map75; ar1, ar10, ar100, with at most 1, 10 and 100
            detections per image and class. Where losses were added, first loss, the sum, and loss_<name> of each.
        """
        precision, recall = self._evaluate()
        losses = {}
        for name, batches in self._losses.items():
            means, nums = zip(*batches, strict=True)
            losses[f"loss_{name}"] = float(np.average(means, weights=nums))
        losses = {"loss": sum(losses.values())} | losses if losses else {}
        of_areas = {name: _mean(precision[..., area, -1]) for area, name in enumerate(AREAS)}
        of_thresholds = {"map50": _mean(precision[0, ..., 0, -1]), "map75": _mean(precision[5, ..., 0, -1])}
        return losses | of_areas | of_thresholds | {name: _mean(recall[..., 0, m]) for m, name in enumerate(NUMBERS)}

    def per_class(self) -> list[float]:
        """Average precision of each class, over T: K values, nan where a class has no true boxes but crowds."""
        precision, _ = self._evaluate()
        return [_mean(precision[:, :, label, 0, -1]) for label in range(self.num_classes)]

    def _rows(self, boxes: Tensor, labels: Tensor, crowd: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        columns = [labels, *(torch.zeros(len(boxes)) if values is None else values for values in (crowd, scores))]
        if boxes.shape != (len(boxes), 4) or any(values.shape != boxes.shape[:1] for values in columns):
            shapes = [tuple(values.shape) for values in (boxes, *columns)]
            raise ValueError(f"Boxes, labels, crowd, scores: {shapes}; must be (n, 4) and three times (n,).")
        if labels.is_floating_point():
            raise ValueError(f"Labels are {labels.dtype}; class numbers are integers.")
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(f"Label {outside[0]} is outside of [0, {self.num_classes}): data and head disagree.")
        corners = boxes.cpu().double()
        size = (corners[:, 2:] - corners[:, :2]).clamp(min=0)
        return torch.cat([corners[:, :2], size, torch.stack([values.cpu().double() for values in columns], 1)], dim=1)

    def _evaluate(self) -> Curves:
        if not self._targets:
            raise ValueError("No image was evaluated: the split is empty, or update() was never called.")
        if self._curves is not None:
            return self._curves
        if self.is_fast:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as Evaluation
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval as Evaluation
        # An overlap of nan passes every threshold: a box that is not finite would be a hit. One without size never is.
        found = [rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for rows in self._detections]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = Evaluation(self._indexed(COCO(), self._targets), self._indexed(COCO(), found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        self._curves = evaluation.eval["precision"], evaluation.eval["recall"]
        return self._curves

    def _indexed(self, coco: Any, images: list[Tensor]) -> Any:
        rows = [(image, *row) for image, of_image in enumerate(images) for row in of_image.tolist()]
        coco.dataset = {
            "images": [{"id": image} for image in range(len(images))],
            "categories": [{"id": label} for label in range(self.num_classes)],
            "annotations": [
                {"id": number, "image_id": image, "category_id": int(label), "bbox": [x, y, width, height]}
                | {"area": width * height, "iscrowd": int(crowd), "score": score}
                for number, (image, x, y, width, height, label, crowd, score) in enumerate(rows, start=1)  # 0: no match
            ],
        }
        coco.createIndex()
        return coco


def _mean(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")

"""Metrics of detection: the COCO evaluation of a split, its curves, and confusion of classes.

Shapes: `B` images, `n` detections of an image, `G` true boxes of it, `K` classes, `T` thresholds of overlap (.5, .55 ..
.95), `R` points of recall (0, .01 .. 1), `A` ranges of area (AREAS), `M` numbers of detections (NUMBERS). Boxes are
(x1, y1, x2, y2) in pixels. Metrics are fractions in [0, 1].
"""

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AREAS = ("map", "map_small", "map_medium", "map_large")
NUMBERS = ("ar1", "ar10", "ar100")
MIN_SCORE = 0.25
"""Lowest score of detections that count as errors, and that are drawn."""
MIN_OVERLAP = 0.45
"""Lowest intersection over union of a detection and a true box of the same object."""
MAX_ROWS = 1_000_000
"""Boxes that are evaluated at a time; each takes 4 kB."""
Backend = Literal["auto", "pycocotools", "faster-coco-eval"]
Curves = tuple[NDArray[np.float64], NDArray[np.float64]]  # precision (T, R, K, A, M), recall (T, K, A, M); -1: no box


class DetectionMetrics:
    """Mean average precision (map) and average recall (ar), from the stored boxes of all images.

    Small, medium and large are true boxes of up to 32², up to 96² and more pixels: pass boxes in pixels of the original
    images, or these three cannot be compared with published ones. The area is that of the box, where COCO itself takes
    that of the mask. Per image and class the 100 detections of the highest score count; of equal scores the earlier. A
    detection on a crowd is neither right nor wrong. A box that is nan or infinite is wrong; such a score counts as 0.
    The backend "auto" takes faster-coco-eval if it is installed: the same numbers, several times faster. ValueError if
    `num_classes` is below 1, or `backend` is unknown or not installed.

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
            raise ValueError(f"num_classes={num_classes}: must be at least 1")
        if backend not in get_args(Backend):
            raise ValueError(f"backend={backend!r}: must be one of {', '.join(get_args(Backend))}.")
        is_installed = importlib.util.find_spec("faster_coco_eval") is not None
        if backend == "faster-coco-eval" and not is_installed:
            raise ValueError('backend="faster-coco-eval": not installed.\nType: pip install "vpt[fast-eval]"')
        self.num_classes = num_classes
        self.is_fast = is_installed and backend != "pycocotools"
        self.reset()

    def reset(self) -> None:
        """Clear everything, to start another evaluation."""
        self._detections: list[Tensor] = []  # of each image: rows of x, y, width, height, label, crowd, score
        self._targets: list[Tensor] = []
        self._losses: dict[str, list[tuple[float, int]]] = {}  # by name, of each batch: mean, number of images
        self._curves: Curves | None = None

    @torch.no_grad()
    def update(self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the boxes of B images, on any device; ValueError, and nothing is added, if one does not fit.

        Detections are "boxes" (n, 4), "scores" (n,) and "labels" (n,), integers in [0, K), of each image; targets are
        "boxes" (G, 4), "labels" (G,) and, if there are crowds, "crowd" (G,) bool.
        """
        if len(detections) != len(targets):
            raise ValueError(f"{len(detections)} images with detections, {len(targets)} with targets: must be equal")
        found = [self._rows(image["boxes"], image["labels"], scores=image["scores"]) for image in detections]
        true = [self._rows(image["boxes"], image["labels"], crowd=image.get("crowd")) for image in targets]
        if not all(rows.isfinite().all() for rows in true):
            raise ValueError("targets: a box is nan or infinite")
        self._detections += found
        self._targets += true
        self._curves = None

    def add_losses(self, losses: Mapping[str, float], num_images: int) -> None:
        """Add the losses of a batch by name ("class", "box"), means over its `num_images`; ValueError if below 1."""
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: must be at least 1")
        for name, value in losses.items():
            self._losses.setdefault(name, []).append((float(value), num_images))

    def compute(self) -> dict[str, float]:
        """Metrics of all images; nan where there are no true boxes; ValueError without images.

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
        """Average precision of each class, over T: K values, nan for a class without true boxes other than crowds."""
        return [_mean(self._evaluate()[0][:, :, label, 0, -1]) for label in range(self.num_classes)]

    def precision_curves(self) -> NDArray[np.float64]:
        """Precision of each class over recall, at an overlap of .5: (K, R), nan for a class without true boxes.

        A value is the best precision at this recall or a higher one, as in COCO; its mean over R is map50.
        """
        curves = self._evaluate()[0][0, :, :, 0, -1].T
        return np.where(curves > -1, curves, np.nan)

    def confusion(self, min_score: float = MIN_SCORE, min_overlap: float = MIN_OVERLAP) -> Tensor:
        """Confusion matrix of classes: (K+1, K+1) int64, rows are true, columns are detected classes.

        The last column counts missed true boxes, the last row false boxes. Detections are matched in the order of their
        scores, each to the free true box of the highest overlap, whatever its class; of two such, to the one of the
        same class. So an object that is detected twice counts as one right and one false box. Crowds are left out, and
        so are detections on a crowd alone, by at least `min_overlap` of their area, and those below `min_score`.
        ValueError if no image was added, or a threshold is out of range.
        """
        confusion = np.zeros((self.num_classes + 1, self.num_classes + 1), dtype=np.int64)
        for pairs in self._pairs(min_score, min_overlap):
            np.add.at(confusion, tuple(pairs.T), 1)
        return torch.from_numpy(confusion)

    def images_by_error(self, num: int, min_score: float = MIN_SCORE, min_overlap: float = MIN_OVERLAP) -> list[int]:
        """Positions, in the order of `update`, of the `num` images with the most errors, the worst first.

        An error is a missed, a false or a confused box; of equally many errors the earlier image comes first.
        """
        errors = [int((pairs[:, 0] != pairs[:, 1]).sum()) for pairs in self._pairs(min_score, min_overlap)]
        return sorted(range(len(errors)), key=lambda image: -errors[image])[:num]

    def best_thresholds(self) -> list[float]:
        """The threshold of the score with the highest F1 at an overlap of .5: K values.

        F1 is 2 * right / (found + true boxes), where found are the detections of this score or a higher one. It is nan
        for a class without true boxes other than crowds, or without any right detection. Detections and crowds are
        matched within the class, as for map50.
        """
        scores: list[list[Tensor]] = [[] for _ in range(self.num_classes)]
        is_right: list[list[NDArray[np.bool_]]] = [[] for _ in range(self.num_classes)]
        num_true = np.zeros(self.num_classes, dtype=np.int64)
        for found, true in self._images():
            np.add.at(num_true, true[true[:, 5] == 0, 4].long().numpy(), 1)
            for label in np.unique(found[:, 4].numpy()).astype(int):
                of_class = found[found[:, 4] == label]
                taken = _match(of_class, true[true[:, 4] == label], 0.5)
                scores[label].append(of_class[taken != _IGNORED, 6])
                is_right[label].append(taken[taken != _IGNORED] >= 0)
        return [
            _best_score(torch.cat(scores[label]).numpy(), np.concatenate(is_right[label]), num_true[label])
            if scores[label]
            else float("nan")
            for label in range(self.num_classes)
        ]

    def _images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the detections of each image, the best first, and of its true boxes; values not finite are 0."""
        self._need_images()
        for found, true in zip(self._detections, self._targets, strict=True):
            finite = _finite(found)
            yield finite[finite[:, 6].argsort(descending=True, stable=True)], true

    def _pairs(self, min_score: float, min_overlap: float) -> Iterator[NDArray[np.int64]]:
        """For each image the pairs (n, 2) of true and detected class; K stands for none."""
        if not (0 <= min_score <= 1 and 0 < min_overlap <= 1):
            raise ValueError(
                f"min_score={min_score}, min_overlap={min_overlap}; allowed: 0 <= min_score <= 1, 0 < min_overlap <= 1"
            )
        for found, true in self._images():
            found = found[found[:, 6] >= min_score]
            taken = _match(found, true, min_overlap)
            is_missed = true[:, 5].numpy() == 0
            is_missed[taken[taken >= 0]] = False
            classes = np.append(true[:, 4].numpy(), self.num_classes)  # index -1, no true box, is the last one too
            counts = taken != _IGNORED
            matched = np.stack([classes[taken[counts]], found[:, 4].numpy()[counts]], axis=1)
            missed = np.stack([classes[:-1][is_missed], np.full(is_missed.sum(), self.num_classes)], axis=1)
            yield np.concatenate([matched, missed]).astype(np.int64)

    def _rows(self, boxes: Tensor, labels: Tensor, crowd: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        columns = [labels, *(torch.zeros(len(boxes)) if values is None else values for values in (crowd, scores))]
        if boxes.shape != (len(boxes), 4) or any(values.shape != boxes.shape[:1] for values in columns):
            shapes = [tuple(values.shape) for values in (boxes, *columns)]
            raise ValueError(f"boxes, labels, crowd, scores: {shapes}; must be (n, 4) and three times (n,)")
        if labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype}; must be integers")
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"label {outside[0]} is outside of [0, {self.num_classes}): data and head have different classes"
            )
        corners = boxes.cpu().double()
        size = (corners[:, 2:] - corners[:, :2]).clamp(min=0)
        return torch.cat([corners[:, :2], size, torch.stack([values.cpu().double() for values in columns], 1)], dim=1)

    def _need_images(self) -> None:
        if not self._targets:
            raise ValueError("no image was evaluated: the split is empty, or update() was never called")

    def _evaluate(self) -> Curves:
        self._need_images()
        if self._curves is not None:
            return self._curves
        if self.is_fast:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as Evaluation
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval as Evaluation
        found = [_finite(rows) for rows in self._detections]
        parts: list[Curves] = []
        with contextlib.redirect_stdout(io.StringIO()):
            for labels in self._parts():
                evaluation = Evaluation(
                    self._indexed(COCO(), self._targets, labels), self._indexed(COCO(), found, labels), "bbox"
                )
                evaluation.evaluate()
                evaluation.accumulate()
                parts.append((evaluation.eval["precision"], evaluation.eval["recall"]))
        precision, recall = zip(*parts, strict=True)
        self._curves = np.concatenate(precision, axis=2), np.concatenate(recall, axis=1)
        return self._curves

    def _parts(self) -> Iterator[range]:
        """Classes that are evaluated together, which changes no number: they have up to MAX_ROWS boxes, or are one."""
        labels = [rows[:, 4].long() for rows in (*self._detections, *self._targets)]
        counts = torch.bincount(torch.cat(labels), minlength=self.num_classes).tolist()
        start = total = 0
        for label, count in enumerate(counts):
            if total + count > MAX_ROWS and label > start:
                yield range(start, label)
                start, total = label, 0
            total += count
        yield range(start, self.num_classes)

    def _indexed(self, coco: Any, images: list[Tensor], labels: range) -> Any:
        rows = ((i, *row) for i, of_image in enumerate(images) for row in of_image.tolist() if int(row[4]) in labels)
        coco.dataset = {
            "images": [{"id": image} for image in range(len(images))],
            "categories": [{"id": label} for label in labels],
            "annotations": [
                {"id": number, "image_id": image, "category_id": int(label), "bbox": [x, y, width, height]}
                | {"area": width * height, "iscrowd": int(crowd), "score": score}
                for number, (image, x, y, width, height, label, crowd, score) in enumerate(rows, start=1)  # 0: no match
            ],
        }
        coco.createIndex()
        return coco


_FALSE, _IGNORED = -1, -2


def _match(found: Tensor, true: Tensor, min_overlap: float) -> NDArray[np.int64]:
    """For each detection, the best first: the index of the matched true box, _FALSE or, on a crowd, _IGNORED."""
    from pycocotools import mask

    taken = np.full(len(found), _FALSE)
    if not len(found) or not len(true):
        return taken
    is_crowd = true[:, 5].numpy() > 0
    overlaps = mask.iou(found[:, :4].contiguous().numpy(), true[:, :4].contiguous().numpy(), is_crowd)
    is_near, is_free = overlaps >= min_overlap, ~is_crowd
    is_same = found[:, 4:5].numpy() == true[:, 4].numpy()
    for i in is_near.any(axis=1).nonzero()[0]:
        free = (is_near[i] & is_free).nonzero()[0]
        if len(free):
            taken[i] = max(free, key=lambda j: (overlaps[i, j], is_same[i, j]))
            is_free[taken[i]] = False
        elif (is_near[i] & is_crowd).any():
            taken[i] = _IGNORED
    return taken


def _best_score(scores: NDArray[np.float64], is_right: NDArray[np.bool_], num_true: int) -> float:
    """The score of the highest F1; nan if nothing is right."""
    if not is_right.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], is_right[order].cumsum()
    f1 = 2 * right / (np.arange(1, len(scores) + 1) + num_true)
    is_last = np.append(scores[1:] < scores[:-1], True)  # equal scores pass a threshold together
    return float(scores[np.where(is_last, f1, 0).argmax()])


def _finite(rows: Tensor) -> Tensor:
    # An overlap of nan passes every threshold, so that a box that is not finite would be a hit; an empty box is none.
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")

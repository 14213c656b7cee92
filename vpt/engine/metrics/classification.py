"""Metrics of classification, fractions in [0, 1]. Shapes: `B` batch, `K` classes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_TOP = 5


class Sample(NamedTuple):
    """An evaluated image: its position in evaluation order, cross-entropy in nats, target and prediction."""

    position: int
    loss: float
    target: int
    prediction: int


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of classes ranked before the target: (B, K) floating point, (B,) int64 -> (B,) int64, 0 for the best.

    Of equal logits the lower class comes first, as in argmax. They are common in bfloat16, and if a tie counted as a
    hit, a model with constant logits would always be right. nan comes before every number.

    Example:
        >>> target_ranks(torch.tensor([[0.1, 0.7, 0.7]]).expand(3, 3), torch.tensor([0, 1, 2]))
        tensor([2, 0, 1])
    """
    logits = logits.masked_fill(logits.isnan(), torch.inf)
    of_target = logits.gather(1, targets[:, None])
    is_lower_class = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return ((logits > of_target) | ((logits == of_target) & is_lower_class)).sum(dim=1)


class ClassificationMetrics:
    """Metrics of a split, accumulated over batches of any size.

    Counts are integers and sums are float64, on the CPU, so that the sizes of batches do not matter. The `num_worst`
    samples with the highest cross-entropy are stored. ValueError if `num_classes` is below 1 or `num_worst` below 0.

    Example:
        >>> metrics = ClassificationMetrics(num_classes=2)
        >>> metrics.update(torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0, 1]))
        >>> {name: round(value, 3) for name, value in metrics.compute().items()}
        {'loss': 0.794, 'top1': 0.667, 'mean_per_class': 0.5}
    """

    def __init__(self, num_classes: int, *, num_worst: int = 16) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: must be at least 1")
        if num_worst < 0:
            raise ValueError(f"num_worst={num_worst}: must be at least 0")
        self.num_classes, self.num_worst = num_classes, num_worst
        self.reset()

    def reset(self) -> None:
        """Clear everything, to start another evaluation."""
        self._pairs: list[Tensor] = []  # targets and predictions (2, B); a matrix would grow with the square of K
        self.hits, self.class_counts = torch.zeros(2, self.num_classes, dtype=torch.int64)
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the losses, of the targets among the five best
        self._num_seen = 0
        self._worst: list[Sample] = []

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, loss: float | Tensor | None = None) -> None:
        """Add logits (B, K), floating point of any precision, and targets (B,), integers in [0, K), on any device.

        `loss` is the mean of the batch, by default the cross-entropy. ValueError if a shape or a target does not fit.
        """
        logits, targets = logits.detach().cpu().double(), targets.detach().cpu()
        self._check(logits, targets)
        if len(targets) == 0:
            return
        targets = targets.long()
        losses = F.cross_entropy(logits, targets, reduction="none")
        predictions = logits.argmax(dim=1)
        self._pairs.append(torch.stack([targets, predictions]))
        self.class_counts += targets.bincount(minlength=self.num_classes)
        self.hits += targets[targets == predictions].bincount(minlength=self.num_classes)
        self._sums[0] += losses.sum() if loss is None else float(loss) * len(targets)
        self._sums[1] += (target_ranks(logits, targets) < NUM_TOP).sum()
        self._update_worst(losses, targets, predictions)
        self._num_seen += len(targets)

    def compute(self) -> dict[str, float]:
        """Return loss, top1, mean_per_class, and top5 where K > 5; ValueError if nothing was added."""
        num = self._num_seen
        if num == 0:
            raise ValueError("no sample was evaluated: the split is empty, or update() was never called")
        loss, hits_top5 = (self._sums / num).tolist()
        values = {"loss": loss, "top1": int(self.hits.sum()) / num}
        if self.num_classes > NUM_TOP:
            values["top5"] = hits_top5
        values["mean_per_class"] = float(self._recall().nanmean())
        return values

    def per_class(self) -> list[float]:
        """Recall of each class, K values, nan where a class has no targets."""
        recall: list[float] = self._recall().tolist()
        return recall

    @property
    def confusion(self) -> Tensor:
        """Counts, (K, K) int64: rows are targets, columns are predictions."""
        return self._count_pairs(1)

    @property
    def prediction_counts(self) -> Tensor:
        """The number of predictions of each class, (K,) int64."""
        return self._all_pairs()[1].bincount(minlength=self.num_classes)

    def pair_counts(self) -> list[tuple[int, int, int]]:
        """Target, prediction and their number, of the pairs that occur, ascending."""
        targets, predictions = self._all_pairs()
        pairs, counts = (targets * self.num_classes + predictions).unique(return_counts=True)
        columns = pairs // self.num_classes, pairs % self.num_classes, counts
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def confusion_of_groups(self, most: int) -> tuple[int, Tensor]:
        """Counts of at most `most` groups of classes, and the number of consecutive classes in each group.

        The counts are (G, G) int64, with G = K and groups of one class if K is at most `most`.
        """
        size = -(-self.num_classes // most)
        return size, self._count_pairs(size)

    def _count_pairs(self, size: int) -> Tensor:
        num = -(-self.num_classes // size)
        targets, predictions = self._all_pairs() // size
        counts: Tensor = (targets * num + predictions).bincount(minlength=num * num)
        return counts.view(num, num)

    def _all_pairs(self) -> Tensor:
        return torch.cat([torch.empty(2, 0, dtype=torch.int64), *self._pairs], dim=1)

    def _recall(self) -> Tensor:
        recall: Tensor = self.hits.double() / self.class_counts.double()
        return recall

    def worst(self, num: int | None = None) -> list[Sample]:
        """The samples of the highest cross-entropy, highest first; of equal ones the earlier comes first.

        Fewer than `num` if fewer were evaluated. ValueError if it is outside of [0, num_worst], by default the last.
        """
        num = self.num_worst if num is None else num
        if not 0 <= num <= self.num_worst:
            raise ValueError(f"num={num}: must be in [0, {self.num_worst}], which is num_worst")
        return self._worst[:num]

    def _update_worst(self, losses: Tensor, targets: Tensor, predictions: Tensor) -> None:
        # argsort puts nan first, as the worst loss.
        order = losses.argsort(descending=True, stable=True)[: self.num_worst].tolist()
        batch = [Sample(self._num_seen + i, float(losses[i]), int(targets[i]), int(predictions[i])) for i in order]
        both = self._worst + batch
        by_loss = torch.tensor([sample.loss for sample in both], dtype=torch.float64)
        self._worst = [both[i] for i in by_loss.argsort(descending=True, stable=True)[: self.num_worst].tolist()]

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        K = self.num_classes
        if logits.ndim != 2 or logits.shape[1] != K:
            raise ValueError(f"logits have the shape {tuple(logits.shape)}; {K} classes require (B, {K})")
        if targets.shape != logits.shape[:1]:
            raise ValueError(f"targets have the shape {tuple(targets.shape)}; these logits require ({len(logits)},)")
        if targets.is_floating_point():
            raise ValueError(f"targets are {targets.dtype}; must be integers")
        outside = targets[(targets < 0) | (targets >= K)]
        if len(outside):
            raise ValueError(f"target {int(outside[0])} is outside of [0, {K}): data and head differ")

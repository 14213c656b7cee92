"""Dense head: an anchor-free detection head on a feature pyramid, with its assignment and losses.

Every cell of every level is a *point* that predicts a score for each class and one box. Two towers of convolutions,
shared by all levels, predict classes and box sides. In training each true box is assigned to the points that currently
predict it best, by score and overlap together. A box without a point inside gets the nearest one, so every box trains.

Legend: B images, A points of all levels, K classes, G true boxes of an image, C channels, S stride in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou_loss

PRIOR = 0.01  # initial probability of each class, as in the focal loss paper
MAX_LOG_SIDE = 7.0  # exp(7) times the stride is larger than any image
NUM_CANDIDATES = 10  # points per true box, at most
SCORE_POWER, OVERLAP_POWER = 0.5, 4.0
Tensors = dict[str, Tensor]
MAX_COMPARED = 3000  # boxes of an image in non-maximum suppression, whose cost is quadratic


@dataclass(frozen=True)
class Selection:
    """Which detections a head returns.

    A score is above `min_score`: 0.05 for evaluation, about 0.25 for display. Of two boxes of a class with an IoU above
    `max_overlap` only the better is returned. The `max_detections` with the highest scores are returned per image, of
    the classes `labels` only; None: of all.

    Raises:
        ValueError: A value is out of range, or `labels` is empty.

    Example:
        >>> Selection(min_score=0.25)
        Selection(min_score=0.25, max_overlap=0.6, max_detections=100, labels=None)
    """

    min_score: float = 0.05
    max_overlap: float = 0.6
    max_detections: int = 100
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_score < 1:
            raise ValueError(f"min_score={self.min_score}: must be at least 0 and below 1")
        if not 0 < self.max_overlap <= 1:
            raise ValueError(f"max_overlap={self.max_overlap}: must be above 0 and at most 1")
        if self.max_detections < 1:
            raise ValueError(f"max_detections={self.max_detections}: must be at least 1")
        if self.labels is not None and (not self.labels or min(self.labels) < 0):
            raise ValueError(f"labels={self.labels}: must be at least one class index from 0, or None for all")

    def only(self, logits: Tensor) -> Tensor:
        """Set the logits (..., K) of the classes that are not selected to -inf."""
        if self.labels is None:
            return logits
        is_excluded = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_excluded[list(self.labels)] = False
        return logits.masked_fill(is_excluded, -math.inf)


@dataclass(frozen=True)
class Assignment:
    """Training targets of the points of an image.

    `box` is the index of the assigned true box, (A,) int64, -1 for background; `overlap` (A,) the IoU of the predicted
    and the assigned box, 0 for background; `is_ignored` (A,) bool marks points without a class loss.
    """

    box: Tensor
    overlap: Tensor
    is_ignored: Tensor


class DenseHead(nn.Module):
    """Anchor-free detection head: feature maps of C channels at each of the strides S -> scores and boxes of points.

    `num_convs` is the number of convolutions in each of the two towers.

    References:
        FCOS (Tian et al., 2019), https://arxiv.org/abs/1904.01355, shared towers and distances to the sides;
        TOOD (Feng et al., 2021), https://arxiv.org/abs/2108.07755, section 3.2, task-aligned assignment;
        Generalized focal loss (Li et al., 2020), https://arxiv.org/abs/2006.04388, equation 2, soft targets.

    Example:
        >>> head = DenseHead(32, num_classes=3, strides=(8, 16))
        >>> logits, boxes = head([torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 4, 4)])
        >>> logits.shape, boxes.shape
        (torch.Size([2, 80, 3]), torch.Size([2, 80, 4]))
    """

    def __init__(self, channels: int, num_classes: int, strides: Sequence[int], num_convs: int = 2) -> None:
        super().__init__()
        self.num_classes, self.num_convs, self.strides = num_classes, num_convs, tuple(strides)
        self.class_tower, self.box_tower = (
            nn.Sequential(*(layer for _ in range(num_convs) for layer in conv_norm(channels))) for _ in range(2)
        )
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box_sides = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        for layer in (self.class_logits, self.box_sides):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        nn.init.constant_(self.box_sides.bias, math.log(3))  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Levels (B, C, H/S, W/S) -> class logits (B, A, K), and boxes (B, A, 4) as x1, y1, x2, y2 in pixels."""
        logits, boxes = [], []
        for level, stride, scale in zip(levels, self.strides, self.scales, strict=True):
            logits.append(self.class_logits(self.class_tower(level)).flatten(2).mT)
            sides = self.box_sides(self.box_tower(level)).flatten(2).mT.float()
            distances = (scale * sides).clamp(max=MAX_LOG_SIDE).exp() * stride
            points = level_points(level.shape[-2:], stride, level.device)
            boxes.append(torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1))
        return torch.cat(logits, dim=1), torch.cat(boxes, dim=1)

    def losses(self, levels: Sequence[Tensor], image_size: tuple[int, int], targets: Sequence[Tensors]) -> Tensors:
        """`dense_losses` of levels (B, C, H/S, W/S) of images of this (height, width), and their targets."""
        logits, boxes = self(levels)
        return dense_losses(self.points(levels), logits, boxes, targets)

    def detect(self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], selection: Selection) -> list[Tensors]:
        """For each (height, width), detections, best first: clipped "boxes" (n, 4) in px, "scores", "labels" (n,)."""
        logits, boxes = self(levels)
        scores = selection.only(logits.float()).sigmoid()
        return [_select(*image, selection) for image in zip(scores, boxes, sizes, strict=True)]

    def points(self, levels: Sequence[Tensor]) -> Tensor:
        """Points of all levels, (A, 2) as x, y in pixels."""
        pairs = zip(levels, self.strides, strict=True)
        return torch.cat([level_points(level.shape[-2:], stride, level.device) for level, stride in pairs])


def conv_norm(channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A 3 x 3 convolution that keeps the size, a norm and an activation."""
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False), group_norm(channels), nn.ReLU(inplace=True)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least four channels."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


def level_points(size: Sequence[int], stride: int, device: torch.device) -> Tensor:
    """Centres of the cells of a level, row by row: (H * W, 2) as x, y in pixels."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride


@torch.no_grad()
def assign(points: Tensor, scores: Tensor, boxes: Tensor, targets: Tensor, labels: Tensor, crowd: Tensor) -> Assignment:
    """Assign the true boxes of one image to points.

    A box gets the points inside it with the largest score^0.5 * IoU^4, at most ten. A point chosen by several boxes
    goes to the one with the largest IoU. Crowds get no points; points inside them are ignored in the class loss.

    Shapes: points (A, 2), predicted probabilities (A, K) and boxes (A, 4); of the true boxes, including crowds, (G, 4),
    their labels (G,) and whether each is a crowd, (G,) bool.
    """
    is_inside = inside(points, targets)  # (A, G)
    is_ignored = is_inside[:, crowd].any(dim=1)
    assigned = points.new_full((len(points),), -1, dtype=torch.long)
    overlap = points.new_zeros(len(points))
    indices = (~crowd).nonzero()[:, 0]
    if not len(indices):
        return Assignment(assigned, overlap, is_ignored)
    true, is_inside = targets[indices], is_inside[:, indices]
    overlaps = box_iou(boxes, true)  # (A, G)
    fit = scores[:, labels[indices]].pow(SCORE_POWER) * overlaps.pow(OVERLAP_POWER)
    top = fit.masked_fill(~is_inside, -1).topk(min(NUM_CANDIDATES, len(points)), dim=0)
    is_chosen = torch.zeros_like(is_inside).scatter_(0, top.indices, top.values >= 0)
    # A point chosen by several boxes keeps the one with the largest IoU; a box left without points gets the nearest.
    best = torch.where(is_chosen, overlaps, -1.0).max(dim=1)
    assigned = torch.where(best.values >= 0, best.indices, assigned)
    distance = torch.cdist(points, (true[:, :2] + true[:, 2:]) / 2)
    for box in (torch.bincount(assigned[assigned >= 0], minlength=len(true)) == 0).nonzero()[:, 0].tolist():
        if (assigned >= 0).all():  # more boxes than points
            break
        assigned[torch.where(assigned < 0, distance[:, box], math.inf).argmin()] = box
    taken = assigned >= 0
    overlap[taken] = overlaps[taken, assigned[taken]]
    assigned[taken] = indices[assigned[taken]]
    return Assignment(assigned, overlap, is_ignored & ~taken)


def dense_losses(points: Tensor, logits: Tensor, boxes: Tensor, targets: Sequence[Tensors]) -> Tensors:
    """Losses of a batch in float32: "class" (soft focal) and "box" (GIoU), divided by the number of assigned points.

    Shapes: points (A, 2), logits (B, A, K), boxes (B, A, 4); per image the targets "boxes" (G, 4), "labels" (G,) and
    optionally "crowd" (G,) bool.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, boxes = logits.float(), boxes.float()
        class_sum, box_sum, num_assigned = logits.new_zeros(()), logits.new_zeros(()), 0
        for image_logits, image_boxes, target in zip(logits, boxes, targets, strict=True):
            true, labels = target["boxes"], target["labels"]
            probabilities = image_logits.sigmoid()
            assignment = assign(points, probabilities, image_boxes, true, labels, is_crowd(target))
            is_assigned = assignment.box >= 0
            box = assignment.box[is_assigned]
            scores = torch.zeros_like(image_logits)  # target scores: the IoU for the class of the box, 0 elsewhere
            scores[is_assigned, labels[box]] = assignment.overlap[is_assigned]
            # Soft focal loss: |target - p|^2 times the cross-entropy, so that correct predictions count little.
            entropy = F.binary_cross_entropy_with_logits(image_logits, scores, reduction="none")
            focal = (scores - probabilities).abs().square() * entropy
            class_sum = class_sum + focal[~assignment.is_ignored].sum()
            box_sum = box_sum + generalized_box_iou_loss(image_boxes[is_assigned], true[box]).sum()
            num_assigned += int(is_assigned.sum())
        return {"class": class_sum / max(1, num_assigned), "box": box_sum / max(1, num_assigned)}


def _select(scores: Tensor, boxes: Tensor, size: tuple[int, int], selection: Selection) -> Tensors:
    """Select detections from scores (A, K) and boxes (A, 4) of an image of this (height, width)."""
    boxes = clip_boxes_to_image(boxes, size)
    is_inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
    points, labels = ((scores > selection.min_score) & is_inside).nonzero(as_tuple=True)
    scores, best = scores[points, labels].topk(min(MAX_COMPARED, len(points)))
    boxes, labels = boxes[points[best]], labels[best]
    kept = batched_nms(boxes, scores, labels, selection.max_overlap)[: selection.max_detections]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def is_crowd(target: Tensors) -> Tensor:
    """Which boxes of a target are crowds, (G,) bool; none if the target does not state it."""
    return target.get("crowd", torch.zeros_like(target["labels"], dtype=torch.bool))


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points (A, 2) are inside which boxes (G, 4), (A, G) bool."""
    x, y = points[:, None].unbind(-1)
    return (x > boxes[:, 0]) & (x < boxes[:, 2]) & (y > boxes[:, 1]) & (y < boxes[:, 3])

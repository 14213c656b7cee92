"""DenseHead: an anchor-free detector on a feature pyramid, its assignment of boxes to points and its losses.

Every cell of every level is a *point* that says a score for each class and one box. Two towers of convolutions, shared
by all levels, look for classes and for box sides. In training each box is given the points that are best at it so far,
by score and by overlap together; a box that has none inside gets the nearest point, so every box trains.

Legend: B images, A points of all levels, K classes, G boxes of an image, C channels, S stride in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou_loss

PRIOR = 0.01  # probability of each class at the start, as in focal loss
MAX_LOG_SIDE = 7.0  # exp of it times the stride is larger than any picture
NUM_CANDIDATES = 10
SCORE_POWER, OVERLAP_POWER = 0.5, 4.0
MAX_COMPARED = 3000  # boxes of an image that go into non-maximum suppression, which takes the square of them


@dataclass(frozen=True)
class Selection:
    """Which of the boxes that a head finds in an image are given out.

    Args:
        min_score: A box must score more; 0.05 for evaluation, some 0.25 to look at.
        max_overlap: Of two boxes of a class with a larger IoU, only the better one.
        max_detections: The best ones of an image.
        labels: Only these classes, which are then all that `max_detections` counts; None is all.

    Raises:
        ValueError: A number out of range, or no label.

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
            raise ValueError(f"min_score must be at least 0 and below 1, got {self.min_score}")
        if not 0 < self.max_overlap <= 1:
            raise ValueError(f"max_overlap must be above 0 and at most 1, got {self.max_overlap}")
        if self.max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {self.max_detections}")
        if self.labels is not None and (not self.labels or min(self.labels) < 0):
            raise ValueError(f"labels must be one class or more, counted from 0, or None for all, got {self.labels}")

    def only(self, logits: Tensor) -> Tensor:
        """Logits (..., K) in which the classes that are not wanted can have no score."""
        if self.labels is None:
            return logits
        is_unwanted = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_unwanted[list(self.labels)] = False
        return logits.masked_fill(is_unwanted, -math.inf)


@dataclass(frozen=True)
class Assignment:
    """What each point of an image is to learn.

    Args:
        box: Index of its box, (A,) int64; -1 for background.
        overlap: IoU of the point's prediction and its box, (A,); 0 for background.
        is_ignored: Points that teach no class, (A,) bool.
    """

    box: Tensor
    overlap: Tensor
    is_ignored: Tensor


class DenseHead(nn.Module):
    """Feature maps of a pyramid -> scores and boxes of all points.

    Args:
        channels: C, of every level.
        num_classes: K.
        strides: S of each level, in pixels.
        num_convs: Convolutions in each of the two towers.

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
        """Class logits (B, A, K), and boxes (B, A, 4) as x1, y1, x2, y2 in pixels, of levels (B, C, H/S, W/S)."""
        logits, boxes = [], []
        for level, stride, scale in zip(levels, self.strides, self.scales, strict=True):
            logits.append(self.class_logits(self.class_tower(level)).flatten(2).mT)
            sides = self.box_sides(self.box_tower(level)).flatten(2).mT.float()
            distances = (scale * sides).clamp(max=MAX_LOG_SIDE).exp() * stride
            points = level_points(level.shape[-2:], stride, level.device)
            boxes.append(torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1))
        return torch.cat(logits, dim=1), torch.cat(boxes, dim=1)

    def losses(
        self, levels: Sequence[Tensor], image_size: tuple[int, int], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `dense_losses` gives for levels (B, C, H/S, W/S) and their targets."""
        logits, boxes = self(levels)
        return dense_losses(self.points(levels), logits, boxes, targets)

    def detect(
        self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], selection: Selection
    ) -> list[dict[str, Tensor]]:
        """For each image of such a size "boxes" (n, 4) in pixels, "scores" (n,) and "labels" (n,), the best first."""
        logits, boxes = self(levels)
        scores = selection.only(logits.float()).sigmoid()
        return [_select(*of_image, selection) for of_image in zip(scores, boxes, sizes, strict=True)]

    def points(self, levels: Sequence[Tensor]) -> Tensor:
        """The points of all levels, (A, 2) as x, y in pixels."""
        pairs = zip(levels, self.strides, strict=True)
        return torch.cat([level_points(level.shape[-2:], stride, level.device) for level, stride in pairs])


def conv_norm(channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A 3 x 3 convolution that keeps the size, its norm and its activation."""
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False), group_norm(channels), nn.ReLU(inplace=True)


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least four channels, at most 32 of them."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


def level_points(size: Sequence[int], stride: int, device: torch.device) -> Tensor:
    """Centres of the cells of a level, row by row: (H * W, 2) as x, y in pixels."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * stride


@torch.no_grad()
def assign(points: Tensor, scores: Tensor, boxes: Tensor, targets: Tensor, labels: Tensor, crowd: Tensor) -> Assignment:
    """Give the boxes of one image to points.

    A box takes the points inside it that are largest by score^0.5 * IoU^4, at most ten; a point that several boxes
    want goes to the one that it overlaps most. Crowds take none: the points inside them teach no class.

    Args:
        points: (A, 2).
        scores: Probabilities (A, K) that the points give.
        boxes: Boxes (A, 4) that the points give.
        targets: True boxes (G, 4), crowds among them.
        labels: Their classes, (G,).
        crowd: Which of them are crowds, (G,) bool.
    """
    is_inside = inside(points, targets)  # (A, G)
    num_points, keep = len(points), ~crowd
    is_ignored = is_inside[:, crowd].any(dim=1)
    assigned = points.new_full((num_points,), -1, dtype=torch.long)
    overlap = points.new_zeros(num_points)
    if not keep.any():
        return Assignment(assigned, overlap, is_ignored)
    indices = keep.nonzero()[:, 0]
    true, is_inside = targets[indices], is_inside[:, indices]
    overlaps = box_iou(boxes, true)  # (A, G)
    fit = scores[:, labels[indices]].pow(SCORE_POWER) * overlaps.pow(OVERLAP_POWER)
    top = fit.masked_fill(~is_inside, -1).topk(min(NUM_CANDIDATES, num_points), dim=0)
    is_chosen = torch.zeros_like(is_inside).scatter_(0, top.indices, top.values >= 0)
    # A point that several boxes chose keeps the one that it overlaps most; a box left with none takes the nearest one.
    best = torch.where(is_chosen, overlaps, -1.0).max(dim=1)
    assigned = torch.where(best.values >= 0, best.indices, assigned)
    distance = torch.cdist(points, (true[:, :2] + true[:, 2:]) / 2)
    for box in (torch.bincount(assigned[assigned >= 0], minlength=len(true)) == 0).nonzero()[:, 0].tolist():
        if (assigned >= 0).all():  # more boxes than points
            break
        free = torch.where(assigned < 0, distance[:, box], math.inf)
        assigned[free.argmin()] = box
    taken = assigned >= 0
    overlap[taken] = overlaps[taken, assigned[taken]]
    assigned[taken] = indices[assigned[taken]]
    return Assignment(assigned, overlap, is_ignored & ~taken)


def dense_losses(
    points: Tensor, logits: Tensor, boxes: Tensor, targets: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Losses of a batch, in float32: "class" (soft focal) and "box" (GIoU), each over the number of given points.

    Args:
        points: (A, 2).
        logits: (B, A, K).
        boxes: (B, A, 4).
        targets: For each image "boxes" (G, 4), "labels" (G,) and, if there are crowds, "crowd" (G,) bool.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, boxes = logits.float(), boxes.float()
        class_sum, box_sum, num_given = logits.new_zeros(()), logits.new_zeros(()), 0
        for image_logits, image_boxes, target in zip(logits, boxes, targets, strict=True):
            crowd = target.get("crowd", torch.zeros_like(target["labels"], dtype=torch.bool))
            found = assign(points, image_logits.sigmoid(), image_boxes, target["boxes"], target["labels"], crowd)
            given = found.box >= 0
            wanted = torch.zeros_like(image_logits)
            wanted[given, target["labels"][found.box[given]]] = found.overlap[given]
            class_sum = class_sum + _soft_focal(image_logits, wanted)[~found.is_ignored].sum()
            apart = generalized_box_iou_loss(image_boxes[given], target["boxes"][found.box[given]])
            box_sum = box_sum + apart.sum()
            num_given += int(given.sum())
        return {"class": class_sum / max(1, num_given), "box": box_sum / max(1, num_given)}


def _select(scores: Tensor, boxes: Tensor, size: tuple[int, int], selection: Selection) -> dict[str, Tensor]:
    """The detections among the scores (A, K) and boxes (A, 4) of an image of this height and width, cut to it."""
    boxes = clip_boxes_to_image(boxes, size)
    is_inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
    points, labels = ((scores > selection.min_score) & is_inside).nonzero(as_tuple=True)
    scores, best = scores[points, labels].topk(min(MAX_COMPARED, len(points)))
    boxes, labels = boxes[points[best]], labels[best]
    kept = batched_nms(boxes, scores, labels, selection.max_overlap)[: selection.max_detections]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def _soft_focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """|wanted - p|^2 times the cross-entropy, so that what is right already counts little."""
    weight = (wanted - logits.sigmoid()).abs().square()
    return weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points lie in which boxes, (A, G) bool."""
    x, y = points[:, None].unbind(-1)
    return (x > boxes[:, 0]) & (x < boxes[:, 2]) & (y > boxes[:, 1]) & (y < boxes[:, 3])

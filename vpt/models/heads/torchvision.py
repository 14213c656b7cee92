"""RetinaNet and Faster R-CNN of torchvision as heads on a feature pyramid: the known references for the dense head.

Layers, assignment, losses and post-processing are torchvision's own. Here they are only fed, and four traps are closed:

- torchvision lays anchors on the corners of cells, at strides that it divides out of the sizes of maps, and in the
  dtype of the maps. Here they lie on the centres of cells, as the patches of a ViT do, at the strides of the pyramid,
  in float32.
- Its pooling of regions takes each stride for a power of two (7 for 8). Here it is told the strides.
- It normalises and resizes images. Here it never sees one: it begins with feature maps.
- Label 0 of Faster R-CNN is background. Here labels begin with 0: one is added on the way in and taken off on the way
  out.

Legend: B images, C channels, K classes, G boxes of an image, A anchors of all levels, S stride in pixels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead as RetinaNetTowers
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.poolers import LevelMapper

from vpt.models.heads.dense import Selection, group_norm, inside

ANCHOR_SIDE = 4  # side of the smallest anchor, in strides
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)  # height to width
REGION_SIDE = 7  # cells of a pooled region
CELLS_OF_LEVEL = 14  # side in cells from which a region is pooled on a level: 224 px at stride 16, as in the FPN paper


class RetinaNetHead(nn.Module):
    """torchvision's RetinaNet behind its backbone: nine anchors at each cell, focal loss; GroupNorm in both towers.

    An anchor learns the box that it overlaps by half; a box that no anchor overlaps so, such as a small one, is given
    its best anchors. Crowds are no boxes, and what would be background inside one teaches nothing.

    Args:
        channels: C, of every level.
        num_classes: K.
        strides: S of each level, in pixels.
        num_convs: Convolutions in each of the two towers; torchvision has four.

    Raises:
        ValueError: `num_convs` is not 1 to 4.

    References:
        RetinaNet (Lin et al., 2017), https://arxiv.org/abs/1708.02002, section 4.

    Example:
        >>> head = RetinaNetHead(32, num_classes=3, strides=(8, 16)).eval()
        >>> found = head.detect([torch.zeros(1, 32, 8, 8), torch.zeros(1, 32, 4, 4)], [(64, 64)], Selection())
        >>> sorted(found[0])
        ['boxes', 'labels', 'scores']
    """

    def __init__(self, channels: int, num_classes: int, strides: Sequence[int], num_convs: int = 4) -> None:
        super().__init__()
        if not 1 <= num_convs <= 4:
            raise ValueError(f"head.num_convs must be 1 to 4 for head.name=retinanet, got {num_convs}")
        self.num_classes, self.num_convs = num_classes, num_convs
        anchors = PyramidAnchors(strides, OCTAVES)
        towers = RetinaNetTowers(channels, len(OCTAVES) * len(RATIOS), num_classes, norm_layer=group_norm)
        for tower in (towers.classification_head, towers.regression_head):
            tower.conv = tower.conv[:num_convs]
        self.retinanet = RetinaNet(_no_backbone(channels), num_classes, anchor_generator=anchors, head=towers)

    def losses(
        self, levels: Sequence[Tensor], image_size: tuple[int, int], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Losses of a batch, in float32: "class" (focal) and "box" (L1 of the offsets), means over the images.

        Args:
            levels: (B, C, H/S, W/S).
            image_size: H and W.
            targets: For each image "boxes" (G, 4), "labels" (G,) and, if there are crowds, "crowd" (G,) bool.
        """
        said = self._said(levels)
        anchors = torch.cat(self.retinanet.anchor_generator.of_levels(levels))
        kept = [without_crowds(target) for target in targets]
        matched = [self._match(anchors, *pair) for pair in zip(targets, kept, strict=True)]
        found = self.retinanet.head.compute_loss(kept, said, [anchors] * len(kept), matched)
        return {"class": found["classification"], "box": found["bbox_regression"]}

    def detect(
        self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], selection: Selection
    ) -> list[dict[str, Tensor]]:
        """For each image of such a size "boxes" (n, 4) in pixels, "scores" (n,) and "labels" (n,), the best first."""
        said = self._said(levels)
        said["cls_logits"] = selection.only(said["cls_logits"])
        anchors = self.retinanet.anchor_generator.of_levels(levels)
        nums = [len(some) for some in anchors]
        by_level = {name: torch.split(one, nums, dim=1) for name, one in said.items()}
        _select_by(self.retinanet, selection)
        found = self.retinanet.postprocess_detections(by_level, [anchors] * len(sizes), list(sizes))
        # Boxes beside the image have been cut to nothing, and are still there.
        return [_best(one, (one["boxes"][:, 2:] > one["boxes"][:, :2]).all(dim=1), selection) for one in found]

    def _said(self, levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Class logits (B, A, K) and box offsets (B, A, 4), in float32."""
        return {name: one.float() for name, one in self.retinanet.head(list(levels)).items()}

    def _match(self, anchors: Tensor, target: dict[str, Tensor], kept: dict[str, Tensor]) -> Tensor:
        """The box of each anchor (A,), or torchvision's numbers for background and for what is not looked at."""
        matcher = self.retinanet.proposal_matcher
        if len(kept["boxes"]):
            matched: Tensor = matcher(box_iou(kept["boxes"], anchors))
        else:
            matched = torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        crowds = target["boxes"][_is_crowd(target)]
        in_crowd = inside((anchors[:, :2] + anchors[:, 2:]) / 2, crowds).any(dim=1)
        is_background = matched == matcher.BELOW_LOW_THRESHOLD
        return matched.masked_fill(in_crowd & is_background, matcher.BETWEEN_THRESHOLDS)


class FasterRCNNHead(nn.Module):
    """torchvision's Faster R-CNN behind its backbone: proposals, then a class and a box for each pooled region.

    Three anchors at each cell. The layers behind the pooling are 4 C wide: that is the 1024 of torchvision for its 256
    channels, and at C=64 it takes 0.9 M weights where 1024 would take 4.3 M. torchvision has no norm in these layers.
    Crowds are no boxes; what is found inside one counts as background.

    The head computes in float32 under autocast too, since torchvision takes its losses where it predicts.

    Args:
        channels: C, of every level.
        num_classes: K.
        strides: S of each level, in pixels, each the double of the one before.
        num_convs: Convolutions that look for proposals.

    Raises:
        ValueError: A stride that is not the double of the one before.

    References:
        Faster R-CNN (Ren et al., 2015), https://arxiv.org/abs/1506.01497; on a pyramid: FPN (Lin et al., 2017),
        https://arxiv.org/abs/1612.03144, equation 1; two convolutions for proposals: ViTDet (Li et al., 2022).

    Example:
        >>> head = FasterRCNNHead(32, num_classes=3, strides=(8, 16)).eval()
        >>> found = head.detect([torch.zeros(1, 32, 8, 8), torch.zeros(1, 32, 4, 4)], [(64, 64)], Selection())
        >>> sorted(found[0])
        ['boxes', 'labels', 'scores']
    """

    def __init__(self, channels: int, num_classes: int, strides: Sequence[int], num_convs: int = 2) -> None:
        super().__init__()
        self.num_classes, self.num_convs = num_classes, num_convs
        width = 4 * channels
        model: Any = FasterRCNN(
            _no_backbone(channels),
            rpn_anchor_generator=PyramidAnchors(strides),
            rpn_head=RPNHead(channels, len(RATIOS), num_convs),
            box_roi_pool=_region_pool(strides),
            box_head=TwoMLPHead(channels * REGION_SIDE**2, width),
            box_predictor=FastRCNNPredictor(width, num_classes + 1),
        )
        self.rpn, self.roi_heads = model.rpn, model.roi_heads

    def losses(
        self, levels: Sequence[Tensor], image_size: tuple[int, int], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Losses of a batch in train mode, in float32: "rpn_class" and "rpn_box" of the proposals, "class" and "box".

        In eval mode there are none, {}: they are losses of anchors and regions drawn at random, and of the true boxes
        among the proposals, so they would neither repeat nor belong to what is detected.

        Args:
            levels: (B, C, H/S, W/S).
            image_size: H and W.
            targets: For each image "boxes" (G, 4), "labels" (G,) and, if there are crowds, "crowd" (G,) bool.
        """
        if not self.training:
            return {}
        kept = [without_crowds(target) for target in targets]
        wanted = [{"boxes": target["boxes"].float(), "labels": target["labels"] + 1} for target in kept]
        _, found = self._run(levels, [image_size] * len(wanted), wanted)
        names = {
            "rpn_class": "loss_objectness",
            "rpn_box": "loss_rpn_box_reg",
            "class": "loss_classifier",
            "box": "loss_box_reg",
        }
        return {ours: found[theirs] for ours, theirs in names.items()}

    def detect(
        self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], selection: Selection
    ) -> list[dict[str, Tensor]]:
        """For each image of such a size "boxes" (n, 4) in pixels, "scores" (n,) and "labels" (n,), the best first."""
        _select_by(self.roi_heads, selection)
        found, _ = self._run(levels, sizes, None)
        wanted = range(self.num_classes) if selection.labels is None else selection.labels
        for one in found:
            one["labels"] = one["labels"] - 1
        return [_best(one, torch.isin(one["labels"], one["labels"].new_tensor(wanted)), selection) for one in found]

    def _run(
        self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in eval mode, losses in train mode; both with the labels and the names of torchvision."""
        with torch.autocast(levels[0].device.type, enabled=False):
            maps = {str(index): level.float() for index, level in enumerate(levels)}
            proposals, rpn_losses = self.rpn(ImageList(maps["0"], list(sizes)), maps, targets)
            found, roi_losses = self.roi_heads(maps, proposals, list(sizes), targets)
        return found, rpn_losses | roi_losses


class PyramidAnchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors, on the centres of the cells of a pyramid and at exactly its strides.

    The smallest are four strides wide, and smaller boxes train as well: each box has its best anchors.

    Args:
        strides: S of each level, in pixels.
        scales: Sizes of the anchors of a cell, times the smallest.

    Example:
        >>> anchors = PyramidAnchors((8, 16)).of_levels([torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 1, 1)])
        >>> anchors[0][[1, 4]].tolist(), anchors[1].shape
        ([[-12.0, -12.0, 20.0, 20.0], [-4.0, -12.0, 28.0, 20.0]], torch.Size([3, 4]))
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float] = (1.0,)) -> None:
        sizes = tuple(tuple(ANCHOR_SIDE * stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, images: ImageList, levels: Sequence[Tensor]) -> list[Tensor]:
        """The anchors (A, 4) of all levels, for each image: what torchvision asks for."""
        return [torch.cat(self.of_levels(levels))] * len(images.image_sizes)

    def of_levels(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each level (B, C, H/S, W/S) as x1, y1, x2, y2 in pixels, in float32."""
        self.set_cell_anchors(torch.float32, levels[0].device)
        on_corners = self.grid_anchors([level.shape[-2:] for level in levels], [(s, s) for s in self.strides])
        return [anchors + stride / 2 for anchors, stride in zip(on_corners, self.strides, strict=True)]


def without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """The boxes and labels of an image that are not crowds."""
    kept = ~_is_crowd(target)
    return {"boxes": target["boxes"][kept], "labels": target["labels"][kept]}


def _is_crowd(target: dict[str, Tensor]) -> Tensor:
    return target.get("crowd", torch.zeros_like(target["labels"], dtype=torch.bool))


def _no_backbone(channels: int) -> nn.Module:
    """What torchvision asks the width of the maps; it is never called."""
    backbone: Any = nn.Identity()
    backbone.out_channels = channels
    return backbone  # type: ignore[no-any-return]


def _region_pool(strides: Sequence[int]) -> MultiScaleRoIAlign:
    """Pooling of regions that is told the strides, as torchvision guesses them, to the next power of two."""
    for finer, coarser in pairwise(strides):
        if coarser != 2 * finer:
            raise ValueError(
                f"head.strides must double from one to the next for head.name=fasterrcnn, got {list(strides)}"
            )
    pool = MultiScaleRoIAlign([str(index) for index in range(len(strides))], REGION_SIDE, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(0, len(strides) - 1, CELLS_OF_LEVEL * strides[0], canonical_level=0)
    return pool


def _select_by(model: Any, selection: Selection) -> None:
    """Set the numbers that torchvision's post-processing reads from its model."""
    model.score_thresh = selection.min_score
    model.nms_thresh = selection.max_overlap
    model.detections_per_img = None  # all: `_best` counts, once what is not wanted is out


def _best(found: dict[str, Tensor], is_wanted: Tensor, selection: Selection) -> dict[str, Tensor]:
    """The first of the wanted detections of an image, as many as may be."""
    kept = is_wanted.nonzero()[: selection.max_detections, 0]
    return {name: found[name][kept] for name in ("boxes", "scores", "labels")}

"""RetinaNet and Faster R-CNN heads of torchvision on a feature pyramid, as references for the dense head.

Layers, assignment, losses and post-processing are torchvision's own. The adaptations are:

- torchvision places anchors on the corners of cells, at strides derived from the sizes of maps, in the dtype of the
  maps. Here anchors are on the centres of cells, like the patches of a ViT, at the pyramid's strides, in float32.
- Its region pooling rounds each stride to a power of two (7 to 8). Here it gets the strides.
- Its normalisation and resizing of images is skipped: the heads take feature maps.
- Label 0 of its Faster R-CNN is background; here labels begin with 0, so they are shifted by one.

Legend: B images, C channels, K classes, G true boxes of an image, A anchors of all levels, S stride in pixels.
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

from vpt.models.heads.dense import Selection, Tensors, group_norm, inside, is_crowd

ANCHOR_SIDE = 4  # side of the smallest anchors, in strides
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)  # height to width
REGION_SIDE = 7  # cells of a pooled region
CELLS_OF_LEVEL = 14  # region side, in cells, from which a level is used: 224 px at stride 16, as in the FPN paper


class RetinaNetHead(nn.Module):
    """torchvision's RetinaNet head: nine anchors per cell, focal loss, GroupNorm in both towers.

    An anchor is matched to a true box from an IoU of 0.5; a box without such an anchor gets its best anchors. Crowds
    are no true boxes, and background anchors inside them are ignored.

    C channels at each of the strides S; `num_convs` convolutions in each tower, four in torchvision.

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
            raise ValueError(f"num_convs={num_convs}: must be 1 to 4 for retinanet")
        self.num_classes, self.num_convs = num_classes, num_convs
        anchors = PyramidAnchors(strides, OCTAVES)
        towers = RetinaNetTowers(channels, len(OCTAVES) * len(RATIOS), num_classes, norm_layer=group_norm)
        for tower in (towers.classification_head, towers.regression_head):
            tower.conv = tower.conv[:num_convs]
        self.retinanet = RetinaNet(_no_backbone(channels), num_classes, anchor_generator=anchors, head=towers)

    def losses(self, levels: Sequence[Tensor], image_size: tuple[int, int], targets: Sequence[Tensors]) -> Tensors:
        """Losses of a batch in float32: "class" (focal) and "box" (L1 of the offsets), averaged over images."""
        anchors = torch.cat(self.retinanet.anchor_generator.of_levels(levels))
        true = [without_crowds(target) for target in targets]
        matched = [self._match(anchors, *pair) for pair in zip(targets, true, strict=True)]
        losses = self.retinanet.head.compute_loss(true, self._predict(levels), [anchors] * len(true), matched)
        return {"class": losses["classification"], "box": losses["bbox_regression"]}

    def detect(self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], selection: Selection) -> list[Tensors]:
        """Detections per image of the given (height, width), as `DenseHead.detect` returns them."""
        outputs = self._predict(levels)
        outputs["cls_logits"] = selection.only(outputs["cls_logits"])
        anchors = self.retinanet.anchor_generator.of_levels(levels)
        nums = [len(level) for level in anchors]
        by_level = {name: torch.split(output, nums, dim=1) for name, output in outputs.items()}
        _configure(self.retinanet, selection)
        found = self.retinanet.postprocess_detections(by_level, [anchors] * len(sizes), list(sizes))
        # torchvision clips boxes outside the image to an empty area, but does not remove them.
        return [_best(one, (one["boxes"][:, 2:] > one["boxes"][:, :2]).all(dim=1), selection) for one in found]

    def _predict(self, levels: Sequence[Tensor]) -> Tensors:
        """Class logits (B, A, K) and box offsets (B, A, 4), in float32."""
        return {name: output.float() for name, output in self.retinanet.head(list(levels)).items()}

    def _match(self, anchors: Tensor, target: Tensors, true: Tensors) -> Tensor:
        """Index of the true box of each anchor (A,), or torchvision's values for background and ignored anchors."""
        matcher = self.retinanet.proposal_matcher
        if len(true["boxes"]):
            matched: Tensor = matcher(box_iou(true["boxes"], anchors))
        else:
            matched = torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        crowds = target["boxes"][is_crowd(target)]
        in_crowd = inside((anchors[:, :2] + anchors[:, 2:]) / 2, crowds).any(dim=1)
        is_background = matched == matcher.BELOW_LOW_THRESHOLD
        return matched.masked_fill(in_crowd & is_background, matcher.BETWEEN_THRESHOLDS)


class FasterRCNNHead(nn.Module):
    """torchvision's Faster R-CNN head: proposals, then a class and a box for each pooled region.

    Three anchors per cell. The layers after the pooling are 4 C wide: torchvision's 1024 for its 256 channels; at C=64
    this takes 0.9 M weights, where 1024 would take 4.3 M. As in torchvision they have no norm. Crowds are no true
    boxes; detections inside them count as background.

    Computes in float32 under autocast too, since torchvision takes its losses where it predicts. C channels at each of
    the strides S; `num_convs` convolutions look for proposals.

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

    def losses(self, levels: Sequence[Tensor], image_size: tuple[int, int], targets: Sequence[Tensors]) -> Tensors:
        """Losses of a batch in train mode, in float32: "rpn_class" and "rpn_box" of the proposals, "class" and "box".

        {} in eval mode: with randomly sampled anchors and regions, and true boxes among the proposals, they would be
        neither reproducible nor the losses of the detections.
        """
        if not self.training:
            return {}
        true = [{"boxes": one["boxes"].float(), "labels": one["labels"] + 1} for one in map(without_crowds, targets)]
        _, losses = self._run(levels, [image_size] * len(true), true)
        names = {"rpn_class": "objectness", "rpn_box": "rpn_box_reg", "class": "classifier", "box": "box_reg"}
        return {ours: losses[f"loss_{theirs}"] for ours, theirs in names.items()}

    def detect(self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], selection: Selection) -> list[Tensors]:
        """Detections per image of the given (height, width), as `DenseHead.detect` returns them."""
        _configure(self.roi_heads, selection)
        found, _ = self._run(levels, sizes, None)
        selected = range(self.num_classes) if selection.labels is None else selection.labels
        for one in found:
            one["labels"] = one["labels"] - 1
        return [_best(one, torch.isin(one["labels"], one["labels"].new_tensor(selected)), selection) for one in found]

    def _run(
        self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], targets: list[Tensors] | None
    ) -> tuple[list[Tensors], Tensors]:
        """Detections (eval mode) and losses (train mode), with the labels and names of torchvision."""
        with torch.autocast(levels[0].device.type, enabled=False):
            maps = {str(index): level.float() for index, level in enumerate(levels)}
            proposals, rpn_losses = self.rpn(ImageList(maps["0"], list(sizes)), maps, targets)
            found, roi_losses = self.roi_heads(maps, proposals, list(sizes), targets)
        return found, rpn_losses | roi_losses


class PyramidAnchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors, on the centres of the cells of a pyramid, at exactly its strides.

    The smallest anchors are four strides wide, or `scales` times that; smaller boxes are matched to their best anchors.

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
        """Anchors (A, 4) of all levels for each image, the interface of torchvision."""
        return [torch.cat(self.of_levels(levels))] * len(images.image_sizes)

    def of_levels(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Anchors of each level (B, C, H/S, W/S) as x1, y1, x2, y2 in pixels, in float32."""
        self.set_cell_anchors(torch.float32, levels[0].device)
        on_corners = self.grid_anchors([level.shape[-2:] for level in levels], [(s, s) for s in self.strides])
        return [anchors + stride / 2 for anchors, stride in zip(on_corners, self.strides, strict=True)]


def without_crowds(target: Tensors) -> Tensors:
    """Boxes and labels of an image without crowds."""
    is_box = ~is_crowd(target)
    return {"boxes": target["boxes"][is_box], "labels": target["labels"][is_box]}


def _no_backbone(channels: int) -> nn.Module:
    """Placeholder from which torchvision reads the number of channels; never called."""
    backbone: Any = nn.Identity()
    backbone.out_channels = channels
    return backbone  # type: ignore[no-any-return]


def _region_pool(strides: Sequence[int]) -> MultiScaleRoIAlign:
    """Region pooling with explicit strides, which torchvision would round to powers of two."""
    for finer, coarser in pairwise(strides):
        if coarser != 2 * finer:
            raise ValueError(f"strides={list(strides)}: must double from one to the next for fasterrcnn")
    pool = MultiScaleRoIAlign([str(index) for index in range(len(strides))], REGION_SIDE, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(0, len(strides) - 1, CELLS_OF_LEVEL * strides[0], canonical_level=0)
    return pool


def _configure(model: Any, selection: Selection) -> None:
    """Set the thresholds that torchvision's post-processing reads from its model."""
    model.score_thresh = selection.min_score
    model.nms_thresh = selection.max_overlap
    model.detections_per_img = None  # no limit: `_best` applies it after the other filters


def _best(found: Tensors, is_selected: Tensor, selection: Selection) -> Tensors:
    """The first `max_detections` selected detections of an image."""
    indices = is_selected.nonzero()[: selection.max_detections, 0]
    return {name: found[name][indices] for name in ("boxes", "scores", "labels")}

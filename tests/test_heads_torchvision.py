"""RetinaNet and Faster R-CNN heads of torchvision on a pyramid: anchors, matching, losses and labels."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from vpt.models.heads.dense import DenseHead, Selection
from vpt.models.heads.torchvision import FasterRCNNHead, PyramidAnchors, RetinaNetHead, without_crowds

HEADS = [RetinaNetHead, FasterRCNNHead]
STRIDES = (8, 16, 32)


def levels_of(size=64, strides=STRIDES, channels=16, batch_size=2):
    return [torch.randn(batch_size, channels, size // stride, size // stride) for stride in strides]


def target_of(boxes, labels=None, crowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels} | ({} if crowd is None else {"crowd": torch.tensor(crowd)})


def detect(head, levels, size=(64, 64), **selection):
    return head.eval().detect(levels, [size] * len(levels[0]), Selection(**selection))


def make_head(make, num_classes=3, strides=STRIDES, **options):
    torch.manual_seed(0)
    return make(16, num_classes, strides, **options)


@pytest.mark.parametrize(
    "make_anchors",
    [
        lambda strides: PyramidAnchors(strides),
        lambda strides: make_head(RetinaNetHead, strides=strides).retinanet.anchor_generator,
        lambda strides: make_head(FasterRCNNHead, strides=strides).rpn.anchor_generator,
    ],
)
@pytest.mark.parametrize(("size", "strides"), [(64, STRIDES), (96, STRIDES), (84, (7, 14, 28)), (72, STRIDES)])
def test_anchors_are_centred_on_cells_at_the_strides_of_the_pyramid(size, strides, make_anchors):
    generator = make_anchors(strides)
    by_level = generator.of_levels(levels_of(size, strides))
    for anchors, stride, num in zip(by_level, strides, generator.num_anchors_per_location(), strict=True):
        side = size // stride
        centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).reshape(side, side, num, 2)
        middles = (torch.arange(side) + 0.5) * stride
        assert (centres[..., 0] == middles[None, :, None]).all()
        assert (centres[..., 1] == middles[:, None, None]).all()
        sides = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1).sqrt()
        assert sides.min().item() == pytest.approx(4 * stride, rel=0.03)
        assert sides.max().item() < 8 * stride


def test_anchors_of_a_wide_image_are_in_row_major_order():
    (anchors,) = PyramidAnchors((8,)).of_levels([torch.zeros(1, 16, 2, 3)])
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2)[::3]
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


@pytest.mark.parametrize("make", [DenseHead, *HEADS])
def test_detections_are_clipped_to_the_height_and_the_width_of_a_wide_image(make):
    levels = [torch.randn(2, 16, 64 // stride, 128 // stride) for stride in STRIDES]
    found = detect(make_head(make), levels, (64, 128), min_score=0.001, max_detections=10_000)
    x2, y2 = torch.cat([one["boxes"][:, 2:] for one in found]).unbind(dim=1)
    assert (x2.max(), y2.max()) == (128, 64)


def test_anchors_stay_in_float32_for_bfloat16_maps():
    levels = [level.bfloat16() for level in levels_of(640, strides=(8,))]
    (anchors,) = PyramidAnchors((8,)).of_levels(levels)
    assert anchors.dtype == torch.float32
    assert anchors[-1].tolist() == [625, 613, 647, 659]  # not multiples of four, as in bfloat16


@pytest.mark.parametrize("box", [[7.5, 7.5, 8.5, 8.5], [0, 0, 2, 2], [62, 62, 64, 64], [20, 3, 60, 5]])
def test_a_box_that_no_anchor_fits_trains_its_best_anchors(box):
    head, target = make_head(RetinaNetHead), target_of([box])
    anchors = torch.cat(head.retinanet.anchor_generator.of_levels(levels_of()))
    matched = head._match(anchors, target, target)
    overlaps = box_iou(target["boxes"], anchors)[0]
    assert overlaps.max() < 0.5
    assert torch.equal(matched == 0, overlaps == overlaps.max())
    labels, _ = make_head(FasterRCNNHead).rpn.assign_targets_to_anchors([anchors], [target])
    assert torch.equal(labels[0] == 1, overlaps == overlaps.max())


def test_the_losses_of_retinanet_are_those_of_the_paper():
    """Focal loss and L1 of the offsets, anchor by anchor: boxes from an IoU of 0.5, background below 0.4."""
    head, levels = make_head(RetinaNetHead), levels_of()
    targets = [target_of([[4, 4, 30, 30], [20, 24, 60, 60]], labels=[2, 0]), target_of([])]
    losses = head.losses(levels, (64, 64), targets)
    outputs = head.retinanet.head(levels)
    anchors = torch.cat(head.retinanet.anchor_generator.of_levels(levels))
    class_loss = box_loss = 0.0
    for target, logits, offsets in zip(targets, outputs["cls_logits"], outputs["bbox_regression"], strict=True):
        overlaps = box_iou(anchors, target["boxes"])
        best, index = F.pad(overlaps, (0, 1)).max(dim=1)  # the last column is no box
        is_box = (best >= 0.5) | (overlaps == overlaps.amax(dim=0)).any(dim=1)
        is_true = torch.zeros_like(logits, dtype=torch.bool)
        is_true[is_box, target["labels"][index[is_box]]] = True
        p, num = logits.sigmoid(), max(1, int(is_box.sum()))
        focal = torch.where(is_true, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
        class_loss += focal[is_box | (best < 0.4)].sum().item() / num / 2
        (xy, wh), (uv, st) = (
            ((b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]) for b in (target["boxes"][index[is_box]], anchors[is_box])
        )
        expected = torch.cat([(xy - uv) / st, (wh / st).log()], dim=1)
        box_loss += (expected - offsets[is_box]).abs().sum().item() / num / 2
    assert losses["class"].item() == pytest.approx(class_loss, rel=1e-4)
    assert losses["box"].item() == pytest.approx(box_loss, rel=1e-4)


def test_retinanet_decodes_boxes_from_anchors_and_offsets():
    head, levels = make_head(RetinaNetHead).eval(), levels_of(batch_size=1)
    head.retinanet.head.regression_head.bbox_reg.bias.data[:4] = torch.tensor([0.25, -0.125, math.log(0.5), 0.0])
    towers = head.retinanet.head.classification_head
    torch.nn.init.zeros_(head.retinanet.head.regression_head.bbox_reg.weight)
    towers.cls_logits.weight.data[0] *= 300  # class 0 of the first anchor of each cell, and no other
    (found,) = detect(head, levels, min_score=0.02, max_overlap=1.0, max_detections=1000)
    logits = head.retinanet.head(levels)["cls_logits"][0, :, 0]
    anchors = torch.cat(head.retinanet.anchor_generator.of_levels(levels))
    order = [i for i in logits.argsort(descending=True).tolist() if logits[i].sigmoid() > 0.02]
    centres, sides = (anchors[order, :2] + anchors[order, 2:]) / 2, anchors[order, 2:] - anchors[order, :2]
    centres, sides = centres + sides * torch.tensor([0.25, -0.125]), sides * torch.tensor([0.5, 1.0])
    expected = torch.cat([centres - sides / 2, centres + sides / 2], dim=1).clamp(0, 64)
    expected = expected[(expected[:, 2:] > expected[:, :2]).all(dim=1)]
    assert len(expected) > 3
    torch.testing.assert_close(found["boxes"], expected)
    assert (found["labels"] == 0).all()


@pytest.mark.parametrize(("size", "strides"), [(64, STRIDES), (84, (7, 14, 28))])
def test_faster_rcnn_pools_regions_at_the_strides_of_the_pyramid(size, strides):
    """torchvision would round 1/7 to 1/8 and so pool beside the region."""
    head, levels = make_head(FasterRCNNHead, strides=strides), levels_of(size, strides, batch_size=1)
    finest = strides[0]
    boxes = torch.tensor([[3.0, 5, 31, 40], [0, 0, 14 * finest, 14 * finest], [0, 0, 28 * finest, 28 * finest + 1]])
    maps = {str(index): level for index, level in enumerate(levels)}
    pooled = head.roi_heads.box_roi_pool(maps, [boxes], [(size, size)])
    for box, level, region in zip(boxes, (0, 0, 1), pooled, strict=True):
        expected = roi_align(levels[level], [box[None]], 7, spatial_scale=1 / strides[level], sampling_ratio=2)
        torch.testing.assert_close(region, expected[0])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (FasterRCNNHead, {"strides": (8, 32)}, r"strides=\[8, 32\]: must double"),
        (RetinaNetHead, {"num_convs": 0}, "num_convs=0: must be 1 to 4"),
        (RetinaNetHead, {"num_convs": 5}, "num_convs=5: must be 1 to 4"),
    ],
)
def test_options_that_torchvision_does_not_support_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make_head(make, **options)


def test_towers_have_the_given_number_of_convolutions_and_group_norm():
    for num_convs in (1, 4):
        retinanet = make_head(RetinaNetHead, num_convs=num_convs).retinanet.head
        for tower in (retinanet.classification_head, retinanet.regression_head):
            types = [type(layer) for layer in tower.conv.modules()]
            assert types.count(torch.nn.Conv2d) == types.count(torch.nn.GroupNorm) == num_convs
        rpn = make_head(FasterRCNNHead, num_convs=num_convs).rpn.head
        assert sum(isinstance(layer, torch.nn.Conv2d) for layer in rpn.conv.modules()) == num_convs


def test_faster_rcnn_trains_on_labels_plus_one_and_returns_the_original_labels(monkeypatch):
    """The targets of regions are 1 + label, and 0 without a box; class 0 is returned as 0."""
    head, levels = make_head(FasterRCNNHead), levels_of()
    learned = []
    entropy = F.cross_entropy
    monkeypatch.setattr(
        "torchvision.models.detection.roi_heads.F.cross_entropy",
        lambda logits, labels: learned.append(labels) or entropy(logits, labels),
    )
    head.losses(levels, (64, 64), [target_of([[4, 4, 30, 30]], [0]), target_of([[20, 24, 60, 60]], [2])])
    assert set(learned[0].tolist()) == {0, 1, 3}

    torch.nn.init.zeros_(head.roi_heads.box_predictor.cls_score.weight)
    head.roi_heads.box_predictor.cls_score.bias.data = torch.tensor([0.0, 2.0, 0.0, 1.0])
    shares = torch.tensor([0.0, 2.0, 0.0, 1.0]).softmax(dim=0)
    for one in detect(head, levels, min_score=0.2):
        assert set(one["labels"].tolist()) == {0, 2}
        torch.testing.assert_close(one["scores"], shares[1 + one["labels"]])


@pytest.mark.parametrize("make", [DenseHead, *HEADS])
@pytest.mark.parametrize("targets", [[[], []], [[], [[4, 4, 20, 20]]]])
def test_batches_with_images_without_boxes_have_finite_losses_and_gradients(make, targets):
    head = make_head(make)
    losses = head.losses(levels_of(), (64, 64), [target_of(boxes) for boxes in targets])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["class"] > 0
    if not any(targets):
        assert losses["box"] == 0
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [DenseHead, *HEADS])
def test_a_crowd_is_not_a_true_box(make):
    """A batch of crowds has the losses of no box; a crowd beside a box leaves the loss of boxes as it is."""
    head, levels = make_head(make), levels_of(batch_size=1)
    torch.manual_seed(1)
    alone = head.losses(levels, (64, 64), [target_of([[4, 4, 30, 30]], crowd=[True])])
    assert alone["box"] == 0
    torch.manual_seed(2)
    with_crowd = head.losses(levels, (64, 64), [target_of([[32, 32, 64, 64], [4, 4, 30, 30]], [1, 2], [True, False])])
    torch.manual_seed(2)
    without = head.losses(levels, (64, 64), [target_of([[4, 4, 30, 30]], [2])])
    assert with_crowd["box"] == without["box"] > 0


def test_retinanet_ignores_background_anchors_in_a_crowd_and_still_matches_the_boxes_in_it():
    head = make_head(RetinaNetHead)
    anchors = torch.cat(head.retinanet.anchor_generator.of_levels(levels_of()))
    target = target_of([[0, 0, 40, 40], [2, 2, 34, 34]], crowd=[True, False])
    kept = without_crowds(target)
    assert kept["boxes"].tolist() == [[2, 2, 34, 34]]
    matched, alone = head._match(anchors, target, kept), head._match(anchors, kept, kept)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    in_crowd = (centres < 40).all(dim=1)
    background, ignored = -1, -2
    assert (alone[in_crowd] == background).any()
    assert not (matched[in_crowd] == background).any()
    assert (matched[in_crowd & (alone == background)] == ignored).all()
    assert torch.equal(matched[~in_crowd], alone[~in_crowd])
    assert torch.equal(matched >= 0, alone >= 0)
    assert (matched >= 0).any()


def test_an_image_without_likely_boxes_has_no_detections():
    for make in HEADS:
        for one in detect(make_head(make), levels_of(), min_score=0.99):
            assert one["boxes"].shape == (0, 4)
            assert (len(one["scores"]), len(one["labels"])) == (0, 0)

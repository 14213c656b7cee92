"""The dense head: assignment of boxes to points, and losses against their formulas."""

import pytest
import torch

from vpt.models.heads.dense import DenseHead, assign, dense_losses, level_points


def assign_to(boxes, labels=None, crowd=None, predicted=None, scores=None):
    """Assign boxes to the 64 points of an 8 x 8 level of stride 8; they predict `predicted`, or small boxes."""
    points = level_points((8, 8), 8, torch.device("cpu"))
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    crowd = torch.zeros(len(boxes), dtype=torch.bool) if crowd is None else torch.tensor(crowd)
    predicted = torch.cat([points - 4, points + 4], dim=1) if predicted is None else predicted
    scores = torch.full((64, 3), 0.5) if scores is None else scores
    return points, assign(points, scores, predicted, boxes, labels, crowd)


def test_points_are_the_centres_of_cells_row_by_row():
    points = level_points((2, 3), 8, torch.device("cpu"))
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


def test_a_box_takes_the_ten_points_inside_it_that_fit_best():
    points, found = assign_to(
        [[0, 0, 64, 64]], predicted=torch.tensor([[0.0, 0, 64, 64]]).repeat(64, 1) - torch.arange(64)[:, None]
    )
    taken = (found.box == 0).nonzero()[:, 0]
    assert taken.tolist() == list(range(10))
    assert found.overlap[0] == 1
    assert (found.overlap[10:] == 0).all()
    assert (points[taken] > 0).all()


def test_scores_and_overlaps_decide_together():
    scores = torch.full((64, 3), 0.01)
    scores[20:30, 1] = 0.9
    _, found = assign_to(
        [[0, 0, 64, 64]], labels=[1], predicted=torch.tensor([[0.0, 0, 60, 60]]).repeat(64, 1), scores=scores
    )
    assert (found.box == 0).nonzero()[:, 0].tolist() == list(range(20, 30))


def test_a_point_chosen_by_two_boxes_goes_to_the_one_with_the_largest_overlap():
    _, found = assign_to([[0, 0, 64, 64], [0, 0, 16, 16]])  # points predict boxes of 8 px
    assert found.box[0] == 1
    assert set(found.box.tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("box", [[7.5, 7.5, 8.5, 8.5], [0, 0, 1, 1], [63, 63, 64, 64]])
def test_a_box_without_a_point_inside_takes_the_nearest_one(box):
    points, found = assign_to([box])
    (taken,) = (found.box == 0).nonzero()[:, 0].tolist()
    centre = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    assert (points[taken] - centre).norm() == (points - centre).norm(dim=1).min()


def test_every_box_trains_even_if_many_are_in_one_cell():
    boxes = [[3 + 0.01 * i, 3, 5, 5] for i in range(20)]
    _, found = assign_to(boxes)
    assert set(found.box.tolist()) == {-1, *range(20)}


def test_crowds_get_no_points_and_points_inside_them_are_ignored():
    points, found = assign_to([[0, 0, 32, 32], [40, 40, 56, 56]], crowd=[True, False])
    inside = (points < 32).all(dim=1)
    assert set(found.box.tolist()) == {-1, 1}
    assert torch.equal(found.is_ignored, inside)
    _, found = assign_to([[0, 0, 32, 32]], crowd=[True])
    assert (found.box == -1).all()


def test_the_losses_are_those_of_their_formulas():
    torch.manual_seed(0)
    points = level_points((8, 8), 8, torch.device("cpu"))
    logits, boxes = torch.randn(1, 64, 3), torch.cat([points - 6, points + 5], dim=1)[None]
    targets = [{"boxes": torch.tensor([[4.0, 4, 30, 30], [20, 24, 60, 60]]), "labels": torch.tensor([0, 1])}]
    losses = dense_losses(points, logits, boxes, targets)
    crowd = torch.zeros(2, dtype=torch.bool)
    found = assign(points, logits[0].sigmoid(), boxes[0], targets[0]["boxes"], targets[0]["labels"], crowd)
    is_box, expected = found.box >= 0, torch.zeros(64, 3)
    expected[is_box, targets[0]["labels"][found.box[is_box]]] = found.overlap[is_box]
    p = logits[0].sigmoid()
    entropy = -expected * p.log() - (1 - expected) * (1 - p).log()
    a, b = boxes[0][is_box], targets[0]["boxes"][found.box[is_box]]
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(dim=1)
    union = (a[:, 2:] - a[:, :2]).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1) - overlap
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(dim=1)
    assert losses["class"].item() == pytest.approx(((expected - p) ** 2 * entropy).sum().item() / len(a), rel=1e-4)
    assert losses["box"].item() == pytest.approx((1 - overlap / union + (hull - union) / hull).mean().item(), rel=1e-4)


def test_a_new_head_predicts_one_percent_per_class_and_shares_its_towers():
    head = DenseHead(32, 3, strides=(8, 16))
    logits, boxes = head([torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 4, 4)])
    assert logits.shape == (2, 64 + 16, 3)
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.01))
    sides = boxes[..., 2:] - boxes[..., :2]
    torch.testing.assert_close(sides[:, :64], torch.full_like(sides[:, :64], 2 * 3 * 8))
    torch.testing.assert_close(sides[:, 64:], torch.full_like(sides[:, 64:], 2 * 3 * 16))
    assert sum(p.numel() for p in DenseHead(64, 3, (8, 16)).parameters()) == pytest.approx(
        sum(p.numel() for p in DenseHead(64, 3, (8, 16, 32)).parameters()), abs=1
    )


def test_with_more_boxes_than_points_no_box_takes_the_point_of_another():
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0]])
    targets = torch.tensor([[0.0, 0, 1, 1], [14.0, 0, 15, 1], [6.0, 6, 7, 7]])
    found = assign(
        points, torch.full((2, 1), 0.5), targets[:2] + 2, targets, torch.zeros(3, dtype=torch.long), torch.zeros(3) > 0
    )
    assert found.box.tolist() == [0, 1]

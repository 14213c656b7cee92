import pytest
import torch
from torch.nn import functional as F

from vpt.engine.losses import CrossEntropy

LOGITS, TARGETS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 2, 2])


def test_without_weights_it_is_the_cross_entropy_of_torch():
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(LOGITS, TARGETS, label_smoothing=smoothing)
        torch.testing.assert_close(CrossEntropy(label_smoothing=smoothing)(LOGITS, TARGETS), expected)


def test_weighted_parts_of_a_batch_add_up_to_the_whole():
    loss = CrossEntropy(torch.tensor([0.5, 1.0, 4.0]))
    parts = loss(LOGITS[:2], TARGETS[:2]) * 2 / 6 + loss(LOGITS[2:], TARGETS[2:]) * 4 / 6
    assert parts.item() == pytest.approx(loss(LOGITS, TARGETS).item(), rel=1e-6)
    by_hand = sum(
        w * F.cross_entropy(LOGITS[i : i + 1], TARGETS[i : i + 1]) for i, w in enumerate((0.5, 0.5, 0.5, 1, 4, 4))
    )
    assert loss(LOGITS, TARGETS).item() == pytest.approx(by_hand.item() / 6, rel=1e-5)

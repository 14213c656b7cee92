import math

import pytest
import torch

from vpt.models.heads.linear import linear_head


def test_the_head_of_the_paper_starts_with_its_published_bias_and_scale():
    head = linear_head(768, 100, init="paper")
    assert head.bias.unique().item() == pytest.approx(-4.5951, abs=1e-4)
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.02)


def test_the_default_head_starts_from_equal_logits():
    assert torch.equal(linear_head(8, 3)(torch.randn(5, 8)), torch.zeros(5, 3))


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        linear_head(8, 0)
    with pytest.raises(ValueError, match="one of zero, paper, got 'ones'"):
        linear_head(8, 2, init="ones")

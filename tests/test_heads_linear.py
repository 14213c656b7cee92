"""The linear head."""

import math

import pytest
import torch

from vpt.models.heads.linear import linear_head


def test_the_paper_initialisation_has_the_published_bias_and_scale():
    head = linear_head(768, 100, init="paper")
    assert head.bias.unique().item() == pytest.approx(-4.5951, abs=1e-4)
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.02)


def test_the_default_initialisation_gives_equal_logits():
    assert torch.equal(linear_head(8, 3)(torch.randn(5, 8)), torch.zeros(5, 3))


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="num_classes=0: must be at least 1"):
        linear_head(8, 0)
    with pytest.raises(ValueError, match="init='ones': must be one of zero, paper"):
        linear_head(8, 2, init="ones")

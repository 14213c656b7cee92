"""Heads: features (B, D) -> logits (B, K)."""

import math
from typing import Literal, get_args

from torch import nn

HeadInit = Literal["zero", "paper"]


def linear_head(embed_dim: int, num_classes: int, init: HeadInit = "zero") -> nn.Linear:
    """A linear classifier.

    Args:
        embed_dim: D, width of the features.
        num_classes: K.
        init: "zero" starts from equal logits, as timm does. "paper" is what Jia et al. (2022) train with: Kaiming
            normal
            weights (fan out) and every bias at -log(99), a prior probability of 0.01 for each class.

    Raises:
        ValueError: `num_classes` is below 1, or `init` is unknown.

    Example:
        >>> linear_head(192, 14)
        Linear(in_features=192, out_features=14, bias=True)
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if init not in get_args(HeadInit):
        raise ValueError(f"head init must be one of {', '.join(get_args(HeadInit))}, got {init!r}")
    head = nn.Linear(embed_dim, num_classes)
    if init == "paper":
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
        nn.init.constant_(head.bias, -math.log(99))
    else:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return head

"""Linear head: features (B, D) -> logits (B, K)."""

import math
from typing import Literal, get_args

from torch import nn

HeadInit = Literal["zero", "paper"]


def linear_head(embed_dim: int, num_classes: int, init: HeadInit = "zero") -> nn.Linear:
    """A linear classifier of K classes on features of width D.

    `init` "zero" gives equal logits, as in timm. "paper" is the initialisation of Jia et al. (2022): Kaiming normal
    weights (fan out) and biases of -log(99), a prior probability of 0.01 for each class.

    Raises:
        ValueError: `num_classes` is below 1, or `init` is unknown.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: must be at least 1")
    if init not in get_args(HeadInit):
        raise ValueError(f"init={init!r}: must be one of {', '.join(get_args(HeadInit))}")
    head = nn.Linear(embed_dim, num_classes)
    if init == "paper":
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
        nn.init.constant_(head.bias, -math.log(99))
    else:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return head

"""DetectionModel: a prompted backbone, a feature pyramid and a head; images -> boxes.

The backbone stays frozen, so the pyramid looks at the patch tokens of several of its blocks: *taps*. A *head* makes
losses (`losses`) or detections (`detect`) of the levels of the pyramid and the size of the images, and that is all that
the model knows of it.

Legend: B images, D embed_dim, T taps, C channels, H, W pixels, S stride in pixels, A points, K classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpt.models.heads.dense import Selection as Selection
from vpt.models.heads.dense import conv_norm, group_norm

STRIDES = (8, 16, 32)


def default_strides(patch_size: int) -> tuple[int, ...]:
    """8, 16 and 32 pixels, or what is nearest to them by doubling and halving the side of a patch.

    Example:
        >>> default_strides(16), default_strides(14)
        ((8, 16, 32), (7, 14, 28))
    """
    return tuple(int(patch_size * 2.0 ** round(math.log2(stride / patch_size))) for stride in STRIDES)


class FeaturePyramid(nn.Module):
    """Patch tokens of several blocks, all at the stride of the patches, -> one feature map for each stride.

    Each tap is normed on its own, all are joined and narrowed, and the result is brought to each stride.

    Args:
        embed_dim: D.
        num_taps: T.
        patch_size: Pixels of a patch's side.
        channels: C.
        strides: S, each the patch size times or divided by a power of two.

    Raises:
        ValueError: A stride that cannot be reached.

    References:
        ViTDet (Li et al., 2022), https://arxiv.org/abs/2203.16527, section 3, the simple pyramid; narrowed before it is
        spread, for a fraction of the weights.

    Example:
        >>> pyramid = FeaturePyramid(192, num_taps=2, patch_size=16, channels=32)
        >>> [tuple(level.shape) for level in pyramid([torch.zeros(1, 192, 4, 4)] * 2)]
        [(1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 2, 2)]
    """

    def __init__(
        self, embed_dim: int, num_taps: int, patch_size: int, channels: int = 128, strides: Sequence[int] = STRIDES
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(num_taps))
        self.narrow = nn.Conv2d(num_taps * embed_dim, channels, 1)
        self.levels = nn.ModuleList(_level(channels, patch_size, stride) for stride in self.strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C, H/S, W/S) of maps (B, D, rows, columns), one for each tap."""
        normed = [
            norm(tapped.movedim(1, -1).to(self.narrow.weight.dtype)).movedim(-1, 1)
            for norm, tapped in zip(self.norms, maps, strict=True)
        ]
        narrowed = self.narrow(torch.cat(normed, dim=1))
        return [level(narrowed) for level in self.levels]


def _level(channels: int, patch_size: int, stride: int) -> nn.Sequential:
    """From the stride of the patches to another one, then a convolution."""
    layers: list[nn.Module] = []
    reached = patch_size
    while reached >= 2 * stride:
        layers += [nn.ConvTranspose2d(channels, channels, 2, stride=2), group_norm(channels), nn.GELU()]
        reached //= 2
    while 2 * reached <= stride:
        layers.append(nn.MaxPool2d(2))
        reached *= 2
    if reached != stride:
        raise ValueError(
            f"head.strides: {stride} cannot be reached from patches of {patch_size} px by doubling or halving"
        )
    return nn.Sequential(*layers, *conv_norm(channels))

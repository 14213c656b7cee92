"""Feature pyramid of a detector or segmenter: patch tokens of several blocks -> feature maps at several strides.

Legend: B images, D embed_dim, T blocks that are read (`out_indices`), C channels, H, W pixels, S stride in pixels.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vpt.models.heads.dense import conv_norm, group_norm

STRIDES = (8, 16, 32)


def default_strides(patch_size: int) -> tuple[int, ...]:
    """Strides nearest to 8, 16 and 32 pixels by doubling or halving the patch size; (7, 14, 28) for 14 pixels."""
    return tuple(int(patch_size * 2.0 ** round(math.log2(stride / patch_size))) for stride in STRIDES)


class FeaturePyramid(nn.Module):
    """Patch tokens of several blocks, all at the stride of the patches, -> one feature map per stride.

    The tokens of each of the T blocks are normalised separately, concatenated, projected to C channels and resampled to
    each stride S, the patch size times or divided by a power of two.

    Raises:
        ValueError: A stride cannot be reached from the patch size.

    References:
        ViTDet (Li et al., 2022), https://arxiv.org/abs/2203.16527, section 3, the simple pyramid. Ours projects to C
        channels before resampling, which needs a fraction of the weights.

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
        """Maps (B, D, rows, columns), one per block that is read -> levels (B, C, H/S, W/S)."""
        narrowed = self.narrow(join_normed(self.norms, maps, self.narrow.weight.dtype))
        return [level(narrowed) for level in self.levels]


def join_normed(norms: Iterable[nn.Module], maps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Maps (B, D, rows, columns), each through its own norm, joined to (B, T * D, rows, columns)."""
    pairs = zip(norms, maps, strict=True)
    return torch.cat([norm(tokens.movedim(1, -1).to(dtype)).movedim(-1, 1) for norm, tokens in pairs], dim=1)


def _level(channels: int, patch_size: int, stride: int) -> nn.Sequential:
    """Resample from the stride of the patches to another one, then apply a convolution."""
    layers: list[nn.Module] = []
    current = patch_size
    while current >= 2 * stride:
        layers += [nn.ConvTranspose2d(channels, channels, 2, stride=2), group_norm(channels), nn.GELU()]
        current //= 2
    while 2 * current <= stride:
        layers.append(nn.MaxPool2d(2))
        current *= 2
    if current != stride:
        raise ValueError(f"strides: {stride} cannot be reached from patches of {patch_size} px by doubling or halving")
    return nn.Sequential(*layers, *conv_norm(channels))

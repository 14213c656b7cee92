"""Heads of a segmenter, features -> logits of each cell, and its losses.

Legend: B images, K classes, T blocks that are read, D embed_dim, C channels, h, w cells, H, W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.models.heads.pyramid import join_normed

IGNORED = -1  # in targets


class LinearMaskHead(nn.Module):
    """Maps (B, D, h, w) of T blocks -> logits (B, K, h, w): a LayerNorm of each, joined, and a 1x1 convolution.

    The convolution begins at zero, so that all classes are equally probable. Without the norms the maps of different
    blocks have scales that differ by orders of magnitude.
    """

    def __init__(self, embed_dim: int, num_maps: int, num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(num_maps))
        self.conv = zero_conv(num_maps * embed_dim, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The logits, at the stride of the patches."""
        logits: Tensor = self.conv(join_normed(self.norms, maps, self.conv.weight.dtype))
        return logits


class PyramidMaskHead(nn.Module):
    """Levels (B, C, h, w) of a pyramid -> logits (B, K, h, w) at its finest stride: enlarged, added, a 1x1 convolution.

    References:
        Panoptic feature pyramid networks (Kirillov et al., 2019), https://arxiv.org/abs/1901.02446, section 3, which
        enlarges in several steps with convolutions between them.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = zero_conv(channels, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """The logits."""
        finest = max(levels, key=lambda level: level.shape[-1])
        total = torch.stack([enlarge(level, finest.shape[-2:]) for level in levels]).sum(dim=0)
        logits: Tensor = self.conv(total)
        return logits


def zero_conv(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1x1 convolution of zeros."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def enlarge(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, K, h, w) bilinearly to (B, K, *size); pixel centres are at halves (align_corners=False)."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def mask_losses(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None = None, dice: float = 0.0
) -> dict[str, Tensor]:
    """Losses by name of logits (B, K, h, w) and targets (B, H, W): numbers of classes, or -1 for ignored pixels.

    "mask" is the cross-entropy, times the weight (K,) of the class, as the mean over the valid pixels of an image, then
    over images: so accumulated small batches equal one large batch. "dice", times its weight, is one minus the soft
    Dice coefficient, as the mean over the classes of an image (Milletari et al., 2016, https://arxiv.org/abs/1606.04797).
    An image without valid pixels gives 0.
    """
    targets = targets.long()
    logits = enlarge(logits.float(), targets.shape[-2:])
    is_valid = (targets != IGNORED).flatten(1)
    entropy = F.cross_entropy(logits, targets, class_weights, ignore_index=IGNORED, reduction="none").flatten(1)
    losses = {"mask": (entropy.sum(dim=1) / is_valid.sum(dim=1).clamp(min=1)).mean()}
    if dice:
        valid = is_valid[:, None]
        probabilities = logits.softmax(dim=1).flatten(2) * valid
        truth = F.one_hot(targets.flatten(1).clamp(min=0), logits.shape[1]).movedim(-1, 1) * valid
        sums = probabilities.sum(dim=-1) + truth.sum(dim=-1)
        is_present = (truth.sum(dim=-1) > 0).float()
        per_class = (1 - 2 * (probabilities * truth).sum(dim=-1) / sums.clamp(min=1e-6)) * is_present
        losses["dice"] = dice * (per_class.sum(dim=1) / is_present.sum(dim=1).clamp(min=1)).mean()
    return losses

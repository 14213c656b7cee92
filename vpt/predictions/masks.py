"""Masks found in images: label maps at the original size, made from the logits of a segmenter.

Shapes: K classes, h, w cells, H, W pixels of the upright image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.data.samples import Size
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size

MAX_NUMBERS = 2**24  # of enlarged logits in memory at a time, 64 MiB


def to_label_map(logits: Tensor, size: Size, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Class and probability of each pixel, (H, W) int16 and float32, of logits (K, h, w) of a letterboxed image.

    Logits are interpolated between the centres of cells at the centre of each pixel, in one step, and in strips of rows
    so that a large image takes little memory. Other shapes raise a ValueError.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits: must be those of one image, (K, h, w), got {tuple(logits.shape)}")
    num_classes, (height, width) = len(logits), size
    inner = letterboxed_size(size, preprocessing)
    # grid_sample counts from -1 to 1 over the whole input, of which the image takes the upper left part.
    rows, columns = (
        ((torch.arange(side, device=logits.device) + 0.5) / side) * 2 * part / whole - 1
        for side, part, whole in zip(size, inner, preprocessing.size, strict=True)
    )
    labels = torch.empty(size, dtype=torch.int16)
    probabilities = torch.empty(size)
    num_rows = max(1, MAX_NUMBERS // (num_classes * width))
    for start in range(0, height, num_rows):
        strip = rows[start : start + num_rows]
        grid = torch.stack(torch.meshgrid(columns, strip, indexing="xy"), dim=-1)
        values = F.grid_sample(logits[None].float(), grid[None], padding_mode="border", align_corners=False)[0]
        best = values.max(dim=0)
        labels[start : start + num_rows] = best.indices.to(torch.int16).cpu()
        probabilities[start : start + num_rows] = (best.values - values.logsumexp(dim=0)).exp().cpu()
    return labels, probabilities

"""Whitening: coordinates in which what a prompt token meets is the same in all directions, for tokens to be learned in.

What a token meets in a block are the queries of patch tokens. The logit of a query q and a token t, over all heads, is
q . W_k t = (W_k^T q) . t but for the division by the token's deviation and for what is the same for all tokens. The
vectors x = W_k^T q are far from isotropic: a few directions have nearly all of their energy, and a learning rate that
suits these leaves the others where they are. With W = (mean of x x^T)^(-1/2), tokens t = t' W are learned as t'.

Legend: T patch tokens that are looked at, P prompt tokens, L prompted blocks, D embed_dim.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vpt.models.attention import key_value_weights, queries_of, why_not_fast
from vpt.models.backbone import PromptedViT
from vpt.models.parametrizations import Bilinear
from vpt.models.prompt_init import look_at

FLOOR = 0.01  # of the mean energy, added to that of every direction: the smallest ones are rounding


@torch.no_grad()
def whiten_from_patches(backbone: PromptedViT, batches: Iterable[Tensor], *, seed: int = 0) -> None:
    """Let a prompt of form `Bilinear(whiten=True)` be learned where patch tokens of images are white to it.

    Its tokens stay as they are, the matrices are fixed from here on. They follow from the images, the seed and the
    frozen blocks, so a run that goes on computes them anew.

    Args:
        backbone: It has such a prompt; the bare backbone is run on the images once.
        batches: Normalised images (B, 3, H, W), some hundred in all.
        seed: Of which patch tokens are looked at.

    Raises:
        ValueError: There is no such prompt, there are no images, or a block is not understood.

    References:
        Attention to the Burstiness in Visual Prompt Tuning! (Wang et al., ICCV 2025),
        https://arxiv.org/abs/2506.22908, "fixed whitening", from a summary and the authors' code under MIT. There x is
        W_q W_k^T x_patch, the keys of patch tokens as the queries of prompt tokens see them. A deep prompt's queries
        have no effect, since its outputs are dropped, so we take queries and keys the other way round. The floor, and
        that W keeps the mean length of tokens so that a learning rate means the same, are ours too.
    """
    prompt = backbone.prompt
    form = None if prompt is None else prompt.form
    if prompt is None or not isinstance(form, Bilinear) or form.whitening is None:
        raise ValueError("only a prompt of form Bilinear(whiten=True) can be whitened (prompt=bilinear)")
    if form.whitening.shape[-1] != prompt.embed_dim:
        raise ValueError(f"{prompt} has no tokens that could be whitened; use prompt.kind=deep or prompt.whiten=false")
    for index in prompt.blocks:
        reason = why_not_fast(backbone.vit.blocks[index])
        if reason is not None:
            raise ValueError(f"prompt.whiten=true reads queries, but in block {index} {reason}; use whiten=false")
    tokens = prompt.tokens.detach().clone()
    seen = look_at(backbone, prompt, batches, torch.Generator().manual_seed(seed))
    matrices = [_matrix(backbone.vit.blocks[index], row) for index, row in zip(prompt.blocks, seen, strict=True)]
    form.whitening.copy_(torch.stack(matrices))
    prompt.start_from(tokens)


def _matrix(block: Any, patches: Tensor) -> Tensor:
    """W (D, D) of a block, of the patch tokens (T, D) that enter it."""
    dtype = next(block.parameters()).dtype
    key_weight = key_value_weights(block)[0]
    met = (queries_of(block, patches.to(dtype)) @ key_weight.to(dtype)).double().cpu()
    energies, directions = torch.linalg.eigh(met.T @ met / len(met))
    scales = (energies.clamp(min=0) / energies.mean() + FLOOR).rsqrt()
    scales = scales / scales.square().mean().sqrt()
    matrix: Tensor = (directions * scales) @ directions.T
    return matrix.float()

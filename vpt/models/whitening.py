"""Whitening of prompt tokens: a basis in which the queries that meet a prompt token are isotropic.

A prompt token meets the queries of the patch tokens in its block. The logit of a query q and a token t, over all heads,
is q . W_k t = (W_k^T q) . t, up to the division by the token's standard deviation and terms that all tokens share. The
vectors x = W_k^T q are far from isotropic: a few directions hold nearly all of their energy, and a learning rate that
suits these hardly moves the others. With W = (mean of x x^T)^(-1/2), tokens t = t' W are learned as t'.

Legend: T collected patch tokens, P prompt tokens, L prompted blocks, D embed_dim.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vpt.models.attention import key_value_weights, queries_of, why_not_fast
from vpt.models.backbone import PromptedViT
from vpt.models.parametrizations import Bilinear
from vpt.models.prompt_init import collect_patch_tokens

FLOOR = 0.01  # fraction of the mean energy added to every direction, since the smallest energies are rounding errors


@torch.no_grad()
def whiten_from_patches(backbone: PromptedViT, batches: Iterable[Tensor], *, seed: int = 0) -> None:
    """Compute the whitening matrices of a prompt of form `Bilinear(whiten=True)` from patch tokens of images.

    The tokens keep their values, and the matrices are fixed from here on. They depend only on the normalised images
    (B, 3, H, W), some hundred in all, the seed of the choice of patch tokens and the frozen blocks, so a resumed run
    computes the same ones.

    Raises:
        ValueError: There is no such prompt, there are no images, or a block is not supported.

    References:
        Attention to the Burstiness in Visual Prompt Tuning! (Wang et al., ICCV 2025),
        https://arxiv.org/abs/2506.22908, "fixed whitening"; from a summary and the authors' code under MIT. The paper
        uses x = W_q W_k^T x_patch, the keys of patch tokens seen by queries of prompt tokens. Queries of a deep prompt
        have no effect, so we exchange queries and keys. `FLOOR`, and scaling W to keep the mean length of tokens (so
        that learning rates stay comparable), are also ours.
    """
    prompt = backbone.prompt
    form = None if prompt is None else prompt.form
    if prompt is None or not isinstance(form, Bilinear) or form.whitening is None:
        raise ValueError("backbone: needs a prompt of form Bilinear(whiten=True)")
    if form.whitening.shape[-1] != prompt.embed_dim:
        raise ValueError(f"whiten=True: {prompt} has no tokens to whiten; use a deep prompt or whiten=False")
    for index in prompt.blocks:
        reason = why_not_fast(backbone.vit.blocks[index])
        if reason is not None:
            raise ValueError(f"whiten=True: needs queries, but in block {index} {reason}; use whiten=False")
    tokens = prompt.tokens.detach().clone()
    rows = collect_patch_tokens(backbone, prompt, batches, torch.Generator().manual_seed(seed))
    blocks = (backbone.vit.blocks[index] for index in prompt.blocks)
    form.whitening.copy_(torch.stack([_matrix(*pair) for pair in zip(blocks, rows, strict=True)]))
    prompt.start_from(tokens)


def _matrix(block: Any, patches: Tensor) -> Tensor:
    """Whitening matrix W (D, D) of a block, from the patch tokens (T, D) that enter it."""
    dtype = next(block.parameters()).dtype
    x = (queries_of(block, patches.to(dtype)) @ key_value_weights(block)[0].to(dtype)).double().cpu()  # (T, D)
    energies, directions = torch.linalg.eigh(x.T @ x / len(x))
    scales = (energies.clamp(min=0) / energies.mean() + FLOOR).rsqrt()
    scales = scales / scales.square().mean().sqrt()
    matrix: Tensor = (directions * scales) @ directions.T
    return matrix.float()

"""Pruning: how much each token of a trained prompt matters to the loss, and the prompt of those that matter most.

A mask m_i on a token is a factor of the attention that it gets: a query gives token i the share
m_i exp(l_i) / sum_j m_j exp(l_j) of logits l, with m = 1 for all that is no prompt. So m_i = 1 changes nothing, and
m_i = 0 is the sequence without the token. Papers put the mask on the token itself, m_i p_i. That says nothing of a deep
prompt: the first thing that happens to its tokens is a norm, which takes any factor away again.

Legend: B images, P prompt tokens, L prompted blocks, N tokens in the sequence.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from vpt.models.attention import run_block, why_not_fast
from vpt.models.backbone import PromptedViT
from vpt.models.prompts import VisualPrompt
from vpt.models.task_file import Model
from vpt.models.tuning import tuned_parameters
from vpt.models.vit import rope_and_bias

Losses = Callable[[nn.Module, Tensor, Any], Mapping[str, Tensor]]  # (model, images, targets) -> means over the batch


def token_importance(model: Model, batches: Iterable[tuple[Tensor, Any]], losses: Losses) -> Tensor:
    """The score of each prompt token, (L, P): the mean over images of |d loss / d m|, at masks m = 1.

    Args:
        model: A trained model; it stays as it is.
        batches: Images (B, 3, H, W) and targets, on the device of the model.
        losses: What trained it; their sum counts. Where their mean is over something else than images, such as boxes,
            an image counts by its part of it.

    Raises:
        ValueError: There is no prompt, no image, or a block that is not understood.

    References:
        E^2VPT (Han et al., ICCV 2023), https://arxiv.org/abs/2307.13770, section 3.3; Do We Really Need a Large Number
        of Visual Prompts? (Kim et al., 2024), https://arxiv.org/abs/2305.17223. Both from summaries, their texts were
        not at hand; the mask is another one, as said above.
    """
    backbone, prompt = model.backbone, model.backbone.prompt
    if prompt is None:
        raise ValueError("there is no prompt whose tokens could be scored")
    for index in range(backbone.depth) if prompt.kind == "shallow" else prompt.blocks:
        reason = why_not_fast(backbone.vit.blocks[index])
        if reason is not None:
            raise ValueError(f"tokens cannot be scored: in block {index} {reason}")
    shape, device = (len(prompt.blocks), prompt.num_tokens), next(model.parameters()).device
    total, num_images = torch.zeros(shape, device=device), 0
    was_training, tuned = model.training, tuned_parameters(model)
    model.backbone = masked = _MaskedViT(backbone.vit, prompt)
    model.train()  # a detection model tells its losses in train mode only
    prompt.eval()
    try:
        for images, targets in batches:
            masked.masks = torch.ones(len(images), *shape, device=device, requires_grad=True)
            with sdpa_kernel(SDPBackend.MATH):  # which has gradients for masks everywhere
                loss = torch.stack(list(losses(model, images, targets).values())).sum()
                (gradients,) = torch.autograd.grad(loss, masked.masks)
            total += gradients.abs().sum(0) * len(images)
            num_images += len(images)
    finally:
        model.backbone = backbone
        model.train(was_training)
        for parameter in tuned.values():
            parameter.requires_grad_(True)
    if num_images == 0:
        raise ValueError("there are no pictures to score tokens on")
    return total / num_images


def keep_tokens(prompt: VisualPrompt, importance: Tensor, num_tokens: int) -> VisualPrompt:
    """A plain prompt of the tokens of each block with the largest scores, in the order that they had.

    Args:
        prompt: Stays as it is.
        importance: Scores (L, P).
        num_tokens: Tokens that each block keeps.

    Raises:
        ValueError: The prompt does not have more tokens than that, or there is not a score for each.

    Example:
        >>> prompt = VisualPrompt(num_tokens=3, embed_dim=192, blocks=range(2))
        >>> keep_tokens(prompt, torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.0, 0.7]]), 2)
        VisualPrompt(kind=deep, num_tokens=2, embed_dim=192, blocks=0-1, dropout=0.0)
    """
    if not 1 <= num_tokens < prompt.num_tokens:
        raise ValueError(f"keep={num_tokens}: the prompt has {prompt.num_tokens} tokens, so from 1 to one less")
    if importance.shape != (len(prompt.blocks), prompt.num_tokens):
        raise ValueError(f"scores of shape {tuple(importance.shape)} do not fit {prompt}")
    kept = importance.topk(num_tokens, dim=1).indices.sort(dim=1).values
    tokens = prompt.tokens.detach()
    smaller = copy.deepcopy(prompt)
    if smaller.form is not None:
        parametrize.remove_parametrizations(smaller, "tokens")
    smaller.num_tokens = num_tokens
    smaller.tokens = nn.Parameter(tokens.take_along_dim(kept[..., None].to(tokens.device), dim=1))
    return smaller


class _MaskedViT(PromptedViT):
    """A prompted ViT with `masks` (B, L, P) on its prompt tokens, of each image."""

    masks: Tensor

    def _run_block(
        self, prompt: VisualPrompt | None, index: int, tokens: Tensor, position: Tensor | None, num_read: int | None
    ) -> Tensor:
        if prompt is None or not (prompt.enters(index) or prompt.kind == "shallow"):
            return super()._run_block(prompt, index, tokens, position, num_read)
        keys_values, num_held = None, 0  # prompt tokens that the sequence holds
        if prompt.kind == "shallow":
            num_held = prompt.num_tokens
            tokens = self._insert(tokens, prompt(index, len(tokens))) if prompt.enters(index) else tokens
            around = (self.num_prefix_tokens, tokens.shape[1] - self.num_prefix_tokens - num_held)
            masks = self.masks[:, 0]
        else:
            keys_values = self._keys_values(prompt, index, tokens, num_read)
            around = (0, tokens.shape[1])
            masks = self.masks[:, prompt.blocks.index(index)]
        rope, bias = rope_and_bias(self.vit, index, position, num_held)
        mask = F.pad(masks.log().to(tokens.dtype), around)[:, None, None]
        block = self.vit.blocks[index]
        return run_block(block, tokens, keys_values, rope=rope, bias=bias, mask=mask, num_queries=num_read)

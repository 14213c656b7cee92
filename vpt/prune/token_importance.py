"""Importance of prompt tokens: how much the loss depends on each, and the prompt of those that matter most.

A mask m_i on a token is a factor of the attention that it gets: a query gives token i the share
m_i exp(l_i) / sum_j m_j exp(l_j) of logits l, with m = 1 for everything that is no prompt. So m_i = 1 changes nothing,
and m_i = 0 is the sequence without the token. Papers put the mask on the token itself, m_i p_i. For a deep prompt that
measures nothing, since the norm at the start of the block removes any factor.

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

from vpt.models.attention import why_not_fast
from vpt.models.backbone import LivePrompt, PromptedViT
from vpt.models.block_loop import BlockInput
from vpt.models.prompts import VisualPrompt
from vpt.models.task_model import TaskModel
from vpt.models.tensor_cache import TensorCache

Losses = Callable[[nn.Module, Tensor, Any], Mapping[str, Tensor]]  # (model, images, targets) -> means over the batch


def token_importance(model: TaskModel, batches: Iterable[tuple[Tensor, Any]], losses: Losses) -> Tensor:
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
        raise ValueError("the backbone has no prompt whose tokens could be scored")
    for index in range(backbone.depth) if prompt.variant == "shallow" else prompt.blocks:
        if (reason := why_not_fast(backbone.vit.blocks[index])) is not None:
            raise ValueError(f"tokens cannot be scored: in block {index} {reason}")
    shape, device = (len(prompt.blocks), prompt.num_tokens), next(model.parameters()).device
    total, num_images = torch.zeros(shape, device=device), 0
    was_training = model.training
    model.train()  # a detector returns its losses in train mode only
    prompt.eval()  # without dropout
    try:
        for images, targets in batches:
            source = MaskedPrompt(backbone, prompt)
            source.masks = torch.ones(len(images), *shape, device=device, requires_grad=True)
            # The plain implementation of attention has gradients for masks on every device.
            with sdpa_kernel(SDPBackend.MATH), backbone.replaced_source(source):
                loss = torch.stack(list(losses(model, images, targets).values())).sum()
                (gradients,) = torch.autograd.grad(loss, source.masks)
            total += gradients.abs().sum(0) * len(images)
            num_images += len(images)
    finally:
        model.train(was_training)
    if num_images == 0:
        raise ValueError("there are no images to score tokens on")
    return total / num_images


def keep_tokens(prompt: VisualPrompt, importance: Tensor, num_tokens: int) -> VisualPrompt:
    """A plain prompt of the tokens of each block with the largest scores, (L, P), in the order that they had.

    Raises:
        ValueError: The prompt does not have more tokens than that, or there is not a score for each.

    Example:
        >>> prompt = VisualPrompt(num_tokens=3, embed_dim=192, blocks=range(2))
        >>> keep_tokens(prompt, torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.0, 0.7]]), 2)
        VisualPrompt(variant=deep, num_tokens=2, embed_dim=192, blocks=0-1, dropout=0.0)
    """
    if not 1 <= num_tokens < prompt.num_tokens:
        raise ValueError(f"num_tokens={num_tokens}: must be from 1 to {prompt.num_tokens - 1}")
    if importance.shape != (len(prompt.blocks), prompt.num_tokens):
        raise ValueError(f"scores of shape {tuple(importance.shape)} do not fit {prompt}")
    kept = importance.topk(num_tokens, dim=1).indices.sort(dim=1).values
    tokens, smaller = prompt.tokens.detach(), copy.deepcopy(prompt)
    if smaller.form is not None:
        parametrize.remove_parametrizations(smaller, "tokens")
    smaller.num_tokens = num_tokens
    smaller.tokens = nn.Parameter(tokens.take_along_dim(kept[..., None].to(tokens.device), dim=1))
    return smaller


class MaskedPrompt(LivePrompt):
    """A live prompt with `masks` (B, L, P), a factor of the attention to each prompt token of each image."""

    masks: Tensor

    def __init__(self, backbone: PromptedViT, prompt: VisualPrompt) -> None:
        super().__init__(backbone.vit, prompt, "auto", TensorCache())

    def enter(self, index: int, tokens: Tensor, num_read: int | None) -> BlockInput:
        """The input of the block, with the masks' logarithms added to the logits of its attention."""
        entering, prompt = super().enter(index, tokens, num_read), self.prompt
        num_tokens, prefix = entering.tokens.shape[1], self.vit.num_prefix_tokens
        if self.num_carried:
            masks, around = self.masks[:, 0], (prefix, num_tokens - prefix - self.num_carried)
        elif prompt.enters(index):
            masks, around = self.masks[:, prompt.blocks.index(index)], (0, num_tokens)
        else:
            return entering
        return entering._replace(mask=F.pad(masks.log().to(tokens.dtype), around)[:, None, None])

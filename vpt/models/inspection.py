"""Inspection of a prompted backbone: attention of its blocks, similarity of prompt tokens, nearest patches.

Blocks call torch's fused attention, which does not return the weights. Its calls are intercepted, and the weights
softmax(q k^T / sqrt(d) + bias) are computed again from their arguments. This works for every block, prompt and adapter.

Legend: B batch, h heads, N prefix and patch tokens, M patch tokens, P prompt tokens of a block, D embed_dim, T tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vpt.models.backbone import PromptedViT
from vpt.models.block_loop import NO_PROMPT, run_blocks, run_images
from vpt.models.prompts import Blocks, resolve_blocks
from vpt.models.vit import grid_size


@dataclass(frozen=True)
class BlockAttention:
    """Attention weights of one block.

    `weights` (B, h, N, P + N) has rows that sum to one: of prefix tokens, then patches, to the prompt's tokens, prefix
    tokens, patches; rows of prompt tokens are left out. Prefix tokens are CLS, if `has_cls`, then registers.
    """

    block: int
    weights: Tensor
    num_prefix_tokens: int
    has_cls: bool
    grid_size: tuple[int, int]

    @property
    def num_prompt_tokens(self) -> int:
        """P; 0 where the block sees no prompt."""
        return self.weights.shape[3] - self.weights.shape[2]

    @property
    def uniform_share(self) -> float:
        """P / (P + N), the share of the prompt under uniform attention."""
        return self.num_prompt_tokens / self.weights.shape[3]

    @property
    def to_prompt(self) -> Tensor:
        """(B, N, P): attention of each token to each prompt token, mean over heads."""
        return self.weights[..., : self.num_prompt_tokens].mean(1)

    @property
    def prompt_shares(self) -> dict[str, Tensor]:
        """The share of attention that goes to the prompt, (B,): that of "cls", if there is one, and of "patches"."""
        shares = self.to_prompt.sum(2)
        patches = shares[:, self.num_prefix_tokens :].mean(1)
        return {"cls": shares[:, 0], "patches": patches} if self.has_cls else {"patches": patches}

    @property
    def prompt_map(self) -> Tensor:
        """(B, rows, columns): the share of each patch's attention that goes to the prompt."""
        return torch.unflatten(self.to_prompt.sum(2)[:, self.num_prefix_tokens :], 1, self.grid_size)

    @property
    def patch_map(self) -> Tensor:
        """(B, rows, columns): attention of CLS (or else the mean of patches) to patches, times M: 1 if uniform."""
        first = self.num_prefix_tokens
        queries = self.weights[:, :, :1] if self.has_cls else self.weights[:, :, first:]
        received = queries[..., self.num_prompt_tokens + first :].mean((1, 2))
        even = received.mean(1, keepdim=True).clamp(min=torch.finfo(received.dtype).tiny)
        return torch.unflatten(received / even, 1, self.grid_size)


@torch.no_grad()
def inspect_attention(
    backbone: PromptedViT, images: Tensor, blocks: Blocks = "all", *, prompted: bool = True
) -> Iterator[BlockAttention]:
    """Yield the attention of blocks, one after the other, so that the weights of one block are in memory at a time.

    Args:
        backbone: In eval mode; otherwise dropout of the prompt is active.
        images: Normalised (B, 3, H, W). Weights take 4 B h N (P + N) bytes.
        blocks: "all", "first:k", "last:k" or a list of indices. Blocks behind the last one are not run.
        prompted: False leaves the prompt out.

    Raises:
        ValueError: A block that the backbone does not have, or one that calls no fused attention.

    Example:
        >>> import timm
        >>> backbone = PromptedViT(timm.create_model("vit_nano_patch8_64", num_classes=0), "deep", num_tokens=10)
        >>> for attention in inspect_attention(backbone, torch.zeros(2, 3, 64, 64), [0, 4]):
        ...     print(attention.block, tuple(attention.weights.shape), tuple(attention.patch_map.shape))
        0 (2, 3, 65, 75) (2, 8, 8)
        4 (2, 3, 65, 75) (2, 8, 8)
    """
    vit, prefix = backbone.vit, backbone.num_prefix_tokens
    source = backbone.source if prompted else NO_PROMPT
    ((tokens, position),) = run_images(vit, images, [0])
    num_tokens, reached = tokens.shape[1], 0
    for block in resolve_blocks(blocks, backbone.depth, key="blocks"):
        tokens = run_blocks(vit, tokens, position, source, first=reached, last=block)
        reached = block + 1
        with _AttentionRecorder() as recorder:
            tokens = run_blocks(vit, tokens, position, source, first=block, last=reached)
        if not recorder.weights:
            why = "so its weights cannot be recorded; is TIMM_FUSED_ATTN=0 set?"
            raise ValueError(f"block {block} calls no fused attention, {why}")
        weights = _prompt_first(torch.cat(recorder.weights, 1), num_tokens, prefix)
        yield BlockAttention(block, weights, prefix, has_cls(backbone), grid_size(vit, images))


@dataclass(frozen=True)
class TokenSimilarity:
    """Similarity of the prompt tokens of a block.

    `mean_cosine` is that of two different tokens: 1 if all point the same way; nan for a single token. `effective_rank`
    is of the tokens as a matrix: from 1, all the same but for their length, to P. `cosines` (P, P): each with each.
    """

    block: int
    cosines: Tensor
    mean_cosine: float
    effective_rank: float


@torch.no_grad()
def compare_tokens(backbone: PromptedViT) -> list[TokenSimilarity]:
    """Similarity of prompt tokens, for each prompted block.

    Raises:
        ValueError: There is no prompt, or one without tokens.
    """
    found = []
    for block, tokens in _tokens_by_block(backbone).items():
        unit = F.normalize(tokens, dim=1)
        cosines, num = unit @ unit.mT, len(tokens)
        mean = float((cosines.sum() - cosines.trace()) / (num * (num - 1))) if num > 1 else math.nan
        found.append(TokenSimilarity(block, cosines, mean, effective_rank(tokens)))
    return found


def has_tokens(backbone: PromptedViT) -> bool:
    """Whether there is a prompt of tokens, not of learned keys and values."""
    return backbone.prompt is not None and backbone.prompt.variant in ("shallow", "deep")


def has_cls(backbone: PromptedViT) -> bool:
    """Whether the first token of the sequence is CLS."""
    return backbone.vit.cls_token is not None


def effective_rank(tokens: Tensor) -> float:
    """Effective number of the singular values of tokens (T, D).

    References:
        The Effective Rank: A Measure of Effective Dimensionality (Roy & Vetterli, EUSIPCO 2007), definition 1.
    """
    return effective_number(torch.linalg.svdvals(tokens.float()))


def effective_number(amounts: Tensor) -> float:
    """Exponential of the entropy of shares of amounts >= 0: k if k of them are equal and the others are 0."""
    return float(torch.special.entr(amounts / amounts.sum()).sum().exp())


@dataclass(frozen=True)
class NearestPatches:
    """Patches with the largest cosine to each prompt token of a block, in descending order; all tensors are (P, k).

    `images` has indices of images, `rows` (from above) and `columns` (from the left) places of patches in them.
    """

    block: int
    cosines: Tensor
    images: Tensor
    rows: Tensor
    columns: Tensor


@torch.no_grad()
def nearest_patches(
    backbone: PromptedViT, images: Tensor, num: int = 5, *, among: Tensor | None = None
) -> Iterator[NearestPatches]:
    """For each prompted block, the patches that are nearest to its prompt tokens, by the cosine.

        Patch tokens are those of normalised images (B, 3, H, W) that enter the block without a prompt, since it changes
    those of later blocks. `num` is k, unless there are fewer. `among` (B, rows, columns) bool: those that may be found.

    Raises:
        ValueError: There is no prompt, or one without tokens, or `num` is below 1.
    """
    if num < 1:
        raise ValueError(f"num={num}: must be at least 1")
    tokens_by_block = _tokens_by_block(backbone)
    rows, columns = grid_size(backbone.vit, images)
    for (block, tokens), patches in zip(tokens_by_block.items(), backbone.entering_patches(images), strict=True):
        unit = F.normalize(patches.to(tokens.dtype), dim=2).flatten(0, 1)
        cosines = F.normalize(tokens, dim=1) @ unit.mT
        num_found = cosines.shape[1]
        if among is not None:
            cosines = cosines.masked_fill(~among.flatten().to(cosines.device), -math.inf)
            num_found = int(among.sum())
        best, index = cosines.topk(min(num, num_found))
        place = index % (rows * columns)
        yield NearestPatches(block, best, index // (rows * columns), place // columns, place % columns)


def _tokens_by_block(backbone: PromptedViT) -> dict[int, Tensor]:
    """Prompt tokens (P, D) of each prompted block, in float32 or wider."""
    prompt = backbone.prompt
    if prompt is None:
        raise ValueError("backbone: has no prompt to inspect")
    if not has_tokens(backbone):
        raise ValueError(f"backbone: {prompt} consists of keys and values and has no tokens to inspect")
    tokens = prompt.tokens.detach()
    return dict(zip(prompt.blocks, tokens.to(torch.promote_types(tokens.dtype, torch.float32)), strict=True))


class _AttentionRecorder(TorchFunctionMode):
    """Records the weights (B, h, queries, keys) of each call of torch's fused attention while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.weights.append(_attention_weights(*args, **kwargs))
        return func(*args, **kwargs)


def _attention_weights(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T scale + mask) of the arguments of `scaled_dot_product_attention`, in float32 or wider."""
    assert not is_causal
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(dtype) @ keys.to(dtype).mT * (queries.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


def _prompt_first(weights: Tensor, num_tokens: int, num_prefix_tokens: int) -> Tensor:
    """Weights (B, h, N, P + N) with the prompt's columns first and no rows of it.

    Keys and values are already in this order. Inserted prompt tokens follow the prefix tokens and have rows too.
    """
    if weights.shape[2] == num_tokens:
        return weights
    prefix, behind = num_prefix_tokens, num_prefix_tokens + weights.shape[3] - num_tokens
    own = [*range(prefix), *range(behind, weights.shape[3])]
    return weights[:, :, own][..., [*range(prefix, behind), *own]]

"""The one loop over the blocks of a ViT: images enter here, and a prompt source passes each block its prompt.

The sequence is `[prefix tokens, prompt tokens, patch tokens]` where prompt tokens are inserted, and
`[prefix tokens, patch tokens]` where the prompt enters a block as keys and values only. A *prompt source* decides,
block by block: a live prompt (`backbone.LivePrompt`), the prompts of a mixed batch (`task_batch.TaskBatch`), the fixed
keys and values of an exported model, the masked tokens of a prompt that is scored. The loop depends on none of them.

Legend: B batch, H, W pixels, P prompt tokens, N tokens in the sequence, D embed_dim, h heads, d width of a head.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vpt.models.attention import KeysValues, run_block
from vpt.models.vit import ViT, embed, grid_size, rope_and_bias, run_timm_block


class BlockInput(NamedTuple):
    """What enters one block.

    Args:
        tokens: The sequence (B, N, D), inserted prompt tokens among it.
        num_prompt_tokens: Prompt tokens in the sequence, behind the prefix tokens.
        keys_values: Keys and values of the prompt, two of (1 or B, h, P, d), that join those of the sequence.
        mask: What each image attends to, (B, 1, 1, P + N), the prompt first: 0, or -inf for padding.
        drops_prompt: Whether the outputs of the inserted prompt tokens are dropped after the block.
    """

    tokens: Tensor
    num_prompt_tokens: int = 0
    keys_values: KeysValues | None = None
    mask: Tensor | None = None
    drops_prompt: bool = False


class PromptSource(Protocol):
    """Source of the prompt of each block."""

    @property
    def num_carried(self) -> int:
        """Prompt tokens that stay in the sequence from block to block, once they are inserted."""

    def enter(self, index: int, tokens: Tensor, num_read: int | None) -> BlockInput:
        """The input of a block, of the tokens (B, N, D) before it; `num_read` are read after it, None is all."""


class NoPrompt:
    """The source of a bare ViT: every block gets the tokens as they are."""

    num_carried = 0

    def enter(self, index: int, tokens: Tensor, num_read: int | None) -> BlockInput:
        """The tokens."""
        return BlockInput(tokens)


NO_PROMPT = NoPrompt()


def run_blocks(
    vit: ViT,
    tokens: Tensor,
    position: Tensor | None,
    source: PromptSource = NO_PROMPT,
    *,
    first: int = 0,
    last: int | None = None,
    num_read: int | None = None,
) -> Tensor:
    """Run blocks `first` up to `last`, excluded (None: all); return the tokens (B, N, D), carried ones among them.

    `position` is the rotary or relative position embedding, from `run_images`. With `num_read`, only so many tokens,
    the first ones, are computed of the last block of the ViT.
    """
    depth = len(vit.blocks)
    # `num_read` holds for the last block of the ViT only: every other block needs keys of all tokens.
    for index in range(first, depth if last is None else last):
        arguments = (vit, index, tokens, position, source, num_read if index == depth - 1 else None)
        if vit.grad_checkpointing and torch.is_grad_enabled():
            # The source enters the prompt inside the checkpoint, so its keys and values are recomputed, not stored.
            tokens = checkpoint(_run_one, *arguments, use_reentrant=False)
        else:
            tokens = _run_one(*arguments)
    return tokens


def run_images(
    vit: ViT, images: Tensor, stops: Iterable[int], source: PromptSource = NO_PROMPT, num_read: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Embed normalised images (B, 3, H, W), and run blocks up to each stop, ascending; the depth stands for the end.

    Yields:
        At each stop the tokens (B, N, D) that enter the block, carried prompt tokens among them, and the position
        embedding that `run_blocks` needs to continue.
    """
    tokens, position = embed(vit, images)
    reached = 0
    for stop in stops:
        tokens = run_blocks(vit, tokens, position, source, first=reached, last=stop, num_read=num_read)
        reached = stop
        yield tokens, position


def read_features(
    vit: ViT,
    images: Tensor,
    out_indices: Sequence[int] = (),
    source: PromptSource = NO_PROMPT,
    num_read: int | None = None,
) -> Tensor | list[Tensor]:
    """Input of a head: pooled features (B, D), or a map (B, D, rows, columns) after each of `out_indices`."""
    if not out_indices:
        ((tokens, _),) = run_images(vit, images, [len(vit.blocks)], source, num_read)
        return pool(vit, tokens, source.num_carried)
    stops, grid = [index + 1 for index in out_indices], grid_size(vit, images)
    # Each map is made before the next block runs: the order in which autograd sums gradients depends on it.
    return [feature_map(vit, tokens, grid, source.num_carried) for tokens, _ in run_images(vit, images, stops, source)]


def pool(vit: ViT, tokens: Tensor, num_prompt_tokens: int = 0) -> Tensor:
    """Features (B, D) of the tokens after the last block, as the timm model pools; prompt tokens are removed first."""
    features: Tensor = vit.forward_head(vit.norm(remove_prompt(vit, tokens, num_prompt_tokens)), pre_logits=True)
    return features


def feature_map(vit: ViT, tokens: Tensor, grid: tuple[int, int], num_prompt_tokens: int = 0) -> Tensor:
    """Patch tokens among (B, N, D) as a map (B, D, rows, columns); not normed."""
    return torch.unflatten(tokens[:, vit.num_prefix_tokens + num_prompt_tokens :].mT, 2, grid)


def insert_prompt(vit: ViT, tokens: Tensor, prompt: Tensor) -> Tensor:
    """Tokens (B, N, D) with prompt tokens (1 or B, P, D) behind the prefix tokens: (B, N + P, D)."""
    prefix = vit.num_prefix_tokens
    prompt = prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return torch.cat([tokens[:, :prefix], prompt, tokens[:, prefix:]], dim=1)


def remove_prompt(vit: ViT, tokens: Tensor, num_prompt_tokens: int) -> Tensor:
    """Tokens without the prompt tokens behind the prefix tokens; prefix tokens alone stay as they are."""
    prefix = vit.num_prefix_tokens
    # After a block run with `num_read`, the sequence is the prefix tokens alone.
    if num_prompt_tokens == 0 or tokens.shape[1] <= prefix:
        return tokens
    return torch.cat([tokens[:, :prefix], tokens[:, prefix + num_prompt_tokens :]], dim=1)


def _run_one(
    vit: ViT, index: int, tokens: Tensor, position: Tensor | None, source: PromptSource, num_read: int | None
) -> Tensor:
    entering = source.enter(index, tokens, num_read)
    tokens, num_prompt_tokens = entering.tokens, entering.num_prompt_tokens
    if entering.keys_values is None and entering.mask is None and num_read is None:
        # timm's own code, so that a bare ViT, and `impl="concat"`, equal timm bit for bit.
        tokens = run_timm_block(vit, index, tokens, position, num_prompt_tokens)
    else:
        rope, bias = rope_and_bias(vit, index, position, num_prompt_tokens)
        prompt, mask = entering.keys_values, entering.mask
        tokens = run_block(vit.blocks[index], tokens, prompt, rope=rope, bias=bias, mask=mask, num_queries=num_read)
    return remove_prompt(vit, tokens, num_prompt_tokens) if entering.drops_prompt else tokens

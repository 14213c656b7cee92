"""VisualPrompt: the learned tokens, the blocks that they enter, their initialisation and their dropout.

A *shallow* prompt enters once, before the first block, and its tokens travel through all blocks. A *deep* prompt has
fresh tokens for each prompted block, and drops their outputs after that block (Jia et al., 2022, equations 4 to 7). A
*kv* prompt has, in the place of each token of a deep one, a key and a value (prefix tuning; Li & Liang, 2021).

Legend: B batch, P prompt tokens, D embed_dim, L prompted blocks, h heads of keys, d their width.
"""

import copy
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpt.models.attention import KeysValues, prompt_keys_values, split_keys_values

PromptKind = Literal["shallow", "deep", "kv"]
PromptInit = Literal["uniform", "normal"]
Blocks = str | Sequence[int]


class VisualPrompt(nn.Module):
    """Learned tokens and the blocks that they enter; one parameter, `tokens`, (L, P, D), or (L, P, 2 h d) of kind kv.

    With a form something else is learned, `tokens` are computed of it in each reading, and
    `torch.nn.utils.parametrize.remove_parametrizations(prompt, "tokens")` makes them a parameter again. They carry no
    position.

    Args:
        num_tokens: P, prompt tokens in each prompted block.
        embed_dim: D, token width of the backbone.
        kind: "shallow", "deep" or "kv".
        blocks: Indices of the prompted blocks, ascending. All kinds need them but a shallow one, which enters block 0.
        dropout: Probability that an element of a prompt token is zeroed, drawn anew for each sample.
        patch_size: Height and width of a patch in pixels; used by the initialisation only.
        init: How tokens start. "uniform": in +-sqrt(6 / (3 * ph * pw + D)) for patches of ph x pw pixels, the bound of
            a patch embedding under Xavier's rule. "normal": with standard deviation 0.02. See also `start_from`.
        form: What is learned in their place, such as `prompt_forms.Bilinear(rank=8)`; None: the tokens themselves.
        width: Numbers of a token. None: D, or for kind kv 2 D; 2 h d where the heads of a ViT have another width.

    Raises:
        ValueError: A number is out of range, or a shallow prompt is given other blocks than (0,).

    References:
        Visual Prompt Tuning (Jia et al., 2022), https://arxiv.org/abs/2203.12119, section 3.2. Prefix-Tuning (Li and
        Liang, 2021), https://arxiv.org/abs/2101.00190, section 4, for kind kv; without its reparametrisation.

    Example:
        >>> VisualPrompt(num_tokens=10, embed_dim=192, kind="deep", blocks=range(12))
        VisualPrompt(kind=deep, num_tokens=10, embed_dim=192, blocks=0-11, dropout=0.0)
    """

    def __init__(
        self,
        num_tokens: int,
        embed_dim: int,
        *,
        kind: PromptKind = "deep",
        blocks: Sequence[int] | None = None,
        dropout: float = 0.0,
        patch_size: tuple[int, int] = (16, 16),
        init: PromptInit = "uniform",
        form: nn.Module | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(PromptKind):
            raise ValueError(f"prompt kind must be one of {', '.join(get_args(PromptKind))}, got {kind!r}")
        if num_tokens < 1:
            raise ValueError(f"prompt.num_tokens must be at least 1, got {num_tokens}; for no prompt use prompt=none")
        if not 0 <= dropout < 1:
            raise ValueError(f"prompt.dropout must be in [0, 1), got {dropout}")
        if blocks is None:
            if kind != "shallow":
                raise ValueError(f"a {kind} prompt needs its blocks, such as blocks=range(12)")
            blocks = (0,)
        if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0:
            raise ValueError(f"prompt.blocks must be ascending block indices, at least one, got {list(blocks)}")
        if kind == "shallow" and tuple(blocks) != (0,):
            raise ValueError(f"a shallow prompt enters block 0 only, got prompt.blocks={list(blocks)}; use prompt=deep")
        self.kind: PromptKind = kind
        self.blocks = tuple(blocks)
        self.dropout = nn.Dropout(dropout)
        self.num_tokens, self.embed_dim = num_tokens, embed_dim
        self.width = width or (2 if kind == "kv" else 1) * embed_dim
        self.tokens = nn.Parameter(torch.empty(len(self.blocks), num_tokens, self.width))
        _initialise(self.tokens, init, patch_size)
        if form is not None:
            parametrize.register_parametrization(self, "tokens", copy.deepcopy(form))

    @property
    def form(self) -> nn.Module | None:
        """What computes the tokens; None where they themselves are learned."""
        if not parametrize.is_parametrized(self, "tokens"):
            return None
        parametrizations: Any = self.parametrizations
        return cast(nn.Module, parametrizations.tokens[0])

    @property
    def draws(self) -> bool:
        """Whether the tokens differ from call to call, because dropout draws a mask for each sample."""
        return self.training and self.dropout.p > 0

    def enters(self, block: int) -> bool:
        """Whether fresh tokens enter the block of this index."""
        return block in self.blocks

    @torch.no_grad()
    def start_from(self, tokens: Tensor) -> None:
        """Begin with given tokens, of the shape of `tokens`, or with a form as near to them as it can.

        Raises:
            ValueError: They are of another shape, or not finite.
        """
        shape = (len(self.blocks), self.num_tokens, self.width)
        if tuple(tokens.shape) != shape or not tokens.isfinite().all():
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} cannot start {self}; finite ones of {shape} can")
        tokens = tokens.to(next(self.parameters()))
        if self.form is None:
            self.tokens.copy_(tokens)
        else:
            setattr(self, "tokens", tokens)  # noqa: B010  # torch's property, which asks the form

    def computed(self) -> "VisualPrompt":
        """The prompt with its tokens computed, for the many readings of one pass; itself where there is no form.

        Gradients flow through it. A compiler finds what is computed twice by itself, and cannot make modules.
        """
        if self.form is None or torch.compiler.is_compiling():
            return self
        prompt = VisualPrompt.__new__(VisualPrompt)
        nn.Module.__init__(prompt)
        for name in ("kind", "blocks", "num_tokens", "embed_dim", "width", "dropout", "tokens", "training"):
            setattr(prompt, name, getattr(self, name))
        return prompt

    def forward(self, block: int, batch_size: int) -> Tensor:
        """Tokens of `block`: (1, P, D) for all samples, or (B, P, D) where dropout draws a mask for each."""
        tokens = self.tokens[self.blocks.index(block)][None]
        if not self.draws:
            return tokens
        return self.dropout(tokens.expand(batch_size, -1, -1))  # type: ignore[no-any-return]

    def keys_values(
        self, block: nn.Module, index: int, batch_size: int, dtype: torch.dtype, num_queries: int | None = None
    ) -> KeysValues:
        """Keys and values in the block of this index, as `attention.run_block` takes them with these `num_queries`."""
        learned = self(index, batch_size).to(dtype)
        if self.kind == "kv":
            return split_keys_values(block, learned)
        return prompt_keys_values(block, learned, num_queries)

    def extra_repr(self) -> str:
        """Kind, sizes and blocks, on one line."""
        return (
            f"kind={self.kind}, num_tokens={self.num_tokens}, embed_dim={self.embed_dim}, "
            f"blocks={format_blocks(self.blocks)}, dropout={self.dropout.p}"
        ) + ("" if self.form is None else f", form={self.form}")

    def __repr__(self) -> str:
        return f"VisualPrompt({self.extra_repr()})"  # torch gives one with a form a class of its own


def uniform_bound(embed_dim: int, patch_size: tuple[int, int]) -> float:
    """The largest number that a uniform start may have, for tokens of this width and patches of so many pixels."""
    return math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + embed_dim))


def _initialise(tokens: Tensor, init: PromptInit, patch_size: tuple[int, int]) -> None:
    if init not in get_args(PromptInit):
        raise ValueError(f"prompt.init must be one of {', '.join(get_args(PromptInit))}, got {init!r}")
    if init == "normal":
        nn.init.normal_(tokens, std=0.02)
    else:
        bound = uniform_bound(tokens.shape[-1], patch_size)
        nn.init.uniform_(tokens, -bound, bound)


def resolve_blocks(blocks: Blocks, depth: int, key: str = "prompt.blocks") -> tuple[int, ...]:
    """Block indices from their description.

    Args:
        blocks: "all", "first:k", "last:k", or indices (negative ones count from the end).
        depth: Number of blocks of the backbone.
        key: The key of the config that holds the description, for an error.

    Raises:
        ValueError: Not such a description, or a block that the backbone does not have.

    Example:
        >>> resolve_blocks("last:3", depth=12)
        (9, 10, 11)
        >>> resolve_blocks([0, -1], depth=12)
        (0, 11)
    """
    is_list = isinstance(blocks, Sequence) and all(type(block) is int for block in blocks)
    if not isinstance(blocks, str) and not is_list:
        raise ValueError(f"{key} must be all, first:k, last:k or a list of indices, got {blocks!r}")
    if isinstance(blocks, str):
        match = re.fullmatch(r"all|(first|last):(\d+)", blocks)
        if match is None:
            raise ValueError(f"{key} must be all, first:k, last:k or a list of indices, got {blocks!r}")
        num = int(match[2] or depth)
        if not 1 <= num <= depth:
            raise ValueError(f"{key}={blocks}: the backbone has {depth} blocks, so k is from 1 to {depth}")
        return tuple(range(depth - num, depth)) if match[1] == "last" else tuple(range(num))
    outside = [block for block in blocks if not -depth <= block < depth]
    if outside or not blocks or len({block % depth for block in blocks}) < len(blocks):
        raise ValueError(f"{key}={list(blocks)}: the backbone has blocks 0 to {depth - 1}; name some, each once")
    return tuple(sorted({block % depth for block in blocks}))


def format_blocks(blocks: Sequence[int]) -> str:
    """Block indices for a person: 0-11, or 0,3,5."""
    if len(blocks) > 1 and list(blocks) == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}-{blocks[-1]}"
    return ",".join(str(block) for block in blocks)

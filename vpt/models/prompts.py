"""Visual prompts: learned tokens that are inserted into the blocks of a frozen ViT.

A *shallow* prompt is inserted once, before the first block, and carried through all blocks. A *deep* prompt inserts
fresh tokens at each prompted block and drops their outputs after it (Jia et al., 2022, equations 4 to 7). A *kv* prompt
learns a key and a value in place of each deep token (prefix tuning; Li and Liang, 2021).

Legend: B batch, P prompt tokens, D embed_dim, L prompted blocks, h key heads, d head width.
"""

import copy
import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpt.models.attention import KeysValues, prompt_keys_values, split_keys_values
from vpt.models.parametrizations import Bilinear, Fourier, Shared

PromptVariant = Literal["shallow", "deep", "kv"]
PromptName = Literal["shallow", "deep", "kv", "shared", "bilinear", "fourier"]
PromptInit = Literal["uniform", "normal"]
Blocks = str | Sequence[int]


class PromptKind(NamedTuple):
    """What a name of a prompt stands for: its variant, its number of tokens, and the parametrization of the tokens."""

    variant: PromptVariant
    num_tokens: int = 20
    form: nn.Module | None = None


PROMPTS: dict[str, PromptKind] = {  # the choices of conf/prompt, by the same names
    "shallow": PromptKind("shallow", 50),
    "deep": PromptKind("deep"),
    "kv": PromptKind("kv", 10),
    "shared": PromptKind("deep", form=Shared()),
    "bilinear": PromptKind("deep", form=Bilinear()),
    "fourier": PromptKind("deep", form=Fourier()),
}
DEFAULT_PROMPT: PromptName = "bilinear"


class VisualPrompt(nn.Module):
    """Prompt tokens and the blocks that they enter.

    `tokens` is one parameter of shape (L, P, D), or (L, P, 2 h d) for variant "kv". With `form`, `tokens` is computed
    from other parameters at each access; `torch.nn.utils.parametrize.remove_parametrizations(prompt, "tokens")` turns
    it back into a parameter. Prompt tokens have no position embedding.

    Args:
        num_tokens: P, prompt tokens per prompted block.
        embed_dim: D, token width of the backbone.
        variant: "shallow", "deep" or "kv".
        blocks: Ascending indices of the prompted blocks. A shallow prompt enters block 0; the others need this.
        dropout: Dropout probability of prompt token elements, with a separate mask for each sample.
        patch_size: Patch height and width in pixels; used by `init="uniform"` only.
        init: "uniform" draws from +-sqrt(6 / (3 * ph * pw + D)) for patches of ph x pw pixels, Xavier's bound for the
            patch embedding. "normal" has standard deviation 0.02. See also `start_from`.
        form: Parametrization of the tokens, such as `parametrizations.Bilinear(rank=8)`; None learns them directly.
        width: Size of the last dimension of `tokens`. None: D, or 2 D for variant "kv". Pass 2 h d if the width of the
            attention heads is not D / h.

    Raises:
        TypeError: A number is of another type.
        ValueError: A value is out of range, or `blocks` does not suit `variant`.

    References:
        Visual Prompt Tuning (Jia et al., 2022), https://arxiv.org/abs/2203.12119, section 3.2. Variant "kv":
        Prefix-Tuning (Li and Liang, 2021), https://arxiv.org/abs/2101.00190, section 4, without its reparametrisation.

    Example:
        >>> VisualPrompt(num_tokens=10, embed_dim=192, variant="deep", blocks=range(12))
        VisualPrompt(variant=deep, num_tokens=10, embed_dim=192, blocks=0-11, dropout=0.0)
    """

    def __init__(
        self,
        num_tokens: int,
        embed_dim: int,
        *,
        variant: PromptVariant = "deep",
        blocks: Sequence[int] | None = None,
        dropout: float = 0.0,
        patch_size: tuple[int, int] = (16, 16),
        init: PromptInit = "uniform",
        form: nn.Module | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        _check_values(num_tokens, embed_dim, variant, dropout, init)
        if blocks is None and variant != "shallow":
            raise ValueError(f"blocks=None: a {variant} prompt needs block indices, such as range(12)")
        blocks = (0,) if blocks is None else tuple(blocks)
        if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0:
            raise ValueError(f"blocks={list(blocks)}: must be ascending block indices, at least one")
        if variant == "shallow" and blocks != (0,):
            raise ValueError(f"blocks={list(blocks)}: a shallow prompt enters block 0 only; use a deep prompt")
        self.variant: PromptVariant = variant
        self.blocks, self.num_tokens, self.embed_dim = blocks, num_tokens, embed_dim
        self.dropout = nn.Dropout(dropout)
        self.width = width or (2 if variant == "kv" else 1) * embed_dim
        self.tokens = nn.Parameter(torch.empty(len(self.blocks), num_tokens, self.width))
        if init == "normal":
            nn.init.normal_(self.tokens, std=0.02)
        else:
            bound = uniform_bound(self.width, patch_size)
            nn.init.uniform_(self.tokens, -bound, bound)
        if form is not None:
            parametrize.register_parametrization(self, "tokens", copy.deepcopy(form))

    @property
    def form(self) -> nn.Module | None:
        """The parametrization of the tokens; None if they are learned directly."""
        own: Any = self
        return own.parametrizations.tokens[0] if parametrize.is_parametrized(self, "tokens") else None

    @property
    def draws(self) -> bool:
        """Whether dropout is active, so that tokens differ between samples and calls."""
        return self.training and self.dropout.p > 0

    def enters(self, block: int) -> bool:
        """Whether tokens are inserted at the block with this index."""
        return block in self.blocks

    @torch.no_grad()
    def start_from(self, tokens: Tensor) -> None:
        """Initialise the prompt from tokens with the shape of `tokens`, or from their nearest value in `form`.

        Raises:
            ValueError: The shape differs, or a value is not finite.
        """
        shape = (len(self.blocks), self.num_tokens, self.width)
        if tuple(tokens.shape) != shape or not tokens.isfinite().all():
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: must be finite and of shape {shape} for {self}")
        tokens = tokens.to(next(self.parameters()))
        if self.form is None:
            self.tokens.copy_(tokens)
        else:
            setattr(self, "tokens", tokens)  # noqa: B010  # a property of torch, which calls right_inverse

    def computed(self) -> "VisualPrompt":
        """A view of the prompt whose tokens are computed once, for use in one forward pass; gradients flow through it.

        Returns the prompt itself if there is nothing to compute, or under torch.compile, which removes repeated work
        itself and cannot trace the creation of modules.
        """
        if self.form is None or torch.compiler.is_compiling():
            return self
        prompt = VisualPrompt.__new__(VisualPrompt)
        nn.Module.__init__(prompt)
        for name in ("variant", "blocks", "num_tokens", "embed_dim", "width", "dropout", "tokens", "training"):
            setattr(prompt, name, getattr(self, name))
        return prompt

    def forward(self, block: int, batch_size: int) -> Tensor:
        """Tokens of `block`: (1, P, D), shared by all samples, or (B, P, D) if dropout is active."""
        tokens = self.tokens[self.blocks.index(block)][None]
        return self.dropout(tokens.expand(batch_size, -1, -1)) if self.draws else tokens

    def keys_values(
        self, block: nn.Module, index: int, batch_size: int, dtype: torch.dtype, num_queries: int | None = None
    ) -> KeysValues:
        """Keys and values of the prompt in `block`, for `attention.run_block` with the same `num_queries`."""
        learned = self(index, batch_size).to(dtype)
        is_kv = self.variant == "kv"
        return split_keys_values(block, learned) if is_kv else prompt_keys_values(block, learned, num_queries)

    def extra_repr(self) -> str:
        """Variant, sizes and blocks."""
        form = "" if self.form is None else f", form={self.form}"
        sizes = f"num_tokens={self.num_tokens}, embed_dim={self.embed_dim}"
        return f"variant={self.variant}, {sizes}, blocks={format_blocks(self.blocks)}, dropout={self.dropout.p}{form}"

    def __repr__(self) -> str:
        return f"VisualPrompt({self.extra_repr()})"  # torch renames the class of a parametrized module


def _check_values(num_tokens: int, embed_dim: int, variant: str, dropout: float, init: str) -> None:
    """Refuse arguments of `VisualPrompt` of another type or out of range."""
    if variant not in get_args(PromptVariant):
        raise ValueError(f"variant={variant!r}: must be one of {', '.join(get_args(PromptVariant))}")
    for name, size in {"num_tokens": num_tokens, "embed_dim": embed_dim}.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"{name}={size!r}: must be an integer")
    if not isinstance(dropout, Real):
        raise TypeError(f"dropout={dropout!r}: must be a number")
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: must be at least 1; use prompt=None for no prompt")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be in [0, 1)")
    if init not in get_args(PromptInit):
        raise ValueError(f"init={init!r}: must be one of {', '.join(get_args(PromptInit))}")


def uniform_bound(embed_dim: int, patch_size: tuple[int, int]) -> float:
    """Bound of the uniform initialisation, for tokens of this width and patches of (height, width) pixels."""
    return math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + embed_dim))


def resolve_blocks(blocks: Blocks, depth: int, key: str = "blocks") -> tuple[int, ...]:
    """Convert a description of blocks to ascending block indices, of a backbone with `depth` blocks.

    `blocks` is "all", "first:k", "last:k", or indices (negative ones count from the end). Errors name it `key`.

    Raises:
        ValueError: The description is invalid, or names a block that the backbone does not have.

    Example:
        >>> resolve_blocks("last:3", depth=12)
        (9, 10, 11)
    """
    match = re.fullmatch(r"all|(first|last):(\d+)", blocks) if isinstance(blocks, str) else None
    if match is not None:
        num = int(match[2] or depth)
        if not 1 <= num <= depth:
            raise ValueError(f"{key}={blocks}: k must be from 1 to {depth}, the number of blocks")
        return tuple(range(depth - num, depth)) if match[1] == "last" else tuple(range(num))
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or any(type(block) is not int for block in blocks):
        raise ValueError(f"{key}={blocks!r}: must be all, first:k, last:k or a list of indices")
    indices = [int(block) for block in blocks]
    chosen = {index % depth for index in indices}
    if not chosen or len(chosen) < len(indices) or any(not -depth <= index < depth for index in indices):
        raise ValueError(f"{key}={indices}: must be distinct indices from 0 to {depth - 1}, at least one")
    return tuple(sorted(chosen))


def format_blocks(blocks: Sequence[int]) -> str:
    """Format block indices for messages: 0-11, or 0,3,5."""
    if len(blocks) > 1 and list(blocks) == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}-{blocks[-1]}"
    return ",".join(str(block) for block in blocks)

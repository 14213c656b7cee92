"""PromptedViT: a timm vision transformer, held and frozen, that carries a prompt.

The sequence in a prompted block is `[prefix tokens, prompt tokens, patch tokens]`. The prompt enters after the position
embedding and has no position of its own: where a block rotates queries and keys (RoPE), prompt tokens are not rotated.
Learned keys and values (variant kv) enter attention only, never the sequence. `block_loop` runs the blocks.

Legend: B batch, H, W pixels, M patch tokens, P prompt tokens, N prefix + patch tokens, D embed_dim, L prompted blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vpt.models.adapters import peft_layers
from vpt.models.attention import KeysValues, join_keys_values, keys_values_width, prompt_keys_values, why_not_fast
from vpt.models.block_loop import (
    NO_PROMPT,
    BlockInput,
    PromptSource,
    insert_prompt,
    pool,
    read_features,
    remove_prompt,
    run_blocks,
    run_images,
)
from vpt.models.prompts import (
    DEFAULT_PROMPT,
    PROMPTS,
    Blocks,
    PromptInit,
    PromptName,
    PromptVariant,
    VisualPrompt,
    format_blocks,
    resolve_blocks,
)
from vpt.models.tensor_cache import TensorCache
from vpt.models.vit import ViT, check_supported, name_of, pools_prefix_only

PromptImpl = Literal["auto", "concat"]


class LivePrompt:
    """The prompt of a `PromptedViT` as a source of `block_loop`.

    A deep prompt enters a block as keys and values where `attention.why_not_fast` allows it, and as tokens elsewhere.
    A shallow prompt is inserted at block 0 and carried. A prompt with a form computes its tokens once for the pass.
    `impl` is that of `PromptedViT`; `cache` holds keys and values of earlier passes.
    """

    def __init__(self, vit: ViT, prompt: VisualPrompt, impl: PromptImpl, cache: TensorCache[KeysValues]) -> None:
        # Without gradients keys and values come from the cache, so that the tokens of a form are rarely needed.
        self.prompt = prompt.computed() if torch.is_grad_enabled() else prompt
        self.vit, self.impl, self.cache = vit, impl, cache
        self.num_carried = prompt.num_tokens if prompt.variant == "shallow" else 0
        self._learned = (*prompt.parameters(), *prompt.buffers())  # a computed prompt has none
        self._was_compared = False

    def enter(self, index: int, tokens: Tensor, num_read: int | None) -> BlockInput:
        """Keys and values of the block, or the tokens with those of the prompt inserted."""
        prompt = self.prompt
        if not prompt.enters(index):
            return BlockInput(tokens, self.num_carried)
        if prompt_path(self.vit, prompt, self.impl, index) == "kv":
            return BlockInput(tokens, keys_values=self.keys_values(index, tokens, num_read))
        tokens = insert_prompt(self.vit, tokens, prompt(index, tokens.shape[0]))
        return BlockInput(tokens, prompt.num_tokens, drops_prompt=prompt.variant == "deep")

    def keys_values(self, index: int, tokens: Tensor, num_read: int | None) -> KeysValues:
        """Keys and values of the prompt in a block, from the cache where the block is frozen and dropout is off."""
        prompt, dtype = self.prompt, tokens.dtype
        block: Any = self.vit.blocks[index]

        def compute() -> KeysValues:
            return prompt.keys_values(block, index, tokens.shape[0], dtype, num_read)

        frozen = (*block.norm1.parameters(), *block.attn.parameters())
        # A compiled or exported graph cannot tell when a tensor changes, so it computes them in each call.
        is_traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if is_traced or prompt.draws or any(parameter.requires_grad for parameter in frozen):
            return compute()
        if not self._was_compared:  # once a pass, since libraries that average weights edit them through `.data`
            self.cache.compare(self._learned)
            self._was_compared = True
        # All tensors that `VisualPrompt.keys_values` reads; a change of any other cannot make the value stale.
        return self.cache.get((index, num_read), (*self._learned, *frozen), compute, given=dtype)


def prompt_path(vit: ViT, prompt: VisualPrompt, impl: PromptImpl, index: int) -> str:
    """How a prompted block is computed: "kv", or "concat" and the reason.

    Evaluated in each pass, since prompts are swapped, and adapters and hooks may be added or removed at any time.
    """
    if impl == "concat":
        return "concat (impl=concat)"
    if prompt.variant == "shallow":
        return "concat (a shallow prompt is carried in the sequence)"
    reason = why_not_fast(vit.blocks[index])
    return "kv" if reason is None else f"concat ({reason})"


class PromptedViT(nn.Module):
    """A frozen timm ViT that carries a prompt; the prompt is all that trains, unless `tune` selects more.

    The ViT is held, not copied: its parameters lose `requires_grad`, it stays in eval mode (no dropout, no drop path)
    also while something trains, and the same object may be held by several prompted backbones. With `prompt=None`
    the results are those of the ViT, bit for bit.

    Args:
        vit: A plain timm ViT: anything that timm builds on `VisionTransformer`, `Eva` or `Beit`. A classifier in it is
            not used.
        prompt: A name of `prompts.PROMPTS`, as `prompt=` of the command: "bilinear", "deep", "shallow", "kv", "shared",
            "fourier"; or None; or a ready `VisualPrompt`, which replaces the next five arguments.
        num_tokens: P, prompt tokens in each prompted block; None is the number of this prompt in `prompts.PROMPTS`.
        blocks: Blocks that a prompt enters: "all", "first:k", "last:k" or a list of indices; a shallow one enters 0.
        dropout: Dropout of prompt tokens, drawn for each sample.
        init: Initialisation of the tokens, "uniform" or "normal", see `VisualPrompt`; a kv prompt is initialised with
            the keys and values of such tokens.
        form: Parametrization of the tokens, such as `parametrizations.Bilinear(rank=4)`; None is that of the name.
        impl: "auto" computes a deep prompt as keys and values in every block that `attention.py` supports, with the
            same result for less work; "concat" always inserts the tokens, as in the paper; not for a kv prompt.

    Raises:
        TypeError: `vit` is not a model that can be prompted.
        ValueError: The prompt does not fit the ViT, or a number is out of range.

    References:
        Visual Prompt Tuning (Jia et al., 2022), https://arxiv.org/abs/2203.12119, equations 4 to 7.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_nano_patch8_64", num_classes=0)
        >>> backbone = PromptedViT(vit, prompt="deep", num_tokens=10)
        >>> images = torch.zeros(2, 3, 64, 64)
        >>> backbone(images).shape, backbone.forward_features(images).shape
        (torch.Size([2, 192]), torch.Size([2, 65, 192]))
    """

    def __init__(
        self,
        vit: ViT,
        prompt: PromptName | VisualPrompt | None = DEFAULT_PROMPT,
        *,
        num_tokens: int | None = None,
        blocks: Blocks = "all",
        dropout: float = 0.0,
        init: PromptInit = "uniform",
        form: nn.Module | None = None,
        impl: PromptImpl = "auto",
    ) -> None:
        super().__init__()
        if impl not in get_args(PromptImpl):
            raise ValueError(f"impl={impl!r}: must be one of {', '.join(get_args(PromptImpl))}")
        check_supported(vit)
        if not isinstance(prompt, VisualPrompt | None) and prompt not in PROMPTS:
            raise ValueError(f"prompt={prompt!r}: must be one of {', '.join(PROMPTS)}, None or a VisualPrompt")
        # Freezes the caller's object, on purpose: a copy per prompt would need the memory of a backbone each.
        self.vit = vit.requires_grad_(False).eval()
        self.impl: PromptImpl = impl
        is_new_kv = prompt == "kv"
        if isinstance(prompt, str):
            kind = PROMPTS[prompt]
            num_tokens, form = kind.num_tokens if num_tokens is None else num_tokens, form or kind.form
            make = partial(VisualPrompt, num_tokens, self.embed_dim, patch_size=vit.patch_embed.patch_size, init=init)
            entered = (0,) if prompt == "shallow" and blocks == "all" else resolve_blocks(blocks, self.depth)
            width = self._width(kind.variant, entered)
            prompt = make(variant=kind.variant, blocks=entered, dropout=dropout, form=form, width=width)
        self.prompt = prompt
        self.check_prompt()
        if is_new_kv and prompt is not None and not next(prompt.parameters()).is_meta:
            # Drawn as tokens first: keys and values drawn directly would not have the scale of those of the block.
            self.start_prompt(make(blocks=prompt.blocks).tokens.detach())
        self._cache: TensorCache[KeysValues] = TensorCache()
        self._other_source: PromptSource | None = None

    @property
    def paths(self) -> dict[int, str]:
        """How each prompted block is computed: "kv", or "concat" and the reason."""
        prompt = self.prompt
        return {} if prompt is None else {i: prompt_path(self.vit, prompt, self.impl, i) for i in prompt.blocks}

    @property
    def computes_prefix_only(self) -> bool:
        """Whether the last block computes prefix tokens only, because nothing else is pooled."""
        is_possible = self.prompt is not None and self.impl == "auto"
        return is_possible and pools_prefix_only(self.vit) and why_not_fast(self.vit.blocks[-1]) is None

    @property
    def num_read(self) -> int | None:
        """Tokens that are read of the last block where features are pooled; None reads all."""
        return self.num_prefix_tokens if self.computes_prefix_only else None

    @property
    def embed_dim(self) -> int:
        """D, token width."""
        return int(self.vit.embed_dim)

    @property
    def stride(self) -> int:
        """Pixels from one patch token to the next, also behind a convolutional stem."""
        reduction: Any = self.vit.feature_info[0]["reduction"]
        return int(reduction[0] if isinstance(reduction, tuple) else reduction)

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.vit.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers, as timm counts them; they come first in the sequence."""
        return int(self.vit.num_prefix_tokens)

    @property
    def name(self) -> str:
        """The timm name with its pretrained tag, such as `vit_tiny_patch16_224.augreg_in21k_ft_in1k`."""
        return name_of(self.vit)

    def train(self, mode: bool = True) -> "PromptedViT":
        """Set the mode of the prompt; the frozen ViT stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        # Dropout inside PEFT layers belongs to what trains, so unlike the rest of the ViT they follow the mode.
        for layer in peft_layers(self.vit):
            layer.train(mode)
        self._cache.clear()  # an edit of frozen weights through `.data` or NumPy leaves no other trace
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache.clear()  # else tensors on the old device would stay in memory
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def source(self) -> PromptSource:
        """The prompt source of the next pass: the prompt, or the source of `replaced_source`."""
        self.check_prompt()
        if self._other_source is not None:
            return self._other_source
        return NO_PROMPT if self.prompt is None else LivePrompt(self.vit, self.prompt, self.impl, self._cache)

    @contextmanager
    def replaced_source(self, source: PromptSource) -> Iterator[None]:
        """A context in which all forward passes use this source instead of the prompt."""
        self._other_source = source
        try:
            yield
        finally:
            self._other_source = None

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D), pooled as the timm model pools, of normalised images (B, 3, H, W)."""
        return self.forward_prompted(*self.forward_frozen(images))

    def forward_frozen(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part that no prompt changes: tokens (B, N, D) that enter the first prompted block, and their position.

        Position is the rotary or relative position embedding, the same for all images of a size, or None. Without a
        prompt the result is the features (B, D), and no position.
        """
        self.check_prompt()
        # A bare pass: neither the prompt nor its dropout can affect what is cached here.
        stop = self.depth if self.prompt is None else self.prompt.blocks[0]
        ((tokens, position),) = run_images(self.vit, images, [stop])
        return (pool(self.vit, tokens), None) if self.prompt is None else (tokens, position)

    def forward_prompted(self, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        """Features (B, D) of the result of `forward_frozen`."""
        if self.prompt is None:
            return tokens
        # Only blocks from the first prompted one on run here: a pass with cached tokens skips all before it.
        source, first = self.source, self.prompt.blocks[0]
        tokens = run_blocks(self.vit, tokens, position, source, first=first, num_read=self.num_read)
        return pool(self.vit, tokens, source.num_carried)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens (B, N, D) after the final norm, prefix tokens first, prompt tokens removed."""
        source = self.source
        ((tokens, _),) = run_images(self.vit, images, [self.depth], source)
        features: Tensor = self.vit.norm(remove_prompt(self.vit, tokens, source.num_carried))
        return features

    def feature_maps(self, images: Tensor, out_indices: Blocks = "last:1") -> list[Tensor]:
        """Patch tokens after some blocks, as maps (B, D, H / stride, W / stride); not normed.

        Args:
            images: Normalised (B, 3, H, W), of any size that the backbone takes.
            out_indices: The blocks: "all", "first:k", "last:k" or a list of indices. Blocks behind the last one are
                not run.

        Raises:
            ValueError: A block that the backbone does not have.
        """
        indices = resolve_blocks(out_indices, self.depth, key="out_indices")
        maps = read_features(self.vit, images, indices, self.source)
        assert isinstance(maps, list)
        return maps

    def entering_patches(self, images: Tensor) -> list[Tensor]:
        """Patch tokens (B, M, D) that enter each prompted block of the bare ViT, computed without any prompt."""
        stops = () if self.prompt is None else self.prompt.blocks
        return [tokens[:, self.num_prefix_tokens :] for tokens, _ in run_images(self.vit, images, stops)]

    @torch.no_grad()
    def start_prompt(self, tokens: Tensor) -> None:
        """Initialise the prompt from finite tokens (L, P, D), or a kv prompt from their keys and values in its blocks.

        Without a prompt, or for other tokens, it raises a ValueError.
        """
        if self.prompt is None:
            raise ValueError("backbone: has no prompt to initialise; create it with one")
        if self.prompt.variant == "kv":
            tokens = self._keys_values_of(tokens)
        self.prompt.start_from(tokens)

    def describe_paths(self) -> str:
        """The path of each prompted block, in a line."""
        by_path: dict[str, list[int]] = {}
        for block, path in self.paths.items():
            by_path.setdefault(path, []).append(block)
        return "; ".join(f"blocks {format_blocks(blocks)}: {path}" for path, blocks in by_path.items())

    def extra_repr(self) -> str:
        """The path of each prompted block, and what is computed of the last block in `forward`."""
        if self.prompt is None or self.impl != "auto":
            return self.describe_paths()
        read = "prefix tokens only" if self.computes_prefix_only else "all tokens"
        return f"{self.describe_paths()}; block {self.depth - 1}: {read} (pooled: {self.vit.global_pool or 'all'})"

    def check_prompt(self) -> None:
        """Refuse, with a ValueError, a prompt that does not fit: it or the ViT may have changed since the last pass."""
        prompt = self.prompt
        if prompt is not None and (prompt.embed_dim != self.embed_dim or prompt.blocks[-1] >= self.depth):
            raise ValueError(f"{prompt} does not fit a ViT of embed_dim {self.embed_dim} and {self.depth} blocks")
        if prompt is not None and prompt.width != self._width(prompt.variant, prompt.blocks):
            raise ValueError(f"{prompt}: its tokens, of width {prompt.width}, do not fit this ViT")

    def _width(self, variant: PromptVariant, blocks: Sequence[int]) -> int:
        """Numbers of a prompt token: D, or of variant kv those of keys and values in these blocks."""
        if variant != "kv":
            return self.embed_dim
        if self.impl == "concat":
            raise ValueError("impl=concat: inserts tokens, and a kv prompt has none; use impl=auto")
        for index in blocks:
            if (reason := why_not_fast(self.vit.blocks[index])) is not None:
                raise ValueError(f"block {index} cannot be given keys and values: {reason}; use prompt=deep")
        widths = {keys_values_width(self.vit.blocks[index]) for index in blocks}
        if len(widths) > 1:
            raise ValueError(f"keys of blocks {format_blocks(blocks)} differ in width; use prompt=deep")
        return widths.pop()

    def _keys_values_of(self, tokens: Tensor) -> Tensor:
        """Keys and values of tokens (L, P, D) in the prompted blocks, (L, P, 2 h d)."""
        assert self.prompt is not None
        blocks = [self.vit.blocks[index] for index in self.prompt.blocks]
        like = next(self.vit.parameters())
        pairs = [prompt_keys_values(block, row[None].to(like)) for block, row in zip(blocks, tokens, strict=True)]
        return torch.cat([join_keys_values(*pair) for pair in pairs])

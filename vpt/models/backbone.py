"""PromptedViT: a timm vision transformer, held and frozen, that carries a prompt.

The sequence in a prompted block is `[prefix tokens, prompt tokens, patch tokens]`. The prompt enters after the position
embedding and has no position of its own: where a block rotates queries and keys (RoPE), prompt tokens are not rotated.
Keys and values that are learned themselves (kind kv) enter attention only, and never the sequence.

Legend: B batch, C channels, H, W pixels, M patch tokens, P prompt tokens, N prefix + patch tokens, D embed_dim.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from vpt.models.adapters import peft_layers
from vpt.models.attention import (
    KeysValues,
    join_keys_values,
    keys_values_width,
    prompt_keys_values,
    run_block,
    why_not_fast,
)
from vpt.models.prompts import Blocks, PromptInit, PromptKind, VisualPrompt, format_blocks, resolve_blocks
from vpt.models.tensor_cache import TensorCache
from vpt.models.vit import ViT, check_supported, embed, name_of, pools_prefix_only, rope_and_bias, run_timm_block

PromptImpl = Literal["auto", "concat"]


class PromptedViT(nn.Module):
    """A frozen timm ViT that carries a prompt; the prompt is all that trains, unless `tune` says more.

    The ViT is held, not copied: its parameters lose `requires_grad`, it stays in eval mode (no dropout, no drop path)
    also while something trains, and the same object may be held by several prompted backbones. With `prompt=None`
    the results are those of the ViT, bit for bit.

    Args:
        vit: A plain timm ViT: anything that timm builds on `VisionTransformer`, `Eva` or `Beit`. A classifier in it is
            not used.
        prompt: "deep", "shallow", "kv", None, or a ready `VisualPrompt`, which brings what the next five say.
        num_tokens: P, prompt tokens in each prompted block.
        blocks: Blocks that a prompt enters: "all", "first:k", "last:k" or a list of indices; a shallow one enters 0.
        dropout: Dropout of prompt tokens, drawn for each sample.
        init: How the tokens start, "uniform" or "normal", see `VisualPrompt`; keys and values start as those of such
            tokens.
        form: What is learned in the place of the tokens, such as `prompt_forms.Bilinear(rank=8)`.
        impl: "auto" computes a deep prompt as keys and values in every block that `attention.py` understands, with the
            same result for less work; "concat" always inserts the tokens, the plain reading of the paper. A kv prompt
            has none that could be inserted.

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
        prompt: PromptKind | VisualPrompt | None = "deep",
        *,
        num_tokens: int = 20,
        blocks: Blocks = "all",
        dropout: float = 0.0,
        init: PromptInit = "uniform",
        form: nn.Module | None = None,
        impl: PromptImpl = "auto",
    ) -> None:
        super().__init__()
        if impl not in get_args(PromptImpl):
            raise ValueError(f"prompt.impl must be one of {', '.join(get_args(PromptImpl))}, got {impl!r}")
        check_supported(vit)
        self.vit = vit.requires_grad_(False).eval()
        self.impl: PromptImpl = impl
        is_new = isinstance(prompt, str)
        if isinstance(prompt, str):
            entered = (0,) if prompt == "shallow" and blocks == "all" else resolve_blocks(blocks, self.depth)
            prompt = VisualPrompt(
                num_tokens,
                self.embed_dim,
                kind=prompt,
                blocks=entered,
                dropout=dropout,
                patch_size=vit.patch_embed.patch_size,
                init=init,
                form=form,
                width=self._width(prompt, entered),
            )
        self.prompt = prompt
        self.check_prompt()
        if is_new and prompt is not None and prompt.kind == "kv" and not next(prompt.parameters()).is_meta:
            like = VisualPrompt(
                num_tokens, self.embed_dim, blocks=prompt.blocks, patch_size=vit.patch_embed.patch_size, init=init
            )
            self.start_prompt(like.tokens.detach())
        self._constants: TensorCache[KeysValues] = TensorCache()

    @property
    def paths(self) -> dict[int, str]:
        """How each prompted block is computed: "kv", or "concat" and the reason."""
        return {index: self._path(index) for index in (self.prompt.blocks if self.prompt else ())}

    @property
    def computes_prefix_only(self) -> bool:
        """Whether the last block computes prefix tokens only, because nothing else is pooled."""
        is_asked = self.prompt is not None and self.impl == "auto"
        return is_asked and pools_prefix_only(self.vit) and why_not_fast(self.vit.blocks[-1]) is None

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
        for layer in peft_layers(self.vit):
            layer.train(mode)
        self._constants.clear()  # an edit through `.data` or NumPy leaves no other trace
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._constants.clear()  # moved elsewhere, they would be computed anew and the old ones stay in memory
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D), pooled as the timm model pools, of normalised images (B, 3, H, W)."""
        return self.forward_prompted(*self.forward_frozen(images))

    def forward_frozen(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What no prompt changes: the tokens (B, N, D) that enter the first prompted block, and their position.

        The position is the rotary or relative position embedding of models that have one; it is the same for all
        images of a size. Without a prompt the features (B, D) are all done, and there is no position.
        """
        tokens, position = embed(self.vit, images)
        if self.prompt is None:
            return self._pool(self._run_blocks(tokens, position, None)), None
        return self._run_blocks(tokens, position, None, last=self.prompt.blocks[0]), position

    def forward_prompted(self, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        """Features (B, D) from what `forward_frozen` gave."""
        if self.prompt is None:
            return tokens
        num_read = self.num_prefix_tokens if self.computes_prefix_only else None
        prompt = self._computed_prompt()
        return self._pool(self._run_blocks(tokens, position, prompt, first=self.prompt.blocks[0], num_read=num_read))

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens (B, N, D) after the final norm, prefix tokens first, prompt tokens removed."""
        features: Tensor = self.vit.norm(self._run_blocks(*embed(self.vit, images), self._computed_prompt()))
        return features

    def feature_maps(self, images: Tensor, taps: Blocks = "last:1") -> list[Tensor]:
        """Patch tokens after some blocks, as maps (B, D, H / stride, W / stride); not normed.

        Args:
            images: Normalised (B, 3, H, W), of any size that the backbone takes.
            taps: The blocks: "all", "first:k", "last:k" or a list of indices. Blocks behind the last one are not run.

        Raises:
            ValueError: A block that the backbone does not have.
        """
        tokens, position = embed(self.vit, images)
        rows, columns = self.vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        prompt = self._computed_prompt()
        held = prompt.num_tokens if prompt is not None and prompt.kind == "shallow" else 0
        maps, first = [], 0
        for tap in resolve_blocks(taps, self.depth):
            tokens = self._run_blocks(tokens, position, prompt, first=first, last=tap + 1)
            patches = tokens[:, self.num_prefix_tokens + held :]
            maps.append(torch.unflatten(patches.mT, 2, (rows, columns)))
            first = tap + 1
        return maps

    def entering_patches(self, images: Tensor) -> Iterator[Tensor]:
        """Patch tokens (B, M, D) of the bare ViT, without any prompt, that enter each block that is prompted."""
        tokens, position = embed(self.vit, images)
        first = 0
        for block in self.prompt.blocks if self.prompt is not None else ():
            tokens, first = self._run_blocks(tokens, position, None, first=first, last=block), block
            yield tokens[:, self.num_prefix_tokens :]

    @torch.no_grad()
    def start_prompt(self, tokens: Tensor) -> None:
        """Begin with given tokens (L, P, D), or for a kv prompt with the keys and values that blocks make of them.

        Raises:
            ValueError: There is no prompt, or the tokens are of another shape or not finite.
        """
        if self.prompt is None:
            raise ValueError("there is no prompt that could start; give the backbone one")
        if self.prompt.kind == "kv":
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
        lines = [self.describe_paths()] if self.prompt is not None else []
        if self.prompt is not None and self.impl == "auto":
            read = "prefix tokens only" if self.computes_prefix_only else "all tokens"
            lines.append(f"block {self.depth - 1}: {read} (pooled: {self.vit.global_pool or 'all'})")
        return "; ".join(lines)

    def check_prompt(self) -> None:
        """Refuse a prompt that does not fit, also one that was put in the place of another.

        Raises:
            ValueError: It is for another width or depth, or the ViT has changed so that it cannot be computed.
        """
        prompt = self.prompt
        if prompt is not None and (prompt.embed_dim != self.embed_dim or prompt.blocks[-1] >= self.depth):
            raise ValueError(f"{prompt} does not fit a ViT of embed_dim {self.embed_dim} and {self.depth} blocks")
        if prompt is not None and prompt.width != self._width(prompt.kind, prompt.blocks):
            raise ValueError(f"{prompt}: its tokens, of width {prompt.width}, do not fit this ViT")

    def _width(self, kind: PromptKind, blocks: Sequence[int]) -> int:
        """Numbers of a prompt token: D, or of kind kv those of keys and values in these blocks.

        Raises:
            ValueError: The blocks cannot be given keys and values of one width.
        """
        if kind != "kv":
            return self.embed_dim
        if self.impl == "concat":
            raise ValueError("prompt.impl=concat inserts tokens, and a kv prompt has none; use prompt.impl=auto")
        for index in blocks:
            reason = why_not_fast(self.vit.blocks[index])
            if reason is not None:
                raise ValueError(f"block {index} cannot be given keys and values: {reason}; use prompt=deep")
        widths = {keys_values_width(self.vit.blocks[index]) for index in blocks}
        if len(widths) > 1:
            raise ValueError(f"keys of blocks {format_blocks(blocks)} differ in width; use prompt=deep")
        return widths.pop()

    def _keys_values_of(self, tokens: Tensor) -> Tensor:
        """What the prompted blocks make of tokens (L, P, D): their keys and values, (L, P, 2 h d)."""
        assert self.prompt is not None
        blocks = [self.vit.blocks[index] for index in self.prompt.blocks]
        like = next(self.vit.parameters())
        pairs = [prompt_keys_values(block, row[None].to(like)) for block, row in zip(blocks, tokens, strict=True)]
        return torch.cat([join_keys_values(*pair) for pair in pairs])

    def _path(self, index: int) -> str:
        """How a prompted block is computed. Asked anew each time: prompts are swapped, adapters come and go."""
        if self.impl == "concat":
            return "concat (asked for)"
        if self.prompt is not None and self.prompt.kind == "shallow":
            return "concat (a shallow prompt travels with the sequence)"
        reason = why_not_fast(self.vit.blocks[index])
        return "kv" if reason is None else f"concat ({reason})"

    def _computed_prompt(self) -> VisualPrompt | None:
        """The prompt for one pass; without gradients its tokens are read rarely, see `_keys_values`."""
        return self.prompt.computed() if self.prompt is not None and torch.is_grad_enabled() else self.prompt

    def _pool(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.vit.forward_head(self.vit.norm(tokens), pre_logits=True)
        return features

    def _run_blocks(
        self,
        tokens: Tensor,
        position: Tensor | None,
        prompt: VisualPrompt | None,
        first: int = 0,
        last: int | None = None,
        num_read: int | None = None,
    ) -> Tensor:
        """Run blocks `first` to `last`, which is left out; of the very last block only `num_read` tokens are wanted."""
        self.check_prompt()
        for index in range(first, self.depth if last is None else last):
            arguments = (prompt, index, tokens, position, num_read if index == self.depth - 1 else None)
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpointed(self._run_block, *arguments, use_reentrant=False)
            else:
                tokens = self._run_block(*arguments)
        if prompt is not None and prompt.kind == "shallow" and num_read is None and last is None:
            tokens = self._remove(tokens, prompt.num_tokens)
        return tokens

    def _run_block(
        self, prompt: VisualPrompt | None, index: int, tokens: Tensor, position: Tensor | None, num_read: int | None
    ) -> Tensor:
        """Tokens after a block, a shallow prompt's among them; or only the first `num_read` of them."""
        keys_values, num_held = None, 0  # prompt tokens that the sequence holds
        if prompt is not None and prompt.enters(index) and self._path(index) == "kv":
            keys_values = self._keys_values(prompt, index, tokens, num_read)
        elif prompt is not None and (prompt.enters(index) or prompt.kind == "shallow"):
            tokens = self._insert(tokens, prompt(index, tokens.shape[0])) if prompt.enters(index) else tokens
            num_held = prompt.num_tokens
        if keys_values is not None or num_read is not None:
            rope, bias = rope_and_bias(self.vit, index, position, num_held)
            block = self.vit.blocks[index]
            return run_block(block, tokens, keys_values, rope=rope, bias=bias, num_queries=num_read)
        tokens = run_timm_block(self.vit, index, tokens, position, num_held)
        drops = prompt is not None and prompt.kind == "deep" and num_held > 0
        return self._remove(tokens, num_held) if drops else tokens

    def _keys_values(self, prompt: VisualPrompt, index: int, tokens: Tensor, num_read: int | None) -> KeysValues:
        """Keys and values of the prompt in a block; where nothing trains or draws they are constants that are kept.

        A compiled or exported program computes them in each call, since it cannot tell when a tensor changes.
        """
        block: Any = self.vit.blocks[index]
        batch_size, dtype = tokens.shape[0], tokens.dtype

        def compute() -> KeysValues:
            return prompt.keys_values(block, index, batch_size, dtype, num_read)

        if torch.is_grad_enabled() or prompt.draws or torch.compiler.is_compiling():
            return compute()
        sources = (*prompt.parameters(), *block.norm1.parameters(), *block.attn.parameters())
        return self._constants.get((index, num_read), sources, compute, given=dtype)

    def _insert(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        prompt = prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :prefix], prompt, tokens[:, prefix:]], dim=1)

    def _remove(self, tokens: Tensor, num_tokens: int) -> Tensor:
        prefix = self.num_prefix_tokens
        return torch.cat([tokens[:, :prefix], tokens[:, prefix + num_tokens :]], dim=1)

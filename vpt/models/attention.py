"""The exact fast path of deep prompts: extra keys and values inside a timm block.

The outputs of deep prompt tokens are dropped after their block, so of each prompt token a block needs only its key and
its value: the first norm and two projections of P vectors, once for the whole batch, joined to the keys and values of
the image tokens. No query, no output projection and no MLP is computed for them. The result equals that of the longer
sequence.

Queries are projected apart from keys and values: the joined keys and values are then the only copies that the backward
pass keeps, and the fused projection's output is freed.

Legend: B batch, P prompt tokens, N prefix + patch tokens, D embed_dim, h heads, d = D / h.
"""

from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]


def why_not_fast(block: nn.Module) -> str | None:
    """None if the block is understood; otherwise what of it is not, for a person to read."""
    if type(block) not in (Block, EvaBlock):
        return f"{type(block).__name__} is not understood"
    attention: Any = block.attn
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        return f"{type(attention).__name__} is not understood"
    if attention.qkv is None:
        return "queries, keys and values are projected apart"
    if getattr(attention, "qkv_bias_separate", False):
        return "the bias of the projection is added apart"
    return None


def prompt_keys_values(block: Any, tokens: Tensor) -> KeysValues:
    """Keys and values of prompt tokens: (B, P, D) -> two of (B, h, P, d); B is 1 when all samples share the tokens.

    Prompt tokens have no position, so where a block rotates keys these are not rotated.
    """
    keys, values = _project(block.attn, block.norm1(tokens), parts=(1, 2))
    return block.attn.k_norm(keys), values


def run_block(block: Any, tokens: Tensor, prompt: KeysValues, rope: Tensor | None = None) -> Tensor:
    """A whole timm block on tokens (B, N, D), whose attention also sees the prompt's keys and values."""
    if isinstance(block, Block):
        tokens = tokens + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(tokens), prompt, rope)))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))  # type: ignore[no-any-return]
    attended = _attend(block.attn, block.norm1(tokens), prompt, rope)
    tokens = tokens + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    mixed = block.mlp(block.norm2(tokens))
    return tokens + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)  # type: ignore[no-any-return]


def _attend(attention: Any, tokens: Tensor, prompt: KeysValues, rope: Tensor | None) -> Tensor:
    """Multi-head attention of tokens (B, N, D), as timm's modules do it, over the tokens and the prompt."""
    (queries,) = _project(attention, tokens, parts=(0,))
    keys, values = _project(attention, tokens, parts=(1, 2))
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if rope is not None:
        queries, keys = (_rotate(attention, part, rope).type_as(values) for part in (queries, keys))
    prompt_keys, prompt_values = (part.to(values.dtype).expand(len(tokens), -1, -1, -1) for part in prompt)
    mixed = F.scaled_dot_product_attention(
        queries,
        torch.cat([prompt_keys, keys], dim=2),
        torch.cat([prompt_values, values], dim=2),
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
    )
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
    gate = getattr(attention, "gate", None)  # timm 1.0.28 and newer
    if gate is not None:
        mixed = mixed * gate(tokens).sigmoid()
    return attention.proj_drop(attention.proj(mixed))  # type: ignore[no-any-return]


def _project(attention: Any, tokens: Tensor, parts: tuple[int, ...]) -> list[Tensor]:
    """Queries (0), keys (1) or values (2) of tokens (B, N, D) out of the fused projection, each (B, h, N, d)."""
    first, last = parts[0], parts[-1] + 1
    bias = _fused_bias(attention)
    size = attention.qkv.out_features // 3
    weight = attention.qkv.weight[first * size : last * size]
    projected = F.linear(tokens, weight, None if bias is None else bias[first * size : last * size])
    heads = projected.reshape(*projected.shape[:-1], len(parts), attention.num_heads, -1)
    return [part.transpose(1, 2) for part in heads.unbind(2)]


def _fused_bias(attention: Any) -> Tensor | None:
    if isinstance(attention, EvaAttention):  # it learns no key bias and keeps the three apart
        parts: Any = (attention.q_bias, attention.k_bias, attention.v_bias)
        return None if attention.q_bias is None else torch.cat(parts)
    return attention.qkv.bias  # type: ignore[no-any-return]


def _rotate(attention: Any, part: Tensor, rope: Tensor) -> Tensor:
    """Rotate the patch tokens among queries or keys (B, h, N, d); prefix tokens have no position."""
    prefix = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    return torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)], dim=2)

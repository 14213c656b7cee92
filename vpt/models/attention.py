"""The exact fast path of deep prompts: extra keys and values inside a timm block.

The outputs of deep prompt tokens are dropped after their block, so of each prompt token a block needs only its key and
its value: the first norm and two projections of P vectors, once for the whole batch, joined to the keys and values of
the image tokens. No query, no output projection and no MLP is computed for them. The result equals that of the longer
sequence.

Where only prefix tokens are read after a block, theirs are the only queries that it computes. For so few, keys and
values need not be computed either: q . (W_k x) = (W_k^T q) . x, and a weighted sum of W_v x is W_v of the weighted sum
of x. The biases drop out of the softmax (keys) or join after it (values), since the weights of a query sum to one. So
the queries look at the normed tokens themselves: "absorbed" below.

Keys and values may also be learned themselves (prefix tuning); then there are no tokens that they are computed of.

Queries are projected apart from keys and values: the joined keys and values are then the only copies that the backward
pass keeps, and the fused projection's output is freed.

Legend: B batch, P prompt tokens, N tokens in the sequence, D embed_dim, h heads, d = D / h.
"""

from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]

PRE_NORM = (vision_transformer.Block, eva.EvaBlock, beit.Block)
POST_NORM = (vision_transformer.ResPostBlock, eva.EvaBlockPostNorm)
ATTENTION = (Attention, AttentionRope, eva.EvaAttention, beit.Attention)
PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj")


def why_not_fast(block: nn.Module) -> str | None:
    """None if the block is understood; otherwise what of it is not, for a person to read.

    The fast path calls neither the block, nor its attention, nor the projections, but reads their weights. So adapters
    around a projection, and hooks on any of them, are a reason, too.
    """
    attention = getattr(block, "attn", None)
    for part, known in ((block, PRE_NORM + POST_NORM), (attention, ATTENTION)):
        if type(part) not in known:
            return f"{type(part).__name__} is not understood"
    projections = {name: getattr(attention, name, None) for name in PROJECTIONS}
    for name, part in {"the block": block, "attn": attention, **projections}.items():
        if name in projections and type(part) not in (nn.Linear, type(None)):
            return f"{name} is a {type(part).__module__}.{type(part).__name__}"
        if part is not None and (part._forward_hooks or part._forward_pre_hooks):
            return f"{name} has hooks"
    return None


def prompt_keys_values(block: Any, tokens: Tensor, num_queries: int | None = None) -> KeysValues:
    """Keys and values of prompt tokens: (B, P, D) -> two of (B, h, P, d); B is 1 when all samples share the tokens.

    Prompt tokens have no position, so where a block rotates keys these are not rotated. With the `num_queries` that
    `run_block` will get, both may be the normed tokens instead, (B, 1, P, D): absorbed.
    """
    if _absorbs(block, num_queries):
        normed = _enter(block, 1, tokens)[:, None]
        return normed, normed
    keys, values = _project(block.attn, _enter(block, 1, tokens), parts=(1, 2))
    return _maybe(block.attn, "k_norm", keys), values


def split_keys_values(block: Any, learned: Tensor) -> KeysValues:
    """Keys and values that are learned themselves, keys first: (B, P, 2 h d) -> two of (B, h, P, d)."""
    attention = block.attn
    heads = getattr(attention, "num_kv_heads", attention.num_heads)
    keys, values = (torch.unflatten(half, -1, (heads, -1)).transpose(1, 2) for half in learned.chunk(2, dim=-1))
    return keys, values


def join_keys_values(keys: Tensor, values: Tensor) -> Tensor:
    """The opposite of `split_keys_values`: two of (B, h, P, d) -> (B, P, 2 h d)."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (keys, values)], dim=-1)


def keys_values_width(block: Any) -> int:
    """Numbers of a key and its value in all heads, 2 h d."""
    attention = block.attn
    return int(2 * attention.k_proj.out_features if attention.qkv is None else 2 * attention.qkv.out_features // 3)


def run_block(
    block: Any,
    tokens: Tensor,
    prompt: KeysValues | None = None,
    *,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """A whole timm block on tokens (B, N, D), whose attention also sees the prompt's keys and values.

    Args:
        block: A block for which `why_not_fast` has no objection.
        tokens: The sequence.
        prompt: Keys and values that join those of the sequence, of `prompt_keys_values` with the same `num_queries`, or
            of `split_keys_values`.
        rope: Rotary embedding of all tokens but the block's prefix tokens.
        bias: Relative position bias (1, h, N, N) of the sequence; that of the prompt is zero.
        mask: What each image may look at, (B, 1, 1, P + N), the prompt first: 0, or -inf for what is not there.
        num_queries: Compute the first tokens only, none of which may have a rotary position.

    Returns:
        The tokens after the block, or the first `num_queries` of them.
    """
    kept = tokens if num_queries is None else tokens[:, :num_queries]
    normed = _enter(block, 1, tokens)
    asking = normed if num_queries is None else normed[:, :num_queries]
    bias = bias if bias is None or num_queries is None else bias[:, :, :num_queries]
    if _absorbs(block, num_queries) and (prompt is None or prompt[0].shape[1] == 1):
        mixed = _attend_absorbed(block.attn, asking, normed, prompt, bias, mask)
    else:
        mixed = _attend(block.attn, asking, normed, prompt, rope, bias, mask, rotates=num_queries is None)
    attended = _project_out(block.attn, mixed, asking)
    kept = kept + _leave(block, 1, attended)
    return kept + _leave(block, 2, block.mlp(_enter(block, 2, kept)))


def queries_of(block: Any, tokens: Tensor) -> Tensor:
    """What tokens (T, D) ask for in a block, before any rotation, the heads side by side: (T, h d)."""
    (queries,) = _project(block.attn, _enter(block, 1, tokens[None]), parts=(0,))
    return _maybe(block.attn, "q_norm", queries)[0].transpose(0, 1).flatten(1)


def key_value_weights(block: Any) -> tuple[Tensor, Tensor]:
    """Projections of tokens, as they enter a block, to keys and to values: two matrices (h d, D).

    The scale of the first norm is in them, and so is that a layer norm takes the mean away. Its division by the
    standard deviation, norms of keys, and biases are not.
    """
    attention: Any = block.attn
    if attention.qkv is None:
        groups = getattr(attention, "num_kv_groups", 1)
        apart = (part.weight.unflatten(0, (-1, attention.head_dim)) for part in (attention.k_proj, attention.v_proj))
        weights = [weight.repeat_interleave(groups, dim=0).flatten(0, 1) for weight in apart]
    else:
        weights = list(attention.qkv.weight.chunk(3)[1:])
    if not isinstance(block, POST_NORM):
        scale = getattr(block.norm1, "weight", None)
        weights = weights if scale is None else [weight * scale for weight in weights]
        if isinstance(block.norm1, nn.LayerNorm):
            weights = [weight - weight.mean(dim=1, keepdim=True) for weight in weights]
    keys, values = weights
    return keys, values


def relative_bias(block: Any, shared: Tensor | None) -> Tensor | None:
    """The relative position bias (1, h, N, N) of a BEiT block: its own, and the one that all blocks share."""
    attention = block.attn
    if not isinstance(attention, beit.Attention):
        return None
    own: Tensor | None = None if attention.relative_position_bias_table is None else attention._get_rel_pos_bias()
    if own is None or shared is None:
        return own if shared is None else shared[None]
    return own + shared


def _absorbs(block: Any, num_queries: int | None) -> bool:
    """Whether a block answers its queries without keys and values: they are few, and nothing acts on single keys.

    There must be several heads, so that the shape of a prompt says which of the two it is.
    """
    attention = block.attn
    k_norm = getattr(attention, "k_norm", None)
    knows_no_position = type(attention) in (Attention, beit.Attention) and attention.num_heads > 1
    return num_queries is not None and knows_no_position and isinstance(k_norm, nn.Identity | None)


def _enter(block: Any, branch: int, tokens: Tensor) -> Tensor:
    """What attention (branch 1) or the MLP (branch 2) gets: normed tokens, but in a post-norm block the tokens."""
    return tokens if isinstance(block, POST_NORM) else getattr(block, f"norm{branch}")(tokens)


def _leave(block: Any, branch: int, tokens: Tensor) -> Tensor:
    """Layer scale, or the norm of a post-norm block, and drop path, before a branch joins the residual stream."""
    if isinstance(block, POST_NORM):
        tokens = getattr(block, f"norm{branch}")(tokens)
    elif isinstance(block, vision_transformer.Block):
        tokens = getattr(block, f"ls{branch}")(tokens)
    else:
        scale = getattr(block, f"gamma_{branch}")
        tokens = tokens if scale is None else scale * tokens
    return getattr(block, f"drop_path{branch}")(tokens)  # type: ignore[no-any-return]


def _attend(
    attention: Any,
    asking: Tensor,
    tokens: Tensor,
    prompt: KeysValues | None,
    rope: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    rotates: bool,
) -> Tensor:
    """Multi-head attention, as timm's modules do it, of `asking` over tokens and prompt: (B, h, N, d)."""
    (queries,) = _project(attention, asking, parts=(0,))
    keys, values = _project(attention, tokens, parts=(1, 2))
    queries, keys = _maybe(attention, "q_norm", queries), _maybe(attention, "k_norm", keys)
    if rope is not None:
        queries = _rotate(attention, queries, rope) if rotates else queries
        queries, keys = queries.type_as(values), _rotate(attention, keys, rope).type_as(values)
    if prompt is not None:
        keys, values = (_join(*pair) for pair in zip(prompt, (keys, values), strict=True))
        bias = None if bias is None else F.pad(bias, (prompt[0].shape[2], 0))
    groups = getattr(attention, "num_kv_groups", 1)  # of query heads that share keys and values
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    dropout = attention.attn_drop.p if attention.training else 0.0
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=_add(bias, mask), dropout_p=dropout)


def _attend_absorbed(
    attention: Any,
    asking: Tensor,
    tokens: Tensor,
    prompt: KeysValues | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The same without keys and values of the tokens: all heads' queries look at one sequence of width D."""
    (queries,) = _project(attention, asking, parts=(0,))
    size = attention.qkv.out_features // 3
    of_keys, of_values = attention.qkv.weight[size:].view(2, attention.num_heads, size // attention.num_heads, -1)
    queries = torch.einsum("bhnd,hdc->bhnc", _maybe(attention, "q_norm", queries), of_keys)
    looked_at = tokens[:, None] if prompt is None else _join(prompt[0], tokens[:, None])
    if bias is not None:
        bias = (bias if prompt is None else F.pad(bias, (prompt[0].shape[2], 0))).flatten(1, 2)[:, None]
    seen = F.scaled_dot_product_attention(
        queries.flatten(1, 2)[:, None], looked_at, looked_at, attn_mask=_add(bias, mask), scale=attention.scale
    )
    mixed = torch.einsum("bhnc,hdc->bhnd", seen.reshape(queries.shape), of_values)
    value_bias = _fused_bias(attention, 2, 3)
    return mixed if value_bias is None else mixed + value_bias.view(attention.num_heads, 1, -1)


def _add(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return bias if mask is None else mask if bias is None else bias + mask


def _join(prompt: Tensor, tokens: Tensor) -> Tensor:
    """Prompt (1 or B, h, P, d) in front of tokens (B, h, N, d)."""
    return torch.cat([prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def _project_out(attention: Any, mixed: Tensor, asking: Tensor) -> Tensor:
    """What attention does with its result (B, h, N, d)."""
    mixed = _maybe(attention, "norm", mixed.transpose(1, 2).flatten(2))
    gate = getattr(attention, "gate", None)  # timm 1.0.28 and newer
    if gate is not None:
        mixed = mixed * gate(asking).sigmoid()
    return attention.proj_drop(attention.proj(mixed))  # type: ignore[no-any-return]


def _project(attention: Any, tokens: Tensor, parts: tuple[int, ...]) -> list[Tensor]:
    """Queries (0), keys (1) or values (2) of tokens (B, N, D), each (B, heads, N, d)."""
    first, last = parts[0], parts[-1] + 1
    if attention.qkv is None:
        projected: Any = [getattr(attention, name)(tokens) for name in ("q_proj", "k_proj", "v_proj")[first:last]]
    else:
        size = attention.qkv.out_features // 3
        weight = attention.qkv.weight[first * size : last * size]
        projected = F.linear(tokens, weight, _fused_bias(attention, first, last)).chunk(last - first, dim=-1)
    heads = attention.num_heads if parts == (0,) else getattr(attention, "num_kv_heads", attention.num_heads)
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected]


def _fused_bias(attention: Any, first: int, last: int) -> Tensor | None:
    """The bias of some parts of the fused projection; EVA and BEiT learn no key bias and keep the three apart."""
    if isinstance(attention, eva.EvaAttention | beit.Attention):
        parts: Any = (attention.q_bias, attention.k_bias, attention.v_bias)[first:last]
        return None if attention.q_bias is None else torch.cat(parts)
    bias, size = attention.qkv.bias, attention.qkv.out_features // 3
    return None if bias is None else bias[first * size : last * size]


def _rotate(attention: Any, part: Tensor, rope: Tensor) -> Tensor:
    """Rotate the tokens behind the prefix tokens among queries or keys (B, h, N, d)."""
    prefix = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    return torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)], dim=2)


def _maybe(attention: Any, name: str, tensor: Tensor) -> Tensor:
    """Apply a norm that some of timm's kinds of attention have and others have not."""
    module = getattr(attention, name, None)
    return tensor if module is None else module(tensor)

"""Exact fast path for deep prompts: extra keys and values inside a timm block.

The outputs of deep prompt tokens are dropped after their block, so a block needs only the key and the value of each:
the first norm and two projections of P vectors, once per batch and not once per sample, joined to those of the image
tokens. The result equals that of the longer sequence, because tokens interact in attention only.

If only prefix tokens are read after a block, only their queries are computed, and keys and values need not be
("absorbed" below): q . (W_k x) = (W_k^T q) . x, and a weighted sum of W_v x is W_v times the weighted sum of x. This is
exact with biases, too: the key bias adds the same number to all logits of a query, which softmax ignores, and the value
bias is added afterwards, since the weights of a query sum to one.

Keys and values may also be learned directly (prefix tuning). Queries are projected separately from them, so that
autograd saves the joined keys and values only and not the whole output of a fused projection as well.

Legend: B batch, P prompt tokens, N tokens of the sequence, D embed_dim, h heads, d = D / h.
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
    """Return None if the fast path supports the block, otherwise the reason why not.

    The fast path reads the weights of the projections and calls neither them, nor the attention module, nor the block.
    Adapters around a projection, and hooks on any of these, would have no effect and are therefore refused.
    """
    attention = getattr(block, "attn", None)
    # Exact types, since a subclass may compute something else.
    for part, known in ((block, PRE_NORM + POST_NORM), (attention, ATTENTION)):
        if type(part) not in known:
            return f"{type(part).__name__} is not supported"
    projections = {name: getattr(attention, name, None) for name in PROJECTIONS}
    for name, part in {"the block": block, "attn": attention, **projections}.items():
        if name in projections and type(part) not in (nn.Linear, type(None)):
            return f"{name} is a {type(part).__module__}.{type(part).__name__}"
        if part is not None and (part._forward_hooks or part._forward_pre_hooks):
            return f"{name} has hooks"
    return None


def prompt_keys_values(block: Any, tokens: Tensor, num_queries: int | None = None) -> KeysValues:
    """Keys and values of prompt tokens: (B, P, D) -> two of (B, h, P, d); B is 1 if all samples share the tokens.

    Prompt tokens have no position, so their keys are not rotated. Pass the same `num_queries` as to `run_block`: in the
    absorbed form both are the normed tokens, (B, 1, P, D).
    """
    if _absorbs(block, num_queries):
        normed = _enter(block, 1, tokens)[:, None]
        return normed, normed
    keys, values = _project(block.attn, _enter(block, 1, tokens), parts=(1, 2))
    return _maybe(block.attn, "k_norm", keys), values


def split_keys_values(block: Any, learned: Tensor) -> KeysValues:
    """Split directly learned keys and values, keys first: (B, P, 2 h d) -> two of (B, h, P, d)."""
    attention = block.attn
    heads = getattr(attention, "num_kv_heads", attention.num_heads)
    keys, values = (torch.unflatten(half, -1, (heads, -1)).transpose(1, 2) for half in learned.chunk(2, dim=-1))
    return keys, values


def join_keys_values(keys: Tensor, values: Tensor) -> Tensor:
    """Inverse of `split_keys_values`: two of (B, h, P, d) -> (B, P, 2 h d)."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (keys, values)], dim=-1)


def keys_values_width(block: Any) -> int:
    """Total width of a key and a value over all heads, 2 h d."""
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
    """Run a timm block on tokens (B, N, D), with the prompt's keys and values joined in attention.

    `why_not_fast` must be None for it. `prompt` is from `prompt_keys_values` with the same `num_queries`, or from
    `split_keys_values`; `rope` is the rotary embedding of all tokens but the block's prefix tokens; `bias` (1, h, N, N)
    is the relative position bias of the sequence, zero for the prompt; `mask` (B, 1, 1, P + N) is additive, prompt
    first: 0 to attend, -inf to ignore (padding). With `num_queries` only the first tokens of the output are computed;
    none of them may have a rotary position.
    """
    # Queries, residual and bias rows are cut to `num_queries`; keys and values always come from the whole sequence.
    residual = tokens if num_queries is None else tokens[:, :num_queries]
    normed = _enter(block, 1, tokens)
    query_tokens = normed if num_queries is None else normed[:, :num_queries]
    bias = bias if bias is None or num_queries is None else bias[:, :, :num_queries]
    # Directly learned keys and values, with one entry per head, cannot be absorbed: they are no projections of tokens.
    if _absorbs(block, num_queries) and (prompt is None or prompt[0].shape[1] == 1):
        mixed = _attend_absorbed(block.attn, query_tokens, normed, prompt, bias, mask)
    else:
        mixed = _attend(block.attn, query_tokens, normed, prompt, rope, bias, mask, rotates=num_queries is None)
    residual = residual + _leave(block, 1, _project_out(block.attn, mixed, query_tokens))
    return residual + _leave(block, 2, block.mlp(_enter(block, 2, residual)))


def queries_of(block: Any, tokens: Tensor) -> Tensor:
    """Queries of tokens (T, D) in a block, before any rotation, with concatenated heads: (T, h d)."""
    (queries,) = _project(block.attn, _enter(block, 1, tokens[None]), parts=(0,))
    return _maybe(block.attn, "q_norm", queries)[0].transpose(0, 1).flatten(1)


def key_value_weights(block: Any) -> tuple[Tensor, Tensor]:
    """Linear maps from tokens, as they enter a block, to keys and to values: two matrices (h d, D).

    They include the scale of the first norm and the centring of a LayerNorm, but not its division by the standard
    deviation, the norm of the keys, or biases.
    """
    attention: Any = block.attn
    if attention.qkv is None:
        groups = getattr(attention, "num_kv_groups", 1)
        heads = (part.weight.unflatten(0, (-1, attention.head_dim)) for part in (attention.k_proj, attention.v_proj))
        weights = [weight.repeat_interleave(groups, dim=0).flatten(0, 1) for weight in heads]
    else:
        weights = list(attention.qkv.weight.chunk(3)[1:])
    if not isinstance(block, POST_NORM):
        scale = getattr(block.norm1, "weight", None)
        weights = weights if scale is None else [weight * scale for weight in weights]
        if isinstance(block.norm1, nn.LayerNorm):
            # W (x - mean(x)) = (W - row means of W) x
            weights = [weight - weight.mean(dim=1, keepdim=True) for weight in weights]
    return weights[0], weights[1]


def relative_bias(block: Any, shared: Tensor | None) -> Tensor | None:
    """Relative position bias (1, h, N, N) of a BEiT block: its own plus the one shared by all blocks; else None."""
    attention = block.attn
    if not isinstance(attention, beit.Attention):
        return None
    own: Tensor | None = None if attention.relative_position_bias_table is None else attention._get_rel_pos_bias()
    return _add(own, None if shared is None else shared[None])


def _absorbs(block: Any, num_queries: int | None) -> bool:
    """Whether to use the absorbed form: few queries, and no norm or rotation that acts on individual keys.

    With a single head, (B, 1, P, D) tokens and (B, h, P, d) keys could not be told apart, so several are required.
    """
    attn, k_norm = block.attn, getattr(block.attn, "k_norm", None)
    knows_no_position = type(attn) in (Attention, beit.Attention) and attn.num_heads > 1
    return num_queries is not None and knows_no_position and isinstance(k_norm, nn.Identity | None)


def _enter(block: Any, branch: int, tokens: Tensor) -> Tensor:
    """Input of attention (branch 1) or the MLP (branch 2): normed tokens, or the tokens in a post-norm block."""
    return tokens if isinstance(block, POST_NORM) else getattr(block, f"norm{branch}")(tokens)


def _leave(block: Any, branch: int, tokens: Tensor) -> Tensor:
    """Apply layer scale (or the norm of a post-norm block) and drop path to the output of a branch."""
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
    query_tokens: Tensor,
    tokens: Tensor,
    prompt: KeysValues | None,
    rope: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    rotates: bool,
) -> Tensor:
    """Multi-head attention of `query_tokens` over prompt and tokens, as in timm's modules: (B, h, N, d)."""
    (queries,) = _project(attention, query_tokens, parts=(0,))
    keys, values = _project(attention, tokens, parts=(1, 2))
    queries, keys = _maybe(attention, "q_norm", queries), _maybe(attention, "k_norm", keys)
    if rope is not None:
        # `rotates` is False for `num_queries`: the queries are those of prefix tokens, which have no rotary position.
        queries = _rotate(attention, queries, rope) if rotates else queries
        queries, keys = queries.type_as(values), _rotate(attention, keys, rope).type_as(values)
    if prompt is not None:
        keys, values = (_join(*pair) for pair in zip(prompt, (keys, values), strict=True))
        bias = None if bias is None else F.pad(bias, (prompt[0].shape[2], 0))  # zero for the prompt, which is first
    groups = getattr(attention, "num_kv_groups", 1)  # query heads per key and value head
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    dropout = attention.attn_drop.p if attention.training else 0.0
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=_add(bias, mask), dropout_p=dropout)


def _attend_absorbed(
    attn: Any, query_tokens: Tensor, tokens: Tensor, prompt: KeysValues | None, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The same in the absorbed form: the queries of all heads attend to one sequence of width D."""
    (queries,) = _project(attn, query_tokens, parts=(0,))
    size = attn.qkv.out_features // 3
    # (2 h d, D) -> two of (h, d, D)
    key_weight, value_weight = attn.qkv.weight[size:].view(2, attn.num_heads, size // attn.num_heads, -1)
    queries = torch.einsum("bhnd,hdc->bhnc", _maybe(attn, "q_norm", queries), key_weight)  # W_k^T q, (B, h, N, D)
    sequence = tokens[:, None] if prompt is None else _join(prompt[0], tokens[:, None])  # (B, 1, P + N, D)
    if bias is not None:
        # Heads become rows of a single head: (1, h, N, P + N) -> (1, 1, h N, P + N).
        bias = (bias if prompt is None else F.pad(bias, (prompt[0].shape[2], 0))).flatten(1, 2)[:, None]
    # The scale is that of head width d; the default would use the width D of these queries.
    rows = queries.flatten(1, 2)[:, None]
    attended = F.scaled_dot_product_attention(rows, sequence, sequence, attn_mask=_add(bias, mask), scale=attn.scale)
    mixed = torch.einsum("bhnc,hdc->bhnd", attended.reshape(queries.shape), value_weight)
    value_bias = _fused_bias(attn, 2, 3)
    return mixed if value_bias is None else mixed + value_bias.view(attn.num_heads, 1, -1)


def _add(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return bias if mask is None else mask if bias is None else bias + mask


def _join(prompt: Tensor, tokens: Tensor) -> Tensor:
    """Prompt (1 or B, h, P, d) and tokens (B, h, N, d) -> (B, h, P + N, d)."""
    return torch.cat([prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def _project_out(attention: Any, mixed: Tensor, query_tokens: Tensor) -> Tensor:
    """Norm, gate and output projection of attention: (B, h, N, d) -> (B, N, D)."""
    mixed = _maybe(attention, "norm", mixed.transpose(1, 2).flatten(2))
    gate = getattr(attention, "gate", None)  # timm 1.0.28 and newer
    if gate is not None:
        mixed = mixed * gate(query_tokens).sigmoid()
    return attention.proj_drop(attention.proj(mixed))  # type: ignore[no-any-return]


def _project(attention: Any, tokens: Tensor, parts: tuple[int, ...]) -> list[Tensor]:
    """Project tokens (B, N, D) to queries (0), keys (1) or values (2), each (B, heads, N, d); `parts` are adjacent."""
    first, last = parts[0], parts[-1] + 1
    # Rows of the fused weight are queries, keys, values, so adjacent parts are one slice and one matrix product.
    if attention.qkv is None:
        projected: Any = [getattr(attention, name)(tokens) for name in ("q_proj", "k_proj", "v_proj")[first:last]]
    else:
        size = attention.qkv.out_features // 3
        weight = attention.qkv.weight[first * size : last * size]
        projected = F.linear(tokens, weight, _fused_bias(attention, first, last)).chunk(last - first, dim=-1)
    heads = attention.num_heads if parts == (0,) else getattr(attention, "num_kv_heads", attention.num_heads)
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected]


def _fused_bias(attention: Any, first: int, last: int) -> Tensor | None:
    """Bias of some parts of the fused projection; EVA and BEiT store three parts, of which the key bias is zero."""
    if isinstance(attention, eva.EvaAttention | beit.Attention):
        parts: Any = (attention.q_bias, attention.k_bias, attention.v_bias)[first:last]
        return None if attention.q_bias is None else torch.cat(parts)
    bias, size = attention.qkv.bias, attention.qkv.out_features // 3
    return None if bias is None else bias[first * size : last * size]


def _rotate(attention: Any, part: Tensor, rope: Tensor) -> Tensor:
    """Apply the rotary embedding to queries or keys (B, h, N, d), except to those of prefix tokens."""
    # timm counts prefix tokens per attention module; those of the prompt are handled by `vit.rope_and_bias`.
    prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
    return torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)], dim=2)


def _maybe(attention: Any, name: str, tensor: Tensor) -> Tensor:
    """Apply a norm that only some of timm's attention modules have."""
    module = getattr(attention, name, None)
    return tensor if module is None else module(tensor)

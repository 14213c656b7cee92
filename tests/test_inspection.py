"""What is seen inside of a prompted backbone, against plain readings of it, in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import FAST, SLOW_PATH, TINY_VITS, make_pair, make_tiny_vit
from vpt.models.backbone import PromptedViT
from vpt.models.inspection import compare_tokens, effective_number, effective_rank, inspect_attention, nearest_patches
from vpt.models.vit import embed, rope_and_bias

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prompted(prompt="deep", kind="cls", num_tokens=5, **options):
    return PromptedViT(make_tiny_vit(kind), prompt, num_tokens=num_tokens, **options).double()


def timm_softmax(block, tokens, rope):
    """Tokens after a block as timm runs it without fused attention, and the weights that it drops out."""
    block, seen = copy.deepcopy(block), []
    for part in block.modules():
        if hasattr(part, "attn_drop"):
            part.fused_attn = False
            part.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tokens = block(tokens) if rope is None else block(tokens, rope=rope)
    return tokens, torch.cat(seen, 1)


@torch.no_grad()
def plain_weights(backbone, with_prompt=True):
    """Weights (B, h, N, P + N) of each block, the prompt first, of sequences that hold the prompt's tokens."""
    tokens, position = embed(backbone.vit, IMAGES)
    prompt, prefix, num_held = backbone.prompt if with_prompt else None, backbone.num_prefix_tokens, 0
    for index, block in enumerate(backbone.vit.blocks):
        if prompt is not None and index in prompt.blocks:
            own = prompt.tokens[prompt.blocks.index(index)].expand(len(tokens), -1, -1)
            tokens, num_held = torch.cat([tokens[:, :prefix], own, tokens[:, prefix:]], 1), prompt.num_tokens
        tokens, weights = timm_softmax(block, tokens, rope_and_bias(backbone.vit, index, position, num_held)[0])
        held = torch.arange(prefix, prefix + num_held)
        others = torch.tensor([i for i in range(tokens.shape[1]) if i not in held])
        yield weights[:, :, others][..., torch.cat([held, others])]
        if num_held and prompt.variant == "deep":
            tokens, num_held = tokens[:, others], 0


def assert_weights(attentions, expected):
    attentions, expected = list(attentions), list(expected)
    assert [attention.block for attention in attentions] == list(range(len(expected)))
    for attention, weights in zip(attentions, expected, strict=True):
        torch.testing.assert_close(attention.weights, weights, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(attention.weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("name", [name for name in {**FAST, **SLOW_PATH} if not name.startswith("beit")])
def test_the_weights_are_those_that_timm_computes_on_the_longer_sequence(name):
    for backbone in make_pair(name, {**FAST, **SLOW_PATH}[name]):
        nn.init.normal_(backbone.prompt.tokens)
        assert_weights(inspect_attention(backbone, IMAGES), plain_weights(backbone))


def test_weights_of_blocks_with_relative_position_bias_are_those_of_the_equation():
    backbone = prompted(kind="relative_position_bias")
    vit, tokens = backbone.vit, backbone.prompt.tokens.detach()
    with torch.no_grad():
        entering, position = embed(vit, IMAGES)
        attention = vit.blocks[0].attn
        normed = vit.blocks[0].norm1(torch.cat([tokens[:1].expand(2, -1, -1), entering], 1))
        biases = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        queries, keys, _ = F.linear(normed, attention.qkv.weight, biases).unflatten(-1, (3, 2, 16)).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", queries[:, 5:], keys) / 4
        scores[..., 5:] += attention._get_rel_pos_bias() + position
    (found,) = inspect_attention(backbone, IMAGES, [0])
    torch.testing.assert_close(found.weights, scores.softmax(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in TINY_VITS if kind != "relative_position_bias"])
@pytest.mark.parametrize("prompt", ["shallow", "deep"])
def test_prompts_of_both_kinds_and_none_are_seen_in_each_block(kind, prompt):
    backbone = prompted(prompt, kind)
    assert_weights(inspect_attention(backbone, IMAGES), plain_weights(backbone))
    assert_weights(inspect_attention(backbone, IMAGES, prompted=False), plain_weights(backbone, with_prompt=False))
    bare = PromptedViT(backbone.vit, None)
    assert_weights(inspect_attention(bare, IMAGES), plain_weights(backbone, with_prompt=False))


@pytest.mark.parametrize("prompt", ["shallow", "deep"])
def test_a_projection_that_was_put_in_the_place_of_the_backbones_own_is_seen(prompt):
    backbone = prompted(prompt)
    before = [attention.weights for attention in inspect_attention(backbone, IMAGES)]
    attn = backbone.vit.blocks[1].attn
    attn.qkv = nn.Sequential(attn.qkv, nn.Linear(96, 96).double())  # as an adapter would
    after = [attention.weights for attention in inspect_attention(backbone, IMAGES)]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    assert_weights(inspect_attention(backbone, IMAGES), plain_weights(backbone))


@pytest.mark.parametrize("impl", ["auto", "concat"])
def test_weights_times_values_are_what_the_block_makes_of_its_tokens(impl):
    backbone = prompted(impl=impl)
    block = backbone.vit.blocks[0]
    with torch.no_grad():
        tokens, _ = embed(backbone.vit, IMAGES)
        seen = torch.cat([backbone.prompt.tokens[:1].expand(2, -1, -1), tokens], 1)
        values = block.attn.qkv(block.norm1(seen))[..., -32:].unflatten(-1, (2, 16)).transpose(1, 2)
        (attention,) = inspect_attention(backbone, IMAGES, [0])
        mixed = tokens + block.attn.proj((attention.weights @ values).transpose(1, 2).flatten(2))
        expected = mixed + block.mlp(block.norm2(mixed))
        (patches,) = backbone.feature_maps(IMAGES, [0])
    torch.testing.assert_close(patches.flatten(2).mT, expected[:, 1:], rtol=1e-10, atol=1e-12)


def test_some_blocks_have_the_weights_that_they_have_among_all():
    backbone = prompted(blocks="last:1")
    every = list(inspect_attention(backbone, IMAGES))
    assert [attention.num_prompt_tokens for attention in every] == [0, 0, 5]
    assert [attention.uniform_share for attention in every] == [0, 0, 5 / 22]
    for attention in inspect_attention(backbone, IMAGES, [0, -1]):
        assert torch.equal(attention.weights, every[attention.block].weights)
    with pytest.raises(ValueError, match=r"blocks=\[3\]: .* indices from 0 to 2"):
        list(inspect_attention(backbone, IMAGES, [3]))


def test_prompt_keys_that_draw_all_attention_have_all_of_the_share_and_tokens_that_draw_none_have_none():
    backbone, size = prompted(), 32
    block = backbone.vit.blocks[0]
    with torch.no_grad():  # every query and the prompt's keys along one direction, all other keys zero
        block.attn.qkv.weight[: 2 * size] = 0
        block.attn.qkv.bias[:size] = 100
        block.attn.qkv.bias[size : 2 * size] = 0
        block.norm1.weight.fill_(1)
        block.norm1.bias.zero_()
        backbone.prompt.tokens[0] = torch.randn(5, size).double() * 0.01
        backbone.prompt.tokens[0, 2] = torch.eye(size)[0].double()
        block.attn.qkv.weight[size : 2 * size, 0] = 20
    tokens, _ = embed(backbone.vit, IMAGES)
    keys = F.layer_norm(torch.cat([backbone.prompt.tokens[:1].expand(2, -1, -1), tokens], 1), (size,))[..., 0] * 20
    expected = (keys[:, None] * 100 * 16 / 4).softmax(-1)
    (attention,) = inspect_attention(backbone, IMAGES, [0])
    torch.testing.assert_close(attention.weights, expected[:, None].expand(-1, 2, 17, -1), atol=1e-9, rtol=1e-9)
    for share in attention.prompt_shares.values():
        torch.testing.assert_close(share, torch.ones_like(share))
    assert effective_number(attention.to_prompt.mean((0, 1))) == pytest.approx(1)
    assert attention.patch_map.isfinite().all()


@pytest.mark.parametrize("kind", ["cls", "cls_and_4_registers", "no_prefix"])
def test_shares_and_maps_are_sums_and_means_of_the_weights(kind):
    backbone = prompted(kind=kind)
    (attention,) = inspect_attention(backbone, IMAGES, [1])
    prefix, weights = backbone.num_prefix_tokens, attention.weights.mean(1)
    patches = weights[:, prefix:, :5].sum(2)
    torch.testing.assert_close(attention.prompt_map, patches.view(2, 4, 4))
    torch.testing.assert_close(attention.prompt_shares["patches"], patches.mean(1))
    asking = weights[:, 0] if prefix else weights.mean(1)
    shares = asking[:, 5 + prefix :] / asking[:, 5 + prefix :].sum(1, keepdim=True) * 16
    torch.testing.assert_close(attention.patch_map, shares.view(2, 4, 4))
    assert set(attention.prompt_shares) == ({"cls", "patches"} if prefix else {"patches"})
    if prefix:
        torch.testing.assert_close(attention.prompt_shares["cls"], weights[:, 0, :5].sum(1))


def test_registers_are_not_taken_for_a_class_token():
    vit = make_tiny_vit("no_prefix", reg_tokens=2, depth=1)
    (attention,) = inspect_attention(PromptedViT(vit, "deep", num_tokens=3).double(), IMAGES)
    assert attention.num_prefix_tokens == 2
    assert set(attention.prompt_shares) == {"patches"}


def test_maps_have_the_shape_of_a_picture_that_is_not_square():
    backbone = PromptedViT(make_tiny_vit(img_size=(16, 48)), "deep", num_tokens=5)
    (attention,) = inspect_attention(backbone, torch.randn(1, 3, 16, 48), [2])
    assert attention.patch_map.shape == attention.prompt_map.shape == (1, 2, 6)


def test_a_backbone_in_bfloat16_has_weights_in_float32_that_sum_to_one():
    backbone = PromptedViT(make_tiny_vit().bfloat16(), "deep", num_tokens=5)
    for attention in inspect_attention(backbone, IMAGES):
        assert attention.weights.dtype == torch.float32
        torch.testing.assert_close(attention.weights.sum(-1), torch.ones(2, 2, 17))


def test_nothing_of_the_backbone_changes_by_looking():
    backbone = prompted().eval()
    backbone.vit.blocks[0].attn.qkv.weight.requires_grad_(True)
    before, paths = backbone(IMAGES), backbone.paths
    list(inspect_attention(backbone, IMAGES, prompted=False))
    assert torch.equal(backbone(IMAGES), before)
    assert backbone.paths == paths
    assert backbone.vit.blocks[0].attn.qkv.weight.requires_grad


def test_attention_that_is_not_fused_is_refused():
    vit = make_tiny_vit()
    for block in vit.blocks:
        block.attn.fused_attn = False
    with pytest.raises(ValueError, match=r"block 0 calls no fused attention.*TIMM_FUSED_ATTN"):
        next(inspect_attention(PromptedViT(vit, "shallow"), IMAGES.float()))


def test_tokens_are_compared_as_numpy_would_do_it():
    backbone = prompted(num_tokens=4, init="normal", blocks=[0, 2])
    for found, tokens in zip(compare_tokens(backbone), backbone.prompt.tokens.detach().numpy(), strict=True):
        lengths = np.linalg.norm(tokens, axis=1)
        cosines = tokens @ tokens.T / np.outer(lengths, lengths)
        np.testing.assert_allclose(found.cosines, cosines)
        assert found.mean_cosine == pytest.approx((cosines.sum() - 4) / 12)
        shares = np.linalg.svd(tokens, compute_uv=False)
        shares /= shares.sum()
        assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert [found.block for found in compare_tokens(backbone)] == [0, 2]


def test_tokens_that_have_collapsed_are_told_from_tokens_that_have_not():
    backbone = PromptedViT(make_tiny_vit(), "deep", num_tokens=4)
    with torch.no_grad():
        backbone.prompt.tokens[0] = torch.outer(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(32))
        backbone.prompt.tokens[1] = 7 * torch.eye(4, 32)
        backbone.prompt.tokens[2] = 0
    same, apart, none = compare_tokens(backbone)
    assert (same.mean_cosine, same.effective_rank) == (pytest.approx(1), pytest.approx(1, abs=1e-4))
    assert (apart.mean_cosine, apart.effective_rank) == (pytest.approx(0), pytest.approx(4))
    assert (none.mean_cosine, none.cosines.abs().max().item()) == (0, 0)
    assert effective_rank(torch.ones(1, 32)) == pytest.approx(1)
    assert math.isnan(compare_tokens(PromptedViT(make_tiny_vit(), "deep", num_tokens=1))[0].mean_cosine)


def test_a_prompt_that_is_a_patch_is_nearest_to_that_patch():
    backbone = prompted(num_tokens=2)
    entering = [tokens.clone() for tokens in backbone.entering_patches(IMAGES)]
    with torch.no_grad():
        for block, patches in enumerate(entering):
            backbone.prompt.tokens[block] = torch.stack([3 * patches[1, 6], patches[0, 15] / 2])
    for block, found in enumerate(nearest_patches(backbone, IMAGES, 3)):
        assert found.block == block
        assert found.cosines.shape == (2, 3)
        torch.testing.assert_close(found.cosines[:, 0], torch.ones(2, dtype=torch.float64))
        assert (found.cosines.diff() <= 0).all()
        places = list(zip(*(part[:, 0].tolist() for part in (found.images, found.rows, found.columns)), strict=True))
        assert places == [(1, 1, 2), (0, 3, 3)]


def test_patches_that_are_not_among_those_wanted_are_not_found():
    backbone = prompted("shallow", num_tokens=2)
    among = torch.zeros(2, 4, 4, dtype=torch.bool)
    among[1, 2, 1:3] = True
    (found,) = nearest_patches(backbone, IMAGES, 9, among=among)
    assert found.cosines.shape == (2, 2)
    assert {*found.images.flatten().tolist()} == {1}
    assert {*found.columns.flatten().tolist()} == {1, 2}


def test_a_backbone_without_prompt_tokens_is_refused_in_words():
    bare = PromptedViT(make_tiny_vit(), None)
    with pytest.raises(ValueError, match="has no prompt"):
        compare_tokens(bare)
    with pytest.raises(ValueError, match="has no prompt"):
        next(nearest_patches(bare, IMAGES.float()))
    backbone = prompted()
    with pytest.raises(ValueError, match="num=0"):
        next(nearest_patches(backbone, IMAGES, 0))
    backbone.prompt.variant = "kv"
    with pytest.raises(ValueError, match=r"VisualPrompt.*has no tokens"):
        compare_tokens(backbone)

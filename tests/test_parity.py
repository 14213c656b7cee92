"""The prompted backbone against timm itself, and against a literal implementation of the paper's equations."""

import pytest
import timm
import torch

from tests.helpers import make_tiny_vit
from vpt.models.backbone import PromptedViT


def embed(vit, images):
    """E_0 of the paper: prefix tokens, then patch tokens with their positions."""
    if isinstance(vit, timm.models.Beit):
        tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), vit.patch_embed(images)], dim=1)
        return tokens if vit.pos_embed is None else tokens + vit.pos_embed, None
    embedded = vit._pos_embed(vit.patch_embed(images))
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    return vit.norm_pre(tokens), rope


def block_with_prompts(block, x, prompts, e, rope, heads, bias_of_positions=None, learned=None):
    """One block L_i on [x, P, E], attention written out; prompt tokens have no position.

    x (B, prefix, D), prompts (B, P, D), e (B, M, D); a pre-norm block with layer scale. Prefix tuning: `learned` keys
    and values, (P, 2 D), precede those of the sequence in each head.
    """
    sequence = torch.cat([x, prompts, e], dim=1)
    B, N, D = sequence.shape
    normed = block.norm1(sequence)
    attention = block.attn
    bias = attention.qkv.bias
    if bias is None and getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    q, k, v = torch.nn.functional.linear(normed, attention.qkv.weight, bias).chunk(3, dim=-1)
    q, k, v = (t.view(B, N, heads, D // heads).transpose(1, 2) for t in (q, k, v))
    if rope is not None:
        first_patch = x.shape[1] + prompts.shape[1]
        sines, cosines = rope.chunk(2, dim=-1)
        half = D // heads // 2

        def rotate(t):
            patches = t[:, :, first_patch:]
            turned = torch.cat([-patches[..., half:], patches[..., :half]], dim=-1)
            return torch.cat([t[:, :, :first_patch], patches * cosines + turned * sines], dim=2)

        q, k = rotate(q), rotate(k)
    if learned is not None:
        own_k, own_v = (t.view(1, -1, heads, D // heads).transpose(1, 2) for t in learned.split(D, dim=-1))
        k, v = (torch.cat([own.expand(B, -1, -1, -1), t], dim=2) for own, t in ((own_k, k), (own_v, v)))
    scores = q @ k.transpose(-2, -1) / (D // heads) ** 0.5
    if bias_of_positions is not None:  # (heads, M + 1, M + 1) between tokens that have a position
        placed = [i for i in range(N) if not x.shape[1] <= i < x.shape[1] + prompts.shape[1]]
        for row, i in enumerate(placed):
            columns = [column + k.shape[2] - N for column in placed]
            scores[:, :, i, columns] = scores[:, :, i, columns] + bias_of_positions[:, row]
    weights = scores.softmax(dim=-1)
    mixed = (weights @ v).transpose(1, 2).reshape(B, N, D)
    scale1 = block.gamma_1 if hasattr(block, "gamma_1") else getattr(block.ls1, "gamma", 1.0)
    scale2 = block.gamma_2 if hasattr(block, "gamma_2") else getattr(block.ls2, "gamma", 1.0)
    sequence = sequence + scale1 * attention.proj(mixed)
    sequence = sequence + scale2 * block.mlp(block.norm2(sequence))
    num = prompts.shape[1]
    return sequence[:, : x.shape[1]], sequence[:, x.shape[1] : x.shape[1] + num], sequence[:, x.shape[1] + num :]


def paper_tokens(vit, images, tokens, kind):
    """Equations 4 to 7: deep replaces the prompts before each block, shallow keeps their outputs; kv has none."""
    embedded, rope = embed(vit, images)
    prefix = vit.num_prefix_tokens
    x, e = embedded[:, :prefix], embedded[:, prefix:]
    z = e[:, :0] if kind == "kv" else tokens[0].expand(len(images), -1, -1)
    for i, block in enumerate(vit.blocks):
        prompts = tokens[i].expand(len(images), -1, -1) if kind == "deep" else z
        learned = tokens[i] if kind == "kv" else None
        bias = None
        if isinstance(vit, timm.models.Beit):
            bias = vit.rel_pos_bias() + block.attn._get_rel_pos_bias()[0]
        x, z, e = block_with_prompts(block, x, prompts, e, rope, 2, bias, learned)
    return vit.norm(torch.cat([x, e], dim=1))


def test_without_a_prompt_the_result_equals_timm_bit_for_bit(tiny_vit, images):
    backbone = PromptedViT(tiny_vit, prompt=None)
    assert torch.equal(backbone(images), tiny_vit(images))
    assert torch.equal(backbone.forward_features(images), tiny_vit.forward_features(images))


@pytest.mark.parametrize("kind", ["shallow", "deep", "kv"])
def test_a_prompted_backbone_and_its_gradients_equal_the_equations_of_the_paper(tiny_vit, images, kind):
    vit, images = tiny_vit.double(), images.double()
    backbone = PromptedViT(vit, prompt=kind, num_tokens=5).double()
    tokens = backbone.prompt.tokens
    expected = paper_tokens(vit, images, tokens, kind)
    actual = backbone.forward_features(images)
    assert actual.shape == vit.forward_features(images).shape
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(actual, vit.forward_features(images), atol=1e-3)
    features, expected = backbone(images), vit.forward_head(expected, pre_logits=True)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((result * weights).sum(), tokens)[0] for result in (features, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
    assert (gradients[0].flatten(1).norm(dim=1) > 0).all()


def test_prompts_in_some_blocks_do_not_change_the_other_blocks(images):
    vit = make_tiny_vit().double()
    backbone = PromptedViT(vit, prompt="deep", num_tokens=4, blocks=[1]).double()
    embedded, _ = embed(vit, images.double())
    sequence = vit.blocks[0](embedded)
    x, _, e = block_with_prompts(
        vit.blocks[1], sequence[:, :1], backbone.prompt.tokens[0].expand(4, -1, -1), sequence[:, 1:], None, heads=2
    )
    expected = vit.norm(vit.blocks[2](torch.cat([x, e], dim=1)))
    torch.testing.assert_close(backbone.forward_features(images.double()), expected, rtol=1e-10, atol=1e-10)

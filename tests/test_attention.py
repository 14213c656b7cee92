"""The fast path against the longer sequence, for many kinds of timm ViTs; equalities are checked in float64."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import FAST, SLOW_PATH, TINY_PAIR, build_model, make_pair, make_tiny_vit
from vpt.engine.measure import count_flops, count_saved_bytes
from vpt.models.attention import key_value_weights, prompt_keys_values, queries_of
from vpt.models.backbone import PromptedViT


def assert_equal_results_and_gradients(fast, plain):
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    weights = torch.randn(3, 32, dtype=torch.float64)
    for backbone in (fast, plain):
        (backbone(images) * weights).sum().backward()
    for function in (type(fast).forward, type(fast).forward_features):
        torch.testing.assert_close(function(fast, images), function(plain, images), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast.prompt.tokens.grad, plain.prompt.tokens.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [*FAST, *SLOW_PATH])
def test_both_implementations_have_the_same_results_and_gradients(name):
    fast, plain = make_pair(name, {**FAST, **SLOW_PATH}[name])
    if name in FAST:
        assert set(fast.paths.values()) == {"kv"}
    else:
        assert all(path.startswith("concat (") and "is not supported" in path for path in fast.paths.values())
    assert all(path.startswith("concat (") for path in plain.paths.values())
    assert_equal_results_and_gradients(fast, plain)
    if name == "vit_tiny_patch16_224":
        for blocks in ("last:1", "first:1"):
            assert_equal_results_and_gradients(*make_pair(name, {}, blocks=blocks))


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_in_float32_results_and_gradients_differ_by_rounding_only(kind, images):
    vit = make_tiny_vit()
    fast, plain = (PromptedViT(vit, kind, num_tokens=5, impl=impl) for impl in ("auto", "concat"))
    plain.load_state_dict(fast.state_dict())
    results = [backbone(images) for backbone in (fast, plain)]
    gradients = [
        torch.autograd.grad(result.square().sum(), backbone.prompt.tokens)[0]
        for result, backbone in zip(results, (fast, plain), strict=True)
    ]
    for actual, expected in (results, gradients):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_both_implementations_agree_with_the_same_dropout_masks():
    fast, plain = make_pair("vit_tiny_patch16_224", {}, dropout=0.5)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    results = []
    for backbone in (fast.train(), plain.train()):
        torch.manual_seed(7)
        results.append(backbone(images))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    torch.manual_seed(7)
    same_image = fast(images[:1].expand(3, -1, -1, -1))
    assert not torch.allclose(same_image[0], same_image[1])  # each sample has its own mask


@pytest.mark.parametrize("kind", ["cls", "no_prefix", "rope_with_cls_and_4_registers", "relative_position_bias"])
def test_the_fast_path_works_under_bfloat16_autocast_and_with_a_bfloat16_backbone(kind, images):
    vit = make_tiny_vit(kind)
    for block in vit.blocks:  # timm initialises attention near zero
        block.attn.qkv.weight.data.mul_(20)
        block.attn.proj.weight.data.mul_(20)
    exact = PromptedViT(vit, "deep", num_tokens=8)
    nn.init.normal_(exact.prompt.tokens)
    held = PromptedViT(copy.deepcopy(vit).bfloat16(), exact.prompt)
    bare = PromptedViT(exact.vit, None)(images)
    expected = exact(images)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = exact(images)
    features = held(images)  # images and prompts stay in float32
    assert features.dtype == torch.bfloat16
    for rounded in (under_autocast, features):
        assert (rounded.float() - expected).norm() < 0.2 * (bare - expected).norm()
    features.float().sum().backward()
    assert held.prompt.tokens.grad.dtype == torch.float32
    assert (held.prompt.tokens.grad.flatten(1).norm(dim=1) > 0).all()


def step_flops(backbone, images):
    return count_flops(lambda: backbone(images).sum().backward())


@pytest.mark.parametrize("num_tokens", [1, 4, 32])
def test_a_training_step_computes_and_saves_less_than_with_the_longer_sequence(num_tokens):
    vit = make_tiny_vit(embed_dim=64, num_heads=1)
    images = torch.randn(8, 3, 32, 32)
    fast, plain = (PromptedViT(vit, "deep", num_tokens=num_tokens, impl=impl) for impl in ("auto", "concat"))
    assert step_flops(fast, images) < (0.6 if num_tokens == 32 else 1) * step_flops(plain, images)
    saved = [count_saved_bytes(lambda b=b: b(images), b.parameters()) for b in (fast, plain)]
    assert saved[0] < saved[1]


@pytest.mark.slow
def test_a_vit_b_has_the_documented_cost():
    """Forward against timm's own ViT, training steps of 32 images against the longer sequence; FLOPs are counted."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False).eval()
    image = torch.randn(1, 3, 224, 224)
    bare = count_flops(lambda: vit(image))
    for num_tokens, most in ((10, 0.921), (100, 0.938), (200, 0.957)):
        backbone = PromptedViT(vit, "deep", num_tokens=num_tokens).requires_grad_(False)
        with torch.no_grad():
            backbone(image)  # caches keys and values
            assert count_flops(lambda backbone=backbone: backbone(image)) < most * bare
    for num_tokens, most in ((10, 0.865), (50, 0.727), (100, 0.607), (200, 0.457)):
        with FakeTensorMode(allow_non_fake_inputs=True):  # counts without computing
            images = torch.empty(32, 3, 224, 224)
            fast, plain = (
                step_flops(PromptedViT(vit, "deep", num_tokens=num_tokens, impl=impl), images)
                for impl in ("auto", "concat")
            )
        assert fast < most * plain


def roll_the_output(module, arguments, output):
    return output.roll(1, dims=-1)


CHANGED = {
    "qkv has hooks": lambda block: block.attn.qkv.register_forward_hook(roll_the_output),
    "attn has hooks": lambda block: block.attn.register_forward_hook(roll_the_output),
    "the block has hooks": lambda block: block.register_forward_hook(roll_the_output),
    f"qkv is a {__name__}.Doubled": lambda block: setattr(block.attn, "qkv", Doubled(block.attn.qkv)),
}


class Doubled(nn.Module):
    """An adapter around a projection, like LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, tokens):
        return 2 * self.base(tokens)


@pytest.mark.parametrize("reason", CHANGED)
@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize("index", [1, 2])
def test_hooks_and_adapters_in_a_block_take_effect(reason, kind, index, images):
    vit = make_tiny_vit()
    fast = PromptedViT(vit, kind, num_tokens=3)
    before = fast(images)
    CHANGED[reason](vit.blocks[index])
    plain = PromptedViT(vit, fast.prompt, impl="concat")
    torch.testing.assert_close(fast(images), plain(images))
    assert not torch.allclose(fast(images), before, atol=1e-3)
    if kind == "deep":
        assert fast.paths[index] == f"concat ({reason})"
        assert fast.paths[0] == "kv"
    assert fast.computes_prefix_only == (index != 2)


def test_the_repr_shows_the_path_of_each_block():
    vit = make_tiny_vit()
    assert list(PromptedViT(vit, "shallow").paths) == [0]
    assert "blocks 0-2: kv; block 2: prefix tokens only (pooled: token)" in repr(PromptedViT(vit, "deep"))
    assert "block 2: all tokens (pooled: avg)" in repr(PromptedViT(make_tiny_vit(global_pool="avg"), "deep"))
    assert PromptedViT(vit, None).paths == {}
    with pytest.raises(ValueError, match=r"auto, concat"):
        PromptedViT(vit, "deep", impl="fast")
    assert build_model(vit, num_classes=2, impl="concat").backbone.impl == "concat"


@pytest.mark.parametrize("name", [name for name in FAST if "qk-norm" not in name])
def test_keys_and_values_are_linear_in_the_tokens_with_the_returned_weights(name):
    """Key and value are linear in the token divided by its standard deviation, up to a bias."""
    torch.manual_seed(0)
    block = timm.create_model(name.split()[0], **{**TINY_PAIR, **FAST[name]}).double().blocks[1]
    for parameter in block.parameters():
        parameter.data.normal_(std=0.5).add_(0.1)
    weights = key_value_weights(block)
    is_normed = "post-norm" not in name
    mean_goes = isinstance(block.norm1, nn.LayerNorm) and is_normed
    found = []
    for token in torch.randn(3, 32, dtype=torch.float64):
        deviation = ((token - token.mean() * mean_goes).square().mean() + 1e-6).sqrt() if is_normed else 1
        pair = prompt_keys_values(block, token[None, None])
        parts = zip(pair, weights, strict=True)
        found.append([part[0, :, 0].flatten() - weight @ token / deviation for part, weight in parts])
    for other in found[1:]:
        for bias, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(bias, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_are_those_of_the_block(qk_norm):
    block = make_tiny_vit(qk_norm=qk_norm).blocks[1]
    tokens = torch.randn(6, 32)
    plain = nn.functional.linear(block.norm1(tokens), block.attn.qkv.weight[:32], block.attn.qkv.bias[:32])
    if qk_norm:
        plain = block.attn.q_norm(plain.unflatten(-1, (2, 16))).flatten(-2)
    torch.testing.assert_close(queries_of(block, tokens), plain)

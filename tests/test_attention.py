"""The fast path against the longer sequence, for many kinds of timm ViT; every equality in float64."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vpt
from tests.helpers import FAST, SLOW_PATH, TINY_PAIR, make_pair, make_tiny_vit
from vpt.models.attention import key_value_weights, prompt_keys_values, queries_of
from vpt.models.backbone import PromptedViT


def assert_equal_results_and_gradients(fast, plain):
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    weights = torch.randn(3, 32, dtype=torch.float64)
    for backbone in (fast, plain):
        (backbone(images) * weights).sum().backward()
    torch.testing.assert_close(fast(images), plain(images), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast.forward_features(images), plain.forward_features(images), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast.prompt.tokens.grad, plain.prompt.tokens.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FAST)
def test_keys_and_values_equal_the_longer_sequence_in_results_and_gradients(name):
    fast, plain = make_pair(name, FAST[name])
    assert set(fast.paths.values()) == {"kv"}
    assert set(plain.paths.values()) == {"concat (asked for)"}
    assert_equal_results_and_gradients(fast, plain)


@pytest.mark.parametrize("name", SLOW_PATH)
def test_blocks_that_are_not_understood_take_the_plain_path_and_say_why(name):
    fast, plain = make_pair(name, SLOW_PATH[name])
    assert all(path.startswith("concat (") and "is not supported" in path for path in fast.paths.values())
    assert_equal_results_and_gradients(fast, plain)


@pytest.mark.parametrize("blocks", ["last:1", "first:1"])
def test_both_ways_are_exact_for_prompts_in_some_blocks_only(blocks):
    assert_equal_results_and_gradients(*make_pair("vit_tiny_patch16_224", {}, blocks=blocks))


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


def test_both_ways_agree_on_the_same_dropout_masks():
    fast, plain = make_pair("vit_tiny_patch16_224", {}, dropout=0.5)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    results = []
    for backbone in (fast.train(), plain.train()):
        torch.manual_seed(7)
        results.append(backbone(images))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    torch.manual_seed(7)
    same_picture = fast(images[:1].expand(3, -1, -1, -1))
    assert not torch.allclose(same_picture[0], same_picture[1])  # each sample has a mask of its own


@pytest.mark.parametrize("kind", ["cls", "no_prefix", "rope_with_cls_and_4_registers", "relative_position_bias"])
def test_the_fast_path_works_under_bfloat16_autocast_and_in_a_backbone_held_in_bfloat16(kind, images):
    vit = make_tiny_vit(kind)
    for block in vit.blocks:  # attention that matters: timm starts it near zero
        block.attn.qkv.weight.data.mul_(20)
        block.attn.proj.weight.data.mul_(20)
    exact = PromptedViT(vit, "deep", num_tokens=8)
    nn.init.normal_(exact.prompt.tokens)
    held = PromptedViT(copy.deepcopy(vit).bfloat16(), exact.prompt)
    bare = PromptedViT(exact.vit, None)(images)
    expected = exact(images)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = exact(images)
    features = held(images)  # images and prompts in float32, as they come
    assert features.dtype == torch.bfloat16
    for rounded in (under_autocast, features):
        assert (rounded.float() - expected).norm() < 0.2 * (bare - expected).norm()
    features.float().sum().backward()
    assert held.prompt.tokens.grad.dtype == torch.float32
    assert (held.prompt.tokens.grad.flatten(1).norm(dim=1) > 0).all()


def count_flops(backbone, images):
    with FlopCounterMode(display=False) as counter:
        backbone(images).sum().backward()
    return counter.get_total_flops()


def test_the_work_of_a_training_step_grows_far_less_with_the_prompt_than_by_the_longer_sequence():
    vit = make_tiny_vit(embed_dim=64, num_heads=1)
    images = torch.randn(8, 3, 32, 32)
    work = {
        impl: count_flops(PromptedViT(vit, "deep", num_tokens=32, impl=impl), images) for impl in ("auto", "concat")
    }
    assert work["auto"] < 0.6 * work["concat"]


@pytest.mark.slow
def test_a_vit_b_costs_what_we_say_it_costs():
    """Forward against timm's own ViT, training steps of 32 images against the longer sequence; FLOPs are counted."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False).eval()
    image = torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        vit(image)
    bare = counter.get_total_flops()
    for num_tokens, most in ((10, 0.921), (100, 0.938), (200, 0.957)):
        backbone = PromptedViT(vit, "deep", num_tokens=num_tokens).requires_grad_(False)
        with torch.no_grad():
            backbone(image)  # computes the constants
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(image)
        assert counter.get_total_flops() < most * bare
    for num_tokens, most in ((10, 0.865), (50, 0.727), (100, 0.607), (200, 0.457)):
        with FakeTensorMode(allow_non_fake_inputs=True):  # counts without computing
            images = torch.empty(32, 3, 224, 224)
            fast, plain = (
                count_flops(PromptedViT(vit, "deep", num_tokens=num_tokens, impl=impl), images)
                for impl in ("auto", "concat")
            )
        assert fast < most * plain


def saved_bytes(backbone, images):
    """Bytes that the backward pass keeps, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(images)
    return sum(num_bytes for address, (num_bytes, _) in kept.items() if address not in weights)


@pytest.mark.parametrize("num_tokens", [1, 4, 16])
def test_the_backward_pass_keeps_less_than_that_of_the_longer_sequence(num_tokens):
    vit = make_tiny_vit(embed_dim=64, num_heads=1)
    images = torch.randn(8, 3, 32, 32)
    fast, plain = (
        saved_bytes(PromptedViT(vit, "deep", num_tokens=num_tokens, impl=impl), images) for impl in ("auto", "concat")
    )
    assert fast < plain


def roll_the_output(module, arguments, output):
    return output.roll(1, dims=-1)


CHANGED = {
    "qkv has hooks": lambda block: block.attn.qkv.register_forward_hook(roll_the_output),
    "attn has hooks": lambda block: block.attn.register_forward_hook(roll_the_output),
    "the block has hooks": lambda block: block.register_forward_hook(roll_the_output),
    f"qkv is a {__name__}.Doubled": lambda block: setattr(block.attn, "qkv", Doubled(block.attn.qkv)),
}


class Doubled(nn.Module):
    """An adapter around a projection, as LoRA is."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, tokens):
        return 2 * self.base(tokens)


@pytest.mark.parametrize("reason", CHANGED)
@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize("index", [1, 2])
def test_what_is_changed_in_a_block_from_outside_has_its_effect(reason, kind, index, images):
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


def test_shallow_prompts_travel_with_the_sequence_and_print_says_which_path_each_block_takes():
    vit = make_tiny_vit()
    assert PromptedViT(vit, "shallow").paths == {0: "concat (a shallow prompt travels with the sequence)"}
    assert "blocks 0-2: kv; block 2: prefix tokens only (pooled: token)" in repr(PromptedViT(vit, "deep"))
    assert "block 2: all tokens (pooled: avg)" in repr(PromptedViT(make_tiny_vit(global_pool="avg"), "deep"))
    assert PromptedViT(vit, None).paths == {}
    with pytest.raises(ValueError, match=r"prompt\.impl must be one of auto, concat, got 'fast'"):
        PromptedViT(vit, "deep", impl="fast")


def test_the_choice_reaches_create_model():
    model = vpt.create_model(make_tiny_vit(), num_classes=2, impl="concat")
    assert model.backbone.impl == "concat"


@pytest.mark.parametrize("name", [name for name in FAST if "qk-norm" not in name])
def test_the_projections_of_tokens_are_what_keys_and_values_change_by(name):
    """A key and a value are linear in the token over its deviation, but for a bias."""
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
def test_queries_are_what_the_block_attends_with(qk_norm):
    block = make_tiny_vit(qk_norm=qk_norm).blocks[1]
    tokens = torch.randn(6, 32)
    plain = nn.functional.linear(block.norm1(tokens), block.attn.qkv.weight[:32], block.attn.qkv.bias[:32])
    if qk_norm:
        plain = block.attn.q_norm(plain.unflatten(-1, (2, 16))).flatten(-2)
    torch.testing.assert_close(queries_of(block, tokens), plain)

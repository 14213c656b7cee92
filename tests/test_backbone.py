import copy
import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vpt.models.backbone
from tests.helpers import make_tiny_vit
from vpt.models import attention
from vpt.models.backbone import PromptedViT
from vpt.models.prompts import VisualPrompt


def test_the_frozen_vit_stays_in_eval_mode_and_train_returns_the_model(images):
    vit = make_tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    backbone = PromptedViT(vit, prompt="deep", num_tokens=2, dropout=0.3)
    assert backbone.train() is backbone
    assert backbone.training
    assert backbone.prompt.training
    assert not any(module.training for module in vit.modules())
    backbone.prompt.dropout.p = 0.0
    assert torch.equal(backbone(images), backbone.eval()(images))


def test_training_leaves_parameters_and_buffers_of_the_vit_bit_identical(images):
    vit = make_tiny_vit()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    backbone = PromptedViT(vit, prompt="deep", num_tokens=2).train()
    assert backbone.vit is vit
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backbone(images).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_a_ready_prompt_is_used_and_one_that_does_not_fit_is_refused():
    prompt = VisualPrompt(2, 32, blocks=(0, 2))
    assert PromptedViT(make_tiny_vit(), prompt).prompt is prompt
    for embed_dim, blocks in ((64, (0,)), (32, (0, 3))):
        with pytest.raises(ValueError, match="does not fit a ViT of embed_dim 32 and 3 blocks"):
            PromptedViT(make_tiny_vit(), VisualPrompt(2, embed_dim, blocks=blocks))


NOT_PLAIN = ["resnet18", "swin_tiny_patch4_window7_224", "vit_relpos_small_patch16_224", "naflexvit_base_patch16_gap"]


class OddViT(timm.models.VisionTransformer):
    def forward_features(self, x):
        return x


@pytest.mark.parametrize(
    "make",
    [
        *(partial(timm.create_model, name) for name in NOT_PLAIN),
        partial(OddViT, embed_dim=32, depth=1, num_heads=2),
        partial(nn.Linear, 2, 2),
    ],
)
def test_models_that_are_no_plain_vit_are_refused_with_what_is_supported(make):
    with torch.device("meta"):
        model = make()
    with pytest.raises(TypeError, match=f"{type(model).__name__} cannot be prompted; supported are plain timm ViTs"):
        PromptedViT(model)


def test_keys_and_values_are_refused_where_a_block_cannot_be_given_them(images):
    with pytest.raises(ValueError, match=r"impl=concat: inserts tokens, and a kv prompt has none"):
        PromptedViT(make_tiny_vit(), "kv", impl="concat")
    vit = make_tiny_vit()
    handle = vit.blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="block 1 cannot be given keys and values: attn has hooks; use prompt=deep"):
        PromptedViT(vit, "kv")
    handle.remove()
    backbone = PromptedViT(vit, "kv", num_tokens=3)
    assert set(backbone.paths.values()) == {"kv"}
    vit.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="block 2 cannot be given keys and values: the block has hooks"):
        backbone(images)
    with pytest.raises(ValueError, match="its tokens, of width 60, do not fit this ViT"):
        PromptedViT(make_tiny_vit(), VisualPrompt(3, 32, variant="kv", blocks=range(3), width=60))


@pytest.mark.parametrize("impl", ["auto", "concat"])
def test_a_prompt_can_be_put_in_the_place_of_another(images, impl):
    vit = make_tiny_vit()
    backbone = PromptedViT(vit, "deep", num_tokens=2, blocks=[0], impl=impl)
    kinds = [("shallow", None), ("deep", range(3)), ("deep", [2]), ("deep", [0])]
    for prompt in [*(VisualPrompt(3, 32, variant=kind, blocks=blocks) for kind, blocks in kinds), None]:
        backbone.prompt = prompt
        fresh = PromptedViT(vit, prompt, impl=impl)
        assert backbone.paths == fresh.paths
        with torch.no_grad():
            assert torch.equal(backbone(images), fresh(images))
            assert torch.equal(backbone.forward_features(images), fresh.forward_features(images))
    for blocks in ((0, 3), (5,)):
        backbone.prompt = VisualPrompt(2, 32, blocks=blocks)
        with pytest.raises(ValueError, match="does not fit a ViT of embed_dim 32 and 3 blocks"):
            backbone(images)


# TensorCache: in inference the prompt's keys and values are computed once.


@pytest.fixture
def num_projections(monkeypatch):
    """How often keys and values of a prompt have been computed, as a list that grows."""
    calls = []

    def counted(block, tokens, num_queries=None):
        calls.append(block)
        return attention.prompt_keys_values(block, tokens, num_queries)

    monkeypatch.setattr(vpt.models.prompts, "prompt_keys_values", counted)
    return calls


def make_twins(images, kind="cls"):
    """A prompted backbone with constants from a first call, and the same by the longer sequence, which keeps none."""
    vit = make_tiny_vit(kind)
    fast = PromptedViT(vit, "deep", num_tokens=3).eval()
    plain = PromptedViT(vit, fast.prompt, impl="concat").eval()
    with torch.no_grad():
        fast(images)
    return fast, plain


def test_keys_and_values_of_a_prompt_are_computed_once_in_inference(images, num_projections):
    fast, plain = make_twins(images)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(fast(images), plain(images))
            fast.forward_frozen(images[:1])
    assert len(num_projections) == 3
    fast(images)  # with gradients there are no constants
    assert len(num_projections) == 6


def step(backbone):
    for make in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = make([backbone.prompt.tokens], lr=0.3)
        backbone.prompt.tokens.grad = torch.ones_like(backbone.prompt.tokens)
        optimizer.step()


CHANGES = {
    "an optimiser step": step,
    "a load": lambda b: b.load_state_dict({name: 2 * value for name, value in b.state_dict().items()}),
    "a load that assigns": lambda b: b.prompt.load_state_dict({"tokens": b.prompt.tokens * 2}, assign=True),
    "an edit through .data": lambda b: b.prompt.tokens.data.mul_(3),
    "an edit of one number through NumPy": lambda b: np.put(b.prompt.tokens.detach().numpy(), 100, 5.0),
    "an edit of the ViT through .data, then eval()": lambda b: b.vit.blocks[1].attn.qkv.weight.data.mul_(3) is b.eval(),
    "an edit of .data itself": lambda b: setattr(b.prompt.tokens, "data", b.prompt.tokens.data * 3),
    "an edit in inference mode": lambda b: torch.inference_mode()(b.prompt.tokens.mul_)(3),
    "a move to float64": lambda b: b.double(),
    "a move there and back": lambda b: b.double().float(),
    "a move of the held ViT alone": lambda b: b.vit.double(),
    "an edit of the backbone's norm": lambda b: nn.init.ones_(b.vit.blocks[1].norm1.weight),
    "an edit of the backbone's projection": lambda b: nn.init.ones_(b.vit.blocks[2].attn.qkv.bias),
    "train()": lambda b: b.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cached_keys_and_values_are_never_stale_after(change, images):
    fast, plain = make_twins(images)
    with torch.no_grad():
        before = fast(images)
    CHANGES[change](fast)
    plain.prompt = fast.prompt
    with torch.no_grad():
        after = fast(images)
        torch.testing.assert_close(after, plain(images))
    assert change in ("train()", "a move there and back") or not torch.equal(after, before)


def test_cached_keys_and_values_follow_the_precision_of_autocast(images, num_projections):
    fast, _ = make_twins(images)
    with torch.no_grad():
        exact = fast(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = fast(images)
        assert len(num_projections) == 6
        assert torch.equal(fast(images), exact)
        fast.prompt.tokens.mul_(1)  # anew: without a trace of the other precision
        assert torch.equal(fast(images), exact)
    assert not torch.equal(rounded.float(), exact)


def test_cached_keys_and_values_are_no_part_of_copies_and_none_stay_behind_a_move(images):
    fast, _ = make_twins(images)
    assert len(fast._cache) == 3
    other = copy.deepcopy(fast)
    assert len(other._cache) == len(pickle.loads(pickle.dumps(fast))._cache) == 0
    with torch.no_grad():
        other.prompt.tokens.mul_(3)
        assert not torch.equal(other(images), fast(images))
    assert len(fast.bfloat16()._cache) == 0


def test_cached_keys_and_values_of_inference_mode_serve_and_gradients_still_reach_the_prompt(images):
    fast, _ = make_twins(images)
    with torch.inference_mode():
        fast(images)
    fast(images).sum().backward()
    assert fast.prompt.tokens.grad is not None
    fast.prompt.requires_grad_(False)
    asking = images.clone().requires_grad_()
    fast(asking).sum().backward()  # a map of what the model looks at
    assert asking.grad.abs().sum() > 0


def test_a_prompt_made_in_inference_mode_has_no_versions_and_no_cache(images, num_projections):
    with torch.inference_mode():
        backbone = PromptedViT(make_tiny_vit(), "deep", num_tokens=3).eval()
        first = backbone(images)
        backbone.prompt.tokens.mul_(3)
        assert not torch.equal(backbone(images), first)
    assert len(num_projections) == 6


# Only what is read is computed.


def shapes_in(module, call):
    """The shapes that a module got while `call` ran."""
    shapes = []
    handle = module.register_forward_hook(lambda _, arguments, __: shapes.append(tuple(arguments[0].shape)))
    call()
    handle.remove()
    return shapes


@pytest.mark.parametrize("prompt", ["deep", "kv", "shallow"])
@pytest.mark.parametrize("kind", ["cls", "cls_and_4_registers", "rope_with_cls_and_4_registers"])
def test_the_last_block_computes_prefix_tokens_only_where_they_are_all_that_is_pooled(kind, prompt, images):
    vit = make_tiny_vit(kind, global_pool="token")
    backbone = PromptedViT(vit, prompt, num_tokens=3)
    prefix = vit.num_prefix_tokens
    assert backbone.computes_prefix_only
    assert shapes_in(vit.blocks[-1].mlp, lambda: backbone(images)) == [(4, prefix, 32)]
    assert shapes_in(vit.blocks[-1].mlp, lambda: backbone.eval()(images)) == [(4, prefix, 32)]
    assert shapes_in(vit.blocks[-1].mlp, lambda: backbone.forward_features(images))[0][1] >= prefix + 16


class MeanOfAll(timm.models.VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return x.mean(dim=1)


def test_the_last_block_computes_all_tokens_where_they_are_pooled(images):
    own = MeanOfAll(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    for vit in (own, *(make_tiny_vit(global_pool=pool) for pool in ("avg", "map", ""))):
        backbone = PromptedViT(vit, "deep", num_tokens=3)
        assert not backbone.computes_prefix_only
        assert shapes_in(vit.blocks[-1].mlp, lambda backbone=backbone: backbone(images)) == [(4, 17, 32)]
    for options in ({"impl": "concat"}, {"prompt": None}):
        assert not PromptedViT(make_tiny_vit(), **options).computes_prefix_only


# Company: the rest of torch.


@pytest.mark.parametrize("prompt", ["deep", "kv", "shallow", None])
@pytest.mark.parametrize("blocks", ["all", "last:1"])
def test_the_two_halves_of_a_forward_pass_are_the_whole(tiny_vit, images, prompt, blocks):
    backbone = PromptedViT(tiny_vit, prompt, num_tokens=3, blocks="all" if prompt != "deep" else blocks)
    tokens, position = backbone.forward_frozen(images)
    assert not tokens.requires_grad
    assert torch.equal(backbone.forward_prompted(tokens, position), backbone(images))
    if prompt == "deep" and blocks == "last:1":
        seen = []
        for block in tiny_vit.blocks:
            block.register_forward_pre_hook(lambda block, _: seen.append(block))
        backbone.forward_prompted(tokens, position)
        assert not set(seen) & set(tiny_vit.blocks[:-1])


@pytest.mark.parametrize(
    ("prompt", "impl"),
    [("deep", "auto"), ("deep", "concat"), ("kv", "auto"), ("shallow", "auto"), ("shallow", "concat")],
)
def test_activation_checkpointing_changes_memory_and_nothing_else(tiny_vit, images, prompt, impl):
    backbone = PromptedViT(tiny_vit, prompt, num_tokens=3, dropout=0.3, impl=impl).train()
    results = []
    for enabled in (False, True):
        tiny_vit.set_grad_checkpointing(enabled)
        backbone.prompt.tokens.grad = None
        torch.manual_seed(5)
        num_saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=num_saved: n.append(t) or t, lambda t: t):
            features = backbone(images)
        features.square().sum().backward()
        results.append((features, backbone.prompt.tokens.grad, len(num_saved)))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-6, atol=1e-6)
    assert results[1][2] < results[0][2]


@pytest.mark.parametrize(
    ("kind", "prompt", "training"),
    [
        pytest.param("cls", "deep", False, marks=pytest.mark.slow),
        ("cls", "deep", True),
        ("cls", "shallow", True),
        pytest.param("rope_with_cls_and_4_registers", "deep", True, marks=pytest.mark.slow),
        pytest.param("relative_position_bias", "deep", True, marks=pytest.mark.slow),
    ],
)
def test_it_is_captured_whole_by_torch_compile(kind, prompt, training, images):
    torch.compiler.reset()
    backbone = PromptedViT(make_tiny_vit(kind), prompt, num_tokens=3).train(training)
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(images), backbone(images))
        with torch.no_grad():
            backbone.prompt.tokens.mul_(2)
        torch.testing.assert_close(compiled(images), backbone(images))
    if training:
        gradients = []
        for forward in (compiled, backbone):
            gradients.append(torch.autograd.grad(forward(images).square().sum(), backbone.prompt.tokens)[0])
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("prompt", ["deep", "kv", "shallow"])
def test_torch_export_gives_a_program_for_any_batch_size(tiny_vit, images, prompt):
    backbone = PromptedViT(tiny_vit, prompt, num_tokens=3).eval()
    with torch.no_grad():
        backbone(images)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(backbone, (images,), dynamic_shapes={"images": {0: batch}}).module()
        for size in (2, 4, 3):
            torch.testing.assert_close(program(images[:size]), backbone(images[:size]))


def _train_on_one_of_two(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    backbone = PromptedViT(make_tiny_vit(), "deep", num_tokens=3).double()
    nn.init.constant_(backbone.prompt.tokens, 0.1)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    parallel = nn.parallel.DistributedDataParallel(backbone)
    parallel(images[2 * rank : 2 * rank + 2]).square().sum().backward()
    results[rank] = backbone.prompt.tokens.grad
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_under_distributed_training_gradients_are_those_of_the_whole_batch(images, tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_train_on_one_of_two, (tmp_path / "meeting", results), nprocs=2)
        gradients = results[0], results[1]
    backbone = PromptedViT(make_tiny_vit(), "deep", num_tokens=3).double()
    nn.init.constant_(backbone.prompt.tokens, 0.1)
    backbone(images.double()).square().sum().backward()
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0] * 2, backbone.prompt.tokens.grad)


# Feature maps, for detection.


@pytest.mark.parametrize("taps", [[0, 2], "all", "last:1"])
def test_feature_maps_without_a_prompt_are_those_of_timm(tiny_vit, images, taps):
    indices = {"all": [0, 1, 2], "last:1": [2]}.get(str(taps), taps)
    maps = PromptedViT(tiny_vit, None).feature_maps(images, taps)
    expected = tiny_vit.forward_intermediates(images, indices=indices, intermediates_only=True)
    assert len(maps) == len(expected) == len(indices)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(maps, expected, strict=True))


@pytest.mark.parametrize("prompt", ["deep", "shallow"])
def test_feature_maps_hold_patch_tokens_only_and_both_ways_give_the_same(tiny_vit, images, prompt):
    fast, plain = (
        PromptedViT(tiny_vit.double(), prompt, num_tokens=3, impl=impl).double() for impl in ("auto", "concat")
    )
    plain.load_state_dict(fast.state_dict())
    tokens = fast.forward_features(images.double())
    maps = [backbone.feature_maps(images.double(), "all") for backbone in (fast, plain)]
    assert [tuple(one.shape) for one in maps[0]] == [(4, 32, 4, 4)] * 3
    for one, other in zip(*maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    patches = tiny_vit.norm(maps[0][-1].flatten(2).mT)
    torch.testing.assert_close(patches, tokens[:, tiny_vit.num_prefix_tokens :], rtol=1e-10, atol=1e-10)
    maps[0][-1].sum().backward()
    assert (fast.prompt.tokens.grad.flatten(1).norm(dim=1) > 0).all()


def test_feature_maps_take_images_of_any_size_that_the_patches_divide():
    vit = make_tiny_vit(dynamic_img_size=True)
    backbone = PromptedViT(vit, "deep", num_tokens=3)
    (one,) = backbone.feature_maps(torch.randn(1, 3, 48, 24))
    assert tuple(one.shape) == (1, 32, 6, 3)
    assert backbone.stride == 8


def test_blocks_behind_the_last_tap_are_not_run(images):
    vit = make_tiny_vit()
    backbone = PromptedViT(vit, "deep", num_tokens=3)
    assert shapes_in(vit.blocks[2].mlp, lambda: backbone.feature_maps(images, [0, 1])) == []
    with pytest.raises(ValueError, match="indices from 0 to 2"):
        backbone.feature_maps(images, [3])

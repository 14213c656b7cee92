"""Every timm ViT based on VisionTransformer, Eva or Beit, in a tiny version: exactness and pooling."""

import functools
import re
from pathlib import Path

import pytest
import timm
import torch

from tests.helpers import randomise
from vpt.models.attention import keys_values_width
from vpt.models.backbone import PromptedViT

FAMILIES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit", "vitamin")
ARCHITECTURES = [name for family in FAMILIES for name in timm.list_models(module=family)]

# One or two of each kind of stem, prefix, position, norm, MLP and pooling; all others are marked as slow.
CHOSEN = re.findall(
    r"\w+",
    """
    vit_tiny_patch16_224 vit_base_patch8_224 vit_base_patch32_224 vit_huge_patch14_224 vit_tiny_r_s16_p8_224
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 vit_base_patch16_clip_224
    vit_base_patch16_clip_quickgelu_224 vit_base_patch16_siglip_224 vit_base_patch16_siglip_gap_224
    vit_so400m_patch14_siglip_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_giant_patch14_dinov2
    vit_small_patch16_dinov3 vit_small_plus_patch16_dinov3 eva02_tiny_patch14_224 eva02_base_patch14_224
    eva02_enormous_patch14_clip_224 eva_giant_patch14_224 vit_small_patch16_rope_mixed_224
    vit_pe_core_tiny_patch16_384 beit_base_patch16_224 flexivit_small vit_base_patch16_rpn_224
    vit_base_patch16_xp_224 vit_small_patch16_18x2_224 vit_dwee_patch16_reg1_gap_256 vit_intern300m_patch14_448
    vit_base_patch16_sapiens2
    """,
)


def make_tiny(name, grid_size=(2, 3), **options):
    """A random ViT of this architecture with two blocks, few patches and 32 dimensions; nothing in it is zero."""
    torch.manual_seed(0)
    size = tuple(num * side for num, side in zip(grid_size, native_patch_size(name), strict=True))
    vit = timm.create_model(name, img_size=size, num_classes=0, **smallest(name, 2), **options)
    return randomise(vit)


def smallest(name, depth):
    """Options of a small model with two heads; stems of two models have a fixed width, Sapiens' blocks share keys."""
    options = {"depth": depth, "num_heads": 2}
    if "mci" not in name and "vitamin" not in name:
        options["embed_dim"] = 32
    if "sapiens2" in name:
        options["num_kv_heads"] = (*[1] * (depth - 1), 2)
    return options


@functools.cache
def native_patch_size(name):
    with torch.device("meta"):
        return patch_size_of(timm.create_model(name, num_classes=0, **smallest(name, 1)))


def patch_size_of(vit):
    """Pixels of an image per row and per column of patch tokens, also behind a convolutional stem."""
    embed = vit.patch_embed
    return tuple(pixels // num for pixels, num in zip(embed.img_size, embed.grid_size, strict=True))


def make_images(vit, grid_size=(2, 3), batch_size=2):
    size = [num * side for num, side in zip(grid_size, patch_size_of(vit), strict=True)]
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(1))


def make_pair(vit, kind):
    """The same prompted ViT twice, in float64: with each implementation."""
    pair = [PromptedViT(vit.double(), kind, num_tokens=3, impl=impl).double() for impl in ("auto", "concat")]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def runs_in_float64(vit, images):
    """Some models of older timm versions always compute the rotary embedding in float32."""
    try:
        vit.double()(images.double())
        return True
    except RuntimeError:
        return False
    finally:
        vit.float()


def read_pooled(vit, tokens):
    """The pooling of timm, written out."""
    prefix = vit.num_prefix_tokens
    includes_prefix = getattr(vit, "pool_include_prefix", False)
    if isinstance(vit, timm.models.deit.VisionTransformerDistilled):
        return (tokens[:, 0] + tokens[:, 1]) / 2
    if vit.global_pool in ("map", "prr"):
        includes_prefix = includes_prefix or isinstance(vit, timm.models.Eva)
        return vit.fc_norm(vit.attn_pool(tokens if includes_prefix else tokens[:, prefix:]))
    if vit.global_pool == "token":
        return vit.fc_norm(tokens[:, 0])
    assert vit.global_pool == "avg"
    return vit.fc_norm((tokens if includes_prefix else tokens[:, prefix:]).mean(dim=1))


def each_architecture(test):
    """Parametrize a test with every architecture; all but the chosen ones are slow."""
    values = [pytest.param(name, marks=[] if name in CHOSEN else pytest.mark.slow) for name in ARCHITECTURES]
    return pytest.mark.parametrize("name", values)(test)


@each_architecture
def test_each_architecture_is_exact_with_and_without_a_prompt(name):
    vit = make_tiny(name)
    images = make_images(vit)
    bare = PromptedViT(vit, prompt=None)
    assert torch.equal(bare(images), vit(images))
    assert torch.equal(bare.forward_features(images), vit.forward_features(images))
    if not runs_in_float64(vit, images):
        pytest.skip(f"timm {timm.__version__} cannot run {name} in float64")
    for kind in ("deep", "shallow"):
        fast, plain = make_pair(vit, kind)
        assert_equal(fast, plain, images.double())
        tokens = fast.forward_features(images.double())
        torch.testing.assert_close(fast(images.double()), read_pooled(vit, tokens), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(tokens, vit.forward_features(images.double()), atol=1e-4)
        with_gradient = {key for key, parameter in fast.named_parameters() if parameter.grad is not None}
        assert with_gradient == {"prompt.tokens"}
        assert (fast.prompt.tokens.grad.flatten(1).norm(dim=1) > 0).all()


@each_architecture
def test_a_kv_prompt_equals_a_deep_prompt_with_the_same_keys_and_values(name):
    vit = make_tiny(name)
    images = make_images(vit)
    deep = PromptedViT(vit, "deep", num_tokens=3)
    if set(deep.paths.values()) != {"kv"} or len({keys_values_width(block) for block in vit.blocks}) > 1:
        with pytest.raises(ValueError, match="use prompt=deep"):
            PromptedViT(vit, "kv", num_tokens=3)
    elif runs_in_float64(vit, images):
        learned = PromptedViT(vit.double(), "kv", num_tokens=3).double()
        tokens = torch.randn(3, deep.embed_dim, dtype=torch.float64).expand(deep.depth, -1, -1)
        for backbone in (deep.double(), learned):
            backbone.start_prompt(tokens)
        torch.testing.assert_close(learned(images.double()), deep(images.double()), rtol=1e-9, atol=1e-9)


@each_architecture
def test_each_architecture_is_exact_for_images_of_other_sizes(name):
    vit = make_tiny(name, grid_size=(3, 2))
    images = make_images(vit, grid_size=(3, 2))
    assert torch.equal(PromptedViT(vit, prompt=None)(images), vit(images))
    if not runs_in_float64(vit, images):
        pytest.skip(f"timm {timm.__version__} cannot run {name} in float64")
    assert_equal(*make_pair(vit, "deep"), images.double())
    if name.startswith("beit") or type(vit.patch_embed).__name__ == "HybridEmbed":
        return  # timm supports one size only
    vit = make_tiny(name, dynamic_img_size=True).double()
    bare, (fast, plain) = PromptedViT(vit, prompt=None), make_pair(vit, "deep")
    for grid_size in ((2, 3), (4, 2)):
        images = make_images(vit, grid_size).double()
        assert torch.equal(bare(images), vit(images))
        assert_equal(fast, plain, images)


def assert_equal(fast, plain, images):
    """The same features, tokens and gradients."""
    torch.manual_seed(2)
    weights = torch.randn(len(images), fast.embed_dim, dtype=torch.float64)
    features = []
    for backbone in (fast, plain):
        backbone.prompt.tokens.grad = None
        features.append(backbone(images))
        (features[-1] * weights).sum().backward()
    torch.testing.assert_close(features[0], features[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast.prompt.tokens.grad, plain.prompt.tokens.grad, rtol=1e-9, atol=1e-10)
    with torch.no_grad():  # with cached keys and values
        torch.testing.assert_close(fast(images), features[1], rtol=1e-10, atol=1e-10)
        tokens = fast.forward_features(images), plain.forward_features(images)
    torch.testing.assert_close(*tokens, rtol=1e-10, atol=1e-10)


def test_the_chosen_architectures_take_the_fast_path_except_for_rare_blocks():
    plain = {name: PromptedViT(make_tiny(name)).paths[1] for name in CHOSEN if name in ARCHITECTURES}
    assert {name: path for name, path in plain.items() if path != "kv"} == {
        "vit_base_patch16_xp_224": "concat (ParallelScalingBlock is not supported)",
        "vit_small_patch16_18x2_224": "concat (ParallelThingsBlock is not supported)",
        "vit_dwee_patch16_reg1_gap_256": "concat (DiffAttention is not supported)",
    }


def test_the_document_lists_the_tested_architectures():
    document = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text()
    if f"timm {timm.__version__}:" not in document:
        pytest.skip("the document was generated with another timm; run scripts/list_backbones.py")
    listed = {name for name in re.findall("`(\\w+)`", document) if timm.is_model(name)}
    assert listed - {"vit_nano_patch8_64"} == set(ARCHITECTURES)

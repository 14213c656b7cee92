import numpy as np
import pytest
import torch

import vpt
from tests.helpers import entering, make_tiny_vit, options_of
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.validation import to_config
from vpt.models.parametrizations import Bilinear
from vpt.models.vit import preprocessing_of
from vpt.models.whitening import FLOOR, whiten_from_patches
from vpt.task_types.base import task_type_of


def met_by_hand(vit, images, index):
    """What the logits of all queries and heads change by when a normed and scaled token does: x = W_k^T q."""
    block, size = vit.blocks[index], vit.embed_dim
    patches = entering(vit, images, index).flatten(0, 1).double()
    normed = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    normed = normed * block.norm1.weight.double() + block.norm1.bias.double()
    weight, bias = block.attn.qkv.weight.double(), block.attn.qkv.bias.double()
    queries = normed @ weight[:size].T + bias[:size]
    centring = torch.eye(size, dtype=torch.float64) - 1 / size
    return (queries @ weight[size : 2 * size] * block.norm1.weight.double()) @ centring


def whitened(vit, images, blocks="all", prompt="deep"):
    backbone = vpt.PromptedViT(vit, prompt, num_tokens=4, blocks=blocks, form=Bilinear(2, whiten=True))
    before = backbone.prompt.tokens.detach().clone()
    whiten_from_patches(backbone, images.split(3))
    return backbone, before


@torch.no_grad()
def test_what_tokens_meet_is_white_in_the_coordinates_that_they_are_learned_in(images):
    vit = make_tiny_vit()
    backbone, _ = whitened(vit, images, [0, 2])
    for row, index in enumerate((0, 2)):
        met = met_by_hand(vit, images, index).numpy()  # 16 patches of each of 4 pictures: all of them are looked at
        second = met.T @ met / len(met)
        floored = second + FLOOR * np.trace(second) / 32 * np.eye(32)
        matrix = backbone.prompt.form.whitening[row].double().numpy()
        white = matrix @ floored @ matrix.T
        np.testing.assert_allclose(white, white[0, 0] * np.eye(32), atol=2e-3 * white[0, 0])
        assert np.trace(matrix @ matrix.T) == pytest.approx(32, rel=1e-5)  # tokens keep their mean length
        values = np.linalg.eigvalsh(second)
        assert values[-1] > 10 * values[len(values) // 2]  # they were not white before


def test_tokens_stay_where_they_were_and_are_the_product_of_three_matrices(images):
    backbone, before = whitened(make_tiny_vit(), images)
    prompt = backbone.prompt
    torch.testing.assert_close(prompt.tokens, before, rtol=1e-4, atol=1e-5)
    left, right = prompt.parameters()
    assert torch.equal(prompt.tokens, left @ right @ prompt.form.whitening)
    assert not torch.allclose(left @ right, before, atol=1e-3)


def test_it_follows_from_pictures_and_draws_no_random_number_that_a_run_goes_on_with(images):
    matrices = []
    for _ in range(2):  # tokens start elsewhere each time
        backbone = vpt.PromptedViT(make_tiny_vit(), num_tokens=4, form=Bilinear(2, whiten=True))
        state = torch.get_rng_state()
        whiten_from_patches(backbone, [images])
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(len(matrices))
        matrices.append(backbone.prompt.form.whitening)
    assert torch.equal(*matrices)


@pytest.mark.parametrize("prompt", ["deep", "shallow"])
def test_every_family_of_backbones_can_be_whitened(tiny_vit, prompt, images):
    backbone, before = whitened(tiny_vit, images, prompt=prompt)
    torch.testing.assert_close(backbone.prompt.tokens, before, rtol=1e-3, atol=1e-4)
    assert torch.linalg.cond(backbone.prompt.form.whitening).max() > 2
    backbone(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.prompt.parameters())


def test_a_backbone_in_bfloat16_is_whitened_in_float32(images):
    backbone, _ = whitened(make_tiny_vit().bfloat16(), images)
    assert backbone.prompt.form.whitening.dtype == torch.float32


def test_what_cannot_be_whitened_is_refused(images):
    for form in (None, Bilinear(2)):
        with pytest.raises(ValueError, match=r"only a prompt of form Bilinear\(whiten=True\)"):
            whiten_from_patches(vpt.PromptedViT(make_tiny_vit(), num_tokens=4, form=form), [images])
    backbone = vpt.PromptedViT(make_tiny_vit(), num_tokens=4, form=Bilinear(2, whiten=True))
    with pytest.raises(ValueError, match="no pictures"):
        whiten_from_patches(backbone, [])
    of_keys = vpt.PromptedViT(make_tiny_vit(), "kv", num_tokens=4, form=Bilinear(2, whiten=True))
    with pytest.raises(ValueError, match=r"kind=kv.* has no tokens that could be whitened; use prompt\.kind=deep"):
        whiten_from_patches(of_keys, [images])
    backbone.vit.blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"prompt\.whiten=true reads queries, but in block 1 attn has hooks"):
        whiten_from_patches(backbone, [images])


@pytest.mark.parametrize("init", ["uniform", "patch"])
def test_the_config_asks_for_it_and_says_where_the_tokens_start(init, photos):
    options = ["prompt=bilinear", "prompt.whiten=true", "prompt.num_tokens=3", "prompt.rank=3", f"prompt.init={init}"]
    config = to_config(compose_config(options_of(photos, *options)))
    kind = task_type_of(config)
    samples = kind.read()
    model = build.build_model(config, samples["train"].classes)
    data = kind.build_data(samples, preprocessing_of(model.backbone.vit))
    form, before = model.backbone.prompt.form, model.backbone.prompt.form.whitening.clone()
    build.whiten_prompt(config, model, data)
    build.start_prompt(config, model, data)
    assert (form.whitening - before).abs().flatten(1).max(1).values.min() > 0.1
    lengths = model.backbone.prompt.tokens.norm(dim=-1)
    assert (lengths.std() < 1e-4) == (init == "patch")  # those of patches are made equal

"""Whitening of prompt tokens, against the formulas and in runs."""

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


def expected_x(vit, images, index):
    """x = W_k^T q, the gradient of the logits with respect to a normed and scaled token, for all queries."""
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
def test_the_queries_that_tokens_meet_are_isotropic_in_the_whitened_basis(images):
    vit = make_tiny_vit()
    backbone, _ = whitened(vit, images, [0, 2])
    for row, index in enumerate((0, 2)):
        x = expected_x(vit, images, index).numpy()  # all 16 patches of each of 4 images
        second = x.T @ x / len(x)
        floored = second + FLOOR * np.trace(second) / 32 * np.eye(32)
        matrix = backbone.prompt.form.whitening[row].double().numpy()
        white = matrix @ floored @ matrix.T
        np.testing.assert_allclose(white, white[0, 0] * np.eye(32), atol=2e-3 * white[0, 0])
        assert np.trace(matrix @ matrix.T) == pytest.approx(32, rel=1e-5)  # tokens keep their mean length
        values = np.linalg.eigvalsh(second)
        assert values[-1] > 10 * values[len(values) // 2]  # not white before


def test_tokens_keep_their_values_and_are_the_product_of_three_matrices(images):
    backbone, before = whitened(make_tiny_vit(), images)
    prompt = backbone.prompt
    torch.testing.assert_close(prompt.tokens, before, rtol=1e-4, atol=1e-5)
    left, right = prompt.parameters()
    assert torch.equal(prompt.tokens, left @ right @ prompt.form.whitening)
    assert not torch.allclose(left @ right, before, atol=1e-3)


def test_matrices_depend_on_the_images_only_and_the_global_random_state_is_untouched(images):
    matrices = []
    for _ in range(2):  # other tokens each time
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


WHITENED = Bilinear(2, whiten=True)


def test_prompts_and_images_that_cannot_be_whitened_are_refused(images):
    def refuse(message, batches, prompt="deep", form=WHITENED, vit=None):
        with pytest.raises(ValueError, match=message):
            whiten_from_patches(vpt.PromptedViT(vit or make_tiny_vit(), prompt, num_tokens=4, form=form), batches)

    for form in (None, Bilinear(2)):
        refuse(r"Bilinear\(whiten=True\)", [images], form=form)
    refuse("at least one image", [])
    refuse(r"whiten=True: .*variant=kv", [images], "kv")
    hooked = make_tiny_vit()
    hooked.blocks[1].attn.register_forward_hook(lambda *_: None)
    refuse(r"whiten=True: .* in block 1 attn has hooks", [images], vit=hooked)


@pytest.mark.parametrize("init", ["uniform", "patch"])
def test_a_run_whitens_and_then_initialises_its_prompt(init, photos):
    options = ["prompt=bilinear", "prompt.whiten=true", "prompt.num_tokens=3", "prompt.rank=3", f"prompt.init={init}"]
    config = to_config(compose_config(options_of(photos, *options)))
    kind = task_type_of(config)
    samples = kind.read()
    model = kind.build_model(samples["train"])
    data = kind.build_data(samples, preprocessing_of(model.backbone.vit))
    form, before = model.backbone.prompt.form, model.backbone.prompt.form.whitening.clone()
    build.whiten_prompt(config, model, data)
    build.start_prompt(config, model, data)
    assert (form.whitening - before).abs().flatten(1).max(1).values.min() > 0.1
    lengths = model.backbone.prompt.tokens.norm(dim=-1)
    assert (lengths.std() < 1e-4) == (init == "patch")  # tokens from patches are rescaled to one length

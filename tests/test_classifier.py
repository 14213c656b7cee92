import subprocess
import sys

import pytest
import torch

import vpt
from tests.helpers import build_model, make_tiny_vit
from vpt.models.task_model import TunedPart


def test_logits_are_the_head_on_the_pooled_features(images):
    model = build_model(make_tiny_vit(), prompt="deep", num_tokens=3, num_classes=6)
    model.head.weight.data.normal_()
    torch.testing.assert_close(model(images), model.backbone(images) @ model.head.weight.T + model.head.bias)
    assert model(images).shape == (4, 6)


def test_a_few_steps_learn_a_batch(images):
    model = build_model(make_tiny_vit(), prompt="deep", num_tokens=3, num_classes=4).train()
    optimizer = torch.optim.AdamW(vpt.tuned_parameters(model).values(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
    assert torch.equal(model.eval()(images).argmax(1), torch.arange(4))


def test_a_backbone_held_in_bfloat16_gives_float32_logits(images):
    model = build_model(make_tiny_vit().bfloat16(), prompt="deep", num_tokens=2, num_classes=3)
    assert model(images.bfloat16()).dtype == torch.float32


def test_the_public_names_are_importable_and_importing_the_package_is_light():
    assert all(getattr(vpt, name) is not None for name in vpt.__all__)
    assert set(vpt.__all__) <= set(dir(vpt))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vpt.nothing


@pytest.mark.parametrize("imports", ["vpt, timm", pytest.param("timm, vpt", marks=pytest.mark.slow)])
def test_the_bundled_backbone_is_known_to_timm_and_importing_the_package_is_light(imports):
    first, second = imports.split(", ")
    code = (
        f"import sys, {first}; print([m for m in ('torch', 'timm', 'albumentations', 'hydra') if m in sys.modules])\n"
    )
    code += f"import {second}; print(timm.is_model('vit_nano_patch8_64'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["[]" if first == "vpt" else "['torch', 'timm']", "True"]


@pytest.mark.parametrize("prompt", ["deep", None])
def test_the_tuned_part_on_frozen_tokens_is_the_whole_model_bit_for_bit(tiny_vit, images, prompt):
    model = build_model(tiny_vit, prompt=prompt, num_tokens=3, blocks="last:1", num_classes=4)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        tokens, _ = model.backbone.forward_frozen(images)
        _, position_of_one = model.backbone.forward_frozen(images[:1])
    part = TunedPart(model, position_of_one).train()
    assert model.training
    assert not model.backbone.vit.training
    gradients = []
    for logits in (model(images), part(tokens)):
        logits.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in vpt.tuned_parameters(model).items()})
        model.zero_grad()
    assert torch.equal(model(images), part(tokens))
    assert gradients[0].keys() == gradients[1].keys() == vpt.tuned_parameters(model).keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("tuning", ["bias", "full"])
def test_tokens_of_a_backbone_that_trains_are_not_kept(tuning):
    model = build_model(make_tiny_vit(), num_classes=2, tuning=tuning)
    with pytest.raises(ValueError, match="backbone that trains"):
        TunedPart(model, None)

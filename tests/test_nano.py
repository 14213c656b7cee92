import json

import timm
import torch

import vpt
from vpt.models.nano import WEIGHTS


def test_timm_knows_the_embedded_backbone_and_its_weights():
    assert timm.is_model("vit_nano_patch8_64")
    assert "vit_nano_patch8_64.vpt" in timm.list_pretrained("vit_nano*")
    vit = timm.create_model("vit_nano_patch8_64.vpt", pretrained=True)
    assert vit(torch.zeros(2, 3, 64, 64)).shape == (2, 192)
    assert sum(parameter.numel() for parameter in vit.parameters()) == 2_274_432
    assert WEIGHTS.stat().st_size <= 5_000_000
    assert json.dumps(vit.pretrained_cfg["mean"]) == "[0.5, 0.5, 0.5]"


def test_its_features_are_not_those_of_random_weights():
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone = vpt.PromptedViT(timm.create_model("vit_nano_patch8_64", pretrained=True), prompt=None)
    assert torch.isfinite(backbone(images)).all()
    names = {name for name, p in backbone.vit.named_parameters() if p.std() == 0 and p.numel() > 1}
    assert not names


def test_it_is_resampled_to_other_sizes():
    vit = timm.create_model("vit_nano_patch8_64", pretrained=True, img_size=128)
    assert vit(torch.zeros(1, 3, 128, 128)).shape == (1, 192)

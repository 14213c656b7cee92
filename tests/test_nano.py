"""The bundled backbone."""

import json

import pytest
import timm
import torch

from vpt.data.loaders import build_loader
from vpt.data.readers.folder import fruit_root, read_folder
from vpt.data.samples import ClassificationDataset
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.models.nano import WEIGHTS
from vpt.models.vit import load_vit, preprocessing_of


def test_the_bundled_backbone_and_its_weights_are_registered_with_timm():
    assert timm.is_model("vit_nano_patch8_64")
    assert "vit_nano_patch8_64.vpt" in timm.list_pretrained("vit_nano*")
    vit = timm.create_model("vit_nano_patch8_64.vpt", pretrained=True)
    assert vit(torch.zeros(2, 3, 64, 64)).shape == (2, 192)
    assert sum(parameter.numel() for parameter in vit.parameters()) == 2_274_432
    assert WEIGHTS.stat().st_size <= 4 * 2**20
    assert json.dumps(vit.pretrained_cfg["mean"]) == "[0.5, 0.5, 0.5]"


def nearest_mean_top1(vit):
    """Top-1 on val of the fruit set, each image assigned the class whose train features have the nearest mean."""
    splits, preprocessing = read_folder(fruit_root()), Preprocessing.from_dict(preprocessing_of(vit))
    found = {}
    for split in ("train", "val"):
        loader = build_loader(ClassificationDataset(splits[split], EvalTransform(preprocessing)), 112, shuffle=False)
        with torch.inference_mode():
            features, targets = zip(*((vit(images), targets) for images, targets in loader), strict=True)
        found[split] = torch.cat(features), torch.cat(targets)
    features, targets = found["train"]
    means = torch.stack([features[targets == target].mean(0) for target in range(14)])
    return (torch.cdist(found["val"][0], means).argmin(1) == found["val"][1]).float().mean().item()


@pytest.mark.slow
def test_its_features_separate_fruit_better_than_random_weights():
    torch.manual_seed(0)
    random, shipped = (load_vit("vit_nano_patch8_64", pretrained=pretrained) for pretrained in (False, True))
    assert nearest_mean_top1(shipped) > nearest_mean_top1(random.eval()) + 0.15


def test_its_position_embedding_is_resampled_to_other_sizes():
    vit = timm.create_model("vit_nano_patch8_64", pretrained=True, img_size=128)
    assert vit(torch.zeros(1, 3, 128, 128)).shape == (1, 192)

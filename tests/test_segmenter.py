"""The segmenter: heads, losses, task files, and mixed batches."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vpt
from tests.helpers import make_tiny_vit
from vpt.models.heads.masks import IGNORED, mask_losses
from vpt.models.segmenter import Segmenter


def segmenter(vit=None, **options):
    torch.manual_seed(0)
    model = vpt.create_model(vit or make_tiny_vit(), task="segmentation", num_classes=3, num_tokens=2, **options)
    nn.init.normal_(model.head.conv.weight)
    return model.eval()


def images_for(model, num=2):
    return torch.rand(num, 3, *model.backbone.vit.patch_embed.img_size)


@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_logits_have_the_stride_of_the_head_and_losses_reach_prompt_and_head_only(head):
    model = segmenter(head=head).train()
    images = images_for(model)
    side, patch = images.shape[-1], model.backbone.stride
    stride = patch if head == "linear" else min(model.pyramid.strides)
    assert model(images).shape == (2, 3, side // stride, side // stride)
    losses = model(images, torch.randint(0, 3, (2, side, side)))
    sum(losses.values()).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("backbone.vit") for name in with_gradient)


def test_a_new_linear_head_finds_all_classes_equally_probable():
    model = vpt.create_model(make_tiny_vit(), task="segmentation", num_classes=5)
    images = images_for(model)
    loss = model(images, torch.zeros(2, *images.shape[-2:], dtype=torch.int16))["mask"]
    assert float(loss.detach()) == pytest.approx(np.log(5), abs=1e-5)


def test_the_loss_is_the_mean_over_valid_pixels_of_an_image_and_then_over_images():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 6, 6), torch.randint(0, 4, (3, 6, 6))
    targets[0, :4] = IGNORED
    targets[2] = IGNORED  # an image without a valid pixel
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0])
    expected = 0.0
    for of_image, truth in zip(logits, targets, strict=True):
        values = [
            -float(weights[label]) * float(F.log_softmax(of_image[:, row, column], 0)[label])
            for row, line in enumerate(truth.tolist())
            for column, label in enumerate(line)
            if label >= 0
        ]
        expected += sum(values) / max(len(values), 1) / 3
    assert float(mask_losses(logits, targets, weights)["mask"]) == pytest.approx(expected, rel=1e-5)


def test_accumulated_small_batches_equal_one_large_batch_also_with_dice():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3, 4, 4), torch.randint(-1, 3, (4, 8, 8))
    whole = mask_losses(logits, targets, dice=0.5)
    parts = [mask_losses(logits[part : part + 2], targets[part : part + 2], dice=0.5) for part in (0, 2)]
    for name, value in whole.items():
        assert float(value) == pytest.approx(sum(float(part[name]) for part in parts) / 2, rel=1e-5)


def test_dice_is_zero_for_perfect_logits_and_no_nan_for_ignored_images():
    targets = torch.tensor([[[0, 1], [1, 2]]])
    logits = 100 * F.one_hot(targets, 3).movedim(-1, 1).float()
    assert float(mask_losses(logits, targets, dice=1.0)["dice"]) == pytest.approx(0, abs=1e-5)
    losses = mask_losses(logits, torch.full_like(targets, IGNORED), dice=1.0)
    assert [float(value) for value in losses.values()] == [0, 0]


@pytest.mark.parametrize("options", [{}, {"head": "pyramid", "channels": 8}, {"out_indices": "last"}])
def test_a_task_file_restores_the_model(tmp_path, options):
    model = segmenter(**options)
    file = vpt.save_task(model, tmp_path / "masks.safetensors", classes=["a", "b", "c"])
    images = images_for(model)
    loaded = vpt.load_task(file, model.backbone.vit)
    assert isinstance(loaded, Segmenter)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "layout",
    [
        None,
        {"head": "linear"},
        {"head": "linear", "taps": [1], "channels": 3},
        {"head": "mask", "taps": [1], "channels": 8, "strides": [8]},
        {"head": ["linear"], "taps": [1]},
        {"head": "pyramid", "taps": [1], "channels": 10**9, "strides": [8]},
    ],
)
def test_layouts_that_cannot_be_are_refused(layout):
    with pytest.raises(ValueError, match="head"):
        Segmenter.check_layout(layout)


def test_masks_boxes_and_classes_share_a_batch(tmp_path):
    vit = make_tiny_vit()
    models = {
        "linear": segmenter(vit),
        "pyramid": segmenter(vit, head="pyramid", channels=8),
        "classes": vpt.create_model(vit, num_classes=4, num_tokens=3).eval(),
        "boxes": vpt.create_model(vit, task="detection", num_classes=2, channels=8).eval(),
    }
    bank = vpt.TaskBank(vit)
    preprocessing = {**vpt.read_task(vpt.save_task(models["boxes"], tmp_path / "x.safetensors")).preprocessing}
    for name, model in models.items():
        bank.load(vpt.save_task(model, tmp_path / f"{name}.safetensors", preprocessing=preprocessing), name)
    images = images_for(models["linear"], num=5)
    mixed = bank(images, ["linear", "classes", "boxes", "pyramid", "linear"])
    with torch.inference_mode():
        torch.testing.assert_close(torch.stack([mixed[0], mixed[4]]), models["linear"](images)[[0, 4]])
        torch.testing.assert_close(mixed[3], models["pyramid"](images)[3])
        torch.testing.assert_close(mixed[1], models["classes"](images)[1])


@pytest.mark.parametrize(
    ("targets", "error", "word"),
    [
        (torch.zeros(2, 64, 64), TypeError, "integers"),
        (torch.zeros(2, 1, 64, 64, dtype=torch.int64), ValueError, "H, W"),
        (torch.zeros(2, 32, 32, dtype=torch.int64), ValueError, "H, W"),
        (torch.zeros(1, 64, 64, dtype=torch.int64), ValueError, "H, W"),
        (torch.full((2, 64, 64), 255), ValueError, "ignored"),
        (torch.full((2, 64, 64), -2), ValueError, "ignored"),
    ],
)
def test_targets_that_are_no_masks_of_the_images_are_refused_by_name(targets, error, word):
    model = segmenter(make_tiny_vit(img_size=64)).train()
    with pytest.raises(error, match=f"targets.*{word}"):
        model(torch.rand(2, 3, 64, 64), targets)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 3, "head": "dense"}, "head"),
        ({"num_classes": 3, "category_ids": (1, 2)}, "category"),
        ({"num_classes": 3, "classes": ["a"]}, "class"),
        ({"num_classes": 3, "out_indices": [99]}, "out_indices"),
    ],
)
def test_what_cannot_be_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        vpt.create_model(make_tiny_vit(), task="segmentation", **options)

"""DetectionModel: a pyramid and a head on a prompted backbone, by torchvision's convention."""

import pytest
import timm
import torch
from torchvision.ops import box_iou

from tests.conftest import make_tiny_vit
from vpt.models.backbone import PromptedViT
from vpt.models.detection import DetectionModel, FeaturePyramid, default_strides, resolve_taps


def make_model(kind="cls", prompt="deep", **options):
    torch.manual_seed(0)
    vit = make_tiny_vit(kind, img_size=64)
    backbone = PromptedViT(vit, prompt, num_tokens=2)
    return DetectionModel(backbone, num_classes=3, channels=32, num_convs=1, **options)


def make_targets(*boxes):
    return [
        {"boxes": torch.tensor(b, dtype=torch.float32).reshape(-1, 4), "labels": torch.arange(len(b)) % 3}
        for b in boxes
    ]


@pytest.mark.parametrize("prompt", ["deep", "shallow", None])
@pytest.mark.parametrize("kind", ["cls", "no_prefix", "rope_with_cls_and_4_registers", "relative_position_bias"])
def test_losses_in_train_mode_reach_exactly_what_trains(kind, prompt):
    model = make_model(kind, prompt).train()
    losses = model(torch.randn(2, 3, 64, 64), make_targets([[4, 4, 40, 40], [10, 20, 30, 60]], []))
    assert set(losses) == {"class", "box"}
    sum(losses.values()).backward()
    trained = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert trained == {"backbone", "pyramid", "head"} - (set() if prompt else {"backbone"})
    assert all(p.grad is None for p in model.backbone.vit.parameters())


def test_detections_in_eval_mode_are_boxes_in_the_image_the_best_first_and_not_twice():
    model = make_model().eval()
    torch.nn.init.normal_(model.head.class_logits.weight, std=0.3)
    found = model(torch.randn(2, 3, 64, 64))
    assert len(found) == 2
    for one in found:
        assert 0 < len(one["boxes"]) == len(one["scores"]) == len(one["labels"]) <= model.max_detections
        assert ((one["boxes"] >= 0) & (one["boxes"] <= 64)).all()
        assert (one["scores"].diff() <= 0).all()
        assert (one["scores"] > model.min_score).all()
        for label in one["labels"].unique():
            same = one["boxes"][one["labels"] == label]
            assert (box_iou(same, same).fill_diagonal_(0) <= model.max_overlap).all()


def test_train_mode_without_targets_is_refused():
    with pytest.raises(ValueError, match=r"needs targets; call model\.eval\(\) to detect"):
        make_model().train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("patch", "strides"), [(16, (8, 16, 32)), (14, (7, 14, 28)), (8, (8, 16, 32)), (32, (8, 16, 32))]
)
def test_levels_have_the_strides_that_are_nearest_to_8_16_and_32(patch, strides):
    assert default_strides(patch) == strides
    pyramid = FeaturePyramid(16, num_taps=1, patch_size=patch, channels=16, strides=strides)
    side = 4 * 32 // patch if patch != 14 else 8
    levels = pyramid([torch.zeros(1, 16, side, side)])
    assert [level.shape[-1] * stride for level, stride in zip(levels, strides, strict=True)] == [side * patch] * 3


def test_a_stride_that_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match="stride 12 cannot be reached from patches of 8 px"):
        make_model(strides=(8, 12))


def test_taps_are_the_last_blocks_of_each_quarter_or_the_last_one_or_a_list():
    assert resolve_taps("quarters", 24) == (5, 11, 17, 23)
    assert resolve_taps("quarters", 3) == (0, 1, 2)
    assert resolve_taps("last", 12) == (11,)
    assert resolve_taps([0, -1], 12) == (0, 11)
    with pytest.raises(ValueError, match="the backbone has blocks 0 to 11"):
        resolve_taps([12], 12)


def test_a_backbone_in_bfloat16_trains_a_float32_pyramid_and_head():
    vit = make_tiny_vit(img_size=64).bfloat16()
    model = DetectionModel(PromptedViT(vit, "deep"), num_classes=3, channels=32).train()
    losses = model(torch.randn(1, 3, 64, 64), make_targets([[4, 4, 40, 40]]))
    assert losses["box"].dtype == torch.float32
    sum(losses.values()).backward()
    assert model.backbone.prompt.tokens.grad.abs().sum() > 0


def test_four_pictures_are_learned():
    """Squares of three colours on noise: every box is found with the right class, and nothing else."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_nano_patch8_64", pretrained=True, num_classes=0)
    model = DetectionModel(PromptedViT(vit, "deep", num_tokens=4), num_classes=3, channels=32, num_convs=1).train()
    images, targets = (
        0.1 * torch.randn(4, 3, 64, 64),
        make_targets(*([[4, 4, 28, 28], [34, 20, 60, 50]] for _ in range(4))),
    )
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        target["labels"] = torch.tensor([i % 3, (i + 1) % 3])
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"], strict=True):
            image[label, y1:y2, x1:x2] += 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(80):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for found, target in zip(model.eval()(images), targets, strict=True):
            sure = found["scores"] > 0.5
            overlaps = box_iou(target["boxes"], found["boxes"][sure])
            assert overlaps.shape == (2, 2)
            assert (overlaps.max(dim=1).values > 0.8).all()
            assert torch.equal(found["labels"][sure][overlaps.argmax(dim=1)], target["labels"])

"""Detector: a pyramid and a head on a prompted backbone, by torchvision's convention."""

import json

import pytest
import timm
import torch
from torchvision.ops import box_iou

from tests.helpers import make_tiny_vit
from vpt.models.backbone import PromptedViT
from vpt.models.detector import HEADS, Detector, Selection, resolve_out_indices
from vpt.models.heads.pyramid import FeaturePyramid, default_strides


def make_model(kind="cls", prompt="deep", **options):
    torch.manual_seed(0)
    vit = make_tiny_vit(kind, img_size=64)
    backbone = PromptedViT(vit, prompt, num_tokens=2)
    return Detector(backbone, **{"num_classes": 3, "channels": 32, "num_convs": 1} | options)


def make_targets(*boxes):
    return [
        {"boxes": torch.tensor(b, dtype=torch.float32).reshape(-1, 4), "labels": torch.arange(len(b)) % 3}
        for b in boxes
    ]


KINDS = ("cls", "no_prefix", "rope_with_cls_and_4_registers", "relative_position_bias")


@pytest.mark.parametrize(
    ("kind", "prompt", "head"),
    [(kind, prompt, "dense") for kind in KINDS for prompt in ("deep", "kv", "shallow", None)]
    + [("cls", "deep", "retinanet"), ("cls", "deep", "fasterrcnn")],
)
def test_losses_in_train_mode_reach_exactly_what_trains(kind, prompt, head):
    model = make_model(kind, prompt, head=head).train()
    losses = model(torch.randn(2, 3, 64, 64), make_targets([[4, 4, 40, 40], [10, 20, 30, 60]], []))
    assert set(losses) == {"class", "box"} | ({"rpn_class", "rpn_box"} if head == "fasterrcnn" else set())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        is_tuned = not name.startswith("backbone.vit.")
        assert parameter.requires_grad == is_tuned
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == is_tuned, name


@pytest.mark.parametrize("head", HEADS)
def test_a_detection_model_and_its_layout_make_each_other(head):
    options = {"head": head, "out_indices": [0, -1], "channels": 16, "strides": (16, 32), "num_convs": 3}
    model = make_model(classes=("ant", "bee", "cat"), category_ids=[7, 3, 90], **options)
    layout = json.loads(json.dumps(model.layout))
    options["taps"] = options.pop("out_indices")
    assert layout == options | {"taps": [0, 2], "strides": [16, 32]}
    again = Detector.from_layout(model.backbone, 3, classes=model.classes, category_ids=None, layout=layout)
    again.load_state_dict(model.state_dict())
    assert again.layout == layout
    assert repr(again) == repr(model)
    assert make_model(head=head, num_convs=None).layout["num_convs"] == {"retinanet": 4}.get(head, 2)
    assert (model.category_ids, again.category_ids) == ((7, 3, 90), None)


@pytest.mark.parametrize("head", HEADS)
def test_detections_with_losses_pass_the_backbone_once_and_training_goes_on_after_them(head, monkeypatch):
    model = make_model(head=head).eval()
    model.selection = Selection(min_score=0.001)
    images, targets = torch.randn(2, 3, 64, 64), make_targets([[4, 4, 40, 40]], [])
    passes = []
    read = model.read
    monkeypatch.setattr(model, "read", lambda *given: passes.append(1) or read(*given))
    with torch.inference_mode():
        found, losses = model.detect_with_losses(images, targets)
        assert len(passes) == 1
        assert sum(len(one["boxes"]) for one in found) > 0
        for one, alone in zip(found, model(images), strict=True):
            assert all(torch.equal(one[name], alone[name]) for name in ("boxes", "scores", "labels"))
    in_train_mode = model.train()(images, targets)
    if head == "fasterrcnn":  # draws anchors and regions, in train mode only
        assert losses == {}
    else:
        assert losses.keys() == in_train_mode.keys()
        assert all(losses[name].item() == pytest.approx(in_train_mode[name].item(), rel=1e-5) for name in losses)
    sum(in_train_mode.values()).backward()  # although the pass before was in inference mode
    assert model.backbone.prompt.tokens.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"for evaluation; call model\.eval\(\) first"):
        model.detect_with_losses(images, targets)
    with pytest.raises(ValueError, match=r"needs targets; call model\.eval\(\) to detect"):
        model(images)


def eager_model(head):
    """A new model of which every class is likely somewhere, so that there is a choice to be made."""
    model = make_model(head=head).eval()
    for layer in model.head.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.1)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_every_head_selects_when_it_is_called_the_best_first_and_not_twice(head):
    model, images = eager_model(head), torch.randn(2, 3, 64, 64)
    model.selection = Selection(min_score=0.01, max_overlap=0.9, max_detections=10_000)
    many = model(images)
    scores = torch.cat([one["scores"] for one in many])
    assert scores.min() > 0.01
    assert all((one["boxes"][:, 2:] > one["boxes"][:, :2]).all() for one in many)
    assert all((one["boxes"] == one["boxes"].clamp(0, 64)).all() for one in many)
    assert all((one["scores"].diff() <= 0).all() for one in many)
    assert set(torch.cat([one["labels"] for one in many]).tolist()) == {0, 1, 2}
    middle = scores.median().item()

    model.selection = Selection(min_score=middle, max_overlap=0.9, max_detections=10_000)
    for one, all_of_it in zip(model(images), many, strict=True):
        torch.testing.assert_close(one["scores"], all_of_it["scores"][all_of_it["scores"] > middle])

    model.selection = Selection(min_score=0.01, max_overlap=0.3)
    for one in model(images):
        assert 0 < len(one["boxes"]) <= 100
        for label in one["labels"].unique():
            same = one["boxes"][one["labels"] == label]
            assert (box_iou(same, same).fill_diagonal_(0) <= 0.3).all()

    model.selection = Selection(min_score=0.01, max_overlap=0.9, max_detections=4, labels=(0, 2))
    for one, all_of_it in zip(model(images), many, strict=True):
        is_wanted = all_of_it["labels"] != 1
        assert torch.equal(one["labels"], all_of_it["labels"][is_wanted][:4])
        torch.testing.assert_close(one["boxes"], all_of_it["boxes"][is_wanted][:4])
        torch.testing.assert_close(one["scores"], all_of_it["scores"][is_wanted][:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_score": 1.0}, "min_score=1.0"),
        ({"min_score": -0.1}, "min_score=-0.1"),
        ({"max_overlap": 0.0}, "max_overlap=0.0"),
        ({"max_detections": 0}, "max_detections=0"),
        ({"labels": ()}, r"labels=\(\)"),
        ({"labels": (0, -1)}, r"labels=\(0, -1\)"),
    ],
)
def test_a_selection_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Selection(**options)


def test_a_selection_of_a_class_that_the_model_has_not_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"labels must be 0 to 2, got \(1, 3\)"):
        model.selection = Selection(labels=(1, 3))
    assert model.selection == Selection()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "detr"}, r"head='detr': must be one of dense, retinanet, fasterrcnn"),
        ({"classes": ["ant", "bee"]}, "2 class names for num_classes=3"),
        ({"category_ids": [1, 2, 3, 4]}, "4 category ids for num_classes=3"),
        ({"strides": (8, 12)}, r"strides: 12 cannot be reached from patches of 8 px"),
        ({"out_indices": [99]}, r"out_indices=\[99\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


@pytest.mark.parametrize(
    ("patch", "strides"), [(16, (8, 16, 32)), (14, (7, 14, 28)), (8, (8, 16, 32)), (32, (8, 16, 32))]
)
def test_levels_have_the_strides_that_are_nearest_to_8_16_and_32(patch, strides):
    assert default_strides(patch) == strides
    pyramid = FeaturePyramid(16, num_taps=1, patch_size=patch, channels=16, strides=strides)
    side = 4 * 32 // patch if patch != 14 else 8
    levels = pyramid([torch.zeros(1, 16, side, side)])
    assert [level.shape[-1] * stride for level, stride in zip(levels, strides, strict=True)] == [side * patch] * 3


def test_taps_are_the_last_blocks_of_each_quarter_or_the_last_one_or_a_list():
    assert resolve_out_indices("quarters", 24) == (5, 11, 17, 23)
    assert resolve_out_indices("quarters", 3) == (0, 1, 2)
    assert resolve_out_indices("last", 12) == (11,)
    assert resolve_out_indices([0, -1], 12) == (0, 11)
    with pytest.raises(ValueError, match="indices from 0 to 11"):
        resolve_out_indices([12], 12)


@pytest.mark.parametrize("head", HEADS)
def test_a_backbone_in_bfloat16_trains_a_float32_pyramid_and_head(head):
    vit = make_tiny_vit(img_size=64).bfloat16()
    model = Detector(PromptedViT(vit, "deep"), num_classes=3, channels=32, head=head).train()
    images = torch.randn(1, 3, 64, 64)
    assert {level.dtype for level in model.levels(images)} == {torch.float32}
    losses = model(images, make_targets([[4, 4, 40, 40]]))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert model.backbone.prompt.tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("head", HEADS)
def test_losses_and_detections_are_float32_under_autocast(head):
    model, images = make_model(head=head), torch.randn(2, 3, 64, 64)
    model.selection, targets = Selection(min_score=0.001), make_targets([[4, 4, 40, 40]], [])
    torch.manual_seed(3)
    plain = model.train()(images, targets)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        found = model.eval()(images)
    assert all(losses[name].item() == pytest.approx(plain[name].item(), rel=0.05) for name in plain)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {one[name].dtype for one in found for name in ("boxes", "scores")} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def learn_pictures(num, num_steps, **options):
    """Squares of three colours on noise: a model that was trained on them, the pictures and their targets."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_nano_patch8_64", pretrained=True, num_classes=0)
    backbone = PromptedViT(vit, "deep", num_tokens=4)
    model = Detector(backbone, num_classes=3, channels=32, num_convs=1, **options).train()
    images = 0.1 * torch.randn(num, 3, 64, 64)
    targets = make_targets(*([[4, 4, 28, 28], [34, 20, 60, 50]] for _ in range(num)))
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        target["labels"] = torch.tensor([i % 3, (i + 1) % 3])
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"], strict=True):
            image[label, y1:y2, x1:x2] += 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(num_steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), images, targets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "num", "num_steps", "overlap"),
    [("dense", 4, 80, 0.8), ("retinanet", 2, 60, 0.7), ("fasterrcnn", 2, 60, 0.7)],
)
def test_pictures_are_learned(head, num, num_steps, overlap):
    """The best box of each class is the true one, no other class is likely, and class 0 is a class like the others."""
    model, images, targets = learn_pictures(num=num, num_steps=num_steps, head=head)
    with torch.no_grad():
        for found, target in zip(model(images), targets, strict=True):
            labels = found["labels"][found["scores"] > 0.5].tolist()
            assert (sorted(labels) if head == "dense" else sorted(set(labels))) == sorted(target["labels"].tolist())
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                best = found["boxes"][found["labels"] == label][:1]
                assert box_iou(box[None], best).item() > overlap
    assert any(0 in target["labels"] for target in targets)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_boxes_end_where_the_picture_in_an_image_ends(head):
    torch.manual_seed(0)
    model = make_model(head=head).eval()
    model.selection = Selection(min_score=0.0, max_overlap=1.0, max_detections=10_000)
    images = torch.randn(2, 3, 64, 64)
    whole, part = model(images), model(images, sizes=[(64, 64), (20, 64)])
    assert (whole[1]["boxes"][:, 3] > 20).any()
    torch.testing.assert_close(part[0], whole[0])
    assert (part[1]["boxes"][:, 3] <= 20).all()
    for found in (*whole, *part):
        assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()
        assert len(found["boxes"]) > 0
    _, losses = model.detect_with_losses(images, make_targets([[1, 1, 9, 9]], []), [(64, 64), (20, 64)])
    assert set(losses) == (set() if head == "fasterrcnn" else {"class", "box"})


def test_images_that_are_no_whole_cells_of_the_largest_stride_are_refused():
    with pytest.raises(ValueError, match=r"72 x 72 px .* 32 px.*img_size=64 or 96"):
        Detector(PromptedViT(make_tiny_vit(img_size=72)), num_classes=1, channels=32)
    free = Detector(PromptedViT(make_tiny_vit(dynamic_img_size=True)), num_classes=1, channels=32).eval()
    assert len(free(torch.zeros(1, 3, 32, 64))) == 1
    with pytest.raises(ValueError, match="40 x 64 px are not whole cells"):
        free(torch.zeros(1, 3, 40, 64))

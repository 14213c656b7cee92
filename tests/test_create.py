"""create_model: every type of task, and what trains by default."""

import pytest
import torch

import vpt
from tests.helpers import build_model, make_tiny_vit
from vpt.models.tuning import tuned_parts


def test_a_model_is_made_from_a_name_at_another_size():
    model = build_model("vit_nano_patch8_64", prompt="shallow", num_tokens=3, num_classes=2, img_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
    assert model.backbone.name == "vit_nano_patch8_64.vpt"


def test_a_ready_backbone_keeps_its_prompt():
    backbone = vpt.PromptedViT(make_tiny_vit(), "shallow", num_tokens=3)
    model = vpt.create_model(backbone, num_classes=2)
    assert model.backbone is backbone
    assert set(tuned_parts(model)) == {"prompt", "head"}


@pytest.mark.parametrize("task", ["classification", "detection"])
@pytest.mark.parametrize(
    ("tuning", "parts"),
    [
        ("prompt", {"prompt"}),
        ("linear", set()),
        ("bias", {"backbone"}),
        ("partial", {"backbone"}),
        ("full", {"backbone"}),
    ],
)
def test_only_tuning_prompt_brings_a_prompt_unasked(task, tuning, parts):
    model = build_model(make_tiny_vit(img_size=64), num_classes=2, task=task, tuning=tuning)
    kind = model.backbone.prompt and model.backbone.prompt.variant
    assert kind == ("deep" if tuning == "prompt" else None)
    assert set(tuned_parts(model)) == parts | {"head"} | ({"neck"} if task == "detection" else set())


def test_a_prompt_that_is_asked_for_trains_beside_the_backbone_but_not_in_a_linear_probe():
    model = build_model(make_tiny_vit(), num_classes=2, tuning="bias", prompt="shallow")
    assert set(tuned_parts(model)) == {"prompt", "head", "backbone"}
    with pytest.raises(ValueError, match=r"tuning=linear: .* use prompt=none or tuning=prompt"):
        build_model(make_tiny_vit(), num_classes=2, tuning="linear", prompt="deep")


def test_the_number_of_blocks_reaches_the_tuning():
    one, two = (
        build_model(make_tiny_vit(), num_classes=2, tuning="partial", num_blocks=num_blocks) for num_blocks in (1, 2)
    )
    assert len(tuned_parts(two)["backbone"]) == 2 * len(tuned_parts(one)["backbone"]) - 2  # one final norm


def test_a_detector_gets_its_options_and_keeps_its_own_defaults():
    vit = make_tiny_vit(img_size=64)
    model = build_model(
        vit, task="detection", num_classes=2, classes=["a", "b"], category_ids=[3, 5], out_indices=[1, 2], channels=16,
        strides=[8, 16], num_convs=1, head="retinanet",
    )  # fmt: skip
    assert model.layout == {"head": "retinanet", "taps": [1, 2], "channels": 16, "strides": [8, 16], "num_convs": 1}
    assert (model.classes, model.category_ids) == (("a", "b"), (3, 5))
    plain = vpt.Detector(model.backbone, 2)
    assert build_model(vit, task="detection", num_classes=2).layout == plain.layout


@pytest.mark.parametrize(
    ("task", "option"),
    [("detection", {"head_init": "zero"}), ("classification", {"channels": 64}), ("classification", {"taps": "last"})],
)
def test_an_option_that_the_model_does_not_take_is_refused_by_name(task, option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))}=.*task={task}, which takes classes"):
        vpt.create_model(make_tiny_vit(), num_classes=2, task=task, **option)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'segmentation': must be one of "):
        vpt.create_model(make_tiny_vit(), num_classes=2, task="segmentation")


@pytest.mark.parametrize("task", ["classification", "detection"])
@pytest.mark.parametrize("tuning", ["bias", "partial", "full"])
def test_weights_in_bfloat16_are_not_tuned(task, tuning):
    options = {"num_classes": 2, "task": task, "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=rf"tuning={tuning}: trains .* torch\.bfloat16; load the backbone in float32"):
        build_model("vit_nano_patch8_64", tuning=tuning, **options)
    model = build_model("vit_nano_patch8_64", tuning="prompt", **options)
    assert {p.dtype for p in vpt.tuned_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("size", "nearest"), [(100, "96 or 104$"), ((32, 100), r"\[32, 96\] or \[32, 104\]$"), (9, "8 or 16$")]
)
def test_an_input_that_patches_do_not_cover_is_refused_with_the_nearest_sizes(size, nearest):
    vit = make_tiny_vit(img_size=size)
    with pytest.raises(ValueError, match=rf"^img_size=.*{nearest}"):
        vpt.create_model(vit, num_classes=3)
    vpt.create_model(make_tiny_vit(img_size=size, dynamic_img_pad=True), num_classes=3)

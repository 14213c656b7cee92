"""create_model: every type of task, and what trains by default."""

import pytest
import torch

import vpt
from tests.helpers import build_model, make_tiny_vit
from vpt.models.tuning import tuned_parts


def test_a_ready_backbone_keeps_its_prompt():
    backbone = vpt.PromptedViT(make_tiny_vit(), "shallow", num_tokens=3)
    model = vpt.create_model(backbone, num_classes=2)
    assert model.backbone is backbone
    assert set(tuned_parts(model)) == {"prompt", "head"}


@pytest.mark.parametrize("task", ["classification", "detection"])
@pytest.mark.parametrize("tuning", ["prompt", "linear", "bias", "partial", "full"])
def test_only_tuning_prompt_brings_a_prompt_unasked(task, tuning):
    model = vpt.create_model(make_tiny_vit(img_size=64), num_classes=2, task=task, tuning=tuning)
    assert (model.backbone.prompt is not None) == (tuning == "prompt")
    parts = {"prompt"} if tuning == "prompt" else set() if tuning == "linear" else {"backbone"}
    assert set(tuned_parts(model)) == parts | {"head"} | ({"neck"} if task == "detection" else set())


def test_a_prompt_that_is_asked_for_trains_beside_the_backbone_but_not_in_a_linear_probe():
    model = build_model(make_tiny_vit(), num_classes=2, tuning="bias", prompt="shallow")
    assert set(tuned_parts(model)) == {"prompt", "head", "backbone"}
    with pytest.raises(ValueError, match=r"tuning=linear: .* use prompt=None or tuning="):
        build_model(make_tiny_vit(), num_classes=2, tuning="linear", prompt="deep")


def test_the_number_of_blocks_reaches_the_tuning():
    one, two = (
        build_model(make_tiny_vit(), num_classes=2, tuning="partial", num_blocks=num_blocks) for num_blocks in (1, 2)
    )
    assert len(tuned_parts(two)["backbone"]) == 2 * len(tuned_parts(one)["backbone"]) - 2  # one final norm


def test_a_detector_gets_its_options_and_keeps_its_own_defaults():
    vit, layout = make_tiny_vit(img_size=64), {"head": "retinanet", "channels": 16, "strides": [8, 16], "num_convs": 1}
    named = {"classes": ("a", "b"), "category_ids": (3, 5), "out_indices": (1, 2)}
    model = vpt.create_model(vit, task="detection", num_classes=2, **named, **layout)
    assert model.layout == {**layout, "taps": [1, 2]}
    assert {name: getattr(model, name) for name in named} == named
    assert vpt.create_model(vit, task="detection", num_classes=2).layout == vpt.Detector(model.backbone, 2).layout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detection", "head_init": "zero"}, "head_init=.*task=detection, which takes classes"),
        ({"channels": 64}, "channels=.*task=classification, which takes classes"),
        ({"taps": "last"}, "taps=.*task=classification, which takes classes"),
        ({"task": "depth"}, "'depth': must be one of "),
        ({"classes": ["cat", "dog", "eel"]}, "3 class names for num_classes=2"),
        ({"classes": ["cat", "cat"]}, "classes: 'cat' is there more than once"),
        ({"classes": "ab"}, "classes='ab': must be a list of texts"),
        ({"classes": [1, 2]}, r"classes=\[1, 2\]: must be a list of texts"),
        *(({"num_classes": value}, rf"num_classes={value!r}: must be") for value in ("2", 2.0, True, 0)),
        ({"num_tokens": "10"}, "num_tokens='10': must be an integer"),
    ],
)
def test_an_option_that_the_model_does_not_take_is_refused_by_name(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vpt.create_model(make_tiny_vit(), **{"num_classes": 2, **options})


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_weights_in_bfloat16_are_not_tuned(task):
    vit = make_tiny_vit(img_size=64).bfloat16()
    for tuning in ("bias", "partial", "full"):
        with pytest.raises(ValueError, match=rf"tuning={tuning}: trains .* torch\.bfloat16; load .* in float32"):
            vpt.create_model(vit, num_classes=2, task=task, tuning=tuning)
    model = vpt.create_model(vit, num_classes=2, task=task)
    assert {p.dtype for p in vpt.tuned_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("size", "nearest"), [(100, "96 or 104$"), ((32, 100), r"\[32, 96\] or \[32, 104\]$"), (9, "8 or 16$")]
)
def test_an_input_that_patches_do_not_cover_is_refused_with_the_nearest_sizes(size, nearest):
    vit = make_tiny_vit(img_size=size)
    with pytest.raises(ValueError, match=rf"^img_size=.*{nearest}"):
        vpt.create_model(vit, num_classes=3)
    vpt.create_model(make_tiny_vit(img_size=size, dynamic_img_pad=True), num_classes=3)

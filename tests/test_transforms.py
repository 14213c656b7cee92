import json
import os
import pickle
import random
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import vpt.data.transforms.preprocessing
from vpt.data.transforms.images import EvalTransform, TrainTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise, resize_and_crop

SMALL = Preprocessing(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
RECIPE = [
    {"name": "RandomResizedCrop", "scale": [0.3, 1.0]},
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "ColorJitter", "p": 0.8},
    {"name": "GaussNoise", "p": 0.5},
]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("image_size", [(100, 80), (80, 101), (64, 64), (20, 30), (333, 71)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [
        ((64, 64), 0.9, "bicubic"),
        ((64, 64), 1.0, "bilinear"),
        ((33, 33), 0.875, "lanczos"),
        ((48, 64), 0.95, "bicubic"),
    ],
)
def test_evaluation_equals_timm(image_size, crop_mode, size, crop_pct, interpolation):
    if size[0] != size[1] and tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
        pytest.skip("older timm keeps the ratio of pictures for oblong inputs in another way")
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    ours = EvalTransform(Preprocessing(size, mean, std, interpolation, crop_pct, crop_mode))
    timms = create_transform(
        (3, *size), interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, crop_mode=crop_mode
    )
    image = picture(*image_size)
    torch.testing.assert_close(ours(image), timms(image), rtol=0, atol=1e-6)


def test_an_empty_list_equals_evaluation():
    train, evaluation = TrainTransform(SMALL), EvalTransform(SMALL)
    image = picture(50, 40)
    assert torch.equal(train(image, 3), evaluation(image))


def test_the_same_seed_gives_the_same_tensor_whatever_else_happens():
    transform, image = TrainTransform(SMALL, RECIPE), picture(50, 40)
    first = [transform(image, seed) for seed in range(6)]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    again = TrainTransform(SMALL, RECIPE)
    for seed in (4, 0, 5, 2):
        assert torch.equal(again(image, seed), first[seed])
    assert not torch.equal(first[0], first[1])


def test_a_transform_leaves_the_global_random_states_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    TrainTransform(SMALL, RECIPE)(picture(50, 40), 0)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_two_steps_of_equal_probability_do_not_always_happen_together():
    flips = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5}]
    transform, image = TrainTransform(SMALL, flips), picture(32, 32)
    plain = EvalTransform(SMALL)(image)
    outcomes = set()
    for seed in range(40):
        result = transform(image, seed)
        outcomes |= {i for i, dims in enumerate([(), (2,), (1,), (1, 2)]) if torch.equal(result, plain.flip(dims))}
    assert outcomes == {0, 1, 2, 3}


def test_shrinking_by_a_random_crop_is_antialiased():
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    keep_all = [{"name": "RandomResizedCrop", "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}]
    preprocessing = SMALL
    pixels = denormalise(TrainTransform(preprocessing, keep_all)(Image.fromarray(stripes), 0)[None], preprocessing)
    assert pixels.min() >= 127
    assert pixels.max() <= 128


def test_without_a_crop_in_the_list_the_evaluation_crop_comes_first():
    flip = TrainTransform(SMALL, [{"name": "HorizontalFlip", "p": 1.0}])
    image = picture(50, 40)
    assert torch.equal(flip(image, 0), EvalTransform(SMALL)(image).flip(2))


def test_a_crop_that_is_not_always_taken_starts_from_the_evaluation_crop():
    sometimes = TrainTransform(SMALL, [{"name": "RandomResizedCrop", "scale": [0.1, 0.2], "p": 0.5}])
    image = picture(50, 40)
    plain = EvalTransform(SMALL)(image)
    same = [torch.equal(sometimes(image, seed), plain) for seed in range(20)]
    assert any(same)
    assert not all(same)


def test_a_list_that_ends_at_another_size_is_refused():
    transform = TrainTransform(SMALL, [{"name": "RandomCrop", "height": 16, "width": 16}])
    with pytest.raises(ValueError, match=r"shape \(16, 16, 3\).*\(32, 32, 3\).*RandomResizedCrop"):
        transform(picture(50, 40), 0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"name": "RandomCrop", "height": 64, "width": 64},
            r"augment.transforms: RandomCrop cannot be applied to 40 x 50 pixels",
        ),
        (
            {"name": "MaskDropout", "p": 0.99},
            r"augment.transforms: MaskDropout cannot be applied to 32 x 32 pixels .*mask",
        ),
    ],
)
def test_a_step_that_fails_on_a_picture_is_named(step, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(Preprocessing((64, 64) if "height" in step else (32, 32), *HALVES), [step])(picture(50, 40), 0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"name": "HorizontalFlp"},
            r"augment\.transforms\[1\]: 'HorizontalFlp' is no transform.*did you mean 'HorizontalFlip'",
        ),
        ({"p": 0.5}, r"augment\.transforms\[1\]: None is no transform"),
        ({"name": "Compose"}, "'Compose' is no transform"),
        ({"name": "os"}, "'os' is no transform"),
        ({"name": "BasicTransform"}, "'BasicTransform' is no transform"),
        ({"name": "Lambda"}, "'Lambda' is no transform"),
        ({"name": "HorizontalFlip", "prob": 1}, r"HorizontalFlip has no argument 'prob'; did you mean 'p'\?"),
        ({"name": "Rotate", "limits": 5}, "Rotate has no argument 'limits'; did you mean 'limit'"),
        ({"name": "RandomResizedCrop", "scale": [2.0, 3.0]}, "RandomResizedCrop refuses"),
        ({"name": "GaussianBlur", "blur_limit": "wide"}, "GaussianBlur refuses"),
        ({"name": "RandomCrop"}, "RandomCrop refuses"),
        ({"name": "HorizontalFlip", 3: 1}, "HorizontalFlip has no argument 3"),
        ("x", r"augment\.transforms\[1\] is 'x', no mapping; write \{name: HorizontalFlip, p: 0.5\}"),
        (None, r"augment\.transforms\[1\] is None, no mapping"),
        ([["name", "x"]], r"augment\.transforms\[1\] is \[\['name', 'x'\]\], no mapping"),
    ],
)
def test_a_wrong_step_is_refused_by_its_place_and_name(step, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainTransform(SMALL, [{"name": "VerticalFlip"}, step])
    assert "\n" not in str(error.value)
    assert "errors.pydantic.dev" not in str(error.value)


def test_albumentations_is_imported_late_and_without_its_query_for_a_newer_version():
    code = """
import os, socket, sys
from vpt.data.transforms.images import TrainTransform
from vpt.data.transforms.preprocessing import Preprocessing

socket.getaddrinfo = lambda *arguments, **others: os._exit(7)
preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)
TrainTransform(preprocessing)
assert "albumentations" not in sys.modules
TrainTransform(preprocessing, [{"name": "HorizontalFlip"}])
assert "albumentations" in sys.modules
"""
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)


def test_a_transform_can_be_sent_to_a_worker():
    transform, image = TrainTransform(SMALL, RECIPE), picture(50, 40)
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(image, 3), transform(image, 3))


def test_denormalise_gives_the_pixels_back():
    image = picture(32, 32)
    preprocessing = Preprocessing(size=(32, 32), mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4), crop_pct=1.0)
    images = EvalTransform(preprocessing)(image)[None].repeat(2, 1, 1, 1)
    pixels = denormalise(images, preprocessing)
    assert pixels.shape == (2, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[1], np.asarray(image))
    assert denormalise(images * 1000, preprocessing).max() == 255


def test_a_preprocessing_survives_json():
    values = json.loads(json.dumps(SMALL.to_dict()))
    assert Preprocessing.from_dict(values) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": [0, 32]}, r"preprocessing.size is \(0, 32\)"),
        ({"size": [32]}, "preprocessing.size"),
        ({"size": [32.0, 32.0]}, "preprocessing.size"),
        ({"size": [10**9, 32]}, "preprocessing.size"),
        ({"mean": [0.5, 0.5]}, "preprocessing.mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "preprocessing.mean"),
        ({"std": [0.5, 0.5, 0.0]}, "preprocessing.std"),
        ({"std": "abc"}, "preprocessing.std"),
        ({"interpolation": "cubic"}, "preprocessing.interpolation is 'cubic'; allowed: .*bicubic"),
        ({"interpolation": {}}, "preprocessing.interpolation"),
        ({"crop_pct": 0.0}, "preprocessing.crop_pct"),
        ({"crop_pct": 1e-9}, "preprocessing.crop_pct"),
        ({"crop_pct": True}, "preprocessing.crop_pct"),
        ({"crop_mode": "border"}, "preprocessing.crop_mode is 'border'; allowed: center, squash"),
        ({"_target_": "os.system"}, r"unknown keys \['_target_'\]"),
    ],
)
def test_a_preprocessing_from_a_file_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(SMALL.to_dict() | change)


def test_a_preprocessing_from_a_file_must_be_complete():
    values = SMALL.to_dict()
    del values["std"]
    with pytest.raises(ValueError, match=r"missing keys \['std'\]"):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize("image_size", [(100, 80), (80, 101), (333, 71), (9, 130), (64, 64)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(
    ("size", "interpolation", "far"), [((64, 64), "bilinear", 1), ((48, 64), "bilinear", 1), ((64, 64), "bicubic", 40)]
)
def test_computing_only_what_is_seen_gives_the_pixels_of_all(
    image_size, crop_mode, size, interpolation, far, monkeypatch
):
    image = picture(*image_size)
    preprocessing = Preprocessing(size, *HALVES, interpolation, 0.9, crop_mode)
    whole = np.asarray(resize_and_crop(image, preprocessing)).astype(int)
    monkeypatch.setattr(vpt.data.transforms.preprocessing, "MAX_ENLARGED", 0)
    different = np.abs(np.asarray(resize_and_crop(image, preprocessing)) - whole)
    # Pillow clips between its two passes, and takes first the one that leaves less: it matters to what overshoots.
    assert different.max() <= far
    assert different.mean() < 1


def test_no_ordinary_picture_is_computed_in_part(monkeypatch):
    preprocessing = Preprocessing((224, 224), *HALVES)
    for size in ((100, 2), (4000, 3000), (20, 6000)):
        image = Image.new("RGB", size)
        resize = Mock(return_value=Image.new("RGB", (9, 9)))
        monkeypatch.setattr(image, "resize", resize)
        resize_and_crop(image, preprocessing)
        assert len(resize.call_args.args) == 2  # the size and the filter, and no box


MEASURE = """
import resource, sys
from PIL import Image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import CROP_MODES, Preprocessing
half = (0.5,) * 3
images = [Image.new("RGB", size, "red") for size in [(1, 10_000), (10_000, 1), (1, 1_000_000), (1_000_000, 1)]]
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for mode in CROP_MODES:
    for crop_pct in (0.1, 0.9):
        transform = EvalTransform(Preprocessing((224, 224), half, half, crop_pct=crop_pct, crop_mode=mode))
        for image in images:
            found = transform(image)
            assert found.shape == (3, 224, 224)
            assert mode == "letterbox" or (found[0] == 1).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024)
"""


def test_a_picture_of_one_pixel_by_a_million_is_used_with_little_memory():
    output = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(output.stdout) < 400  # MB; enlarged it would take 250,000

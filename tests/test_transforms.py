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
from tests.helpers import noise
from vpt.data.transforms.boxes import DetectionEvalTransform, DetectionTrainTransform
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
BOXES = np.float32([[0, 0, 16, 16], [20, 8, 44, 40]])


class WithoutBoxes:
    """The transforms for classification."""

    train, evaluation = TrainTransform, EvalTransform

    @staticmethod
    def apply(transform, image, seed):
        return (transform(image, seed),)


class WithBoxes:
    """The transforms for detection."""

    train, evaluation = DetectionTrainTransform, DetectionEvalTransform

    @staticmethod
    def apply(transform, image, seed):
        return transform(image, BOXES, seed)


both = pytest.mark.parametrize("task", [WithoutBoxes, WithBoxes])


def equal(ours, theirs):
    return all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


# Both tasks


@both
def test_an_empty_list_equals_evaluation(task):
    image = noise(150, 400)
    train, evaluation = task.train(SMALL), task.evaluation(SMALL)
    assert equal(task.apply(train, image, 3), task.apply(evaluation, image, 0))
    assert not train.is_random
    assert task.train(SMALL, RECIPE).is_random


@both
def test_the_result_depends_on_image_and_seed_alone_and_changes_no_global_state(task):
    transform, image = task.train(SMALL, RECIPE), noise(90, 70)
    first = [task.apply(transform, image, seed) for seed in range(6)]
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    again = pickle.loads(pickle.dumps(task.train(SMALL, RECIPE)))
    for seed in (4, 0, 5, 2):
        assert equal(task.apply(again, image, seed), first[seed])
    assert not equal(first[0], first[1])
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


@both
def test_two_steps_of_equal_probability_are_independent(task):
    flips = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5}]
    transform, image = task.train(SMALL, flips), noise(32, 32)
    plain = task.apply(task.evaluation(SMALL), image, 0)[0]
    outcomes = set()
    for seed in range(40):
        result = task.apply(transform, image, seed)[0]
        outcomes |= {i for i, dims in enumerate([(), (2,), (1,), (1, 2)]) if torch.equal(result, plain.flip(dims))}
    assert outcomes == {0, 1, 2, 3}


@both
@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"name": "HorizontalFlp"}, "did you mean 'HorizontalFlip'"),
        ({"p": 0.5}, "None is not a transform"),
        *(({"name": name}, f"'{name}' is not a transform") for name in ("Compose", "os", "BasicTransform", "Lambda")),
        ({"name": "HorizontalFlip", "prob": 1}, r"no argument 'prob'; did you mean 'p'\?"),
        ({"name": "Rotate", "limits": 5}, "did you mean 'limit'"),
        ({"name": "RandomResizedCrop", "scale": [2.0, 3.0]}, "RandomResizedCrop refuses"),
        ({"name": "GaussianBlur", "blur_limit": "wide"}, "GaussianBlur refuses"),
        ({"name": "RandomCrop"}, "RandomCrop refuses"),
        ({"name": "HorizontalFlip", 3: 1}, "no argument 3"),
        *((step, "must be a mapping") for step in ("x", None, [["name", "x"]])),
    ],
)
def test_a_wrong_step_is_refused_by_its_index_and_name(task, step, words):
    with pytest.raises(ValueError, match=rf"^augment\[1\].*{words}") as error:
        task.train(SMALL, [{"name": "VerticalFlip"}, step])
    assert "\n" not in str(error.value)
    assert "errors.pydantic.dev" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "size", "step", "words"),
    [
        (WithoutBoxes, 64, {"name": "RandomCrop", "height": 64, "width": 64}, "RandomCrop cannot .* 40 x 50 pixels"),
        (WithoutBoxes, 32, {"name": "MaskDropout", "p": 0.99}, "MaskDropout cannot .* 32 x 32 pixels .*mask"),
        (WithoutBoxes, 32, {"name": "RandomCrop", "height": 16, "width": 16}, r"\(16, 16, 3\).*RandomResizedCrop"),
        (WithBoxes, 64, {"name": "RandomCrop", "height": 64, "width": 64}, "RandomCrop .* 40 x 50 pixels and 2 boxes"),
        (WithBoxes, 64, {"name": "ToGray", "num_output_channels": 1, "p": 1}, r"ToGray .*shape \(40, 50"),
    ],
)
def test_a_step_that_fails_on_an_image_is_named(task, size, step, words):
    with pytest.raises(ValueError, match=f"^augment: .*{words}"):
        task.apply(task.train(Preprocessing((size, size), *HALVES), [step]), noise(50, 40), 0)


# Classification


@pytest.mark.parametrize("image_size", [(100, 80), (80, 101), (64, 64), (20, 30), (333, 71)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [(64, 0.9, "bicubic"), (64, 1.0, "bilinear"), (33, 0.875, "lanczos"), ((48, 64), 0.95, "bicubic")],
)
def test_evaluation_equals_timm(image_size, crop_mode, size, crop_pct, interpolation):
    size = (size, size) if isinstance(size, int) else size
    if size[0] != size[1] and tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
        pytest.skip("older timm resizes to oblong inputs in another way")
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    ours = EvalTransform(Preprocessing(size, mean, std, interpolation, crop_pct, crop_mode))
    timms = create_transform(
        (3, *size), interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, crop_mode=crop_mode
    )
    image = noise(*image_size)
    torch.testing.assert_close(ours(image), timms(image), rtol=0, atol=1e-6)


def test_shrinking_by_a_random_crop_is_antialiased():
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    keep_all = [{"name": "RandomResizedCrop", "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}]
    pixels = denormalise(TrainTransform(SMALL, keep_all)(Image.fromarray(stripes), 0)[None], SMALL)
    assert 127 <= pixels.min() <= pixels.max() <= 128


def test_without_a_crop_that_is_always_applied_the_evaluation_crop_comes_first():
    image = noise(50, 40)
    plain = EvalTransform(SMALL)(image)
    assert torch.equal(TrainTransform(SMALL, [{"name": "HorizontalFlip", "p": 1.0}])(image, 0), plain.flip(2))
    sometimes = TrainTransform(SMALL, [{"name": "RandomResizedCrop", "scale": [0.1, 0.2], "p": 0.5}])
    assert {torch.equal(sometimes(image, seed), plain) for seed in range(20)} == {True, False}


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


# Preprocessing


def test_denormalise_inverts_the_normalisation():
    image = noise(32, 32)
    preprocessing = Preprocessing(size=(32, 32), mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4), crop_pct=1.0)
    images = EvalTransform(preprocessing)(image)[None].repeat(2, 1, 1, 1)
    pixels = denormalise(images, preprocessing)
    assert (pixels.shape, pixels.dtype) == ((2, 32, 32, 3), np.uint8)
    assert np.array_equal(pixels[1], np.asarray(image))
    assert denormalise(images * 1000, preprocessing).max() == 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": [0, 32]}, r"size is \(0, 32\)"),
        *(({"size": size}, "size") for size in ([32], [32.0, 32.0], [10**9, 32])),
        *(({"mean": mean}, "mean") for mean in ([0.5, 0.5], [0.5, 0.5, float("nan")])),
        *(({"std": std}, "std") for std in ([0.5, 0.5, 0.0], "abc")),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; allowed: .*bicubic"),
        ({"interpolation": {}}, "interpolation"),
        *(({"crop_pct": value}, "crop_pct") for value in (0.0, 1e-9, True)),
        ({"crop_mode": "border"}, "crop_mode is 'border'; allowed: center, squash"),
        ({"_target_": "os.system"}, r"unknown keys \['_target_'\]"),
        ({"std": None}, r"missing keys \['std'\]"),
    ],
)
def test_a_preprocessing_survives_json_and_is_checked(change, words):
    values = json.loads(json.dumps(SMALL.to_dict()))
    assert Preprocessing.from_dict(values) == SMALL
    changed = {key: value for key, value in (values | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"preprocessing.*{words}"):
        Preprocessing.from_dict(changed)


@pytest.mark.parametrize("image_size", [(100, 80), (80, 101), (333, 71), (9, 130), (64, 64)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(
    ("size", "interpolation", "far"), [((64, 64), "bilinear", 1), ((48, 64), "bilinear", 1), ((64, 64), "bicubic", 40)]
)
def test_resizing_only_the_cropped_part_gives_the_same_pixels(
    image_size, crop_mode, size, interpolation, far, monkeypatch
):
    image = noise(*image_size)
    preprocessing = Preprocessing(size, *HALVES, interpolation, 0.9, crop_mode)
    whole = np.asarray(resize_and_crop(image, preprocessing)).astype(int)
    monkeypatch.setattr(vpt.data.transforms.preprocessing, "MAX_ENLARGED", 0)
    different = np.abs(np.asarray(resize_and_crop(image, preprocessing)) - whole)
    # Pillow clips between its two passes, and starts with the one that leaves less: it matters where bicubic overshoots
    assert different.max() <= far
    assert different.mean() < 1


def test_ordinary_images_are_resized_as_a_whole(monkeypatch):
    for size in ((100, 2), (4000, 3000), (20, 6000)):
        image = Image.new("RGB", size)
        resize = Mock(return_value=Image.new("RGB", (9, 9)))
        monkeypatch.setattr(image, "resize", resize)
        resize_and_crop(image, Preprocessing((224, 224), *HALVES))
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


def test_an_image_of_one_pixel_by_a_million_takes_little_memory():
    output = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(output.stdout) < 400  # MB; enlarged it would take 250,000

"""Transforms of images with masks."""

import numpy as np
import pytest
from PIL import Image

from vpt.data.masks import IGNORE
from vpt.data.transforms.masks import SegmentationEvalTransform, SegmentationTrainTransform, resize_mask
from vpt.data.transforms.preprocessing import Preprocessing

HALF = (0.5, 0.5, 0.5)
INPUT = Preprocessing(size=(32, 32), mean=HALF, std=HALF)
MOVING = [
    {"name": "Affine", "rotate": [30, 30], "p": 1},
    {"name": "PadIfNeeded", "min_height": 60, "min_width": 60, "p": 1},
    {"name": "CropAndPad", "percent": [0.2, 0.2], "p": 1},
    {"name": "Perspective", "p": 1},
    {"name": "ElasticTransform", "p": 1},
    {"name": "SafeRotate", "limit": [20, 20], "p": 1},
]


def white_square(height=32, width=32):
    """An image and its mask: class 1 is where the image is white."""
    mask = np.zeros((height, width), np.int16)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    return Image.fromarray((mask * 255).astype(np.uint8)).convert("RGB"), mask


def test_a_mask_is_letterboxed_as_its_image_and_the_rest_is_ignored():
    image, mask = white_square(20, 40)
    tensor, found = SegmentationEvalTransform(INPUT)(image, mask)
    assert (found[16:] == IGNORE).all()
    assert (found[:16] >= 0).all()
    is_white = tensor[0, :16].numpy() > 0
    assert (is_white != (found[:16] == 1)).mean() < 0.05


@pytest.mark.parametrize("size", [(13, 29), (37, 37), (64, 31), (101, 97), (5, 200)])
def test_no_edge_of_a_checkerboard_moves_by_more_than_half_a_pixel(size):
    rows, columns = np.indices(size)
    mask = ((rows // 8 + columns // 8) % 2).astype(np.int16)
    target = max(1, size[0] // 2), max(1, size[1] // 2)
    centres = [(np.arange(new) + 0.5) * old / new for old, new in zip(size, target, strict=True)]
    nearest = [np.clip(np.floor(of_axis).astype(int), 0, side - 1) for of_axis, side in zip(centres, size, strict=True)]
    assert (resize_mask(mask, target) == mask[np.ix_(*nearest)]).all()


@pytest.mark.parametrize("step", MOVING, ids=lambda step: step["name"])
def test_what_a_step_fills_in_is_ignored_and_the_mask_moves_with_the_image(step):
    image, mask = white_square()
    tensor, found = SegmentationTrainTransform(INPUT, [step])(image, mask + 1, seed=3)  # no pixel is class 0
    assert 0 not in found
    assert {1, 2} <= set(found.ravel().tolist()) <= {IGNORE, 1, 2}
    is_white = tensor[0].numpy() > 0
    assert ((is_white == (found == 2)) | (found == IGNORE)).mean() > 0.9


def test_a_flip_of_image_and_mask_is_exact_and_depends_on_the_seed_alone():
    image, mask = white_square()
    transform = SegmentationTrainTransform(INPUT, [{"name": "HorizontalFlip", "p": 1}])
    tensor, found = transform(image, mask, seed=1)
    assert (found == mask[:, ::-1]).all()
    plain, _ = SegmentationEvalTransform(INPUT)(image, mask)
    assert (tensor == plain.flip(-1)).all()
    random = SegmentationTrainTransform(INPUT, MOVING)
    assert (random(image, mask, seed=5)[1] == random(image, mask, seed=5)[1]).all()


def test_a_step_that_changes_colours_only_leaves_the_mask():
    image, mask = white_square()
    _, found = SegmentationTrainTransform(INPUT, [{"name": "ColorJitter", "p": 1}])(image, mask, seed=0)
    assert (found == mask).all()

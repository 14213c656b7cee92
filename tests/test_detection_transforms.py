import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpt.data.transforms.boxes import DetectionEvalTransform, DetectionTrainTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise, letterbox, unletterbox

SQUARE = Preprocessing(size=(64, 64), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OBLONG = Preprocessing(size=(48, 96), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")
MEAN_COLOUR, MEAN_GREY = (124, 116, 104), 115
JITTER = {"name": "CropAndPad", "percent": [-0.25, 0.5], "keep_size": False}
RECIPE = [{"name": "HorizontalFlip", "p": 0.5}, JITTER, {"name": "ColorJitter", "p": 0.8}]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def boxes_in(width: int, height: int, num: int, seed: int = 0) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, (width, height), (num, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)


def painted(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A black image with a white box."""
    image = Image.new("RGB", (width, height))
    image.paste("white", box)
    return image


def white_part(tensor: torch.Tensor, preprocessing: Preprocessing) -> list[int]:
    """Corners of what is white."""
    rows, columns = np.nonzero(denormalise(tensor[None], preprocessing)[0].min(-1) > 190)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_an_image_of_any_size_fills_the_input_on_one_side():
    for width in range(1, 400):
        whole = np.float32([[0, 0, width, 1]])
        assert letterbox(Image.new("RGB", (width, 1)), whole, SQUARE)[1].max() == 64


def test_unletterbox_clips_boxes():
    boxes = np.float32([[-9, -9, 999, 60]])
    assert unletterbox(boxes, (50, 100), SQUARE).tolist() == [[0, 0, 100, 50]]


@pytest.mark.parametrize("size", [(128, 96), (96, 128), (20, 31), (64, 64), (300, 70)])
@pytest.mark.parametrize("preprocessing", [SQUARE, OBLONG])
def test_a_box_is_where_its_content_is(preprocessing, size):
    width, height = size
    box = width // 4, height // 3, width // 2, height
    tensor, boxes, _ = DetectionEvalTransform(preprocessing)(painted(width, height, box), np.float32([box]))
    assert np.abs(white_part(tensor, preprocessing) - boxes[0]).max() <= 1


def test_an_image_is_at_the_upper_left_corner_and_the_rest_is_the_mean():
    pixels = np.asarray(letterbox(Image.new("RGB", (100, 50), "red"), boxes_in(100, 50, 0), SQUARE)[0])
    assert (pixels[:32] == (255, 0, 0)).all()
    assert (pixels[32:] == MEAN_COLOUR).all()
    tensor = DetectionEvalTransform(SQUARE)(Image.new("RGB", (100, 50), "red"))[0]
    assert tensor[:, 32:].abs().max() < 0.01
    assert tensor.shape == (3, 64, 64)


def test_shrinking_is_antialiased():
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = np.asarray(letterbox(Image.fromarray(stripes), boxes_in(256, 256, 0), SQUARE)[0])
    assert 120 < pixels[:, 2:-2].min() <= pixels[:, 2:-2].max() < 136


@pytest.mark.parametrize("size", [(90, 60), (500, 400)])
def test_boxes_follow_their_content_through_every_step(size):
    geometry = [*RECIPE[:2], {"name": "RandomRotate90"}, {"name": "Affine", "translate_percent": [-0.05, 0.05]}]
    transform = DetectionTrainTransform(SQUARE, geometry)
    width, height = size
    box = width // 3, height // 3, width // 2, height // 2
    shapes = set()
    for seed in range(20):
        tensor, boxes, kept = transform(painted(width, height, box), np.float32([box]), seed)
        assert kept.tolist() == [0]
        assert np.abs(white_part(tensor, SQUARE) - boxes[0]).max() <= 1.5
        shapes.add(tuple(np.round(boxes[0])))
    assert len(shapes) > 10


def test_boxes_stay_inside_and_a_pixel_wide_and_indices_identify_them():
    transform = DetectionTrainTransform(SQUARE, [JITTER], min_visibility=0.3)
    boxes = boxes_in(200, 100, 60)
    num_kept = []
    for seed in range(10):
        _, moved, kept = transform(picture(200, 100), boxes, seed)
        assert (moved.dtype, kept.dtype) == (np.float32, np.int64)
        assert len(moved) == len(kept) == len(set(kept.tolist()))
        assert (moved == moved.clip(0, 64)).all()
        assert (moved[:, 2:] > moved[:, :2]).all()
        num_kept.append(len(kept))
    assert min(num_kept) < 60


def test_a_box_that_is_mostly_cut_off_is_dropped_and_the_next_one_keeps_its_index():
    half = [{"name": "Crop", "x_min": 0, "y_min": 0, "x_max": 32, "y_max": 64}]
    boxes = np.float32([[30, 0, 60, 64], [20, 0, 44, 64], [40, 0, 64, 64], [0, 0, 8, 8]])
    _, moved, kept = DetectionTrainTransform(SQUARE, half, min_visibility=0.4)(picture(64, 64), boxes, 0)
    assert kept.tolist() == [1, 3]
    np.testing.assert_allclose(moved, [[20, 0, 32, 64], [0, 0, 8, 8]], atol=1e-4)
    assert DetectionTrainTransform(SQUARE, half, min_visibility=0)(picture(64, 64), boxes, 0)[2].tolist() == [0, 1, 3]


def test_images_without_boxes_and_those_that_lose_all_have_empty_arrays():
    transform = DetectionTrainTransform(SQUARE, RECIPE)
    far = [{"name": "Crop", "x_min": 0, "y_min": 0, "x_max": 8, "y_max": 8}, *RECIPE]
    for tensor, boxes, kept in (
        transform(picture(50, 40), boxes_in(50, 40, 0), 1),
        DetectionTrainTransform(SQUARE, far)(picture(50, 40), np.float32([[30, 30, 40, 40]]), 1),
    ):
        assert (tensor.shape, boxes.shape, kept.shape) == ((3, 64, 64), (0, 4), (0,))
        assert (boxes.dtype, kept.dtype) == (np.float32, np.int64)


def test_steps_fill_with_the_grey_of_the_mean_by_default():
    wide = {"name": "CropAndPad", "percent": 0.5, "keep_size": False}
    boxes = boxes_in(64, 64, 1)
    for step, grey in ((wide, MEAN_GREY), (wide | {"fill": 255}, 255)):
        tensor = DetectionTrainTransform(SQUARE, [step])(Image.new("RGB", (64, 64)), boxes, 0)[0]
        assert denormalise(tensor[None], SQUARE)[0, 0, 0].tolist() == [grey] * 3


def test_a_large_image_is_shrunk_to_twice_the_input_before_the_steps():
    crop = [{"name": "CenterCrop", "height": 64, "width": 64}]
    middle = np.float32([[250, 250, 750, 750]])
    _, boxes, _ = DetectionTrainTransform(SQUARE, crop)(picture(1000, 1000), middle, 0)
    np.testing.assert_allclose(boxes, [[0, 0, 64, 64]], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"augment": [{"name": "CubicSymmetry"}]}, r"augment\[0\]: CubicSymmetry does not move boxes"),
        ({"augment": [{"name": "Rotate", "fill": "x"}]}, r"augment\[0\]: Rotate refuses"),
        *(({"min_visibility": value}, "min_visibility=") for value in (-0.1, 1.0, float("nan"))),
    ],
)
def test_steps_that_do_not_move_boxes_and_wrong_values_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        DetectionTrainTransform(SQUARE, **arguments)


def test_transforms_leave_their_boxes_alone():
    boxes = boxes_in(50, 40, 4)
    boxes.setflags(write=False)
    before = boxes.copy()
    DetectionTrainTransform(SQUARE, RECIPE)(picture(50, 40), boxes, 0)
    DetectionEvalTransform(SQUARE)(picture(50, 40), boxes)
    assert np.array_equal(boxes, before)


properties = settings(max_examples=50, derandomize=True, deadline=None)


@st.composite
def pictures_with_boxes(draw, max_side=1200):
    """Height and width of an image, and some boxes in it, at least a pixel wide and high."""
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        x1, y1 = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
        x2, y2 = draw(st.floats(x1 + 1, width)), draw(st.floats(y1 + 1, height))
        rows.append((x1, y1, min(x2, width), min(y2, height)))
    return (height, width), np.array(rows, dtype=np.float32).reshape(-1, 4)


@properties
@given(case=pictures_with_boxes(), preprocessing=st.sampled_from([SQUARE, OBLONG]))
def test_unletterbox_inverts_letterbox_within_half_a_pixel(case, preprocessing):
    (height, width), boxes = case
    image, inner = letterbox(Image.new("RGB", (width, height)), boxes, preprocessing)
    assert image.size == preprocessing.size[::-1]
    assert inner.shape == boxes.shape
    assert np.abs(inner - inner.clip(0, [*image.size, *image.size])).max(initial=0) <= 1e-3
    back = unletterbox(inner, (height, width), preprocessing)
    assert np.abs(back - boxes).max(initial=0) < 0.5


@properties
@given(case=pictures_with_boxes(max_side=128), seed=st.integers(0, 2**31), steps=st.sampled_from([(0,), (1,), (0, 1)]))
def test_flips_keep_all_boxes_inside_and_in_place(case, seed, steps):
    (height, width), boxes = case
    names = ["HorizontalFlip", "VerticalFlip"]
    transform = DetectionTrainTransform(SQUARE, [{"name": names[step], "p": 1.0} for step in steps])
    _, found, kept = transform(Image.new("RGB", (width, height)), boxes, seed)
    assert list(kept) == sorted(set(kept.tolist()))  # only what a small input makes smaller than a pixel may go
    _, plain, all_of_them = DetectionTrainTransform(SQUARE)(Image.new("RGB", (width, height)), boxes, seed)
    assert len(all_of_them) == len(boxes)
    inner = [round(side * min(64 / height, 64 / width)) or 1 for side in (width, height)]
    expected = plain[kept].copy()
    for step in steps:
        expected[:, [step, step + 2]] = inner[step] - expected[:, [step + 2, step]]
    assert np.abs(found - expected).max(initial=0) < 0.1
    assert np.abs(found - found.clip(0, 64)).max(initial=0) <= 1e-3

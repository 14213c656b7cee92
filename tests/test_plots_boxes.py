"""Boxes drawn on images."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from vpt.plots.boxes import boxes_page, class_colour, draw_boxes

GREY = 128

# What is left of linear RGB without one type of cones (Machado et al., 2009, severity 1); each row sums to 1.
SIGHT = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def where(image: np.ndarray, label: int) -> np.ndarray:
    return (np.abs(image - np.float32(255 * np.array(to_rgb(class_colour(label))))) < 2).all(axis=-1)


def least_distance(num: int, sight: str) -> float:
    def cielab(label: int) -> np.ndarray:
        shares = np.array(to_rgb(class_colour(label)))
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        x, y, z = np.cbrt(np.array(TO_XYZ) @ np.clip(np.array(SIGHT[sight]) @ linear, 0, 1) / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    pairs = itertools.combinations([cielab(label) for label in range(num)], 2)
    return min(float(np.linalg.norm(one - other)) for one, other in pairs)


@pytest.mark.parametrize("sight", SIGHT)
def test_the_first_eight_colours_differ_for_every_type_of_sight(sight):
    assert least_distance(8, sight) > 15


def test_the_colours_of_eighty_classes_differ_and_no_two_of_five_hundred_are_the_same():
    assert least_distance(80, "all") > 8
    assert len({class_colour(label) for label in range(500)}) == 500


@pytest.mark.parametrize("side", [64, 300, 640, 2000])
def test_lines_are_on_the_inner_edge_of_the_box_and_grow_with_the_image(side):
    x1, y1, x2, y2 = box = (np.array([0.25, 0.5, 0.75, 0.9]) * side).round().astype(int)
    drawn = draw_boxes(grey(side, side), [box.tolist()], [0], [""])
    width = max(1, round(side * 0.004))
    expected = np.zeros((side, side), bool)
    expected[y1:y2, x1:x2] = True
    expected[y1 + width : y2 - width, x1 + width : x2 - width] = False
    assert np.array_equal(where(drawn, 0), expected)
    assert (drawn[~expected] == GREY).all()


def test_the_input_is_unchanged_and_no_boxes_change_nothing():
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    before = image.copy()
    image.setflags(write=False)
    for boxes in ([], np.zeros((0, 4), np.float32), torch.zeros(0, 4)):
        assert np.array_equal(draw_boxes(image, boxes, [], ["pear"], scores=[]), before)
    assert not np.array_equal(draw_boxes(image, [[1, 1, 40, 40]], [0], ["pear"]), before)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "box",
    [
        *([0, 0, 200, 200], [50, 0, 90, 40], [180, 60, 200, 90], [0, 180, 30, 200]),
        *([-30, -20, 260, 300], [300, 300, 400, 400]),  # larger than the image; outside
        *([90, 20, 90.2, 20.1], [90, 90, 60, 60]),  # less than a pixel; swapped
    ],
)
def test_a_name_can_be_read_wherever_its_box_is(box):
    def num_letter_pixels(position: list[float]) -> int:
        drawn = draw_boxes(grey(200, 200), [position], [0], ["pear"], [0.5])
        return int((drawn.min(axis=-1) > 160).sum())  # white letters on blue; the rest is grey

    expected = num_letter_pixels([60, 90, 120, 150])
    assert expected > 40
    assert num_letter_pixels(box) == pytest.approx(expected, rel=0.3)


def test_a_name_is_above_its_box_where_there_is_room_and_shows_the_score_of_a_long_name():
    def first_row(box: list[float]) -> int:
        return int(where(draw_boxes(grey(200, 200), [box], [0], ["pear"]), 0).any(axis=1).nonzero()[0][0])

    assert first_row([60, 90, 120, 150]) < 85
    assert first_row([60, 5, 120, 150]) == 5
    name = "a name that is far too long for the image"
    scores = [draw_boxes(grey(64, 64), [[5, 30, 60, 60]], [0], [name], [score]) for score in (0.9, 0.1, 0.9)]
    assert not np.array_equal(scores[0], scores[1])
    assert np.array_equal(scores[0], scores[2])


def test_the_best_box_is_on_top_and_boxes_that_are_not_finite_are_left_out():
    box = [60.0, 60.0, 140.0, 140.0]
    one = draw_boxes(grey(200, 200), [box], [0], ["a", "b"])
    assert np.array_equal(draw_boxes(grey(200, 200), [box, box], [0, 1], ["a", "a"])[60:140], one[60:140])
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan, 1, 2, 3], box, [1, 1, inf, 4]])
    assert np.array_equal(draw_boxes(grey(200, 200), boxes, torch.tensor([1, 0, 1]), ["a", "b"]), one)


def test_a_crowd_is_dashed():
    plain, crowd = (
        where(draw_boxes(grey(200, 200), [[20, 50, 180, 180]], [0], [""], crowd=[is_crowd]), 0)
        for is_crowd in (False, True)
    )
    assert plain[179, 20:180].all()
    assert 0.4 < crowd[179, 20:180].mean() < 0.7


@pytest.mark.parametrize("name", ["猫", "\udc80", "猫 2", "кошка", "قط", "", "  ", "$x_1$", "$", "Pfläumchen\n2"])
def test_a_name_in_any_script_is_drawn_or_is_the_number_of_its_class_if_the_font_lacks_a_letter(name):
    names = name, name, "class 1"
    drawn = [draw_boxes(grey(100, 200), [[20, 50, 180, 90]], [1], ["other", one], [0.5]) for one in names]
    assert np.array_equal(*drawn[:2])
    assert np.array_equal(drawn[0], drawn[2]) == (name in ("猫", "\udc80", "猫 2"))
    assert where(drawn[0], 1)[:48].sum() > 100


@pytest.mark.parametrize("side", [64, 150, 350, 640])
@pytest.mark.parametrize("name", ["W" * 200, "i" * 200, "a name that is far too long for the image " * 3])
def test_a_long_name_ends_inside_the_image(side, name):
    drawn = draw_boxes(grey(side, side), [[side / 2, side / 2, side - 5, side - 5]], [0], [name], [0.5])
    assert not where(drawn, 0)[:, -1].any()


def test_small_images_stay_sharp_on_a_page():
    image = np.random.default_rng(0).choice([0, 255], (60, 60, 1)).repeat(3, axis=2).astype(np.uint8)
    page = boxes_page([image], [boxes_of([], [], [])], [boxes_of([], [], [])], ["a"])
    assert np.array_equal(page[6:486, 6:486], image.repeat(8, axis=0).repeat(8, axis=1))


def test_images_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"not \(3, 8, 8\)"):
        draw_boxes(np.zeros((3, 8, 8), np.uint8), [], [], [])
    with pytest.raises(ValueError, match="2 boxes came with 1 labels"):
        draw_boxes(grey(8, 8), np.zeros((2, 4)), [0], ["a"])


def boxes_of(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, torch.Tensor]:
    corners = torch.tensor(boxes).reshape(-1, 4)
    return {"boxes": corners, "labels": torch.tensor(labels).long(), "scores": torch.tensor(scores)}


def test_a_page_has_true_boxes_on_the_left_and_those_with_a_high_score_on_the_right():
    box = [100.0, 100.0, 300.0, 200.0]
    found = boxes_of([box, [0.0, 0.0, 50.0, 50.0], box], [1, 2, 3], [0.9, 0.3, 0.29])
    page = boxes_page([grey(240, 480)], [boxes_of([box], [0], [])], [found], ["", "", "", ""], ["a.jpg"], min_score=0.3)
    left, right = page[:, :489], page[:, 489:]
    assert [where(left, label).any() for label in range(4)] == [True, False, False, False]
    assert [where(right, label).any() for label in range(4)] == [False, True, True, False]
    rows, columns = where(left, 0).any(axis=1).nonzero()[0], where(left, 0).any(axis=0).nonzero()[0]
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == [value + 6 for value in box]


def test_a_page_shows_eight_images_of_any_sizes_at_one_size():
    chance = np.random.default_rng(0)
    images = [chance.integers(0, 256, (*chance.integers(20, 200, 2), 3), dtype=np.uint8) for _ in range(10)]
    images[0] = images[0][:1].repeat(700, axis=1)
    empty = boxes_of([], [], [])
    page = boxes_page(images, [empty] * 10, [empty] * 10, ["a"])
    assert np.array_equal(page, boxes_page(images[:8], [empty] * 8, [empty] * 8, ["a"]))
    assert page.dtype == np.uint8
    assert page.shape[1:] == (2 * 486 + 6, 3)
    for numbers in ((0, 0, 0), (10, 10, 9), (10, 9, 10)):
        with pytest.raises(ValueError, match=f"{numbers[2]} detections"):
            boxes_page(images[: numbers[0]], [empty] * numbers[1], [empty] * numbers[2], ["a"])

"""Attention maps, charts over blocks, matrices and patches."""

import math

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vpt.plots import attention
from vpt.plots.attention import Curve, attention_map, attention_page, line_charts

BLUE, RED = "#0a14fa", "#fa140a"


def where(image: np.ndarray, colour: object) -> np.ndarray:
    return np.abs(image - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 2


def test_a_map_covers_the_part_of_the_input_that_shows_the_image():
    image = np.full((24, 64, 3), 100, np.uint8)  # the upper part of an input of 64 x 64
    values = np.zeros((4, 4))
    values[1, 3], values[3, 0] = 3, 1  # above the scale, and in the fill of the letterbox
    drawn = attention_map(image, values, (64, 64))
    dark, bright = (0.4 * 100 + 0.6 * 255 * np.array(matplotlib.colormaps["viridis"](end)[:3]) for end in (0.0, 1.0))
    expected = np.broadcast_to(dark, drawn.shape).copy()
    expected[16:24, 48:] = bright
    assert drawn.shape == image.shape
    assert np.abs(drawn - expected).max() <= 1


def test_a_page_has_the_image_and_its_maps_in_rows():
    image = np.full((64, 64, 3), (0, 200, 0), np.uint8)
    rows = [(f"block {value}", [(np.full((2, 2), value), "$a$\n猫")] * 2) for value in (0.0, 1.0)]
    page, again = (attention_page(image, (64, 64), "a title that is too long " * 9 + "\n2nd", rows) for _ in range(2))
    assert page.shape[1] == 3 * (256 + 6) + 6
    assert (page == (0, 200, 0)).all(axis=-1).sum() == 2 * 256**2
    for value in (0.0, 1.0):
        colour = attention_map(image, np.full((2, 2), value), (64, 64))[0, 0]
        assert (page == colour).all(axis=-1).sum() == 2 * 256**2
    assert np.array_equal(page, again)


def test_a_chart_has_its_points_at_their_blocks_and_gaps_for_values_that_are_not_finite():
    even = Curve("even", {0: 1.0, 2: 1.0}, RED, is_dashed=True)
    low, high = (
        line_charts({"title": [even, Curve("share", {0: value, 1: math.nan, 2: value}, BLUE)]}, num_blocks=3)
        for value in (0.25, 0.5)
    )
    rows, columns = where(high[:330], BLUE).nonzero()
    assert columns.max() - columns.min() > 200
    assert not any(180 < column < 300 for column in columns - columns.min() + 80)
    assert np.median(rows) < np.median(where(low[:330], BLUE).nonzero()[0])
    assert where(low[330:], BLUE).any()  # the legend


@pytest.mark.parametrize("values", [{}, {0: 0.0}, {0: math.nan}])
def test_charts_without_values_or_with_zeros_only_are_drawn(values):
    chart = [Curve("none", values, BLUE, {0: [0.0]})]
    assert line_charts({"one": chart, "two": chart}, 12).shape == (380, 1000, 3)


@pytest.mark.parametrize("num_tokens", [1, 10, 300])
def test_matrices_are_red_where_tokens_are_alike_and_blue_where_they_are_opposite(num_tokens):
    matrices = [np.full((num_tokens, num_tokens), value) for value in (1.0, -1.0, 0.0, 1.0, -1.0)]
    page = attention.similarity_matrices(matrices, [f"block {number}\nmean" for number in range(5)], "title")
    for end, num in ((0.0, 2), (1.0, 2), (0.5, 1)):
        assert where(page, matplotlib.colormaps["RdBu_r"](end)[:3]).sum() >= num * 224**2


def test_a_patch_is_framed_in_the_middle_of_its_surroundings():
    image = np.zeros((28, 32, 3), np.uint8)
    image[8:16, 24:32] = 90
    part = attention.patch_with_surroundings(image, (24, 8, 32, 16))
    assert part.shape == (24, 24, 3)
    assert (part[8:16, 8:16] == 90).all()
    assert [int(part[12, x, 0]) for x in (5, 6, 7)] == [0, 32, 255]
    assert (part[:, 18:] == 255).all()  # outside of the image
    assert (image[8:16, 22] == 0).all()
    assert attention.patch_with_surroundings(image, (0, 24, 8, 32)).shape == (
        24,
        24,
        3,
    )  # with fill

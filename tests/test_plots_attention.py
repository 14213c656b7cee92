"""Maps over pictures, curves over blocks, matrices and patches, as pixels."""

import math

import matplotlib
import numpy as np
import pytest

from vpt.plots.attention import (
    SIGNED,
    VIRIDIS,
    Chart,
    Curve,
    MapRow,
    charts_picture,
    framed_patch,
    maps_page,
    matrices_page,
    over_picture,
    patches_page,
)
from vpt.plots.grid import INK, PAPER, colour_map

BLUE, RED = (10, 20, 250), (250, 20, 10)


def has(picture, colour, tolerance=2):
    return bool((np.abs(picture.astype(int) - colour).max(-1) <= tolerance).any())


@pytest.mark.parametrize(("name", "table"), [("viridis", VIRIDIS), ("RdBu_r", SIGNED)])
def test_the_colour_tables_are_those_of_matplotlib(name, table):
    expected = 255 * matplotlib.colormaps[name](np.linspace(0, 1, 9))[:, :3]
    assert np.abs(colour_map(np.linspace(0, 1, 9), table) - expected).max() < 1


def test_a_map_lies_over_the_part_of_the_input_that_is_picture():
    picture = np.full((32, 64, 3), 100, np.uint8)  # the upper half of an input of 64 x 64
    values = np.zeros((4, 4))
    values[1, 3] = values[3, 0] = 1  # the second of these is fill
    drawn = over_picture(picture, values, (64, 64))
    assert drawn.shape == (112, 224, 3)
    dark, bright = (np.round(0.4 * 100 + 0.6 * VIRIDIS[end]) for end in (0, -1))
    expected = np.broadcast_to(dark, drawn.shape).copy()
    expected[56:, 168:] = bright
    assert np.abs(drawn - expected).max() <= 1


def test_a_large_picture_is_shrunk_and_a_small_one_enlarged_to_one_size():
    for side in (16, 64, 448):
        assert over_picture(np.zeros((side, side, 3), np.uint8), np.eye(4), (side, side)).shape == (224, 224, 3)


def test_a_page_of_maps_has_the_picture_and_a_map_in_each_place():
    picture = np.full((64, 64, 3), (0, 200, 0), np.uint8)
    rows = [
        MapRow("block 0", [np.ones((2, 2))] * 2, ["a", "b"]),
        MapRow("block 11", [np.zeros((2, 2))] * 2, ["c", "d"]),
    ]
    page = maps_page(
        picture,
        (64, 64),
        ["a name that is far too long for the page " * 3, "Ünïcödé"],
        ["one", "two"],
        rows,
        [((0, 0, 32, 32), RED)],
    )
    is_picture = (page == (0, 200, 0)).all(-1)
    is_frame = (page == RED).all(-1)
    assert is_picture.sum() + is_frame.sum() == 224 * 224
    assert is_frame.sum() == 112**2 - 108**2
    grey = 0.587 * 200
    for row, end in ((0, -1), (1, 0)):
        colour = 0.4 * grey + 0.6 * VIRIDIS[end]
        assert (np.abs(page - colour).max(-1) <= 2).sum() >= 2 * 224 * 224, row
    assert (page[:, -1] == PAPER).all()


def test_a_chart_draws_a_curve_at_its_height_and_leaves_out_what_is_not_a_number():
    curve = Curve("share", {0: 0.5, 1: math.nan, 2: 0.5}, BLUE)
    page = charts_picture([Chart("title", [Curve("even", {0: 1.0, 2: 1.0}, RED, is_dashed=True), curve], 3)])
    plot = page[41:299, 65:483].astype(int)
    points = np.argwhere(np.abs(plot - BLUE).max(-1) <= 2)
    middles = sorted({round(float(x)) for x in points[:, 1]})
    assert all(abs(x - 70) <= 5 or abs(x - 350) <= 5 for x in middles)  # of three blocks the first and the last
    assert np.median(points[:, 0]) == pytest.approx(260 * (1 - 0.5 / 1.2), abs=3)  # the scale ends at 1.2


def test_charts_without_values_or_with_zeros_only_are_drawn():
    for values in ({}, {0: 0.0}, {0: math.nan}):
        assert charts_picture([Chart("empty", [Curve("none", values, BLUE)], 12, is_share=True)]).ndim == 3


@pytest.mark.parametrize("num_tokens", [1, 10, 300])
def test_matrices_are_red_where_tokens_are_alike_and_blue_where_they_are_opposite(num_tokens):
    matrices = [np.full((num_tokens, num_tokens), value) for value in (1.0, -1.0, 0.0, 1.0, -1.0)]
    page = matrices_page(matrices, [f"block {number}\nmean" for number in range(5)])
    assert page.shape[1] == 4 * 244 + 20
    for end, num in ((0, 2), (-1, 2), (4, 1)):
        assert (np.abs(page - SIGNED[end]).max(-1) <= 1).sum() >= num * 224 * 224


def test_a_patch_is_framed_in_the_middle_of_what_is_around_it():
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[8:16, 24:32] = BLUE
    drawn = framed_patch(picture, (24, 8, 32, 16))
    assert drawn.shape == (72, 72, 3)
    assert tuple(drawn[36, 36]) == BLUE
    assert tuple(drawn[36, 68]) == PAPER  # outside of the picture
    assert tuple(drawn[22, 36]) == INK
    assert tuple(drawn[23, 36]) == (255, 255, 255)
    assert tuple(drawn[36, 5]) == (0, 0, 0)


def test_a_page_of_patches_has_a_row_for_each_token():
    patch = np.full((72, 72, 3), BLUE, np.uint8)
    page = patches_page(["title", "line"], [(f"token {token}", [(patch, "00: 0.5")] * 8) for token in range(3)])
    assert (page == BLUE).all(-1).sum() == 3 * 8 * 72 * 72
    assert has(page, INK)

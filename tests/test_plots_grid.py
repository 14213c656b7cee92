"""Image grids, confusion matrices and precision-recall curves."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vpt.plots.boxes import class_colour
from vpt.plots.figure import INK, fit, legible_names, one_line, text_width
from vpt.plots.grid import RIGHT, WRONG, image_grid
from vpt.plots.metrics import confusion_matrix, precision_recall_curves

NAMES = ["猫", "кошка", "قط", "\udc80", "$x_1$", "$", "_hidden", "", "Äpfel\n2", "too long a name for its place"]


def random_images(num: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def has_colour(image: np.ndarray, colour: str) -> bool:
    return bool((np.abs(image - 255 * np.array(to_rgb(colour))).max(axis=-1) < 50).any())


@pytest.mark.parametrize(("width", "scale"), [(200, 1), (101, 2), (64, 2), (7, 19)])
def test_images_are_in_reading_order_with_their_pixels_enlarged_by_an_integer(width, scale):
    images = random_images(5, 50, width)
    grid = image_grid(images, columns=3)
    assert grid.dtype == np.uint8
    height, width = 50 * scale, width * scale
    assert grid.shape == (2 * (height + 6) + 6, 3 * (width + 6) + 6, 3)
    for i, image in enumerate(images):
        y, x = 6 + i // 3 * (height + 6), 6 + i % 3 * (width + 6)
        assert np.array_equal(grid[y : y + height, x : x + width], image.repeat(scale, axis=0).repeat(scale, axis=1))
    assert image_grid(images[:2], columns=8).shape[1] == 2 * (width + 6) + 6


@pytest.mark.parametrize("caption", ["W" * 200, "i" * 200, "猫" * 200, "a name that is far too long for its image"])
def test_a_long_caption_ends_inside_its_tile(caption):
    white = np.full((2, 128, 128, 3), 255, np.uint8)
    grid = image_grid(white, [caption, ""])
    assert (grid[:, :134] < 128).any()
    assert (grid[:, 137:] == 255).all()


def test_captions_are_below_in_their_colours_and_a_title_above():
    black = np.zeros((2, 128, 128, 3), np.uint8)
    plain, captioned = image_grid(black), image_grid(black, ["pear", "plum\n0.9"], colours=[RIGHT, WRONG])
    assert captioned.shape[0] > plain.shape[0]
    left, right = captioned[134:, :137], captioned[134:, 137:]
    assert has_colour(left, RIGHT)
    assert not has_colour(left, WRONG)
    assert has_colour(right[:18], WRONG)
    assert has_colour(right[18:], WRONG)
    assert has_colour(image_grid(black, ["pear", "plum"]), INK)
    titled = image_grid(black, title="first\nsecond")
    assert np.array_equal(titled[38:], plain)
    assert (titled[:16] < 128).any()
    assert (titled[16:36] < 128).any()


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), {}, r"\(2, 3, 8, 8\)"),
        (np.zeros((2, 8, 8, 3)), {}, "float64"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "B > 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"captions": ["one"]}, "1 captions"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"colours": [RIGHT]}, "1 colours"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"columns": 0}, "columns=0"),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused(images, settings, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **settings)


def test_names_in_any_script_are_drawn_and_every_figure_is_the_same_when_drawn_again_also_in_threads():
    K = len(NAMES)
    curves = np.linspace(0.1, 0.9, K)[:, None].repeat(101, axis=1)

    def draw(_: int) -> list[np.ndarray]:
        return [
            image_grid(random_images(K, 64, 64), NAMES, title=NAMES[4]),
            confusion_matrix(np.eye(K, dtype=np.int64), NAMES),
            precision_recall_curves(curves, NAMES),
        ]

    first = draw(0)
    with ThreadPoolExecutor(4) as threads:
        for figures in threads.map(draw, range(4)):
            assert all(np.array_equal(one, other) for one, other in zip(first, figures, strict=True))


@pytest.mark.parametrize("num_classes", [1, 2, 10, 21, 87, 88, 1000, 3000])
def test_a_confusion_matrix_of_any_size_has_a_reasonable_size(num_classes):
    names = [f"a long name of class {i}" for i in range(num_classes)]
    figure = confusion_matrix(np.eye(num_classes, dtype=np.int64), names)
    assert figure.dtype == np.uint8
    assert 128 < min(figure.shape[:2]) <= max(figure.shape[:2]) <= 1250


def test_consecutive_classes_share_a_cell_so_that_a_figure_of_many_takes_little_memory():
    counts = np.random.default_rng(0).integers(0, 9, (2000, 2000))
    grouped = counts.reshape(400, 5, 400, 5).sum((1, 3))
    figure = confusion_matrix(counts, [f"class {i}" for i in range(2000)])
    assert np.array_equal(figure, confusion_matrix(grouped, [""] * 400, 5))
    assert not np.array_equal(figure, confusion_matrix(grouped, [""] * 400))  # the axes say that cells are shared


@pytest.mark.parametrize("letter", ["W", "i", " i", "é"])
def test_the_longest_text_that_fits_is_found_in_a_text_of_any_length(letter):
    for width in (5, 60):
        plain = (one_line(letter * 40, num) for num in range(40, 1, -1))
        expected = next((line for line in plain if text_width(line, 12) <= width), one_line(letter * 40, 1))
        assert fit(letter * 40, width, 12) == expected
    start = time.monotonic()
    fit(letter * 1_000_000, 60, 12)
    legible_names([letter * 1_000_000] * 100)
    assert time.monotonic() - start < 1


def test_cells_are_darker_with_their_share_of_the_row_and_rows_are_targets():
    counts = np.zeros((30, 30), np.int64)
    counts[0, :2], counts[1, 0] = (90, 10), 1
    figure = confusion_matrix(counts, [""] * 30).astype(int).sum(axis=-1)
    is_frame = figure < 3 * 120
    top, left = (min(np.flatnonzero(is_frame.sum(axis=axis) > 800)) for axis in (1, 0))
    cells = figure[top + 10 :: 32, left + 10 :: 32]
    assert cells[1, 0] < cells[0, 0] < cells[0, 1] < cells[0, 2]
    assert cells[1, 1] == cells[5, 5] == cells[0, 2]


def test_counts_are_written_up_to_twenty_classes_and_names_where_they_are_legible():
    def draw(num_classes: int, count: int, name: str) -> np.ndarray:
        return confusion_matrix(np.eye(num_classes, dtype=np.int64) * count, [name] * num_classes)

    assert not np.array_equal(draw(20, 8, ""), draw(20, 9, ""))
    assert np.array_equal(draw(21, 8, ""), draw(21, 9, ""))
    assert draw(81, 8, "a name").shape > draw(81, 8, "").shape  # COCO and its background
    assert np.array_equal(draw(100, 8, "a name"), draw(100, 8, ""))


def columns_of(figure: np.ndarray, colour: str) -> set[int]:
    return set((np.abs(figure - 255 * np.array(to_rgb(colour))).max(axis=-1) < 3).any(axis=0).nonzero()[0].tolist())


def test_curves_of_classes_with_boxes_and_their_mean_are_drawn_to_where_they_meet_zero():
    curves = np.full((3, 101), np.nan)
    curves[1] = np.where(np.arange(101) <= 50, 0.7, 0.0)
    curves[2] = 0.3
    figure = precision_recall_curves(curves, ["absent", "short", "long"])
    legend = 650  # pixels from the left
    absent, short, long, mean = (columns_of(figure, colour) for colour in (*map(class_colour, range(3)), INK))
    assert not absent
    assert max(short) > legend
    short, long, mean = ({x for x in columns if x < legend} for columns in (short, long, mean))
    assert max(long) - min(long) > 450
    assert max(short) - min(short) < 0.6 * (max(long) - min(long))
    assert mean


def test_of_more_than_ten_classes_the_best_and_the_worst_five_have_colours():
    curves = np.repeat(np.linspace(0.9, 0.1, 12)[:, None], 101, axis=1)
    figure = precision_recall_curves(curves, [f"class {i}" for i in range(12)])
    assert [bool(columns_of(figure, class_colour(i))) for i in range(12)] == [i not in (5, 6) for i in range(12)]


def test_curves_without_boxes_are_an_empty_plot():
    figure = precision_recall_curves(np.full((3, 101), np.nan), ["a", "b", "c"])
    assert not any(columns_of(figure, class_colour(label)) for label in range(3))


def test_values_that_do_not_fit_their_classes_are_refused():
    with pytest.raises(ValueError, match=r"3 classes is \(3, 3\), not \(2, 2\)"):
        confusion_matrix(np.eye(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"\(3, R\), not \(2, 101\)"):
        precision_recall_curves(np.zeros((2, 101)), ["a", "b", "c"])

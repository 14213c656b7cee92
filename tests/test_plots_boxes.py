import itertools

import numpy as np
import pytest
import torch

from vpt.plots import boxes as box_pictures
from vpt.plots.boxes import class_colour, draw_boxes, precision_recall_picture, truth_and_found_page
from vpt.plots.grid import INK, PAPER

Colour = tuple[int, int, int]
GREY = 128

# What is left of linear RGB without one kind of cones (Machado et al., 2009, severity 1); each row sums to 1.
SIGHT = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def where(picture: np.ndarray, colour: Colour) -> np.ndarray:
    return (picture == colour).all(axis=-1)


def limits(mask: np.ndarray) -> list[int]:
    """The first and the last row and column of what is True."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return [int(value) for value in (columns[0], rows[0], columns[-1], rows[-1])]


def cielab(colour: Colour, sight: str) -> np.ndarray:
    shares = np.array(colour) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    x, y, z = np.cbrt(np.array(TO_XYZ) @ seen / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def least_distance(num: int, sight: str) -> float:
    colours = [cielab(class_colour(label), sight) for label in range(num)]
    return min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(colours, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_the_first_eight_colours_differ_for_every_kind_of_sight(sight):
    assert least_distance(8, sight) > 15


def test_the_colours_of_eighty_classes_differ_and_no_two_of_five_hundred_are_the_same():
    assert least_distance(80, "all") > 8
    assert len({class_colour(label) for label in range(500)}) == 500


@pytest.mark.parametrize("side", [64, 300, 640, 4000])
def test_lines_lie_on_the_borders_of_the_box_and_grow_with_the_picture(side):
    box = np.array([0.25, 0.5, 0.75, 0.9]) * side
    drawn = draw_boxes(grey(side, side), [box.tolist()], [0], ["x"])
    line = where(drawn, class_colour(0))
    x1, y1, x2, y2 = box.round().astype(int)
    middle = (y1 + y2) // 2
    width = int(line[middle, x1 : (x1 + x2) // 2].sum())
    assert abs(width - max(1, 0.004 * side)) <= 0.5
    assert line[middle, x1 : x1 + width].all()
    assert line[middle, x2 - width : x2].all()
    assert line[y2 - width : y2, (x1 + x2) // 2].all()
    assert (drawn[middle, (x1 + x2) // 2] == GREY).all()
    border = width // 3
    assert (drawn[middle, x1 - border - 1] == GREY).all()
    assert (drawn[middle, x1 - border : x1] == PAPER).all()


def test_the_given_picture_stays_as_it_is_and_no_boxes_change_nothing():
    picture = grey(64, 80)
    picture.setflags(write=False)
    for boxes in ([], np.zeros((0, 4), np.float32), torch.zeros(0, 4)):
        assert np.array_equal(draw_boxes(picture, boxes, [], ["pear"], scores=[]), picture)
    draw_boxes(picture, [[1, 1, 40, 40]], [0], ["pear"])
    assert (picture == GREY).all()


@pytest.mark.parametrize(
    "box",
    [
        pytest.param([0, 0, 200, 200], id="all of the picture"),
        pytest.param([50, 0, 90, 40], id="top"),
        pytest.param([180, 60, 200, 90], id="right"),
        pytest.param([0, 180, 30, 200], id="lower left"),
        pytest.param([-30, -20, 260, 300], id="larger than the picture"),
        pytest.param([300, 300, 400, 400], id="outside"),
        pytest.param([90, 20, 90.2, 20.1], id="less than a pixel"),
        pytest.param([90, 90, 60, 60], id="swapped"),
    ],
)
def test_a_name_can_be_read_wherever_its_box_lies(box):
    def letters(position: list[float]) -> np.ndarray:
        drawn = draw_boxes(grey(200, 200), [position], [0], ["pear"], [0.5])
        return drawn[drawn.min(axis=-1) > 160]  # white letters on blue; the rest is grey

    expected = letters([60, 90, 120, 150])
    assert len(expected) > 40
    assert np.array_equal(letters(box), expected)


def test_a_name_stands_above_its_box_where_there_is_room():
    drawn = where(draw_boxes(grey(200, 200), [[60, 90, 120, 150]], [0], ["pear"]), class_colour(0))
    assert limits(drawn)[0] == 60
    assert limits(drawn)[1] < 85
    at_top = where(draw_boxes(grey(200, 200), [[60, 5, 120, 150]], [0], ["pear"]), class_colour(0))
    assert limits(at_top) == [60, 5, 119, 149]


def test_a_score_is_kept_where_a_long_name_is_shortened():
    def drawn(name: str, score: float) -> np.ndarray:
        return draw_boxes(grey(64, 64), [[5, 30, 60, 60]], [0], [name], [score])

    assert not np.array_equal(drawn("a name that is too long", 0.9), drawn("a name that is too long", 0.1))
    assert np.array_equal(drawn("a name that is too long", 0.9), drawn("a name that is too long for it", 0.9))


def test_names_do_not_cover_those_of_better_boxes():
    box = [60.0, 60.0, 140.0, 140.0]
    one = draw_boxes(grey(200, 200), [box], [0], ["a"])
    many = draw_boxes(grey(200, 200), [box] * 30, [0] + [1] * 29, ["a", "b"])
    name = (one != GREY).any(axis=-1)[:60]
    assert name.sum() > 50
    assert np.array_equal(many[:60][name], one[:60][name])
    assert where(many, class_colour(1)).any()


def test_a_crowd_is_dashed_and_says_so():
    plain, crowd = (
        draw_boxes(grey(200, 200), [[20, 50, 180, 180]], [0], ["pear"], crowd=[is_crowd]) for is_crowd in (False, True)
    )
    lower = [where(picture, class_colour(0))[179, 20:180] for picture in (plain, crowd)]
    assert lower[0].all()
    assert 0.4 < lower[1].mean() < 0.7
    assert where(crowd, class_colour(0))[:45].sum() > where(plain, class_colour(0))[:45].sum()


def test_a_name_that_the_font_cannot_write_becomes_the_number_of_its_class():
    def drawn(name: str) -> np.ndarray:
        return draw_boxes(grey(100, 200), [[20, 50, 180, 90]], [1], ["other", name])

    for name in ("猫", "кошка", "قط", "\udc80", "", "  "):
        assert np.array_equal(drawn(name), drawn("class 1"))
    assert np.array_equal(drawn("Pfläumchen\n2"), drawn("Pflaumchen 2"))


def test_boxes_that_are_not_finite_are_left_out():
    boxes = torch.tensor([[float("nan"), 1, 2, 3], [10, 30, 60, 60], [1, 1, float("inf"), 4]])
    some = draw_boxes(grey(64, 80), boxes, torch.tensor([0, 1, 0]), ["a", "b"])
    assert np.array_equal(some, draw_boxes(grey(64, 80), boxes[1:2], [1], ["a", "b"]))


def test_pictures_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, not \(3, 8, 8\)"):
        draw_boxes(np.zeros((3, 8, 8), np.uint8), [], [], [])
    with pytest.raises(ValueError, match="2 boxes came with 1 labels, 1 scores, 1 crowds"):
        draw_boxes(grey(8, 8), np.zeros((2, 4)), [0], ["a"])


def found_in(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, torch.Tensor]:
    shape = torch.tensor(boxes).reshape(-1, 4)
    return {"boxes": shape, "labels": torch.tensor(labels).long(), "scores": torch.tensor(scores)}


def test_a_page_has_truth_at_the_left_and_what_scores_enough_at_the_right():
    box = [100.0, 100.0, 300.0, 200.0]
    target = {"boxes": torch.tensor([box]), "labels": torch.tensor([0])}
    found = found_in([box, box, box], [1, 2, 3], [0.9, 0.3, 0.29])
    page = truth_and_found_page([grey(240, 480)], [target], [found], ["a", "b", "c", "d"], ["a.jpg"], min_score=0.3)
    left, right = page[:, :488], page[:, 488:]
    assert [where(left, class_colour(label)).any() for label in range(4)] == [True, False, False, False]
    assert [where(right, class_colour(label)).any() for label in range(4)] == [False, True, True, False]
    assert where(page[:30], INK).any()


@pytest.mark.parametrize(("height", "width", "scale"), [(960, 1920, 0.25), (100, 120, 4), (480, 300, 1)])
def test_boxes_of_a_page_go_along_with_the_size_of_their_picture(height, width, scale):
    box = [20.0, 40.0, 100.0, 80.0]
    target = {"boxes": torch.tensor([box]), "labels": torch.tensor([0])}
    page = truth_and_found_page([grey(height, width)], [target], [found_in([], [], [])], [" a"])
    tile = page[30:, 8 : 8 + round(width * scale)]
    assert (tile[: round(height * scale), -1] == GREY).all()
    x1, _, x2, y2 = limits(where(tile, class_colour(0)))
    assert [x1, x2 + 1, y2 + 1] == pytest.approx([value * scale for value in (box[0], box[2], box[3])], abs=8)


def test_a_page_shows_eight_pictures_of_any_sizes_and_their_boxes_may_be_missing():
    chance = np.random.default_rng(0)
    pictures = [chance.integers(0, 256, (*chance.integers(20, 200, 2), 3), dtype=np.uint8) for _ in range(10)]
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "crowd": torch.zeros(0).bool()}
    nothing = found_in([], [], [])
    page = truth_and_found_page(pictures, [target] * 10, [nothing] * 10, ["a"])
    assert np.array_equal(page, truth_and_found_page(pictures[:8], [target] * 8, [nothing] * 8, ["a"]))
    assert page.dtype == np.uint8
    assert page.shape[1:] == (984, 3)
    with pytest.raises(ValueError, match="0 pictures came with 0 targets"):
        truth_and_found_page([], [], [], ["a"])
    with pytest.raises(ValueError, match="10 pictures came with 10 targets, 9 detections and 10 captions"):
        truth_and_found_page(pictures, [target] * 10, [nothing] * 9, ["a"])


PLOT_LEFT, PLOT_TOP, PLOT = 64, 16, 480


def at(picture: np.ndarray, recall: float, precision: float) -> np.ndarray:
    return picture[round(PLOT_TOP + (1 - precision) * PLOT), round(PLOT_LEFT + recall * PLOT)]


def test_a_curve_lies_at_its_precision_and_ends_where_it_meets_zero():
    curves = np.full((2, 101), np.nan)
    curves[1] = np.where(np.arange(101) <= 50, 0.7, 0.0)
    picture = precision_recall_picture(curves, ["absent", "pear"])
    for recall in (0.05, 0.3, 0.49):
        assert tuple(at(picture, recall, 0.7)) == INK  # the mean of one class lies on it
    assert tuple(at(picture, 0.65, 0.7)) == PAPER
    assert tuple(at(picture, 0.65, 0.01)) == PAPER
    assert not where(picture, class_colour(0)).any()
    assert where(picture[:, PLOT_LEFT + PLOT :], class_colour(1)).any()


def test_the_mean_is_that_of_the_classes_with_boxes():
    curves = np.stack([np.full(101, 0.9), np.full(101, 0.3), np.full(101, np.nan)])
    picture = precision_recall_picture(curves, ["a", "b", "c"])
    assert tuple(at(picture, 0.5, 0.9)) == class_colour(0)
    assert tuple(at(picture, 0.5, 0.3)) == class_colour(1)
    assert tuple(at(picture, 0.5, 0.6)) == INK


def test_of_many_classes_the_best_and_the_worst_are_named_and_the_others_grey():
    curves = np.repeat(np.arange(46, 0, -4)[:, None] / 48, 101, axis=1)  # whole pixels
    picture = precision_recall_picture(curves, [f"class {i}" for i in range(12)])
    for label in range(12):
        line = at(picture, 0.3, curves[label, 0])
        if label in (5, 6):
            assert line.max() - line.min() < 10
            assert line.max() < 240
        else:
            assert tuple(line) == class_colour(label)
    few = precision_recall_picture(curves[:10], [f"class {i}" for i in range(10)])
    assert tuple(at(few, 0.3, curves[5, 0])) == class_colour(5)


def test_curves_without_any_class_that_has_boxes_are_an_empty_plot():
    picture = precision_recall_picture(np.full((3, 101), np.nan), ["a", "b", "c"])
    assert picture.dtype == np.uint8
    plot = picture[PLOT_TOP : PLOT_TOP + PLOT, PLOT_LEFT : PLOT_LEFT + PLOT]
    assert plot.min() >= min(box_pictures._GRID)


def test_curves_that_do_not_fit_their_classes_are_refused():
    with pytest.raises(ValueError, match=r"Curves of 3 classes are \(3, R\), not \(2, 101\)"):
        precision_recall_picture(np.zeros((2, 101)), ["a", "b", "c"])

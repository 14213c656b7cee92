import numpy as np
import pytest
from PIL import ImageFont

from vpt.plots import grid as pictures
from vpt.plots.grid import INK, RIGHT, WRONG, confusion_picture, picture_grid, shortened


def random_pictures(num: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_tiles_stand_in_reading_order_with_their_pixels_unchanged():
    tiles = random_pictures(5, 150, 200)
    grid = picture_grid(tiles, columns=3)
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * 156 + 6, 3 * 206 + 6, 3)
    for i, tile in enumerate(tiles):
        y, x = 6 + i // 3 * 156, 6 + i % 3 * 206
        assert np.array_equal(grid[y : y + 150, x : x + 200], tile)


def test_small_pictures_are_enlarged_by_an_integer_and_stay_sharp():
    (tile,) = tiles = random_pictures(1, 64, 64)
    grid = picture_grid(tiles)
    assert np.array_equal(grid[6:134, 6:134], tile.repeat(2, axis=0).repeat(2, axis=1))


def test_a_row_is_not_wider_than_its_pictures():
    assert picture_grid(random_pictures(2, 128, 128), columns=8).shape[1] == 2 * 134 + 6


def test_captions_are_drawn_below_in_their_colours():
    black = np.zeros((2, 128, 128, 3), np.uint8)
    plain, captioned = picture_grid(black), picture_grid(black, ["pear", "plum"], colours=[RIGHT, WRONG])
    assert captioned.shape[0] > plain.shape[0]
    left, right = captioned[134:, :137], captioned[134:, 137:]
    assert has_colour(left, RIGHT)
    assert has_colour(right, WRONG)
    assert not has_colour(left, WRONG)
    assert has_colour(picture_grid(black, ["pear", "plum"]), INK)


def test_a_long_caption_is_shortened_to_its_tile():
    black = np.zeros((2, 128, 128, 3), np.uint8)
    caption = picture_grid(black, ["a name that is far too long for its tile", ""])[134:]
    assert (caption[:, :134] < 255).any()
    assert (caption[:, 140:] == 255).all()


def test_a_caption_of_two_lines_makes_room_for_both():
    one, two = (picture_grid(random_pictures(1, 128, 128), [caption]) for caption in ("pear", "pear\nplum 0.9"))
    assert two.shape[0] == one.shape[0] + 16
    assert (two[one.shape[0] - 6 :] < 128).any()


def test_letters_with_accents_are_written_without_them():
    grid = random_pictures(1, 128, 128)
    assert np.array_equal(picture_grid(grid, ["Äpfel é"]), picture_grid(grid, ["Apfel e"]))


def test_a_text_is_one_line_without_accents_and_not_wider_than_asked():
    font = ImageFont.load_default(size=13)
    assert shortened("  Äpfel \n\t é ", font, 200) == "Apfel e"
    for text in ("a very long name of a class", "\udc80", "кошка 猫", ""):
        assert font.getlength(shortened(text, font, 60)) <= 60


@pytest.mark.parametrize(
    ("tiles", "settings", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), {}, r"\(B, H, W, 3\) uint8"),
        (np.zeros((2, 8, 8, 3)), {}, r"not \(2, 8, 8, 3\) float64"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "B > 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"captions": ["one"]}, "2 pictures came with 1 captions"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"colours": [RIGHT]}, "2 pictures came with 1 colours"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"columns": 0}, "columns=0: must be at least 1"),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused(tiles, settings, message):
    with pytest.raises(ValueError, match=message):
        picture_grid(tiles, **settings)


@pytest.mark.parametrize("num_classes", [2, 10, 20, 21, 75, 76, 81, 200, 1000])
def test_a_confusion_of_any_size_stays_a_reasonable_picture(num_classes):
    picture = confusion_picture(np.eye(num_classes, dtype=np.int64), [f"class {i}" for i in range(num_classes)])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert 128 < min(picture.shape[:2]) <= max(picture.shape[:2]) <= 1200


def test_cells_get_darker_with_their_share_of_the_row(monkeypatch):
    monkeypatch.setattr(pictures, "_MAX_COUNTED", 0)
    counts = np.array([[90, 10, 0], [0, 1, 0], [0, 0, 0]])
    picture = confusion_picture(counts, ["", "", ""]).astype(int)
    cells = picture[12 : 12 + 192, 36 : 36 + 192].reshape(3, 64, 3, 64, 3)[:, 32, :, 32].sum(axis=-1)
    assert cells[1, 1] < cells[0, 0] < cells[0, 1] < cells[0, 2]
    assert cells[0, 2] == cells[2].max() == cells[2].min() == 3 * 255


def test_rows_are_targets(monkeypatch):
    monkeypatch.setattr(pictures, "_MAX_COUNTED", 0)
    picture = confusion_picture(np.array([[0, 7], [0, 0]]), ["", ""])
    assert not has_colour(picture[12:76, 36:100], (8, 48, 107))
    assert has_colour(picture[12:76, 100:164], (8, 48, 107))
    assert not has_colour(picture[76:140, 36:164], (8, 48, 107))


def test_counts_are_written_up_to_twenty_classes(monkeypatch):
    def drawn(num_classes: int) -> np.ndarray:
        return confusion_picture(np.eye(num_classes, dtype=np.int64) * 8, [""] * num_classes)

    counted = [drawn(20), drawn(21)]
    monkeypatch.setattr(pictures, "_MAX_COUNTED", 0)
    assert not np.array_equal(counted[0], drawn(20))
    assert np.array_equal(counted[1], drawn(21))


def test_names_are_dropped_where_they_would_not_be_legible():
    def widths(num_classes: int) -> tuple[int, int]:
        counts = np.eye(num_classes, dtype=np.int64)
        return tuple(confusion_picture(counts, [name] * num_classes).shape[1] for name in ("", "a long name"))

    assert widths(75)[0] < widths(75)[1]
    assert widths(81)[0] < widths(81)[1]  # COCO and its background
    assert widths(100)[0] == widths(100)[1]


def test_a_matrix_that_does_not_fit_its_classes_is_refused():
    with pytest.raises(ValueError, match=r"3 classes is \(3, 3\), not \(2, 2\)"):
        confusion_picture(np.eye(2), ["a", "b", "c"])

"""Masks as files hold them, and as label maps."""

import numpy as np
import pytest
from PIL import Image

from vpt.data.images import ImageError, read_image
from vpt.data.masks import IGNORE, UNKNOWN, MaskValues, fit_to_image, read_mask

INDICES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3


def palette_image(values):
    image = Image.fromarray(values)
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, *[255] * 759])
    return image


@pytest.mark.parametrize(
    "image",
    [
        palette_image(INDICES),
        Image.fromarray(INDICES),
        Image.fromarray(INDICES.astype(np.uint16)),
        Image.fromarray(INDICES.astype(np.int32)),
        Image.fromarray(np.stack([INDICES] * 3, axis=-1)),
        Image.fromarray(np.stack([INDICES, np.full_like(INDICES, 255)], axis=-1), "LA"),
        Image.fromarray(np.stack([*[INDICES] * 3, np.full_like(INDICES, 255)], axis=-1)),
    ],
    ids=["P", "L", "I;16", "I", "RGB of greys", "LA", "RGBA of greys"],
)
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_indices_are_read_unchanged_from_every_mode(tmp_path, image, ending):
    if image.mode == "I" and ending == ".png":
        pytest.skip("Pillow writes no PNG of 32 bits")
    image.save(tmp_path / f"mask{ending}")
    values, orientation = read_mask(tmp_path / f"mask{ending}")
    assert (values.tolist(), orientation) == (INDICES.tolist(), 1)


def test_values_above_255_are_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 300, 65535]], np.uint16)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png")[0].tolist() == [[0, 300, 65535]]


def test_colours_are_one_number_each_also_from_a_palette(tmp_path):
    Image.new("RGB", (2, 1), (1, 2, 3)).save(tmp_path / "rgb.png")
    assert read_mask(tmp_path / "rgb.png")[0].tolist() == [[0x010203] * 2]
    palette_image(INDICES).save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png", has_colours=True)[0][0].tolist() == [
        0xC80A0A,
        0x0AC80A,
        0x0A0AC8,
        0xC80A0A,
    ]


def test_jpeg_is_read_for_two_values_only(tmp_path):
    two = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((8, 8), np.uint8))
    Image.fromarray(two).save(tmp_path / "two.jpg", quality=90)
    assert (read_mask(tmp_path / "two.jpg")[0] == two).all()
    Image.fromarray(two // 2).save(tmp_path / "grey.jpg")
    with pytest.raises(ImageError, match="JPEG"):
        read_mask(tmp_path / "grey.jpg")


def test_floating_point_and_broken_masks_are_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "mask.tif")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name in ("mask.tif", "broken.png"):
        with pytest.raises(ImageError, match=name):
            read_mask(tmp_path / name)


def test_a_mask_is_turned_as_its_stored_image_and_resized_by_one_factor():
    values = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    turned = fit_to_image(values, 1, image=(3, 2), stored=(2, 3), turn=6)
    assert turned.tolist() == np.rot90(values, -1).tolist()
    assert fit_to_image(values, 3, image=(2, 3), stored=(2, 3), turn=1).tolist() == values[::-1, ::-1].tolist()
    assert fit_to_image(values, 1, (4, 6), (4, 6), 1).tolist() == values.repeat(2, axis=0).repeat(2, axis=1).tolist()
    with pytest.raises(ValueError, match="3 x 2"):
        fit_to_image(values, 1, image=(8, 4), stored=(8, 4), turn=1)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_with_an_orientation_of_its_own_is_turned_once(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(tmp_path / f"a.{ending}", exif=exif)
    expected = np.asarray(read_image(tmp_path / f"a.{ending}"))[..., 0]
    values, turn = read_mask(tmp_path / f"a.{ending}")
    upright = fit_to_image(values, turn, image=expected.shape, stored=expected.shape, turn=1)
    assert np.array_equal(upright, expected)


def test_values_become_labels_and_unknown_ones_stay_known_as_such():
    mapping = MaskValues({7: 0, 8: 1, 255: IGNORE})
    assert mapping.to_labels(np.array([[7, 8, 255, 9, 0]], np.int32)).tolist() == [[0, 1, IGNORE, UNKNOWN, UNKNOWN]]
    assert MaskValues({0: 0, 1: 1}, merges=True).to_labels(np.array([[0, 1, 700]], np.int32)).tolist() == [[0, 1, 1]]

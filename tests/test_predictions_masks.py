"""Label maps at the size of the image."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.predictions import masks
from vpt.predictions.masks import to_label_map

INPUT = Preprocessing(size=(32, 64), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("size", [(32, 64), (16, 32), (64, 128)])
def test_it_equals_bilinear_enlargement_where_the_image_fills_the_input(size):
    logits = torch.randn(3, 4, 8)
    labels, probabilities = to_label_map(logits, size, INPUT)
    expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    assert (labels == expected.argmax(dim=0)).float().mean() > 0.999
    torch.testing.assert_close(probabilities, expected.softmax(dim=0).amax(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(13, 29), (37, 37), (64, 31), (101, 97), (5, 200)])
def test_each_pixel_is_interpolated_at_its_own_centre(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 8, generator=generator)
    inner = letterboxed_size(size, INPUT)
    labels, _ = to_label_map(logits, size, INPUT)
    rows, columns = (
        np.clip((np.arange(side) + 0.5) * part / side / stride - 0.5, 0, cells - 1)
        for side, part, stride, cells in zip(size, inner, (8, 8), (4, 8), strict=True)
    )
    difference = (logits[1] - logits[0]).numpy()
    wrong = 0
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            top, left = min(int(row), 2), min(int(column), 6)
            down, right = row - top, column - left
            square = difference[top : top + 2, left : left + 2]
            value = np.array([1 - down, down]) @ square @ np.array([1 - right, right])
            wrong += abs(value) > 1e-4 and (value > 0) != bool(labels[y, x])
    assert wrong == 0


def test_logits_of_several_images_are_refused():
    with pytest.raises(ValueError, match="logits"):
        to_label_map(torch.zeros(2, 3, 4, 8), (5, 5), INPUT)


def test_strips_change_nothing(monkeypatch):
    logits = torch.randn(5, 4, 8)
    whole = to_label_map(logits, (50, 70), INPUT)
    monkeypatch.setattr(masks, "MAX_NUMBERS", 5 * 70 * 3)
    for one, other in zip(whole, to_label_map(logits, (50, 70), INPUT), strict=True):
        torch.testing.assert_close(one, other)

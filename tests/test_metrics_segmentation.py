"""Metrics of masks, against a slow loop over pixels."""

import numpy as np
import pytest

from vpt.engine.metrics.segmentation import SegmentationMetrics, confusion_of


def slow_iou(truth, found, num_classes):
    values = []
    for label in range(num_classes):
        pairs = [(t, f) for t, f in zip(truth.ravel(), found.ravel(), strict=True) if t >= 0]
        both = sum(t == label and f == label for t, f in pairs)
        either = sum(t == label or f == label for t, f in pairs)
        values.append(both / either if either else np.nan)
    return values


@pytest.mark.parametrize("seed", range(20))
def test_values_equal_a_loop_over_pixels(seed):
    generator = np.random.default_rng(seed)
    num_classes = int(generator.integers(2, 6))
    truth = generator.integers(-1, num_classes - 1, (9, 11))  # the last class is never true
    found = generator.integers(0, num_classes, (9, 11))
    metrics = SegmentationMetrics(num_classes)
    metrics.update(truth[:4], found[:4])
    metrics.update(truth[4:], found[4:])
    expected = slow_iou(truth, found, num_classes)
    np.testing.assert_allclose(metrics.per_class(), expected, rtol=1e-12)
    valid = truth >= 0
    values = metrics.compute()
    assert values["miou"] == pytest.approx(np.nanmean(expected), rel=1e-12)
    assert values["pixel_accuracy"] == pytest.approx((truth == found)[valid].mean())
    recalls = [(found == label)[truth == label].mean() for label in range(num_classes) if (truth == label).any()]
    assert values["mean_accuracy"] == pytest.approx(np.mean(recalls))


def test_a_class_found_but_never_true_counts_zero_and_an_absent_one_is_left_out():
    metrics = SegmentationMetrics(4)
    metrics.update(np.array([[0, 0, 1, -1]]), np.array([[0, 2, 1, 3]]))
    iou = metrics.per_class()
    assert iou[:3].tolist() == [0.5, 1.0, 0.0]
    assert np.isnan(iou[3])
    assert metrics.compute()["miou"] == pytest.approx(0.5)


def test_the_confusion_is_exact_and_ignores_what_is_found_on_ignored_pixels():
    truth, found = np.array([[0, 1, -1, 2]]), np.array([[1, 1, 2, 2]])
    assert confusion_of(truth, found, 3).tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_a_split_without_a_valid_pixel_is_refused():
    metrics = SegmentationMetrics(2)
    assert np.isnan(metrics.update(np.array([[-1]]), np.array([[0]])))
    with pytest.raises(ValueError, match="pixel"):
        metrics.compute()

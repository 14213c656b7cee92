"""Notes on splits of few images."""

import pytest

from vpt.data.samples import ClassificationSamples
from vpt.runs.summary import describe_small_splits, wilson_interval


def samples(targets, num_classes=2):
    names = tuple(f"{index}.png" for index in range(len(targets)))
    classes = tuple("abcdefgh"[:num_classes])
    return ClassificationSamples(classes=classes, targets=tuple(targets), names=names, reader=lambda _: None)


@pytest.mark.parametrize(
    ("fraction", "num", "low", "high"),  # the values of scipy.stats.binomtest
    [
        (1.0, 1, 0.2065493, 1.0),
        (0.0, 5, 0.0, 0.4344825),
        (0.5, 10, 0.2365931, 0.7634069),
        (0.9, 1000, 0.8798480, 0.9170906),
    ],
)
def test_the_interval_is_that_of_wilson(fraction, num, low, high):
    assert wilson_interval(fraction, num) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([0], ["val has 1 image, and fewer than 2 examples of 2 of its classes (first a)", "20.7 % to 100.0 %"]),
        ([0] * 6 + [1] * 6, ["val has 12 images: ", "75.8 % to 100.0 %"]),
        ([0] * 30 + [1], ["val has 31 images, and fewer than 2 examples of 1 of its classes (first b)"]),
        ([0, 1] * 10, []),
    ],
)
def test_few_images_of_a_split_or_a_class_are_reported_with_the_interval_of_the_accuracy(targets, expected):
    lines = describe_small_splits({"val": samples(targets)}, {"val": {"loss": 0.1, "top1": 1.0}})
    assert len(lines) == bool(expected)
    assert all(text in lines[0] for text in expected)


def test_metrics_that_are_no_fractions_of_images_have_no_interval():
    (line,) = describe_small_splits({"test": samples([0, 0, 1, 1])}, {"test": {"map": 0.4}})
    assert "interval" not in line

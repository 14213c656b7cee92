import importlib.util
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import coco_evaluation, coco_metrics
from vpt.engine.metrics import detection
from vpt.engine.metrics.detection import DetectionMetrics

Image = dict[str, Tensor]
HAS_FAST = importlib.util.find_spec("faster_coco_eval") is not None
FAST = pytest.param("faster-coco-eval", marks=pytest.mark.skipif(not HAS_FAST, reason="needs faster-coco-eval"))
BACKENDS = pytest.mark.parametrize("backend", ["pycocotools", FAST])


def image(boxes: list[list[float]], labels: list[int], **others: list[float] | list[bool]) -> Image:
    tensors = {name: torch.tensor(values) for name, values in others.items()}
    return {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "labels": torch.tensor(labels).long(), **tensors}


def random_images(num: int, num_classes: int, seed: int, num_extra: int = 5) -> tuple[list[Image], list[Image]]:
    """Targets of all sizes, a few of them crowds; detections that are moved targets, and some at random places."""
    chance = random.Random(seed)
    scores = chance.sample(range(10000), 10000)  # no two are equal

    def box() -> list[float]:
        x, y, size = chance.uniform(0, 200), chance.uniform(0, 200), chance.choice([20, 60, 150])
        return [x, y, x + size * chance.uniform(0.7, 1.4), y + size * chance.uniform(0.7, 1.4)]

    detections, targets = [], []
    for _ in range(num):
        boxes = [box() for _ in range(chance.randint(0, 5))]
        labels = [chance.randrange(num_classes) for _ in boxes]
        crowd = [chance.random() < 0.15 for _ in boxes]
        targets.append(image(boxes, labels, crowd=crowd))
        found, names = [], []
        for corners, label in zip(boxes * 2, labels * 2, strict=True):
            if chance.random() < 0.7:
                spread = chance.choice([0.01, 0.05, 0.2]) * (corners[2] - corners[0])
                found.append([value + chance.uniform(-spread, spread) for value in corners])
                names.append(label if chance.random() < 0.8 else chance.randrange(num_classes))
        found += [box() for _ in range(num_extra)]
        names += [chance.randrange(num_classes) for _ in range(num_extra)]
        detections.append(image(found, names, scores=[scores.pop() / 10000 for _ in found]))
    return detections, targets


def by_pycocotools(detections: list[Image], targets: list[Image], num_classes: int) -> tuple[dict, np.ndarray]:
    """Metrics of the same boxes in the form of files, and the precision (T, R, K), nan where there is no true box."""

    def rows(images: list[Image], key: str) -> list[dict]:
        return [
            {"image_id": i, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1], key: value}
            for i, one in enumerate(images)
            for (x1, y1, x2, y2), label, value in zip(*(one[k].tolist() for k in ("boxes", "labels", key)), strict=True)
        ]

    true = [
        row | {"id": i, "iscrowd": int(row["crowd"]), "area": row["bbox"][2] * row["bbox"][3]}
        for i, row in enumerate(rows(targets, "crowd"), start=1)
    ]
    found = [row | {"score": row["scores"]} for row in rows(detections, "scores")]
    categories = [{"id": label} for label in range(num_classes)]
    images = [{"id": i} for i in range(len(targets))]
    evaluation = coco_evaluation({"images": images, "categories": categories, "annotations": true}, found)
    precision = evaluation.eval["precision"][..., 0, -1]
    return coco_metrics(evaluation), np.where(precision > -1, precision, np.nan)


def fed(
    detections: list[Image], targets: list[Image], num_classes: int, backend: str = "auto", batch_size: int = 4
) -> DetectionMetrics:
    metrics = DetectionMetrics(num_classes, backend=backend)
    for start in range(0, len(targets), batch_size):
        metrics.update(detections[start : start + batch_size], targets[start : start + batch_size])
    return metrics


def as_found(target: Image) -> Image:
    scores = torch.linspace(0.9, 0.5, len(target["labels"]))
    return {"boxes": target["boxes"], "labels": target["labels"], "scores": scores}


A, B, FAR = [0.0, 0.0, 20.0, 20.0], [40.0, 0.0, 60.0, 20.0], [200.0, 200.0, 220.0, 220.0]
NEAR = [0.0, 0.0, 20.0, 16.0]
ONE = image([[10.0, 10.0, 50.0, 50.0]], [0], crowd=[False])
SECOND = {"labels": torch.tensor([1])}
NOTHING = image([], [], scores=[])
NO_TARGET = image([], [], crowd=[])


@BACKENDS
@pytest.mark.parametrize("seed", range(6))
def test_metrics_classes_and_curves_equal_the_coco_evaluation_of_the_same_boxes_in_files(backend, seed):
    detections, targets = random_images(8, 4, seed)
    targets = [{**target, "labels": target["labels"].clamp(max=2)} for target in targets]
    metrics = fed(detections, targets, 4, backend)
    expected, precision = by_pycocotools(detections, targets, 4)
    assert metrics.compute() == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert 0 < expected["map"] < 1
    assert metrics.per_class() == pytest.approx(precision.mean((0, 1)).tolist(), abs=1e-9, nan_ok=True)
    curves = metrics.precision_curves()
    assert curves.dtype == np.float64
    assert np.isnan(curves[3]).all()
    np.testing.assert_allclose(curves, precision[0].T, atol=1e-9)
    assert curves[:3].mean() == pytest.approx(metrics.compute()["map50"], abs=1e-12)


@pytest.mark.skipif(not HAS_FAST, reason="needs faster-coco-eval")
def test_both_backends_return_the_same_numbers_for_equal_scores():
    for seed in range(15):
        detections, targets = random_images(12, 4, seed)
        for found in detections:
            found["scores"] = (found["scores"] * 4).round() / 4
        slow, fast = (fed(detections, targets, 5, backend) for backend in ("pycocotools", "faster-coco-eval"))
        assert fast.compute() == pytest.approx(slow.compute(), abs=5e-6, nan_ok=True)
        assert fast.per_class() == pytest.approx(slow.per_class(), abs=5e-6, nan_ok=True)


@BACKENDS
def test_perfect_detections_score_one_from_the_first_box_on(backend):
    targets = random_images(6, 3, seed=1)[1]
    for target in targets:
        target["crowd"] = torch.zeros_like(target["crowd"])
    metrics = fed([as_found(target) for target in targets], targets, 3, backend)
    values = metrics.compute()
    assert values.pop("ar1") < 1  # several boxes of a class in an image
    assert list(values.values()) == pytest.approx([1.0] * 8)
    assert metrics.per_class() == pytest.approx([1.0] * 3)
    assert fed([as_found(ONE)], [ONE], 1, backend).compute()["map"] == pytest.approx(1.0)


@BACKENDS
def test_order_of_images_and_sizes_of_batches_change_nothing_and_nothing_is_printed(backend, capsys):
    detections, targets = random_images(9, 3, seed=2)
    whole = fed(detections, targets, 3, backend, batch_size=9).compute()
    order = random.Random(0).sample(range(9), 9)
    mixed = fed([detections[i] for i in order], [targets[i] for i in order], 3, backend, batch_size=2).compute()
    assert mixed == pytest.approx(whole, abs=1e-12)
    assert capsys.readouterr() == ("", "")


@BACKENDS
@pytest.mark.parametrize("num_rows", [1, 60])
def test_classes_that_are_evaluated_in_parts_have_the_same_numbers(backend, num_rows, monkeypatch):
    detections, targets = random_images(9, 5, seed=2)
    whole, parts = (fed(detections, targets, 6, backend) for _ in range(2))
    expected = whole.compute(), whole.per_class(), whole.precision_curves()
    monkeypatch.setattr(detection, "MAX_ROWS", num_rows)
    assert 1 < len(list(parts._parts())) <= 6
    for value, other in zip((parts.compute(), parts.per_class(), parts.precision_curves()), expected, strict=True):
        np.testing.assert_equal(value, other)


@BACKENDS
def test_without_detections_everything_is_zero(backend):
    metrics = fed([NOTHING], [ONE | SECOND], 2, backend)
    values = metrics.compute()
    assert math.isnan(values.pop("map_small"))
    assert math.isnan(values.pop("map_large"))
    assert set(values.values()) == {0.0}
    assert metrics.per_class() == pytest.approx([math.nan, 0.0], nan_ok=True)


@BACKENDS
@pytest.mark.parametrize("found", [NOTHING, as_found(ONE)])
@pytest.mark.parametrize("target", [NO_TARGET, ONE | {"crowd": torch.tensor([True])}])
def test_without_true_boxes_or_with_crowds_alone_everything_is_nan(backend, found, target):
    metrics = fed([found], [target], 2, backend)
    assert all(math.isnan(value) for value in [*metrics.compute().values(), *metrics.per_class()])


TWO = image([[10.0, 10.0, 50.0, 50.0], [100.0, 100.0, 300.0, 300.0]], [0, 0], crowd=[False, False])
CROWD = TWO | {"crowd": torch.tensor([False, True])}
ON_TWO = image([[120, 120, 150, 150], [200, 200, 240, 240], [10, 10, 50, 50]], [0, 0, 0], scores=[0.9, 0.8, 0.7])


def broken(place: int, value: float) -> Image:
    """ONE of the second class, with another number."""
    found = as_found(ONE) | SECOND | {"boxes": ONE["boxes"].clone()}
    found["boxes"][0, place] = value
    return found


@BACKENDS
@pytest.mark.parametrize(
    ("found", "true", "of_classes", "recall"),
    [
        pytest.param([as_found(ONE), image([FAR], [0], scores=[0.95])], [ONE, NO_TARGET], [0.5], 1.0, id="no true box"),
        pytest.param([ON_TWO], [CROWD], [1.0], 1.0, id="on a crowd: ignored"),
        pytest.param([ON_TWO], [TWO], [51 / 101 / 3], 0.5, id="the same on a box"),
        pytest.param(
            [ON_TWO | {"labels": torch.tensor([1, 1, 0])}, NOTHING], [CROWD, ONE | SECOND], [1, 0], 0.5, id="crowd"
        ),
        pytest.param(
            [as_found(ONE) | {"scores": torch.tensor([math.nan])}, image([FAR], [0], scores=[0.1])],
            *([ONE, NO_TARGET], [0.5], 1.0),
            id="a score that is not finite counts as 0",
        ),
        *(
            pytest.param([broken(place, value), as_found(ONE)], [ONE | SECOND, ONE], [1, 0], 0.5, id=f"{value} {place}")
            for place in range(4)
            for value in (math.nan, math.inf, -math.inf)
        ),
        *(
            pytest.param(
                [image([swapped, A], [0, 0], scores=[0.9, 0.8])], [image([A], [0])], [0.5], 1.0, id=str(swapped)
            )
            for swapped in ([20, 0, 0, 20], [0, 20, 20, 0], [20, 20, 0, 0])
        ),
    ],
)
def test_detections_that_are_wrong_and_those_that_are_ignored(backend, found, true, of_classes, recall):
    metrics = fed(found, true, len(of_classes), backend)
    assert metrics.per_class() == pytest.approx(of_classes)
    assert metrics.compute()["map"] == pytest.approx(np.mean(of_classes))
    assert metrics.compute()["ar100"] == pytest.approx(recall)


@BACKENDS
def test_only_the_hundred_best_detections_of_an_image_and_class_count(backend):
    chance = random.Random(0)
    wrong = [[x, 500.0, x + 5, 505.0] for x in (chance.uniform(0, 400) for _ in range(100))]
    scores = [0.5 + 0.4 * i / 100 for i in range(100)]

    def of(num_wrong: int, label: int) -> float:
        found = image(
            [*wrong[:num_wrong], [10.0, 10.0, 50.0, 50.0]], [label] * num_wrong + [0], scores=[*scores[:num_wrong], 0.1]
        )
        return fed([found], [ONE], 2, backend).compute()["ar100"]

    assert of(99, label=0) == pytest.approx(1.0)
    assert of(100, label=0) == pytest.approx(0.0)
    assert of(100, label=1) == pytest.approx(1.0)


@BACKENDS
def test_the_size_of_a_true_box_decides_which_of_the_three_it_counts_in(backend):
    for side, present in [(20.0, "map_small"), (60.0, "map_medium"), (120.0, "map_large")]:
        target = image([[0.0, 0.0, side, side]], [0])
        values = fed([as_found(target)], [target], 1, backend).compute()
        known = [name for name in ("map_small", "map_medium", "map_large") if not math.isnan(values[name])]
        assert known == [present]
        assert values[present] == pytest.approx(1.0)


def test_losses_are_means_over_images_and_loss_is_their_sum():
    metrics = fed([as_found(ONE)], [ONE], 1)
    assert not any(name.startswith("loss") for name in metrics.compute())
    metrics.add_losses({"class": 1.0, "box": 2.0}, num_images=3)
    metrics.add_losses({"class": torch.tensor(5.0), "box": 2.0}, num_images=1)
    values = metrics.compute()
    assert list(values)[:4] == ["loss", "loss_class", "loss_box", "map"]
    assert [values[name] for name in ("loss", "loss_class", "loss_box")] == pytest.approx([4.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="num_images=0: must be at least 1"):
        metrics.add_losses({"class": math.nan}, num_images=0)


def test_images_are_added_after_compute_and_cleared_by_reset():
    detections, targets = random_images(6, 3, seed=4)
    metrics = fed(detections, targets, 3)
    metrics.add_losses({"class": 1.0}, num_images=6)
    metrics.compute()
    metrics.reset()
    metrics.update([as_found(ONE)], [ONE])
    assert metrics.compute() == pytest.approx(fed([as_found(ONE)], [ONE], 3).compute(), nan_ok=True)
    assert metrics.compute()["ar100"] == pytest.approx(1.0)
    metrics.update([], [])
    assert metrics.compute()["ar100"] == pytest.approx(1.0)
    metrics.update([NOTHING], [ONE])
    assert metrics.compute()["ar100"] == pytest.approx(0.5)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_boxes_of_any_precision_on_any_device_are_accepted(dtype, device):
    found = as_found(ONE) | {"boxes": ONE["boxes"].to(dtype).requires_grad_(), "scores": torch.tensor([0.5]).to(dtype)}
    target = ONE | {"labels": ONE["labels"].int()}
    found, target = ({name: value.to(device) for name, value in one.items()} for one in (found, target))
    assert fed([found], [target], 1).compute()["map"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("found", "target", "message"),
    [
        ({"labels": torch.tensor([3])}, {}, r"label 3 is outside of \[0, 3\)"),
        ({"labels": torch.tensor([-1])}, {}, r"label -1 is outside"),
        ({}, {"labels": torch.tensor([3])}, r"label 3 is outside"),
        ({"labels": torch.tensor([0.0])}, {}, "must be integers"),
        ({"boxes": torch.zeros(4)}, {}, r"must be \(n, 4\)"),
        ({"boxes": torch.zeros(2, 4)}, {}, r"must be \(n, 4\)"),
        ({"scores": torch.zeros(1, 1)}, {}, r"must be \(n, 4\)"),
        ({}, {"crowd": torch.tensor([False, True])}, r"must be \(n, 4\)"),
        ({}, {"boxes": torch.full((1, 4), math.nan)}, "a box is nan or infinite"),
    ],
)
def test_images_that_do_not_fit_are_refused_and_nothing_of_their_batch_is_added(found, target, message):
    metrics = DetectionMetrics(3)
    with pytest.raises(ValueError, match=message):
        metrics.update([as_found(ONE), as_found(ONE) | found], [ONE, ONE | target])
    with pytest.raises(ValueError, match="no image was evaluated"):
        metrics.compute()


def test_unequal_numbers_of_images_and_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="2 images with detections, 1 with targets"):
        DetectionMetrics(1).update([NOTHING, NOTHING], [ONE])
    for num_classes, backend, name in [(0, "auto", "num_classes=0"), (1, "fast", "backend='fast'")]:
        with pytest.raises(ValueError, match=name):
            DetectionMetrics(num_classes, backend=backend)


def test_without_faster_coco_eval_auto_takes_pycocotools_and_the_name_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not DetectionMetrics(1).is_fast
    with pytest.raises(ValueError, match="not installed"):
        DetectionMetrics(1, backend="faster-coco-eval")


# Curves, confusion, worst images, thresholds.


def test_best_thresholds_give_the_highest_f1():
    detections, targets = random_images(15, 4, seed=8)
    targets = [{**target, "labels": target["labels"].clamp(max=2)} for target in targets]
    thresholds = fed(detections, targets, 4).best_thresholds()
    assert len(thresholds) == 4
    assert math.isnan(thresholds[3])
    for label in range(3):
        found, true = (
            [
                {name: value[one["labels"] == label] for name, value in one.items()}
                | {"labels": 0 * one["labels"][one["labels"] == label]}
                for one in images
            ]
            for images in (detections, targets)
        )
        scores = sorted(torch.cat([one["scores"] for one in found]).tolist())
        f1 = []
        for score in scores:
            (right, missed), (wrong, _) = fed(found, true, 1).confusion(score, 0.5).tolist()
            f1.append(2 * right / (2 * right + missed + wrong))
        assert 0 < max(f1) < 1
        assert f1[scores.index(thresholds[label])] == max(f1)


@pytest.mark.parametrize(
    ("found", "true", "expected"),
    [
        pytest.param([(A, 0, 0.9), (B, 1, 0.9)], [(A, 0), (B, 1)], {(0, 0): 1, (1, 1): 1}, id="right"),
        pytest.param([(A, 1, 0.9)], [(A, 0)], {(0, 1): 1}, id="wrong class"),
        pytest.param([], [(A, 0), (B, 0)], {(0, 2): 2}, id="missed"),
        pytest.param([(FAR, 1, 0.9)], [], {(2, 1): 1}, id="false"),
        pytest.param([(FAR, 1, 0.9)], [(A, 0)], {(2, 1): 1, (0, 2): 1}, id="beside"),
        pytest.param([(A, 0, 0.9), (A, 0, 0.8)], [(A, 0)], {(0, 0): 1, (2, 0): 1}, id="twice"),
        pytest.param([(A, 0, 0.8), (A, 1, 0.9)], [(A, 0)], {(0, 1): 1, (2, 0): 1}, id="the higher score counts"),
        pytest.param([(A, 1, 0.9)], [(A, 0), (A, 1)], {(1, 1): 1, (0, 2): 1}, id="equal boxes: that of the class"),
        pytest.param([(A, 1, 0.9)], [(A, 0), (NEAR, 1)], {(0, 1): 1, (1, 2): 1}, id="the highest overlap counts"),
        pytest.param([(A, 0, 0.9), (NEAR, 0, 0.8)], [(A, 0), (NEAR, 1)], {(0, 0): 1, (1, 0): 1}, id="the free one"),
        pytest.param([(A, 0, 0.24)], [(A, 0)], {(0, 2): 1}, id="score too low"),
        pytest.param([(A, 0, 0.25)], [(A, 0)], {(0, 0): 1}, id="score just enough"),
        pytest.param([([0, 0, 20, 9.1], 0, 0.9)], [(A, 0)], {(0, 0): 1}, id="overlap just enough"),
        pytest.param([([0, 0, 20, 8.9], 0, 0.9)], [(A, 0)], {(2, 0): 1, (0, 2): 1}, id="overlap too small"),
        pytest.param([([math.nan] * 4, 0, 0.9)], [(A, 0)], {(2, 0): 1, (0, 2): 1}, id="not finite"),
        pytest.param([(A, 0, math.nan)], [(A, 0)], {(0, 2): 1}, id="score not finite"),
    ],
)
def test_confusion_of_a_single_image(found, true, expected):
    detections = image([row[0] for row in found], [row[1] for row in found], scores=[row[2] for row in found])
    targets = image([row[0] for row in true], [row[1] for row in true])
    confusion = fed([detections], [targets], 2).confusion()
    assert {tuple(at.tolist()): int(confusion[tuple(at)]) for at in confusion.nonzero()} == expected


@pytest.mark.parametrize("limits", [(0.25, 0.45), (0.0, 0.3), (0.6, 0.75)])
def test_confusion_is_the_sum_over_images_and_the_worst_images_have_the_most_errors(limits):
    detections, targets = random_images(25, 3, seed=7)
    metrics = fed(detections, targets, 3)
    singles = [fed([one], [target], 3).confusion(*limits) for one, target in zip(detections, targets, strict=True)]
    assert metrics.confusion(*limits).dtype == torch.int64
    assert torch.equal(metrics.confusion(*limits), sum(singles))
    errors = [int(single.sum() - single.trace()) for single in singles]
    assert len(set(errors)) > 3
    assert metrics.images_by_error(10, *limits) == sorted(range(25), key=lambda i: (-errors[i], i))[:10]


def test_crowds_and_detections_on_them_are_not_in_the_confusion():
    crowd = [0.0, 0.0, 100.0, 100.0]
    target = image([crowd, A], [0, 1], crowd=[True, False])
    found = image([A, [50.0, 50.0, 60.0, 60.0], [70.0, 70.0, 80.0, 80.0], FAR], [1, 0, 1, 0], scores=[0.9] * 4)
    metrics = fed([found], [target], 2)
    assert metrics.confusion().tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert metrics.images_by_error(5) == [0]


def test_images_without_errors_come_last_and_no_more_images_are_named_than_there_are():
    metrics = fed([as_found(ONE), NOTHING, as_found(ONE)], [ONE, ONE, NO_TARGET], 1, batch_size=2)
    assert metrics.images_by_error(8) == [1, 2, 0]
    assert metrics.images_by_error(1) == [1]


@pytest.mark.parametrize(
    ("found", "scores", "target", "expected"),
    [
        pytest.param([A, FAR, B], [0.9, 0.5, 0.5], image([A, B], [0, 0]), 0.5, id="equal scores pass together"),
        pytest.param([A, FAR, FAR, B], [0.9, 0.5, 0.5, 0.1], image([A, B], [0, 0]), 0.9, id="equal wrong ones"),
        pytest.param([FAR], [0.9], image([A, B], [0, 1]), math.nan, id="never found"),
        pytest.param(
            [FAR, FAR, A],
            [0.9, 0.8, 0.3],
            image([A, [100.0, 100.0, 300.0, 300.0]], [0, 0], crowd=[False, True]),
            0.3,
            id="boxes in a crowd",
        ),
    ],
)
def test_best_threshold_of_a_single_image(found, scores, target, expected):
    thresholds = fed([image(found, [0] * len(found), scores=scores)], [target], 3).best_thresholds()
    assert thresholds == pytest.approx([expected, math.nan, math.nan], nan_ok=True)


def test_metrics_without_images_and_thresholds_out_of_range_are_refused():
    metrics = DetectionMetrics(2)
    metrics.update([], [])
    computes = metrics.compute, metrics.per_class, metrics.precision_curves, metrics.confusion, metrics.best_thresholds
    for compute in (*computes, lambda: metrics.images_by_error(3)):
        with pytest.raises(ValueError, match="no image was evaluated"):
            compute()
    metrics.update([NOTHING], [ONE])
    for thresholds in [(-0.1, 0.5), (0.5, 0.0), (0.5, 1.1), (math.nan, 0.5)]:
        with pytest.raises(ValueError, match="allowed: 0 <= min_score"):
            metrics.confusion(*thresholds)

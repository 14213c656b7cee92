import math
import random

import pytest
import torch
from torch import Tensor

from vpt.engine.metrics.classification import ClassificationMetrics, target_ranks


def random_split(num: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (num,), generator=generator)


def by_hand(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """The same metrics with plain loops over python lists."""
    losses, hits, hits_top5, of_class = [], [], [], {}
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda k: (-row[k], k))
        losses.append(math.log(sum(math.exp(x - row[target]) for x in row)))
        hits.append(ranked[0] == target)
        hits_top5.append(target in ranked[:5])
        of_class.setdefault(target, []).append(hits[-1])
    recalls = [sum(found) / len(found) for found in of_class.values()]
    return {
        "loss": sum(losses) / len(losses),
        "top1": sum(hits) / len(hits),
        "top5": sum(hits_top5) / len(hits),
        "mean_per_class": sum(recalls) / len(recalls),
    }


def fed(logits: Tensor, targets: Tensor, batch_size: int, **settings: int) -> ClassificationMetrics:
    metrics = ClassificationMetrics(logits.shape[1], **settings)
    for part in torch.arange(len(logits)).split(batch_size):
        metrics.update(logits[part], targets[part])
    return metrics


def test_metrics_of_random_splits_in_any_batches_equal_a_plain_loop():
    chance = random.Random(0)
    for seed in range(25):
        logits, targets = random_split(chance.randint(1, 83), chance.randint(6, 12), seed)
        for rounded in (logits, logits.bfloat16()):
            metrics = fed(rounded, targets, batch_size=chance.randint(1, 20))
            assert metrics.compute() == pytest.approx(by_hand(rounded, targets), abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 83])
def test_the_size_of_batches_changes_nothing(batch_size):
    logits, targets = random_split(83, 9)
    whole, parts = fed(logits, targets, 1000), fed(logits, targets, batch_size)
    assert parts.compute() == pytest.approx(whole.compute(), abs=1e-14)
    assert parts.confusion.equal(whole.confusion)
    assert [sample.position for sample in parts.worst()] == [sample.position for sample in whole.worst()]


def test_confusion_has_rows_of_targets_and_classes_without_targets_are_nan_and_left_out_of_the_mean():
    metrics = fed(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 0, 0, 2]), batch_size=4)
    assert metrics.confusion.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    assert metrics.confusion.dtype == torch.int64
    first, absent, last = metrics.per_class()
    assert (first, last) == (pytest.approx(1 / 3), 1.0)
    assert math.isnan(absent)
    assert metrics.compute()["mean_per_class"] == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize(("num_classes", "present"), [(2, False), (5, False), (6, True)])
def test_top5_is_present_only_with_more_than_five_classes(num_classes, present):
    assert ("top5" in fed(*random_split(20, num_classes), batch_size=8).compute()) is present


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_equal_logits_and_nan_do_not_count_as_hits_of_every_class(value):
    values = fed(torch.full((10, 10), value), torch.arange(10), batch_size=10).compute()
    assert (values["top1"], values["top5"]) == pytest.approx((0.1, 0.5))


def test_the_lower_of_equal_classes_ranks_first_as_in_argmax():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]]).expand(4, 4)
    assert target_ranks(logits, torch.arange(4)).tolist() == [3, 0, 2, 1]
    coarse = random_split(200, 30)[0].round()
    assert target_ranks(coarse, coarse.argmax(dim=1)).max() == 0


def test_a_given_loss_is_weighted_by_the_size_of_its_batch():
    logits, targets = random_split(4, 3)
    metrics = ClassificationMetrics(3)
    metrics.update(logits[:3], targets[:3], loss=1.0)
    metrics.update(logits[3:], targets[3:], loss=torch.tensor(5.0))
    assert metrics.compute()["loss"] == pytest.approx(2.0)


def test_the_worst_samples_are_those_of_the_highest_cross_entropy():
    logits, targets = random_split(83, 4)
    losses = [math.log(sum(math.exp(x - row[t]) for x in row)) for row, t in zip(logits.tolist(), targets, strict=True)]
    expected = sorted(range(83), key=lambda i: -losses[i])[:5]
    worst = fed(logits, targets, batch_size=10, num_worst=7).worst(5)
    assert [sample.position for sample in worst] == expected
    assert [sample.loss for sample in worst] == pytest.approx([losses[i] for i in expected])
    assert [sample.target for sample in worst] == targets[expected].tolist()
    assert [sample.prediction for sample in worst] == logits[expected].argmax(dim=1).tolist()


def test_nan_is_the_worst_loss_and_worst_returns_as_many_as_were_evaluated_and_refuses_more_than_are_stored():
    logits, targets = random_split(20, 4)
    logits[11] = math.nan
    metrics = fed(logits, targets, batch_size=6)
    assert metrics.worst(1)[0].position == 11
    assert math.isnan(metrics.compute()["loss"])
    metrics = fed(*random_split(3, 4), batch_size=2, num_worst=5)
    assert len(metrics.worst()) == 3
    assert metrics.worst(0) == []
    with pytest.raises(ValueError, match="num=6"):
        metrics.worst(6)
    assert fed(*random_split(9, 3), batch_size=4, num_worst=0).worst() == []


ON_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, ON_CUDA])
def test_logits_of_any_precision_and_on_a_gpu_are_accepted(kind):
    logits, targets = random_split(40, 7)
    logits = logits.to(kind).requires_grad_()
    metrics = fed(logits, targets.to(logits.device), batch_size=16)
    assert metrics.compute() == pytest.approx(by_hand(logits, targets), abs=1e-12)


def test_reset_clears_everything_and_an_empty_batch_changes_nothing():
    logits, targets = random_split(30, 4)
    metrics = fed(logits, targets, batch_size=8)
    metrics.confusion.zero_()  # a copy
    assert metrics.confusion.sum() == 30
    metrics.reset()
    metrics.update(logits[:5], targets[:5])
    metrics.update(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), loss=math.nan)
    assert metrics.compute() == fed(logits[:5], targets[:5], batch_size=5).compute()
    assert max(sample.position for sample in metrics.worst()) == 4


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ((2, 4), [0, 1], r"3 classes require \(B, 3\)"),
        ((3,), [0, 1, 2], r"3 classes require \(B, 3\)"),
        ((2, 3), [0], r"these logits require \(2,\)"),
        ((2, 3), [0, 3], r"target 3 is outside of \[0, 3\)"),
        ((2, 3), [-100, 0], "target -100 is outside"),
        ((2, 3), [0.0, 1.0], "must be integers"),
    ],
)
def test_batches_that_do_not_fit_are_refused_and_so_is_a_result_without_samples(logits, targets, message):
    metrics = ClassificationMetrics(3)
    with pytest.raises(ValueError, match=message):
        metrics.update(torch.zeros(logits), torch.tensor(targets))
    with pytest.raises(ValueError, match="no sample was evaluated"):
        metrics.compute()


@pytest.mark.parametrize("settings", [{"num_classes": 0}, {"num_classes": 3, "num_worst": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="must be at least"):
        ClassificationMetrics(**settings)


def test_a_confusion_of_many_classes_is_counted_in_groups_and_none_of_its_square_is_held():
    metrics, targets = ClassificationMetrics(7), torch.tensor([0, 1, 2, 6, 6])
    metrics.update(torch.eye(7)[[1, 1, 5, 6, 0]], targets)
    assert metrics.confusion_of_groups(7)[1].equal(metrics.confusion)
    size, counts = metrics.confusion_of_groups(3)
    assert size == 3
    assert counts.tolist() == [[2, 1, 0], [0, 0, 0], [1, 0, 1]]
    many = ClassificationMetrics(100_000)  # a matrix would take 80 GB
    many.update(torch.zeros(1, 100_000), torch.tensor([99_999]))
    size, counts = many.confusion_of_groups(480)
    assert (size, counts.shape, counts[-1, 0]) == (209, (479, 479), 1)

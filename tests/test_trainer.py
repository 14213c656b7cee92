import math
import signal
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tests.helpers import Evaluator, Separable, cross_entropy, fit_small, make_loader, metric_lines
from vpt.engine.signals import Stopped, StopSignal
from vpt.engine.trainer import evaluate, overfit

NUM_TRAIN, BATCH = 22, 5
WHOLE = partial(make_loader, batch_size=NUM_TRAIN)


def test_training_lowers_the_loss_and_counts_epochs_and_steps(tmp_path):
    calls = []
    _, result, _ = fit_small(tmp_path, epochs=6, callbacks={"on_epoch": lambda *numbers: calls.append(numbers)})
    losses = [line["train/loss"] for line in metric_lines(tmp_path) if "train/loss" in line]
    assert (result.epochs, result.steps) == (6, 6 * math.ceil(NUM_TRAIN / BATCH))
    assert len(losses) == result.steps
    assert losses[-1] < losses[0] / 2
    assert calls == [(epoch, 5 * epoch) for epoch in range(1, 7)]


@pytest.mark.parametrize(("num", "lr"), [(22, 20.0), (1, 0.5)])  # a single image: equal metrics, the lower loss wins
def test_the_model_ends_with_the_weights_that_val_chose(tmp_path, num, lr):
    val = make_loader(num=num, seed=1)
    model, result, _ = fit_small(tmp_path, val=val, epochs=8, lr=lr)
    found = [(line["val/top1"], -line["val/loss"]) for line in metric_lines(tmp_path) if "val/top1" in line]
    assert found[result.best_epoch - 1] == max(found) == (result.best["top1"], -result.best["loss"])
    assert evaluate(model, val, Evaluator()) == result.best
    assert result.best_step == result.best_epoch * math.ceil(NUM_TRAIN / BATCH)


@pytest.mark.parametrize(
    ("select", "epochs"),
    [
        ("map", [{"map": math.nan}, {"map": 0.0}, {"map": math.nan}]),  # nan is the worst, and no loss is needed
        ("map50", [{"map": 0.9, "map50": 0.1}, {"map": 0.2, "map50": 0.3}, {"map": 0.5, "map50": 0.2}]),
        ("loss", [{"top1": 0.9, "loss": 2.0}, {"top1": 0.2, "loss": 1.0}, {"top1": 0.5, "loss": 3.0}]),
    ],
)
def test_the_best_epoch_is_that_of_the_selected_metric(tmp_path, capsys, select, epochs):
    evaluator = Evaluator()
    evaluator.compute = Mock(side_effect=epochs)
    _, result, _ = fit_small(tmp_path, epochs=3, select=select, evaluator=evaluator)
    assert (result.best_epoch, result.best) == (2, epochs[1])
    output = capsys.readouterr()
    assert output.out.count("100") == output.out.count("200") == 0  # a loss is no percentage
    assert output.err.count("map on val is not a number") == 2 * (select == "map")


def test_a_metric_that_the_evaluator_does_not_compute_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"select='map'.*top1"):
        fit_small(tmp_path, select="map")


def test_early_stopping_waits_for_its_patience(tmp_path):
    _, result, _ = fit_small(tmp_path, epochs=50, lr=1e-12, patience=3)
    assert result.epochs == result.best_epoch + 3


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    large, _, _ = fit_small(tmp_path / "a", train=WHOLE(), epochs=1, warmup=0)
    small, result, _ = fit_small(tmp_path / "b", epochs=1, accumulation=5, warmup=0)
    assert result.steps == 1
    torch.testing.assert_close(small.head.weight, large.head.weight)


def test_gradients_are_clipped_to_their_norm(tmp_path):
    before = Separable().head.weight.detach().clone()
    model, _, _ = fit_small(tmp_path, train=WHOLE(), epochs=1, clip_norm=1e-3, lr=1.0)
    assert 0 < (model.head.weight - before).norm() <= 1e-3 + 1e-6


def test_val_is_evaluated_with_the_moving_average_and_the_best_holds_it(tmp_path):
    val = make_loader(seed=1)
    model, result, state = fit_small(tmp_path, val=val, epochs=1, ema=0.9)
    assert torch.equal(model.head.weight, state.average.average["head.weight"])
    assert evaluate(model, val, Evaluator()) == result.best


def test_evaluation_is_in_eval_mode_without_gradients_and_whatever_the_batches():
    model = Separable().train()
    one, *others = (evaluate(model, make_loader(batch_size=size), Evaluator()) for size in (1, 7, 100))
    assert not any(model.modes)
    assert [pytest.approx(values) for values in others] == [one, one]


def test_passes_can_be_limited_and_autocast_reaches_the_forward_pass(tmp_path):
    dtypes, model = [], Separable()
    model.register_forward_hook(lambda _, inputs, logits: dtypes.append(logits.dtype))
    _, result, _ = fit_small(tmp_path, model=model, epochs=1, max_batches=2, precision="bf16")
    assert result.steps == 2
    assert model.modes.count(False) == 2
    assert set(dtypes) == {torch.bfloat16}


def test_the_pace_memory_and_learning_rates_are_logged(tmp_path):
    fit_small(tmp_path, epochs=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("perf/images_per_s")[0].value > 0
    assert 0 <= events.Scalars("perf/data_wait_fraction")[0].value <= 1
    assert events.Scalars("memory/peak_mib")[0].value > 10
    line = metric_lines(tmp_path)[0]
    assert line["lr/head"] == pytest.approx(0.25)
    assert line["train/grad_norm"] > 0


def test_one_batch_is_learned_or_the_result_is_none():
    batch = next(iter(make_loader()))
    options = {"losses": cross_entropy, "evaluator": Evaluator(), "select": "top1", "goal": 1.0}
    model, fresh = Separable(), Separable()
    assert overfit(model, batch, optimizer=torch.optim.Adam(model.parameters(), lr=0.1), **options) > 1
    assert torch.equal(model(batch[0]).argmax(1), batch[1])
    stuck = torch.optim.Adam(fresh.parameters(), lr=0.0)
    assert overfit(fresh, batch, optimizer=stuck, max_steps=5, **options) is None
    stop = StopSignal()
    stop.received = signal.SIGTERM  # as after an exception that was dropped
    with pytest.raises(Stopped):
        overfit(fresh, batch, optimizer=stuck, stop=stop, **options)


def test_several_losses_train_by_their_sum_and_are_logged_apart(tmp_path):
    def two(model, images, targets):
        loss = cross_entropy(model, images, targets)["class"]
        return {"class": 0.25 * loss, "box": 0.75 * loss}

    one, _, _ = fit_small(tmp_path / "a", epochs=1)
    both, _, _ = fit_small(tmp_path / "b", epochs=1, losses=two)
    torch.testing.assert_close(both.head.weight, one.head.weight)
    first = metric_lines(tmp_path / "b")[0]
    assert first["train/class_loss"] + first["train/box_loss"] == pytest.approx(first["train/loss"])
    assert first["train/box_loss"] == pytest.approx(3 * first["train/class_loss"])
    assert not any(tag.endswith("_loss") for tag in metric_lines(tmp_path / "a")[0])


def test_targets_of_any_form_reach_losses_and_evaluator(tmp_path):
    def nested(batch):
        images, targets = zip(*batch, strict=True)
        return torch.stack(images), [{"label": target, "name": "a"} for target in targets]

    def losses(model, images, targets):
        return cross_entropy(model, images, torch.stack([target["label"] for target in targets]))

    class Labels(Evaluator):
        def update(self, model, images, targets):
            super().update(model, images, torch.stack([target["label"] for target in targets]))

    loader = DataLoader(make_loader().dataset, batch_size=4, collate_fn=nested)
    _, result, _ = fit_small(tmp_path, train=loader, val=loader, losses=losses, evaluator=Labels(), epochs=1)
    assert result.best["top1"] > 0

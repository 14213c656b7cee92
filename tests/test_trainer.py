import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tests.helpers import Evaluator, Separable, cross_entropy, make_loader, metric_lines
from vpt.engine.checkpoint import Checkpoints
from vpt.engine.monitor import Monitor
from vpt.engine.optim import MovingAverage, warmup_cosine
from vpt.engine.state import RunState
from vpt.engine.steps import FitSettings
from vpt.engine.trainer import evaluate, fit, overfit

NUM_TRAIN, BATCH = 22, 5
EXTRA = {}  # further arguments of fit()


def run_fit(
    tmp_path,
    model=None,
    train=None,
    val=None,
    lr=0.5,
    average=None,
    warmup=2,
    losses=cross_entropy,
    evaluator=None,
    **settings,
):
    model = model or Separable()
    train, val = train or make_loader(), val or make_loader(seed=1)
    options = FitSettings(**{"epochs": 4, "select": "top1", "log_every": 1, **settings})
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": lr, "name": "head"}])
    schedule = warmup_cosine(optimizer, num_steps=options.epochs * len(train), num_warmup_steps=warmup)
    state = RunState(dict(model.named_parameters()), optimizer, schedule, average(model) if average else None)
    with Monitor(tmp_path) as monitor:
        result = fit(
            model,
            train,
            val,
            losses=losses,
            evaluator=evaluator or Evaluator(),
            state=state,
            settings=options,
            checkpoints=Checkpoints(tmp_path),
            monitor=monitor,
            **EXTRA,
        )
    return model, result


def test_training_lowers_the_loss_and_counts_epochs_and_steps(tmp_path):
    _, result = run_fit(tmp_path, epochs=6)
    losses = [line["train/loss"] for line in metric_lines(tmp_path) if "train/loss" in line]
    assert (result.epochs, result.steps) == (6, 6 * math.ceil(NUM_TRAIN / BATCH))
    assert len(losses) == result.steps
    assert losses[-1] < losses[0] / 2


def test_the_model_ends_with_the_weights_that_val_chose(tmp_path):
    val = make_loader(seed=1)
    model, result = run_fit(tmp_path, val=val, epochs=8, lr=20.0)
    tops = [line["val/top1"] for line in metric_lines(tmp_path) if "val/top1" in line]
    assert result.best["top1"] == max(tops)
    assert tops[result.best_epoch - 1] == max(tops)
    assert evaluate(model, val, Evaluator()) == result.best
    assert result.best_step == result.best_epoch * math.ceil(NUM_TRAIN / BATCH)


def test_of_equal_val_metrics_the_lower_loss_is_better(tmp_path):
    val = make_loader(num=1)
    _, result = run_fit(tmp_path, val=val, epochs=5)
    found = [(line["val/top1"], -line["val/loss"]) for line in metric_lines(tmp_path) if "val/top1" in line]
    assert found[result.best_epoch - 1] == max(found)


def test_early_stopping_waits_for_its_patience(tmp_path):
    _, result = run_fit(tmp_path, epochs=50, lr=1e-12, patience=3)
    assert result.epochs == result.best_epoch + 3


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    large, _ = run_fit(tmp_path / "a", train=make_loader(batch_size=NUM_TRAIN), epochs=1, warmup=0)
    model = Separable()
    small, result = run_fit(
        tmp_path / "b", model=model, train=make_loader(batch_size=BATCH), epochs=1, accumulation=5, warmup=0
    )
    assert result.steps == 1
    torch.testing.assert_close(small.head.weight, large.head.weight)


def test_gradients_are_clipped_to_their_norm(tmp_path):
    before = Separable().head.weight.detach().clone()
    model, _ = run_fit(tmp_path, train=make_loader(batch_size=NUM_TRAIN), epochs=1, clip_norm=1e-3, lr=1.0)
    change = torch.cat([(model.head.weight - before).flatten(), torch.zeros(1)]).norm()
    assert 0 < change <= 1e-3 + 1e-6


def test_val_sees_the_moving_average_and_the_best_holds_it(tmp_path):
    val = make_loader(seed=1)
    averages = []

    def average(model):
        averages.append(MovingAverage(dict(model.named_parameters()), decay=0.9))
        return averages[0]

    model, result = run_fit(tmp_path, val=val, epochs=1, average=average)
    assert torch.equal(model.head.weight, averages[0].average["head.weight"])
    assert evaluate(model, val, Evaluator()) == result.best


def test_a_loss_that_is_not_finite_stops_and_names_step_and_learning_rate(tmp_path):
    loader = make_loader()
    loader.dataset.tensors[0][0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 1, epoch 1 \(lr/head .*lower optim\.prompt_lr"
    ):
        run_fit(tmp_path, train=loader)
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "last").exists()


def test_evaluation_is_in_eval_mode_without_gradients_and_whatever_the_batches(tmp_path):
    model = Separable().train()
    values = [evaluate(model, make_loader(batch_size=size), Evaluator()) for size in (1, 7, 100)]
    assert not any(model.modes)
    assert values[0] == pytest.approx(values[1])
    assert values[1] == pytest.approx(values[2])


def test_passes_can_be_cut_short(tmp_path):
    model, result = run_fit(tmp_path, epochs=1, max_batches=2)
    assert result.steps == 2
    assert model.modes.count(False) == 2


def test_bfloat16_autocast_reaches_the_forward_pass(tmp_path):
    seen = []

    class Watching(Separable):
        def forward(self, images):
            logits = super().forward(images)
            seen.append(logits.dtype)
            return logits

    run_fit(tmp_path, model=Watching(), epochs=1, precision="bf16")
    assert set(seen) == {torch.bfloat16}


def test_the_pace_memory_and_learning_rates_are_logged(tmp_path):
    run_fit(tmp_path, epochs=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("perf/images_per_s")[0].value > 0
    assert 0 <= events.Scalars("perf/data_wait_fraction")[0].value <= 1
    assert events.Scalars("memory/peak_mib")[0].value > 10
    line = metric_lines(tmp_path)[0]
    assert line["lr/head"] == pytest.approx(0.25)
    assert line["train/grad_norm"] > 0


def test_one_batch_is_learned_or_the_answer_is_none():
    batch = next(iter(make_loader()))
    options = {"losses": cross_entropy, "evaluator": Evaluator(), "select": "top1", "goal": 1.0}
    model = Separable()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    assert overfit(model, batch, optimizer=optimizer, **options) > 1
    assert torch.equal(model(batch[0]).argmax(1), batch[1])
    fresh = Separable()
    stuck = torch.optim.Adam(fresh.parameters(), lr=0.0)
    assert overfit(fresh, batch, optimizer=stuck, max_steps=5, **options) is None


def test_several_losses_train_by_their_sum_and_are_logged_apart(tmp_path):
    def two(model, images, targets):
        loss = cross_entropy(model, images, targets)["class"]
        return {"class": 0.25 * loss, "box": 0.75 * loss}

    one, _ = run_fit(tmp_path / "a", epochs=1)
    both, _ = run_fit(tmp_path / "b", epochs=1, losses=two)
    torch.testing.assert_close(both.head.weight, one.head.weight)
    first = metric_lines(tmp_path / "b")[0]
    assert first["train/class_loss"] + first["train/box_loss"] == pytest.approx(first["train/loss"])
    assert first["train/box_loss"] == pytest.approx(3 * first["train/class_loss"])
    assert not any(tag.endswith("_loss") for tag in metric_lines(tmp_path / "a")[0])


def test_nan_is_worse_than_any_metric_and_needs_no_loss(tmp_path):
    class Says(Evaluator):
        said = iter([math.nan, 0.0, math.nan])

        def compute(self):
            return {"map": next(self.said)}

    _, result = run_fit(tmp_path, epochs=3, select="map", evaluator=Says())
    assert result.best_epoch == 2
    assert result.best == {"map": 0.0}


def test_targets_of_any_form_reach_losses_and_evaluator(tmp_path):
    seen = []

    def nested(batch):
        images, targets = zip(*batch, strict=True)
        return torch.stack(images), [{"label": target, "name": "a"} for target in targets]

    def losses(model, images, targets):
        seen.append(targets)
        return cross_entropy(model, images, torch.stack([target["label"] for target in targets]))

    class Reads(Evaluator):
        def update(self, model, images, targets):
            super().update(model, images, torch.stack([target["label"] for target in targets]))

    loader = DataLoader(make_loader().dataset, batch_size=4, collate_fn=nested)
    _, result = run_fit(tmp_path, train=loader, val=loader, losses=losses, evaluator=Reads(), epochs=1)
    assert result.best["top1"] > 0
    assert seen[0][0]["name"] == "a"


def test_each_evaluation_on_val_is_followed_by_a_call(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(EXTRA, "on_epoch", lambda epoch, step: calls.append((epoch, step)))
    run_fit(tmp_path, epochs=2)
    assert calls == [(1, 5), (2, 10)]

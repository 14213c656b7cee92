import math

import pytest
import torch
from torch import nn

from vpt.engine.optim import MovingAverage, make_optimizer, warmup_cosine


def parts():
    return {"prompt": ([nn.Parameter(torch.ones(2, 3, 4))], 1e-2), "head": (list(nn.Linear(4, 5).parameters()), 1e-3)}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_each_part_has_its_learning_rate_and_biases_have_no_weight_decay(name):
    optimizer = make_optimizer(name, parts(), weight_decay=0.1, momentum=0.9)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {"prompt": (1e-2, 0.1), "head": (1e-3, 0.1), "head_bias": (1e-3, 0.0)}


def test_an_unknown_optimiser_and_an_empty_model_are_refused():
    with pytest.raises(ValueError, match=r"name='lion': must be one of adamw, sgd"):
        make_optimizer("lion", parts(), weight_decay=0, momentum=0)
    with pytest.raises(ValueError, match="parts: none has parameters"):
        make_optimizer("adamw", {"prompt": ([], 1.0)}, weight_decay=0, momentum=0)


def learning_rates(num_steps, num_warmup_steps):
    optimizer = make_optimizer("sgd", parts(), weight_decay=0, momentum=0)
    schedule = warmup_cosine(optimizer, num_steps=num_steps, num_warmup_steps=num_warmup_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
        optimizer.step()
        schedule.step()
    return rates


def test_warm_up_does_not_start_at_zero_and_the_cosine_ends_near_zero():
    rates = learning_rates(20, 4)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([(1 + math.cos(math.pi * t / 16)) / 2 for t in range(16)])
    assert 0 < rates[-1] < 0.02


def test_a_warm_up_longer_than_the_run_and_a_run_of_one_step_still_train():
    assert all(rate > 0 for rate in learning_rates(3, 10))
    assert learning_rates(1, 1) == [1.0]


def test_the_moving_average_is_the_recursion_of_its_definition():
    parameter = nn.Parameter(torch.zeros(3))
    average = MovingAverage({"w": parameter}, decay=0.5)
    expected = torch.zeros(3)
    for step, value in enumerate([1.0, 5.0, -2.0, 4.0]):
        parameter.data.fill_(value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.swapped_in():
        torch.testing.assert_close(parameter.data, expected)
    assert torch.equal(parameter.data, torch.full((3,), 4.0))

"""Measurements of FLOPs, memory and time, against counts by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vpt.engine import measure

CPU = torch.device("cpu")


def test_flops_of_a_linear_layer_are_two_for_each_multiply_and_add():
    model, inputs = nn.Linear(8, 4), torch.randn(3, 8)
    assert measure.count_flops(measure.inference(model, inputs)) == 2 * 3 * 8 * 4


def test_a_training_step_adds_the_backward_products_and_changes_tuned_parameters_only():
    model = nn.Sequential(nn.Linear(8, 5).requires_grad_(False), nn.Linear(5, 4))
    optimizer = torch.optim.AdamW(model[1].parameters())
    before = [parameter.clone() for parameter in model.parameters()]
    step = measure.training_step(model, torch.randn(3, 8), torch.tensor([0, 1, 2]), optimizer)
    frozen, tuned = 2 * 3 * 8 * 5, 2 * (2 * 3 * 5 * 4)  # frozen: forward only; tuned: its weight too
    assert measure.count_flops(step) == frozen + tuned
    moved = [not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flops_of_attention_are_those_of_its_two_products():
    queries, keys = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 11, 16)
    counted = measure.count_flops(lambda: F.scaled_dot_product_attention(queries, keys, keys))
    assert counted == 2 * (2 * 2 * 3 * 7 * 11 * 16)
    measure.check_attention_is_counted(CPU, torch.float32)
    measure.check_attention_is_counted(CPU, torch.bfloat16)


def test_attention_that_torch_does_not_count_is_refused(monkeypatch):
    monkeypatch.setattr(measure, "count_flops", lambda function: function() and 0)
    with pytest.raises(ValueError, match=r"device=cpu: .*does not count"):
        measure.check_attention_is_counted(CPU, torch.float32)


def test_saved_bytes_leave_out_parameters_and_their_views():
    model, inputs = nn.Linear(8, 4, bias=False), torch.randn(3, 8, requires_grad=True)
    held = measure.model_tensors(model)
    assert measure.count_saved_bytes(lambda: model(inputs).sum(), held) == 3 * 8 * 4  # the inputs; the weight is held
    assert measure.count_saved_bytes(lambda: model(inputs).sum(), []) == 3 * 8 * 4 + 8 * 4 * 4
    assert measure.count_saved_bytes(lambda: F.linear(inputs, model.weight[2:]).sum(), held) == 3 * 8 * 4


def test_saved_bytes_count_the_whole_storage_of_views_once():
    inputs = torch.randn(4, 6, requires_grad=True)

    def loss():
        doubled = inputs * 2
        return (doubled[:1] * doubled[1:2]).sum() + doubled[3].exp().sum()

    assert measure.count_saved_bytes(loss, []) == 4 * 6 * 4 + 6 * 4  # `doubled` and the result of exp()


def test_saved_bytes_of_a_training_loss_are_those_of_the_tuned_layer_and_the_loss():
    model = nn.Sequential(nn.Linear(8, 5).requires_grad_(False), nn.Linear(5, 4))
    loss = measure.training_loss(model, torch.randn(3, 8), torch.tensor([0, 1, 2]))
    by_hand = 3 * 5 * 4 + 3 * 4 * 4 + 3 * 8 + 4  # inputs of the tuned layer, log-probabilities, targets, their weight
    assert measure.count_saved_bytes(loss, measure.model_tensors(model)) == by_hand


def test_held_bytes_are_parameters_buffers_and_two_moments_with_a_step_count():
    model = nn.Linear(8, 4)
    model.register_buffer("scale", torch.ones(2))
    model.register_buffer("view", model.scale[:1])
    optimizer = torch.optim.AdamW(model.parameters())
    measure.training_step(model, torch.randn(3, 8), torch.tensor([0, 1, 2]), optimizer)()
    assert measure.count_held_bytes(model, optimizer) == 36 * 4 + 2 * 4 + 2 * 36 * 4 + 2 * 4


def test_peak_memory_is_known_on_cuda_only():
    assert measure.peak_bytes(lambda: None, CPU) is None


def test_functions_run_in_turns_and_each_round_is_yielded_when_it_ends():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    rounds = measure.time_rounds(functions, 2, CPU, after_call=lambda: calls.append("."))
    assert calls == []
    first = next(rounds)
    assert "".join(calls) == "a.b.c."
    assert list(first) == ["a", "b", "c"]
    assert all(seconds >= 0 for seconds in first.values())
    assert len(list(rounds)) == 1
    assert "".join(calls) == "a.b.c.a.b.c."


def test_the_machine_is_described_with_its_threads_and_versions():
    machine = measure.describe_machine(CPU)
    assert machine["cpu"]
    assert machine["gpu"] is None
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__.partition("+")[0]

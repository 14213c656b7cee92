import pytest
import torch
from torch import nn

from vpt.engine.watch import RowWatch


def test_norms_gradients_and_update_ratios_are_those_of_each_row():
    parameter = nn.Parameter(torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]]))
    watch = RowWatch("prompt", parameter, ["block_00", "block_07"])
    parameter.grad = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    watch.before_step()
    parameter.data -= parameter.grad
    values = watch.after_step()
    assert values == {
        "prompt_norm/block_00": 5.0,
        "prompt_norm/block_07": 2.0,
        "prompt_grad_norm/block_00": 1.0,
        "prompt_grad_norm/block_07": 3.0,
        "prompt_update_ratio/block_00": pytest.approx(0.2),
        "prompt_update_ratio/block_07": pytest.approx(1.5),
    }


def test_names_must_fit_the_rows():
    with pytest.raises(ValueError, match="1 row names for a parameter of 2 rows"):
        RowWatch("prompt", nn.Parameter(torch.zeros(2, 3)), ["only"])

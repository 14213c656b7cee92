import pytest
import torch
from torch import nn

from vpt.engine.checkpoint import Checkpoints


def test_best_and_last_are_kept_apart_and_restored_with_their_metadata(tmp_path):
    parameter = nn.Parameter(torch.zeros(3))
    checkpoints = Checkpoints(tmp_path, {"w": parameter})
    checkpoints.save("best", {"epoch": 1})
    parameter.data.fill_(2.0)
    checkpoints.save("last", {"epoch": 2})
    assert checkpoints.restore("best") == {"epoch": 1}
    assert torch.equal(parameter.data, torch.zeros(3))
    assert checkpoints.restore("last") == {"epoch": 2}
    assert torch.equal(parameter.data, torch.full((3,), 2.0))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Checkpoints(tmp_path, {"w": nn.Parameter(torch.zeros(3))}).save("best", {})
    with pytest.raises(ValueError, match="w has shape"):
        Checkpoints(tmp_path, {"w": nn.Parameter(torch.zeros(4))}).restore("best")
    with pytest.raises(ValueError, match="the model tunes"):
        Checkpoints(tmp_path, {"v": nn.Parameter(torch.zeros(3))}).restore("best")
    with pytest.raises(FileNotFoundError):
        Checkpoints(tmp_path, {}).restore("last")


def test_a_checkpoint_of_our_own_may_be_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("vpt.files.MAX_BYTES", 10)
    checkpoints = Checkpoints(tmp_path, {"w": nn.Parameter(torch.ones(300))})
    checkpoints.save("best", {"epoch": 1})
    assert checkpoints.restore("best") == {"epoch": 1}

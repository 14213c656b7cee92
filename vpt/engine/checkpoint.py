"""Checkpoints: `last/` and `best/` of a run folder, each with the tuned parameters and what is known of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt.files import read_tensors, write_tensors


class Checkpoints:
    """The two checkpoints of a run: `last/tuned.safetensors` and `best/tuned.safetensors`.

    Args:
        run_dir: The run folder.
        parameters: The tuned parameters, by name.
    """

    def __init__(self, run_dir: Path, parameters: Mapping[str, nn.Parameter]) -> None:
        self.run_dir = run_dir
        self.parameters = dict(parameters)

    def save(self, which: str, metadata: Mapping[str, Any]) -> None:
        """Write the parameters as they are now.

        Args:
            which: "last" or "best".
            metadata: Epoch, step and metrics, as JSON values.
        """
        write_tensors(self.path(which), self.parameters, metadata)

    def restore(self, which: str) -> dict[str, Any]:
        """Put the values of a checkpoint into the parameters; return its metadata.

        Raises:
            FileNotFoundError: It was not written.
            ValueError: It is damaged or of another model.
        """
        tensors, metadata = read_tensors(self.path(which), max_bytes=math.inf)
        if set(tensors) != set(self.parameters):
            raise ValueError(f"{self.path(which)}: holds {sorted(tensors)}, the model tunes {sorted(self.parameters)}")
        for name, parameter in self.parameters.items():
            _copy(self.path(which), name, parameter, tensors[name])
        return metadata

    def path(self, which: str) -> Path:
        """Where a checkpoint is."""
        return self.run_dir / which / "tuned.safetensors"


def _copy(path: Path, name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
    if tensor.shape != parameter.shape:
        raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model wants {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(tensor)

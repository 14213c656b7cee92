"""Norms of the rows of a parameter, of its gradient, and of the change by an optimiser step."""

from collections.abc import Sequence

import torch
from torch import nn


class RowWatch:
    """Norms of the rows of one parameter (L, ...), such as the prompt tokens of each block.

    `name`, such as "prompt", starts the tags; `rows` are L names, such as "block_07", ValueError for another number.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rows: Sequence[str]) -> None:
        if len(rows) != len(parameter):
            raise ValueError(f"{len(rows)} row names for a parameter of {len(parameter)} rows")
        self.name, self.parameter, self.rows = name, parameter, list(rows)

    @torch.no_grad()
    def before_step(self) -> None:
        """Store the values and the gradient norms that the optimiser is about to use."""
        self._before = self.parameter.detach().clone()
        gradient = self.parameter.grad
        self._gradient_norms = torch.zeros(len(self.rows)) if gradient is None else _row_norms(gradient)

    @torch.no_grad()
    def after_step(self) -> dict[str, float]:
        """`{name}_norm/`, `{name}_grad_norm/` and `{name}_update_ratio/` (norm of the change / norm) of every row."""
        norms = _row_norms(self._before)
        changes = _row_norms(self.parameter.detach() - self._before)
        values = {"norm": norms, "grad_norm": self._gradient_norms, "update_ratio": changes / norms.clamp(min=1e-12)}
        return {
            f"{self.name}_{quantity}/{row}": value
            for quantity, column in values.items()
            for row, value in zip(self.rows, column.tolist(), strict=True)
        }


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = rows.detach().float().flatten(1).norm(dim=1)
    return norms.cpu()

"""Mix: the prompts of a batch whose images belong to different tasks, as keys, values and a mask for each block.

A deep prompt is keys and values that join those of the images (`attention.py`), so images of different tasks differ in
a few rows of keys and values only, and go through a block together. Shorter prompts are padded, and a mask takes the
padding out of the softmax. The tokens of shallow prompts travel with the sequence, behind the prefix tokens, in slots
that are padded and masked in the same way.

Legend: B images, P prompt tokens, S slots, N tokens in the sequence with the slots, D embed_dim, h heads, d = D / h.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.models.attention import KeysValues
from vpt.models.detector import DetectionModel, Sizes
from vpt.models.task_file import Model
from vpt.models.task_schema import TaskMetadata
from vpt.models.vit import pools_prefix_only

Maps = dict[int, Tensor]  # patch tokens after some blocks: block -> (B, D, rows, columns)


@dataclass(frozen=True, eq=False)
class HeldTask:
    """A task in memory, on a backbone that it shares with others.

    Args:
        model: Prompt and head on the backbone, in eval mode.
        metadata: What the task file says of itself.
        keys_values: Of a deep or kv prompt, by block and by how many tokens are read of it (None is all of them).
        is_shared: Whether it may go through the backbone together with others.
    """

    model: Model
    metadata: TaskMetadata
    keys_values: Mapping[tuple[int, int | None], KeysValues]
    is_shared: bool

    @property
    def first(self) -> int:
        """The block at which the task begins to differ from the bare backbone: its first prompted one, or none."""
        prompt = self.model.backbone.prompt
        return self.model.backbone.depth if prompt is None else prompt.blocks[0]

    @property
    def taps(self) -> tuple[int, ...]:
        """Blocks that a detector looks at; none for a classifier."""
        return self.model.taps if isinstance(self.model, DetectionModel) else ()

    @property
    def last(self) -> int:
        """The block behind the last one that the task needs."""
        return max(self.taps) + 1 if self.taps else self.model.backbone.depth

    @property
    def travelling(self) -> Tensor | None:
        """Tokens (P, D) of a shallow prompt."""
        prompt = self.model.backbone.prompt
        return prompt.tokens[0] if prompt is not None and prompt.kind == "shallow" else None

    def finish(self, features: Tensor | None, maps: Maps, sizes: Sizes) -> Any:
        """Logits (B, K) of features (B, D), or detections of maps."""
        if isinstance(self.model, DetectionModel):
            return self.model.forward_head([maps[tap] for tap in self.taps], sizes)
        assert features is not None
        return self.model.forward_head(features)

    def run(self, images: Tensor, sizes: Sizes) -> Any:
        """The same of images, in a pass of its own."""
        return self.model(images, sizes=sizes) if isinstance(self.model, DetectionModel) else self.model(images)


def keys_values_of(model: Model) -> dict[tuple[int, int | None], KeysValues]:
    """Keys and values of a prompt in each of its blocks, for all ways in which a block may be read."""
    vit, prompt = model.backbone.vit, model.backbone.prompt
    if prompt is None or prompt.kind == "shallow":
        return {}
    dtype = next(vit.parameters()).dtype
    readings: dict[int, list[int | None]] = {index: [None] for index in prompt.blocks}
    if pools_prefix_only(vit) and len(vit.blocks) - 1 in readings:
        readings[len(vit.blocks) - 1].append(vit.num_prefix_tokens)
    with torch.no_grad():
        return {
            (index, num_read): prompt.keys_values(vit.blocks[index], index, 1, dtype, num_read)
            for index, ways in readings.items()
            for num_read in ways
        }


class Mix:
    """The prompts of a batch.

    Args:
        rows: The task of each image; none at all for tokens that no prompt enters.
        num_prefix_tokens: Of the backbone.

    Attributes:
        num_slots: S, tokens of shallow prompts that the sequence holds.
    """

    def __init__(self, rows: Sequence[HeldTask], num_prefix_tokens: int) -> None:
        self.rows, self.tasks = rows, list(dict.fromkeys(rows))
        self.num_prefix_tokens = num_prefix_tokens
        self.travelling = {task: task.travelling for task in self.tasks}
        self.num_slots = max((len(tokens) for tokens in self.travelling.values() if tokens is not None), default=0)
        self._masks: dict[tuple[int, ...], Tensor | None] = {}

    def insert(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N - S, D) with the slots, (B, N, D)."""
        if self.num_slots == 0:
            return tokens
        empty = tokens.new_zeros(0, tokens.shape[-1])
        slots = {task: own if own is not None else empty for task, own in self.travelling.items()}
        padded = {task: F.pad(own, (0, 0, 0, self.num_slots - len(own))).to(tokens) for task, own in slots.items()}
        prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        return torch.cat([prefix, torch.stack([padded[task] for task in self.rows]), patches], dim=1)

    def remove(self, tokens: Tensor) -> Tensor:
        """Tokens without the slots."""
        if self.num_slots == 0 or tokens.shape[1] <= self.num_prefix_tokens:
            return tokens
        behind = self.num_prefix_tokens + self.num_slots
        return torch.cat([tokens[:, : self.num_prefix_tokens], tokens[:, behind:]], dim=1)

    def at(self, block: int, num_read: int | None, tokens: Tensor) -> tuple[KeysValues | None, Tensor | None]:
        """Keys and values of a block's prompts, (1 or B, h, P, d), and the mask (B, 1, 1, P + N); None if not needed.

        Args:
            block: Its index.
            num_read: How many tokens are read after it; None is all of them.
            tokens: The sequence (B, N, D) that enters it.
        """
        parts = {task: task.keys_values.get((block, num_read)) for task in self.tasks}
        if len({part[0].shape[1] for part in parts.values() if part is not None}) > 1:  # one has keys of its own
            parts = {task: task.keys_values.get((block, None)) for task in self.tasks}
        lengths = {task: 0 if part is None else part[0].shape[2] for task, part in parts.items()}
        counts = tuple(lengths[task] for task in self.rows)
        if counts not in self._masks:
            self._masks[counts] = self._mask(counts, tokens)
        present = [part for part in parts.values() if part is not None]
        if not present:
            return None, self._masks[counts]
        joined = present[0] if len(self.tasks) == 1 else self._join(parts, max(counts))
        return joined, self._masks[counts]

    def _join(self, parts: Mapping[HeldTask, KeysValues | None], longest: int) -> KeysValues:
        """Keys and values of each row's own task, padded to the longest."""
        shape = next(part[0] for part in parts.values() if part is not None)

        def rows(which: int) -> Tensor:
            own = {
                task: shape.new_zeros(1, shape.shape[1], longest, shape.shape[3])
                if part is None
                else F.pad(part[which], (0, 0, 0, longest - part[which].shape[2]))
                for task, part in parts.items()
            }
            return torch.cat([own[task] for task in self.rows])

        keys = rows(0)
        is_absorbed = all(part is None or part[0] is part[1] for part in parts.values())
        return keys, keys if is_absorbed else rows(1)

    def _mask(self, counts: Sequence[int], tokens: Tensor) -> Tensor | None:
        """-inf for padding among `counts` prompt tokens and among slots; None where nothing is padded."""
        slots = [0 if own is None else len(own) for own in (self.travelling[task] for task in self.rows)]
        longest = max(counts, default=0)
        if min(counts, default=0) == longest and min(slots, default=0) == self.num_slots:
            return None
        columns = [_padding(counts, longest, tokens), tokens.new_zeros(len(counts), tokens.shape[1])]
        columns[1][:, self.num_prefix_tokens : self.num_prefix_tokens + self.num_slots] = _padding(
            slots, self.num_slots, tokens
        )
        return torch.cat(columns, dim=1)[:, None, None]


def _padding(counts: Sequence[int], longest: int, like: Tensor) -> Tensor:
    """(B, longest): 0 for the first `counts` columns of each row and -inf behind them."""
    given = torch.tensor(counts, device=like.device)[:, None]
    behind = torch.arange(longest, device=like.device) >= given
    return torch.zeros_like(behind, dtype=like.dtype).masked_fill(behind, -torch.inf)

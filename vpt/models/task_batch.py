"""TaskBatch: the prompts of a batch whose images belong to different tasks, as one prompt source of `block_loop`.

A deep prompt is keys and values that join those of the images (`attention.py`), so images of different tasks differ in
a few rows of keys and values only, and pass a block together. Shorter prompts are padded, and a mask takes the padding
out of the softmax. The tokens of shallow prompts are carried in the sequence, behind the prefix tokens, in slots that
are padded and masked in the same way.

Legend: B images, P prompt tokens, S slots, N tokens in the sequence with the slots, D embed_dim, h heads, d = D / h.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.models.attention import KeysValues
from vpt.models.block_loop import BlockInput, insert_prompt
from vpt.models.task_model import TaskModel
from vpt.models.task_schema import TaskMetadata
from vpt.models.vit import ViT, pools_prefix_only


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task in memory: prompt and head, in eval mode, on a backbone that it shares with others.

    Keys and values, of a deep or kv prompt, are by block and number of tokens read after it (None: all). Images of a
    task with `is_shared` may share a pass of the backbone with those of other tasks.
    """

    model: TaskModel
    metadata: TaskMetadata
    keys_values: Mapping[tuple[int, int | None], KeysValues]
    is_shared: bool

    @property
    def last(self) -> int:
        """The block behind the last one that the task needs."""
        return max(self.model.out_indices) + 1 if self.model.out_indices else self.model.backbone.depth

    @property
    def first(self) -> int:
        """The first block whose result differs from that of the bare backbone."""
        prompt = self.model.backbone.prompt
        return self.last if prompt is None else min(prompt.blocks[0], self.last)

    @property
    def carried(self) -> Tensor | None:
        """Tokens (P, D) of a shallow prompt."""
        prompt = self.model.backbone.prompt
        return prompt.tokens[0] if prompt is not None and prompt.variant == "shallow" else None


def keys_values_of(model: TaskModel) -> dict[tuple[int, int | None], KeysValues]:
    """Keys and values of a prompt in each of its blocks; of the last block also for reading prefix tokens only."""
    vit, prompt = model.backbone.vit, model.backbone.prompt
    if prompt is None or prompt.variant == "shallow":
        return {}
    dtype = next(vit.parameters()).dtype
    readings: dict[int, list[int | None]] = {index: [None] for index in prompt.blocks}
    if pools_prefix_only(vit) and len(vit.blocks) - 1 in readings:
        readings[len(vit.blocks) - 1].append(vit.num_prefix_tokens)
    with torch.no_grad():
        return {
            (index, num_read): prompt.keys_values(vit.blocks[index], index, 1, dtype, num_read)
            for index, variants in readings.items()
            for num_read in variants
        }


class TaskBatch:
    """The prompts of a batch, a prompt source; `rows` has the task of each image, and `num_carried` is S."""

    def __init__(self, vit: ViT, rows: Sequence[LoadedTask]) -> None:
        self.vit, self.rows, self.tasks = vit, rows, list(dict.fromkeys(rows))
        self.carried = {task: task.carried for task in self.tasks}
        self.num_carried = max((len(tokens) for tokens in self.carried.values() if tokens is not None), default=0)
        self._masks: dict[tuple[int, ...], Tensor | None] = {}

    def enter(self, index: int, tokens: Tensor, num_read: int | None) -> BlockInput:
        """Keys and values of the prompts, (1 or B, h, P, d), and the mask; at block 0 the slots are inserted."""
        if index == 0 and self.num_carried:
            tokens = insert_prompt(self.vit, tokens, self._slots(tokens))
        parts = {task: task.keys_values.get((index, num_read)) for task in self.tasks}
        if len({part[0].shape[1] for part in parts.values() if part is not None}) > 1:
            # One task has learned keys, which cannot be absorbed, so none is in this block.
            parts = {task: task.keys_values.get((index, None)) for task in self.tasks}
        lengths = {task: 0 if part is None else part[0].shape[2] for task, part in parts.items()}
        counts = tuple(lengths[task] for task in self.rows)
        if counts not in self._masks:
            self._masks[counts] = self._mask(counts, tokens)
        present = [part for part in parts.values() if part is not None]
        joined = present[0] if present and len(self.tasks) == 1 else self._join(parts, max(counts)) if present else None
        return BlockInput(tokens, self.num_carried, joined, self._masks[counts])

    def _slots(self, tokens: Tensor) -> Tensor:
        """Tokens of shallow prompts of each row, padded: (B, S, D)."""
        empty = tokens.new_zeros(0, tokens.shape[-1])
        own = {task: empty if given is None else given for task, given in self.carried.items()}
        padded = {task: F.pad(given, (0, 0, 0, self.num_carried - len(given))) for task, given in own.items()}
        return torch.stack([padded[task] for task in self.rows])

    def _join(self, parts: Mapping[LoadedTask, KeysValues | None], longest: int) -> KeysValues:
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
        slots = [0 if (own := self.carried[task]) is None else len(own) for task in self.rows]
        longest, prefix = max(counts, default=0), self.vit.num_prefix_tokens
        if min(counts, default=0) == longest and min(slots, default=0) == self.num_carried:
            return None
        sequence = tokens.new_zeros(len(counts), tokens.shape[1])
        sequence[:, prefix : prefix + self.num_carried] = _padding(slots, self.num_carried, tokens)
        return torch.cat([_padding(counts, longest, tokens), sequence], dim=1)[:, None, None]


def _padding(counts: Sequence[int], longest: int, like: Tensor) -> Tensor:
    """(B, longest): 0 for the first `counts` columns of each row and -inf behind them."""
    behind = torch.arange(longest, device=like.device) >= torch.tensor(counts, device=like.device)[:, None]
    return torch.zeros_like(behind, dtype=like.dtype).masked_fill(behind, -torch.inf)

"""Exported models: models whose inputs and outputs are named tensors, so that torch can trace them.

An `ExportedModel` is one task: images -> logits, or boxes and scores. Its deep prompt is fixed: the keys and values of
each block. A `SharedModel` is the backbone alone and takes the prompts and heads of any number of tasks as inputs; in
one batch each image may belong to another task.

Legend: B images, T tasks, L blocks of the backbone, P prompt tokens, S shallow prompt tokens, N sequence, D embed_dim,
K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from vpt.models.attention import prompt_keys_values, why_not_fast
from vpt.models.backbone import LivePrompt, PromptedViT
from vpt.models.block_loop import NO_PROMPT, BlockInput, insert_prompt, pool, read_features, run_images
from vpt.models.task_model import TaskModel
from vpt.models.tensor_cache import TensorCache
from vpt.models.vit import ViT, name_of, pools_prefix_only, preprocessing_of

Axes = Mapping[str, dict[int, str]]  # by name of a tensor: the axes whose length is free, and a name for each


class Traceable(nn.Module, ABC):
    """A model that torch can trace. It holds the modules that it is made of, not copies, frozen and in eval mode."""

    # Both in their order.
    inputs: ClassVar[Axes] = MappingProxyType({"images": {0: "batch"}})
    outputs: Axes

    @abstractmethod
    def examples(self) -> dict[str, Tensor]:
        """Valid inputs by name, with two or more entries along every free axis."""


class FixedPrompt(nn.Module):
    """A prompt source with keys and values in buffers, for `num_read` tokens of the last block; None is all."""

    def __init__(self, backbone: PromptedViT, num_read: int | None) -> None:
        super().__init__()
        prompt = backbone.prompt
        assert prompt is not None
        with torch.no_grad():
            self.live = LivePrompt(backbone.vit, prompt, backbone.impl, TensorCache())
            for index in [index for index, path in backbone.paths.items() if path == "kv"]:
                last = num_read if index == backbone.depth - 1 else None
                pair = prompt.keys_values(backbone.vit.blocks[index], index, 1, torch.float32, last)
                for name, tensor in zip(("keys", "values"), pair, strict=True):
                    self.register_buffer(f"{name}_{index}", tensor.clone(memory_format=torch.contiguous_format))
        self.num_carried = self.live.num_carried

    def enter(self, index: int, tokens: Tensor, num_read: int | None) -> BlockInput:
        """The buffers of a block; what has none is inserted."""
        if f"keys_{index}" not in self._buffers:
            return self.live.enter(index, tokens, num_read)
        return BlockInput(tokens, keys_values=(self.get_buffer(f"keys_{index}"), self.get_buffer(f"values_{index}")))


class ExportedModel(Traceable):
    """Images (B, 3, H, W) -> the raw outputs of one task, see `TaskModel.forward_tensors`.

    ValueError if the model cannot be traced, or the backbone is not held in float32.
    """

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        if (reason := model.why_not_exported(model.layout)) is not None:
            raise ValueError(reason)
        _check_float32(model.backbone.vit)
        self.model = model.requires_grad_(False).eval()
        self.num_read = model.backbone.num_read if model.pools_features else None
        self.source = NO_PROMPT if model.backbone.prompt is None else FixedPrompt(model.backbone, self.num_read)
        self.outputs = {name: {0: "batch"} for name in outputs_of(model, self.examples()["images"])}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs for normalised images (B, 3, H, W)."""
        model, size = self.model, (images.shape[-2], images.shape[-1])
        features = read_features(model.backbone.vit, images, model.out_indices, self.source, self.num_read)
        return tuple(model.forward_tensors(features, size).values())

    def examples(self) -> dict[str, Tensor]:
        """Two black images."""
        return {"images": _black_images(self.model.backbone.vit)}


class SharedModel(Traceable):
    """Images, each of one of T tasks, and the prompts and heads of the tasks -> logits (B, K).

    `pack_tasks` makes the inputs that describe the tasks. Where tasks differ in numbers of tokens and classes they are
    padded, and padding is masked: results are those of each task's own model. ValueError if the attention of a block
    cannot be masked, or the ViT is not held in float32.
    """

    inputs: ClassVar[Axes] = MappingProxyType(
        {
            "images": {0: "batch"},
            "task": {0: "batch"},
            "prompts": {0: "tasks", 2: "num_tokens"},
            "num_tokens": {0: "tasks"},
            "shallow": {0: "tasks", 1: "num_shallow"},
            "num_shallow": {0: "tasks"},
            "head_weight": {0: "tasks", 1: "num_classes"},
            "head_bias": {0: "tasks", 1: "num_classes"},
        }
    )
    outputs = MappingProxyType({"logits": {0: "batch", 1: "num_classes"}})

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        _check_float32(vit)
        for index, block in enumerate(vit.blocks):
            if (reason := why_not_fast(block)) is not None:
                raise ValueError(f"{name_of(vit)} cannot be shared, in block {index} {reason}; export each task alone")
        self.vit = vit
        self.requires_grad_(False).eval()

    def forward(
        self,
        images: Tensor,
        task: Tensor,
        prompts: Tensor,
        num_tokens: Tensor,
        shallow: Tensor,
        num_shallow: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
    ) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W).

        Args:
            images: Normalised as the task of each requires.
            task: Which of the T tasks each image is for, (B,) int64.
            prompts: Tokens of deep prompts, (T, L, P, D).
            num_tokens: How many of the P there are in each block, (T, L) int64; 0 where a prompt does not enter.
            shallow: Tokens of shallow prompts, (T, S, D).
            num_shallow: How many of the S there are, (T,) int64.
            head_weight: (T, K, D).
            head_bias: (T, K); -inf for classes that a task does not have.
        """
        vit, source = self.vit, InputPrompts(self.vit, task, prompts, num_tokens, shallow, num_shallow)
        num_read = vit.num_prefix_tokens if pools_prefix_only(vit) else None
        ((tokens, _),) = run_images(vit, images, [len(vit.blocks)], source, num_read)
        features = pool(vit, tokens, source.num_carried)
        return torch.einsum("bd,bkd->bk", features, head_weight[task]) + head_bias[task]

    def examples(self) -> dict[str, Tensor]:
        """Two black images, for three tasks of five classes, with four prompt tokens and two shallow ones."""
        num_blocks, width = len(self.vit.blocks), int(self.vit.embed_dim)
        return {
            "images": _black_images(self.vit),
            "task": torch.tensor([0, 2]),
            "prompts": torch.zeros(3, num_blocks, 4, width),
            "num_tokens": torch.full((3, num_blocks), 4),
            "shallow": torch.zeros(3, 2, width),
            "num_shallow": torch.tensor([0, 1, 2]),
            "head_weight": torch.zeros(3, 5, width),
            "head_bias": torch.zeros(3, 5),
        }


class InputPrompts:
    """A prompt source whose prompts are inputs of a `SharedModel`, see its `forward`."""

    def __init__(
        self, vit: ViT, task: Tensor, prompts: Tensor, num_tokens: Tensor, shallow: Tensor, num_shallow: Tensor
    ) -> None:
        self.vit, self.task, self.prompts, self.num_tokens = vit, task, prompts, num_tokens
        self.shallow, self.num_shallow = shallow[task], num_shallow[task]
        self.num_carried = shallow.shape[1]

    def enter(self, index: int, tokens: Tensor, num_read: int | None) -> BlockInput:
        """Keys and values of every task, picked for each image, and a mask of the padding."""
        vit, prefix, slots = self.vit, self.vit.num_prefix_tokens, self.num_carried
        tokens = insert_prompt(vit, tokens, self.shallow) if index == 0 else tokens
        keys, values = prompt_keys_values(vit.blocks[index], self.prompts[:, index], num_read)
        is_prompt = _first(self.num_tokens[self.task, index], self.prompts.shape[2])
        is_shallow = _first(self.num_shallow, slots)
        attended = torch.cat([is_prompt, _all(tokens[:, :prefix]), is_shallow, _all(tokens[:, prefix + slots :])], 1)
        mask = torch.where(attended, 0.0, -torch.inf)[:, None, None]
        return BlockInput(tokens, slots, (keys[self.task], values[self.task]), mask)


def outputs_of(model: TaskModel, images: Tensor) -> dict[str, Tensor]:
    """The outputs of a model's `ExportedModel` for images (B, 3, H, W), as the model itself computes them."""
    with torch.no_grad():
        return model.forward_tensors(model.read(images), (images.shape[-2], images.shape[-1]))


def _check_float32(vit: ViT) -> None:
    if others := {parameter.dtype for parameter in vit.parameters()} - {torch.float32}:
        dtype = others.pop()
        raise ValueError(f"{name_of(vit)} is held in {dtype}; exported models are float32: load it without dtype")


def _black_images(vit: ViT) -> Tensor:
    height, width = preprocessing_of(vit)["size"]
    return torch.zeros(2, 3, height, width)


def _all(tokens: Tensor) -> Tensor:
    """True for each token (B, N, D): (B, N)."""
    return torch.ones_like(tokens[..., 0], dtype=torch.bool)


def _first(num: Tensor, size: int) -> Tensor:
    """Which of `size` places are among the first `num` (B,): (B, size) bool."""
    return torch.arange(size, device=num.device) < num[:, None]

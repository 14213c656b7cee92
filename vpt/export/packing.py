"""Packing: the inputs of a shared model that describe its tasks, from task files.

Legend: T tasks, L blocks of the backbone, P prompt tokens, S shallow prompt tokens, D embed_dim, K classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.models.task_file import open_task
from vpt.models.task_model import model_named
from vpt.models.task_schema import TaskMetadata


def pack_tasks(paths: Sequence[str | Path], depth: int) -> dict[str, NDArray[Any]]:
    """The inputs of a shared model that describe its tasks, from task files of one backbone; task 0 is the first.

    The tasks are of classification, in any dtype; `depth` is L. The inputs are prompts, num_tokens, shallow,
    num_shallow, head_weight and head_bias, see `SharedModel.forward`; float32 and int64. P, S and K are the largest of
    all tasks; P and S may be 0. FileNotFoundError for a missing file; ValueError for no file, one that cannot be read,
    or a task that cannot share the backbone with the first.
    """
    if not paths:
        raise ValueError("paths is empty: name at least one task file")
    opened = [open_task(path) for path in paths]
    for path, (metadata, _) in zip(paths, opened, strict=True):
        check_shareable(Path(path), metadata, opened[0][0])
    tensors = [{name: tensor.float().numpy() for name, tensor in held.items()} for _, held in opened]
    prompts = [metadata.prompt or {"kind": None, "num_tokens": 0, "blocks": [0]} for metadata, _ in opened]
    num_tasks, width = len(opened), tensors[0]["head.weight"].shape[1]
    num_tokens, num_shallow = (
        max(prompt["num_tokens"] * (prompt["kind"] == kind) for prompt in prompts) for kind in ("deep", "shallow")
    )
    num_classes = max(metadata.num_classes for metadata, _ in opened)
    packed: dict[str, NDArray[Any]] = {
        "prompts": np.zeros((num_tasks, depth, num_tokens, width), np.float32),
        "num_tokens": np.zeros((num_tasks, depth), np.int64),
        "shallow": np.zeros((num_tasks, num_shallow, width), np.float32),
        "num_shallow": np.zeros(num_tasks, np.int64),
        "head_weight": np.zeros((num_tasks, num_classes, width), np.float32),
        "head_bias": np.full((num_tasks, num_classes), -np.inf, np.float32),
    }
    for task, (path, prompt, held) in enumerate(zip(paths, prompts, tensors, strict=True)):
        widths = {tensor.shape[-1] for name, tensor in held.items() if name != "head.bias"}
        if widths != {width} or prompt["blocks"][-1] >= depth:
            raise ValueError(f"{path}: does not fit a backbone of embed_dim {width} and {depth} blocks")
        packed["head_weight"][task, : len(held["head.weight"])] = held["head.weight"]
        packed["head_bias"][task, : len(held["head.bias"])] = held["head.bias"]
        if prompt["kind"] == "deep":
            packed["prompts"][task, prompt["blocks"], : prompt["num_tokens"]] = held["prompt.tokens"]
            packed["num_tokens"][task, prompt["blocks"]] = prompt["num_tokens"]
        elif prompt["kind"] == "shallow":
            packed["shallow"][task, : prompt["num_tokens"]] = held["prompt.tokens"][0]
            packed["num_shallow"][task] = prompt["num_tokens"]
    return packed


def check_shareable(path: Path, metadata: TaskMetadata, first: TaskMetadata) -> None:
    """ValueError for a task without a linear head, with a tuned or another backbone, or a prompt without tokens."""
    if not model_named(metadata.task_type).has_linear_head:
        raise ValueError(f"{path}: a task of type {metadata.task_type} cannot share a backbone; export it alone")
    if metadata.prompt is not None and metadata.prompt["kind"] == "kv":
        raise ValueError(f"{path}: has keys and values, and a shared model takes prompt tokens; export it alone")
    if metadata.tuned_backbone:
        raise ValueError(f"{path}: parameters of the backbone were tuned, so it cannot be shared; export it alone")
    if metadata.fingerprint != first.fingerprint:
        same = " with other weights" if metadata.backbone == first.backbone else ""
        raise ValueError(
            f"{path}: made for the backbone {metadata.backbone}{same}, the first task for {first.backbone}; "
            "tasks share a backbone only if they were made for the same one"
        )

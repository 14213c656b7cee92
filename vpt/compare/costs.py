"""Costs of a method: trained parameters, FLOPs, and bytes saved for the backward pass."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vpt import build
from vpt.build import Data
from vpt.compare.plan import bare_config
from vpt.config.schema import Config
from vpt.engine.measure import check_attention_is_counted, count_flops, count_saved_bytes, inference, model_tensors
from vpt.engine.steps import autocast, move, total_of
from vpt.models.task_model import TaskModel
from vpt.models.tuning import tuned_parts
from vpt.models.vit import preprocessing_of
from vpt.task_types.base import TaskType, task_type_of


@dataclass(frozen=True)
class Cost:
    """Costs of a method; None where this machine cannot count them."""

    tuned: dict[str, int]  # trained parameters, by part: prompt, neck, head, backbone
    step_images: int  # images of the training step that was counted
    step_flops: int | None  # of that step, forward and backward, without a cache of tokens
    saved_bytes: int | None  # by its forward pass for the backward pass
    flops: int | None  # of inference on one image
    bare_flops: int | None  # of the bare ViT with the same head, on one image

    @property
    def num_tuned(self) -> int:
        """Number of trained parameters."""
        return sum(self.tuned.values())

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs of inference relative to the bare ViT."""
        return self.flops / self.bare_flops if self.flops and self.bare_flops else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cost":
        """The inverse of `to_dict`; a TypeError or KeyError for other values."""
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})


def measure_cost(config: Config, samples: Mapping[str, Any]) -> Cost:
    """Build the model of a run and count one training step and the inference on one image; nothing is saved.

    A ValueError or FileNotFoundError refuses a method that does not fit the data or the backbone, such as one with a
    block that does not exist.
    """
    device = build.pick_device(config.device)
    config.num_workers = 0  # one batch only
    task_type, model, data = _prepare(config, samples, device)
    build.whiten_prompt(config, model, data)
    build.start_prompt(config, model, data)
    tuned = {name: sum(map(torch.numel, parameters)) for name, parameters in tuned_parts(model).items()}
    images, targets = move(next(iter(data.loaders["train"])), device)
    counted: dict[str, int] = {}
    precision = build.choose_precision(config, device)
    with suppress(ValueError, torch.OutOfMemoryError), autocast(device, precision):
        check_attention_is_counted(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        counted |= _count_step(model, task_type.losses(data), images, targets)
        counted["flops"] = _count_inference(model, images[:1])
        counted["bare_flops"] = _count_inference(_build_bare(config, samples, device), images[:1])
    names = ("step_flops", "saved_bytes", "flops", "bare_flops")
    return Cost(tuned, len(images), **{name: counted.get(name) for name in names})


def _prepare(config: Config, samples: Mapping[str, Any], device: torch.device) -> tuple[TaskType, TaskModel, Data]:
    build.seed_everything(config.seed, config.deterministic)
    task_type = task_type_of(config)
    model = task_type.build_model(samples["train"]).to(device)
    return task_type, model, task_type.build_data(samples, preprocessing_of(model.backbone.vit))


def _build_bare(config: Config, samples: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The same head on the bare backbone; with a head on pooled features, as timm itself computes it."""
    _, model, _ = _prepare(bare_config(config), samples, device)
    return nn.Sequential(model.backbone.vit, model.head) if model.pools_features else model


def _count_step(
    model: TaskModel, losses: Callable[..., Mapping[str, Tensor]], images: Tensor, targets: Any
) -> dict[str, int]:
    """FLOPs of a training step, and the bytes that its forward pass saves for the backward pass."""
    model.train()
    found: dict[str, Any] = {}

    def forward() -> None:
        found["loss"] = total_of(losses(model, images, targets))

    def step() -> None:
        found["saved_bytes"] = count_saved_bytes(forward, model_tensors(model))
        found["loss"].backward()

    return {"step_flops": count_flops(step), "saved_bytes": found["saved_bytes"]}


def _count_inference(model: nn.Module, image: Tensor) -> int:
    model.requires_grad_(False).eval()  # torch counts no FLOPs where a view of a tuned parameter is used
    run = inference(model, image)
    run()  # the first call caches the keys and values of a prompt
    return count_flops(run)

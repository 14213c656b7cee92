"""What training would do with the data: preprocessing, images used, steps, and what would stop it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vpt.config.schema import Config
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.doctor.images import too_many
from vpt.models.vit import load_vit, preprocessing_of
from vpt.task_types.base import TaskType
from vpt.task_types.findings import Finding, Level

ON_THE_HUB = ("hf-hub:", "hf_hub:")


@dataclass(frozen=True)
class Input:
    """Preprocessing for the configured backbone, and the strides of the head in pixels, if it has feature maps."""

    preprocessing: Preprocessing
    strides: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The input as plain JSON values."""
        return {**self.preprocessing.to_dict(), "strides": list(self.strides)}


@dataclass(frozen=True)
class Plan:
    """What training would do."""

    would_run: bool
    stops_at: str | None  # the code of the first finding that stops it
    images: dict[str, int]  # number used, by split
    split_off: tuple[str, ...]  # splits taken from the given train
    steps_per_epoch: int  # of the optimiser
    steps: int
    next: str  # the command to type, or what to fix first

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {**asdict(self), "split_off": list(self.split_off)}


def input_of(config: Config, task_type: TaskType) -> Input | None:
    """The input of the configured backbone, which is built without weights; None if it is known on the hub only.

    Raises:
        ValueError: timm does not know the backbone, or the size does not fit it.
    """
    name = config.backbone.name
    if name.startswith(ON_THE_HUB):
        return None
    with torch.device("meta"):  # shapes only
        vit = load_vit(name, pretrained=False, img_size=config.backbone.img_size)
    return Input(task_type.preprocessing(preprocessing_of(vit)), task_type.strides(vit.patch_embed.patch_size[0]))


def make_plan(
    config: Config, used: Mapping[str, int], split_off: tuple[str, ...], findings: Sequence[Finding], command: str
) -> Plan:
    """What training would do with `used` images of each split; findings have errors first; `command` trains."""
    stops = [finding for finding in findings if finding.level is Level.error and finding.code != "leakage"]
    steps = math.ceil(math.ceil(used["train"] / config.train.batch_size) / config.train.accumulation)
    stops_at, then = stops[0].code if stops else None, _next(config, findings, used["train"], command)
    return Plan(not stops, stops_at, dict(used), split_off, steps, steps * config.train.epochs, then)


def _next(config: Config, findings: Sequence[Finding], num_train: int, command: str) -> str:
    errors = [finding for finding in findings if finding.level is Level.error]
    if not errors:
        return command
    can_be_skipped = all(error.code in ("unreadable", "too_large") and error.split == "train" for error in errors)
    num = sum(len(error.files) for error in errors)
    if can_be_skipped and not too_many(config, num, num_train + num):
        return f"replace or remove these images, or skip them: {command} data.on_error=skip"
    return f"fix {' and '.join(dict.fromkeys(error.code for error in errors))}, then check again"

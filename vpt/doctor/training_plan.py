"""What training would do with the data: how pictures are prepared, how many are used, whether it would stop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vpt.build import build_preprocessing
from vpt.config.schema import Config
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.doctor.findings import Finding, Level
from vpt.doctor.images import too_many
from vpt.models.heads.pyramid import default_strides
from vpt.models.vit import load_vit, preprocessing_of

ON_THE_HUB = ("hf-hub:", "hf_hub:")


@dataclass(frozen=True)
class Input:
    """How the configured backbone wants its pictures, and for boxes the strides of the head in pixels."""

    preprocessing: Preprocessing
    strides: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The input as JSON has it."""
        return {**self.preprocessing.to_dict(), "strides": list(self.strides)}


@dataclass(frozen=True)
class Plan:
    """What training would do.

    Args:
        would_run: Whether no finding stops it.
        stops_at: The code of the first finding that stops it.
        pictures: Used in each split.
        split_off: Splits that are parts of what train was given.
        steps_per_epoch: Optimiser steps.
        steps: Of all epochs.
        next: What to type or to do.
    """

    would_run: bool
    stops_at: str | None
    pictures: dict[str, int]
    split_off: tuple[str, ...]
    steps_per_epoch: int
    steps: int
    next: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {**asdict(self), "split_off": list(self.split_off)}


def input_of(config: Config) -> Input | None:
    """The input of the configured backbone, which is built without weights; None if only the hub knows it.

    Raises:
        ValueError: timm does not know the backbone, or the size does not fit it.
    """
    name = config.backbone.name
    if name.startswith(ON_THE_HUB):
        return None
    with torch.device("meta"):  # shapes only
        vit = load_vit(name, pretrained=False, img_size=config.backbone.img_size)
    wanted = preprocessing_of(vit)
    if config.task == "detection":
        strides = config.head.strides or default_strides(vit.patch_embed.patch_size[0])
        return Input(build_preprocessing(wanted, crop_mode="letterbox", crop_pct=1.0), tuple(strides))
    augment = config.augment
    return Input(build_preprocessing(wanted, crop_mode=augment.crop_mode, crop_pct=augment.crop_pct), ())


def make_plan(
    config: Config,
    used: Mapping[str, int],
    split_off: tuple[str, ...],
    findings: Sequence[Finding],
    command: str,
) -> Plan:
    """What training would do.

    Args:
        config: Of the run.
        used: Pictures of each split that training would use.
        split_off: Splits that are parts of what train was given.
        findings: All of them, worst first.
        command: What trains on these data.
    """
    stops = [finding for finding in findings if finding.level is Level.error and finding.code != "leakage"]
    batches = math.ceil(used["train"] / config.train.batch_size)
    steps = math.ceil(batches / config.train.accumulation)
    return Plan(
        would_run=not stops,
        stops_at=stops[0].code if stops else None,
        pictures=dict(used),
        split_off=split_off,
        steps_per_epoch=steps,
        steps=steps * config.train.epochs,
        next=_next(config, findings, used["train"], command),
    )


def _next(config: Config, findings: Sequence[Finding], num_train: int, command: str) -> str:
    """The command that trains, or what to mend before."""
    errors = [finding for finding in findings if finding.level is Level.error]
    if not errors:
        return command
    are_of_train = all(error.code in ("unreadable", "too_large") and error.split == "train" for error in errors)
    num = sum(len(error.files) for error in errors)
    if are_of_train and not too_many(config, num, num_train + num):
        return f"replace or remove these pictures, or leave them out: {command} data.on_error=skip"
    return f"mend {' and '.join(dict.fromkeys(error.code for error in errors))}, and look again"

"""The typed schema of `conf/`, its ranges, and messages that name the nearest valid choice."""

import math
import re
from dataclasses import fields, is_dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vpt.config.composition import explain
from vpt.config.errors import ConfigError
from vpt.config.schema import (
    Config,
    DatasetConfig,
    DatasetKind,
    HeadName,
    PromptConfig,
    PromptFormName,
    PromptName,
    TaskName,
    TuningName,
)

ONLY_CLASSES = [
    *(("dataset", "num_per_class"), ("train", "class_weights"), ("train", "label_smoothing")),
    *(("augment", "crop_mode"), ("augment", "crop_pct")),
]


ONLY_BOXES = [
    *(("head", "taps"), ("head", "channels"), ("head", "strides"), ("head", "num_convs")),
    *(("dataset", "annotations"), ("dataset", "strict"), ("dataset", "form")),
]


RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


NEEDED_KEYS = {
    DatasetKind.boxes: ("root", "PATH"),
    DatasetKind.folder: ("root", "PATH"),
    DatasetKind.list: ("root", "PATH"),
    DatasetKind.csv: ("path", "FILE"),
    DatasetKind.torchvision: ("name", "CIFAR10, or another data set of torchvision"),
}


def to_config(composed: DictConfig) -> Config:
    """The composed tree as typed objects, with every number in its range.

    Raises:
        ConfigError: A value is missing or out of range.
    """
    try:
        config = cast(Config, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    check_ranges(config)
    _check_dataset(config.dataset)
    _check_task(config)
    _check_start(config.prompt)
    if config.tuning.options and config.tuning.kind is not TuningName.adapters:
        raise ConfigError(
            f"tuning.options={config.tuning.options} are of adapters: type tuning=lora, or leave them out"
        )
    for key, name in {"name": config.run.name, "title": config.run.title}.items():
        if name is not None and not RUN_NAME.fullmatch(name):
            shown = name if name.isprintable() else repr(name)
            raise ConfigError(
                f"run.{key}={shown}: must be the name of a folder, of 1 to 64 of A-Z a-z 0-9 . _ - and no dot in "
                "front; run.root says where it lies"
            )
    return config


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise a ConfigError for the first number that is out of its range."""
    for entry in fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif entry.metadata and value is not None:
            low, high, above = (entry.metadata[bound] for bound in ("low", "high", "above"))
            within = math.isfinite(value) and (
                (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
            )
            if not within:
                raise ConfigError(f"{key}={value} is out of range: it must be {_describe_range(low, high, above)}")


def _check_dataset(dataset: DatasetConfig) -> None:
    key, example = NEEDED_KEYS.get(dataset.kind, (None, ""))
    if key is not None and getattr(dataset, key) is None:
        raise ConfigError(f"dataset.{key} is needed by dataset={dataset.kind.value}: type dataset.{key}={example}")


def _check_task(config: Config) -> None:
    """Head and data must be of one kind of task, and what is for one kind only must not be said of the other."""
    finds_boxes = config.head.name not in (None, HeadName.linear)
    data, has_boxes = f"dataset={config.dataset.kind.value}", config.task is TaskName.detection
    if has_boxes and config.head.name is HeadName.linear:
        raise ConfigError(f"head=linear finds classes, and {data} has boxes: type head=dense, or leave head out")
    if finds_boxes and not has_boxes:
        raise ConfigError(
            f"head={config.head.name} finds boxes, and {data} has none: type dataset=boxes, or head=linear"
        )
    defaults = Config(dataset=DatasetConfig(kind=config.dataset.kind))
    for section, key in ONLY_CLASSES if has_boxes else ONLY_BOXES:
        value = getattr(getattr(config, section), key)
        if value != getattr(getattr(defaults, section), key):
            other = "classification" if has_boxes else "detection"
            raise ConfigError(f"{section}.{key}={value} is for {other}, and {data} is not: leave it out")


def _check_start(prompt: PromptConfig) -> None:
    """Refuse a start for no prompt, and a whitening that nothing would use."""
    if prompt.whiten and prompt.form is not PromptFormName.bilinear:
        raise ConfigError(f"prompt.whiten=true is for prompt=bilinear, and prompt.form={prompt.form}: leave it out")
    if prompt.init_from is not None and prompt.kind is PromptName.none:
        raise ConfigError(f"prompt.init_from={prompt.init_from}: there is no prompt to start; leave it out")


def _describe_range(low: float | None, high: float | None, above: float | None) -> str:
    bounds = [f"at least {low}" if low is not None else "", f"above {above}" if above is not None else ""]
    bounds.append(f"at most {high}" if high is not None else "")
    return " and ".join(bound for bound in bounds if bound)

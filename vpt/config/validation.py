"""Validation of a composed config: types, ranges, and keys that exclude each other."""

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vpt.config.composition import explain
from vpt.config.errors import ConfigError
from vpt.config.help import describe_range
from vpt.config.schema import Config, DatasetConfig, Mode, PromptFormName, PromptName, TuningName, schema_options

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def to_config(composed: DictConfig) -> Config:
    """The composed tree as typed objects; a ConfigError for values missing, of a wrong type or range, or at odds."""
    try:
        config = cast(Config, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    check_ranges(config)
    for key in config.dataset.required:
        required(config.dataset, key)
    _check_task(config)
    _check_conflicts(config)
    for key, name in {"name": config.run.name, "title": config.run.title}.items():
        if name is not None and not RUN_NAME.fullmatch(name):
            shown = name if name.isprintable() else repr(name)
            raise ConfigError(
                f"run.{key}={shown}: must be the name of a folder, 1 to 64 of A-Z a-z 0-9 . _ - without a dot in "
                "front; run.root is the folder that it is in"
            )
    return config


def _check_conflicts(config: Config) -> None:
    """Refuse values that exclude each other."""
    prompt, tuning = config.prompt, config.tuning
    if prompt.whiten and prompt.form is not PromptFormName.bilinear:
        raise ConfigError(f"prompt.whiten=true is for prompt=bilinear, and prompt.form={prompt.form}: leave it out")
    if prompt.init_from is not None and prompt.variant is PromptName.none:
        raise ConfigError(f"prompt.init_from={prompt.init_from}: there is no prompt to initialise; leave it out")
    if tuning.options and tuning.method is not TuningName.adapters:
        raise ConfigError(f"tuning.options={tuning.options} are for adapters: type tuning=lora, or leave them out")
    if config.extend and (config.fresh or config.mode is not Mode.train):
        other = "fresh=true" if config.fresh else f"mode={config.mode}"
        raise ConfigError(f"extend=true continues a finished run, and {other} does not: leave one of them out")


def check_ranges(config: Any) -> None:
    """Check the numbers of a config or of options; a ConfigError names the first that is out of its range."""
    for key, entry, value in _entries(config):
        low, high, above = (entry.metadata.get(bound) for bound in ("low", "high", "above"))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not (
                math.isfinite(number)
                and (low is None or number >= low)
                and (high is None or number <= high)
                and (above is None or number > above)
            ):
                raise ConfigError(f"{key}={number} is out of range: it must be {describe_range(entry)}")


def why_unread(config: Config, key: str) -> str:
    """Why a key has no effect on a run of this config, after the words "has no effect"; empty if it has one.

    The option of each key in the schema states what reads it; all of `prompt` is read if there is a prompt.
    """
    entry, method = dict(schema_options()).get(key), f"tuning={config.tuning.method}"
    needs = entry.metadata.get("needs", "") if entry else ""
    if (needs == "prompt" or key.startswith("prompt.")) and not config.is_prompted:
        return f"there is no prompt with {'prompt=none' if config.prompt.variant is PromptName.none else method}"
    if key == "prompt" and config.prompt.variant is not PromptName.none and not config.is_prompted:
        return f"{method} trains no prompt: type tuning=prompt, or for instance tuning=prompt_bias"
    name, is_not, values = needs.partition("!=") if "!=" in needs else needs.partition("=")
    value = operator.attrgetter(name)(config) if values else None
    shown = {None: "null", True: "true", False: "false"}.get(value, str(value))
    if not values or (shown in values.split(",")) != (is_not == "!="):
        return ""
    need = f"it is for {name}={values.replace(',', ' or ')}, and "
    return f"{'' if is_not == '!=' else need}{name}={shown}{' does not read it' if is_not == '!=' else ''}"


def required(dataset: DatasetConfig, key: str) -> str:
    """The value of a key that the reader requires; a ConfigError if it is null."""
    value = getattr(dataset, key)
    if value is None:
        raise ConfigError(f"dataset.{key} is needed: type dataset.{key}=...")
    return str(value)


def _check_task(config: Config) -> None:
    """Refuse a head, or a key, that is for another type of task than the data."""
    annotations = config.dataset.annotations
    for split, path in annotations.items() if isinstance(annotations, dict) else ():
        if not isinstance(path, str):
            raise ConfigError(f"dataset.annotations.{split}={path}: is no path; if it is a name, put quotes around it")
    head, data = config.head, f"dataset={config.dataset.reader} is for {config.task}"
    if head.task not in (None, config.task):
        raise ConfigError(f"head={head.name} is for {head.task}, and {data}: type another head, or leave head out")
    entries = [(key, entry, value) for key, entry, value in _entries(config) if entry.metadata.get("task")]
    if config.task not in {task for _, entry, _ in entries for task in entry.metadata["task"]}:
        return  # a type of task that the schema does not know may use any key
    for key, entry, value in entries:
        if config.task not in entry.metadata["task"] and value != entry.default:
            raise ConfigError(f"{key}={value} is for {' and '.join(entry.metadata['task'])}, and {data}: leave it out")


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Key, field and value of each leaf."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from _entries(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", entry, value

"""Saved configs: written without secrets, read as untrusted input, also those of version 0.1."""

import copy
import functools
import operator
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from vpt.config.composition import explain
from vpt.config.errors import RENAMED, ConfigError
from vpt.config.schema import Config, schema_keys
from vpt.config.text import quote_text
from vpt.config.validation import to_config

WITHOUT_EFFECT = (  # on the result of a run that ends
    *("run", "fresh", "extend", "num_workers", "timeout_s", "cache", "cache_gb", "cache_dir"),
    *("log_every", "auto_batch", "skip_nonfinite", "required"),
)
ROUNDING = ("device", "deterministic", "compile", "grad_checkpointing")  # they change last digits only
ADDED = {  # keys of later versions, and their values where they change nothing
    **{"dataset.layout": "auto", "dataset.group": None, "dataset.folds": None, "dataset.fold": 0},
    **{"dataset.exif_boxes": "auto", "data.range": "auto", "data.bands": None},
    **{"train.select": None, "train.sampling": "uniform", "train.dice": 0.0},
    **{"dataset.classes": None, "dataset.ignore": 255, "dataset.reduce_zero_label": False, "dataset.instances": False},
}
PLACES = ("root", "path", "annotations", "checkpoint", "init_from")  # paths on this machine
MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_DEPTH = 20  # of nested mappings and lists


def conceal(config: Config, composed: DictConfig) -> Config:
    """The config as it may be saved: text from the environment is replaced by the expression that reads it.

    A secret such as `dataset.root=${oc.env:BUCKET_WITH_KEY}` is used, but saved in no file. Numbers are not secrets.
    """
    shown, hidden = copy.deepcopy(config), f"hidden-{secrets.token_hex(16)}"
    written: Any = OmegaConf.to_container(composed, resolve=False)
    OmegaConf.register_new_resolver("oc.env", lambda *_: hidden, replace=True)
    try:
        for key in schema_keys():
            section, _, name = key.rpartition(".")
            holder: Any = operator.attrgetter(section)(shown) if section else shown
            if type(getattr(holder, name)) in (str, list, dict) and hidden in _resolved(composed, key, hidden):
                setattr(holder, name, functools.reduce(operator.getitem, key.split("."), written))
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return shown


def _resolved(composed: DictConfig, key: str, otherwise: str) -> str:
    """The text of a value with all expressions resolved, or `otherwise` if that fails."""
    try:
        value = OmegaConf.select(composed, key)
        return str(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)
    except OmegaConfBaseException:
        return otherwise


def to_plain(config: Any) -> dict[str, Any]:
    """A config as the plain values of YAML and JSON."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    match value:
        case StrEnum():
            return value.value
        case dict():
            return {_plain(key): _plain(part) for key, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
    return value


def recipe(config: Any) -> dict[str, Any]:
    """The part of a config that decides the result, for publication: of paths the last part only."""
    values: dict[str, Any] = {}
    for entry in fields(config):
        if entry.name in WITHOUT_EFFECT:
            continue
        value = getattr(config, entry.name)
        if is_dataclass(value):
            value = recipe(value)
        elif entry.name in PLACES and isinstance(value, str):
            value = Path(value).name
        elif entry.name in PLACES and isinstance(value, dict):
            value = {key: Path(str(path)).name for key, path in value.items()}
        values[entry.name] = value
    return values


def rename_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a saved config with the keys of this version; those of version 0.1 had other names.

    Version 0.1 also had no `dataset.task` and `head.task`, which follow from the reader and the head.
    """
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    dataset, head = new.get("dataset", {}), new.get("head", {})
    if "kind" in dataset:
        dataset.setdefault("task", "detection" if dataset["kind"] in ("boxes", "trees") else "classification")
        if head.get("name") is not None:
            head.setdefault("task", "classification" if head["name"] == "linear" else "detection")
    for before, after in RENAMED.items():
        section, _, name = before.partition(".")
        if name in new.get(section, ()):
            new[section].setdefault(after.partition(".")[2], new[section].pop(name))
    return new


def first_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `rename_keys` for keys such as "prompt.variant", so that digests in run names stay the same."""
    before = {new: old for old, new in RENAMED.items()}
    new = ("dataset.task", "dataset.required", "head.task")
    old = {key: value for key, value in values.items() if key not in new and (key, value) not in ADDED.items()}
    return {before.get(key, key): value for key, value in old.items()}


def load_config(path: Path) -> Config:
    """Load the config from a run folder.

    Nothing in it is resolved: an expression such as `${oc.env:TOKEN}` stays this text, or a downloaded file could read
    the environment. Aliases, which expand a few bytes to gigabytes, and tags are refused; no run writes them.
    A ConfigError is raised if the file is missing, not YAML, has what no run writes, or keys unknown to the schema.
    """
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(quote_text(_plain_text(path))), resolve=False)
        loaded = OmegaConf.create(_escape(_of_this_version(values) if isinstance(values, dict) else values))
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), loaded))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, RecursionError, AssertionError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    try:
        return to_config(merged)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _of_this_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the keys of this version; a null `dataset.test_fraction` of version 0.1 meant no test."""
    new, given = rename_keys(values), values.get("dataset")
    if (
        isinstance(given, dict)
        and given.get("kind") in ("folder", "csv", "boxes")
        and given.get("test_fraction") is None
    ):
        new["dataset"]["test_fraction"] = 0.0
    return new


def _plain_text(path: Path) -> str:
    """The text of a YAML file; a ConfigError for an alias, a tag, or too large a size or depth."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, not the config of a run")
    text, depth = path.read_text(encoding="utf-8"), 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        odd = {
            "an alias": isinstance(event, yaml.AliasEvent),
            "a tag": bool(getattr(event, "tag", None)),
            f"more than {MAX_CONFIG_DEPTH} levels": depth > MAX_CONFIG_DEPTH,
        }
        for what in (name for name, is_present in odd.items() if is_present):
            line = event.start_mark.line + 1
            raise ConfigError(f"{path}, line {line}: has {what}, which no run writes; open runs that you trust only")
    return text


def _escape(value: Any) -> Any:
    """The same values with expressions escaped, so that they stay text."""
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
        case dict():
            return {key: _escape(part) for key, part in value.items()}
        case list():
            return [_escape(part) for part in value]
    return value

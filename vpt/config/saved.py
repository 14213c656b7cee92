"""The config in the files of a run: what of it decides the result, written without secrets, read without trust."""

import copy
import re
import secrets
from dataclasses import asdict, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from vpt.config.composition import explain
from vpt.config.errors import ConfigError
from vpt.config.schema import Config, schema_keys
from vpt.config.validation import to_config

WITHOUT_EFFECT = (  # on the result of a run that ends
    *("run", "fresh", "num_workers", "timeout_s", "cache", "cache_gb", "cache_dir"),
    *("log_every", "auto_batch", "skip_nonfinite"),
)
ROUNDING = ("device", "deterministic", "compile", "grad_checkpointing")  # keys that change last digits only
PLACES = ("root", "path", "annotations", "checkpoint", "init_from")  # keys that say where something lies on a disk
MAX_CONFIG_BYTES = 1_000_000  # of the file that a run leaves
MAX_CONFIG_DEPTH = 20  # of mappings and lists in each other


def conceal(config: Config, composed: DictConfig) -> Config:
    """The config as it may be written down: text out of the environment is the expression that asks for it.

    A secret such as `dataset.root=${oc.env:BUCKET_WITH_KEY}` is used, and in no file. Numbers are no secrets.
    """
    shown, hidden = copy.deepcopy(config), f"hidden-{secrets.token_hex(16)}"
    written = OmegaConf.to_container(composed, resolve=False)
    OmegaConf.register_new_resolver("oc.env", lambda *_: hidden, replace=True)
    try:
        for key in schema_keys():
            *sections, name = key.split(".")
            holder: Any = shown
            for section in sections:
                holder = getattr(holder, section)
            if type(getattr(holder, name)) in (str, list, dict) and hidden in _resolved(composed, key, hidden):
                setattr(holder, name, _at(written, key))
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return shown


def _resolved(composed: DictConfig, key: str, otherwise: str) -> str:
    """The text of a value, all expressions in it resolved; or what stands for it if they cannot be."""
    try:
        value = OmegaConf.select(composed, key)
        return str(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)
    except OmegaConfBaseException:
        return otherwise


def _at(values: Any, key: str) -> Any:
    """What stands at a key such as "run.title"."""
    for part in key.split("."):
        values = values[part]
    return values


def to_plain(config: Any) -> dict[str, Any]:
    """A config as plain values, as YAML and JSON have them."""
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
    """What of a config decides the result, as plain values that may be given away: paths are cut to their last part."""
    values: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in WITHOUT_EFFECT:
            continue
        if is_dataclass(value):
            value = recipe(value)
        elif entry.name in PLACES and isinstance(value, str):
            value = Path(value).name
        elif entry.name in PLACES and isinstance(value, dict):
            value = {key: Path(str(path)).name for key, path in value.items()}
        values[entry.name] = value
    return values


def load_config(path: Path) -> Config:
    """The config that a run left in its folder.

    Nothing in it is resolved: an expression such as `${oc.env:TOKEN}` stays this text, or a stranger's file would read
    the environment. Aliases, of which a few bytes can stand for gigabytes, and tags are refused; no run writes them.

    Raises:
        ConfigError: It is missing, is not YAML, holds what no run writes, or is of another version of the schema.
    """
    try:
        loaded = OmegaConf.create(_escape(OmegaConf.to_container(OmegaConf.create(_plain_text(path)), resolve=False)))
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), loaded))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, RecursionError, AssertionError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    try:
        return to_config(merged)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _plain_text(path: Path) -> str:
    """The text of a YAML file of moderate size and depth, without aliases and tags.

    Raises:
        ConfigError: It has one of these.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, not the config of a run")
    text = path.read_text(encoding="utf-8")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        odd = {
            "an alias": isinstance(event, yaml.AliasEvent),
            "a tag": bool(getattr(event, "tag", None)),
            f"more than {MAX_CONFIG_DEPTH} levels": depth > MAX_CONFIG_DEPTH,
        }
        for what in (name for name, is_there in odd.items() if is_there):
            line = event.start_mark.line + 1
            raise ConfigError(f"{path}, line {line}: has {what}, which no run writes; open runs that you trust only")
    return text


def _escape(value: Any) -> Any:
    """The same values, in which an expression stands for its own text."""
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
        case dict():
            return {key: _escape(part) for key, part in value.items()}
        case list():
            return [_escape(part) for part in value]
    return value

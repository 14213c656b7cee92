"""Composition of the config from `conf/`, the schema and overrides."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vpt.config.errors import ConfigError, did_you_mean, first_line, no_such_choice, unknown_key
from vpt.config.schema import Config, schema_keys
from vpt.config.text import register_source

PACKAGE = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """The absolute path of `conf/`: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"conf/train.yaml is neither in {PACKAGE} nor beside it; install vpt again")


def register_schema() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of the defaults list of `conf/train.yaml`."""
    register_source()
    ConfigStore.instance().store(name="schema", node=Config)


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Compose `conf/train.yaml`, searching `config_dir` after `conf/`; a ConfigError for an unusable override."""
    register_schema()
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose("train", [*overrides, *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_file_of(error, config_dir) + explain(error)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{where}no YAML: {error.problem}") from error


def _file_of(error: BaseException | None, config_dir: Path | None) -> str:
    """The file of the user that Hydra was reading, as the start of a message; empty for none."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    message, files = "\n".join(texts), sorted(config_dir.rglob("*.yaml")) if config_dir else []
    inside = re.search(r"In '(?!train')([^']+)'", message)
    absent = re.search(r"Could not find '[^/']+/([^']+)'", message)  # read in the end, with all defaults
    for path in files:
        is_named = inside and path.as_posix().endswith(f"/{inside[1]}.yaml")
        if is_named or (absent and re.search(rf": *{re.escape(absent[1])}\b", path.read_text(encoding="utf-8"))):
            return f"{path}: "
    return ""


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf, with the nearest valid choice where there is one."""
    while isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    message = re.sub(r"In '[^']+': (\w+ raised while composing config:\s*)?", "", str(error))
    full_key = re.search(r"full_key: (\S+)", message)
    if unknown := re.search(r"Key '([^']*)' (?:not in|is not in struct)", message):
        key = full_key[1] if full_key else unknown[1]
        if key.startswith("tuning.options."):
            return f"{key} is not among the present options; to add it, type +{key}=..."
        if key in groups():
            return f"sets {key}, a group; its first line must be: # @package _global_"
        return unknown_key(key, schema_keys())
    missing = re.search(
        r"Missing mandatory value: (\S+)|Structured config of type .* has missing mandatory value: (\S+)", message
    )
    if missing:
        key = full_key[1] if full_key else missing[1] or missing[2]
        return f"{key} is needed: type {key}=..."
    if option := re.search(r"Could not find '([^/']+)/([^']+)'", message):
        return no_such_choice(option[1], option[2], group_choices(option[1]))
    if group := re.search(r"Could not override '/?([^']+)'", message):
        return f"there is no group {group[1]}{did_you_mean(group[1], sorted(groups()))}"
    line = first_line(message)
    if line.endswith(":"):  # a heading of the next line
        line = " ".join(part.strip() for part in message.splitlines()[:2])
    if invalid := re.search(r"Invalid value '([^']*)', expected one of \[(.*)\]", line):
        near = difflib.get_close_matches(invalid[1], invalid[2].split(", "), n=1, cutoff=0.5)
        line += f"; did you mean {near[0]}?" if near else ""
    return f"{full_key[1]}: {line}" if full_key and full_key[1] not in line else line


def groups() -> frozenset[str]:
    """Names of the groups of `conf/`."""
    return frozenset(folder.name for folder in config_folder().iterdir() if folder.is_dir())


def group_choices(group: str, config_dir: Path | None = None) -> list[str]:
    """Names of the files of a group of `conf/`."""
    folders = [config_folder(), *([config_dir] if config_dir else [])]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})

"""The command line: what was typed is checked before anything is loaded, and refused in one line."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vpt.config import (
    ConfigError,
    check_ranges,
    compose_config,
    config_folder,
    did_you_mean,
    explain,
    first_line,
    group_choices,
    no_such_choice,
    schema_keys,
    to_config,
)

OptionsT = TypeVar("OptionsT")


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would refuse, in one line, before Hydra starts.

    Raises:
        ConfigError: An override has a syntax error, an unknown key, group or value, or a wrong type.
    """
    words, config_dir = _split_arguments(arguments)
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"cannot read the command line ({first_line(error)}); options are key=value") from error
    overrides = [override for override in overrides if not override.is_hydra_override()]
    for override in overrides:
        _check_key(override, config_dir)
    choices = [_choices(override) for override in overrides]
    for number in range(max(map(len, choices), default=1)):  # of a sweep every value is tried, not every combination
        to_config(compose_config([values[min(number, len(values) - 1)] for values in choices], config_dir))


def parse_options(schema: type[OptionsT], arguments: Sequence[str], usage: str) -> OptionsT:
    """Read `key=value` arguments of a small command into its dataclass; `--help` prints the usage.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(usage)  # noqa: T201  # it is what was asked for
        sys.exit(0)
    known = [entry.name for entry in fields(cast(Any, schema))]
    for word in arguments:
        key, equals, _ = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"{word}: not an option of the form key=value{did_you_mean(key, known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(arguments)))
        options = cast(OptionsT, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    check_ranges(options)
    return options


def fail(error: Exception, code: int = 2) -> NoReturn:
    """Print one error as a user should see it, and exit."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201  # the last word of a command
    sys.exit(code)


def _check_key(override: Override, config_dir: Path | None) -> None:
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or override.is_delete():
        return
    choices = group_choices(key, config_dir)
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values if choices else []:
        if isinstance(value, str) and value not in choices:
            raise ConfigError(no_such_choice(key, value, choices))
    if key == "experiment" and not override.is_add():
        raise ConfigError(f"an experiment is added: type +experiment={values[0]}")
    keys = [*schema_keys(), *(folder.name for folder in config_folder().iterdir() if folder.is_dir())]
    if not choices and key not in keys:
        raise ConfigError(f"unknown key {key}{did_you_mean(key, keys)}")


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Overrides, and the folder of `--config-dir`, out of a Hydra command line."""
    words, folder, rest = [], None, iter(arguments)
    for word in rest:
        if word in ("--config-dir", "-cd"):
            folder = next(rest, None)
        elif word in ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-name", "-cn", "--config-path", "-cp"):
            next(rest, None)
        elif word.startswith("--config-dir="):
            folder = word.partition("=")[2]
        elif not word.startswith("-"):
            words.append(word)
    return words, Path(folder) if folder else None


def _choices(override: Override) -> list[str]:
    """The override as typed, or one for each value of a sweep `key=a,b`."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = str(override.input_line).partition("=")[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]

"""The command line: what was typed is checked before anything is loaded, and refused in one line."""

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from vpt.config.composition import compose_config, config_folder, group_choices
from vpt.config.errors import ConfigError, did_you_mean, first_line, no_such_choice
from vpt.config.saved import conceal
from vpt.config.schema import Config, schema_keys
from vpt.config.validation import check_ranges, to_config

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it
OptionsT = TypeVar("OptionsT")
PATH_KEYS = (
    *("dataset.root", "dataset.path", "backbone.checkpoint", "prompt.init_from", "run.root", "run.name", "cache_dir"),
)


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
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    for override in overrides:
        _check_key(override, config_dir)
        if override.is_sweep_override() and not is_sweep:
            raise ConfigError(f"{override.input_line} is a sweep over several values: add -m, or put quotes around it")
    choices = [_choices(override) for override in overrides]
    for number in range(max(map(len, choices), default=1)):  # of a sweep every value is tried, not every combination
        to_config(compose_config([values[min(number, len(values) - 1)] for values in choices], config_dir))


def read_config(arguments: Sequence[str]) -> Config:
    """The config of one run, as `python -m vpt.train` would have it of these arguments, outside of a Hydra application.

    Raises:
        ConfigError: As `check_command_line`; or an option of Hydra's own, such as the sweep `-m`.
    """
    rest = iter(arguments)
    for word in rest:
        if word in ("--config-dir", "-cd"):
            next(rest, None)
        elif word.startswith("-") and not word.startswith("--config-dir="):
            raise ConfigError(f"{word}: not an option of this command; options are key=value, and --config-dir FOLDER")
    check_command_line(arguments)
    words, config_dir = _split_arguments(arguments)
    return to_config(compose_config(words, config_dir))


def compose_run(arguments: Sequence[str]) -> tuple[Config, Config]:
    """The config of one run and what of it may be written down, see `conceal`, of arguments that were checked.

    Raises:
        ConfigError: They cannot be used together.
    """
    words, config_dir = _split_arguments(arguments)
    composed = compose_config(words, config_dir)
    config = to_config(composed)
    return config, conceal(config, composed)


def parse_options(schema: type[OptionsT], arguments: Sequence[str], usage: str) -> OptionsT:
    """Read `key=value` arguments of a small command into its dataclass; `--help` prints the usage.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(usage)  # noqa: T201  # it is what was asked for
        sys.exit(0)
    types = {entry.name: entry.type for entry in fields(cast(Any, schema))}
    values: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals or key not in types:
            raise ConfigError(f"{word}: not an option of the form key=value{did_you_mean(key, list(types))}")
        values[key] = _parse(key, text, types[key])
    for entry in fields(cast(Any, schema)):
        if entry.default is MISSING and entry.name not in values:
            raise ConfigError(f"{entry.name} is needed: type {entry.name}=...")
    options = schema(**values)
    check_ranges(options)
    return options


def check_file(option: str, path: Path, endings: Sequence[str]) -> None:
    """Make sure, before the work, that its result can be written to the file of an option.

    Args:
        option: Its name.
        path: Its value.
        endings: What a file may end in, as ".csv"; capitals are as good.

    Raises:
        ConfigError: The ending is another one, there is a folder of this name, or its folder cannot be written to.
    """
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option}={path}: must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ConfigError(f"{option}={path}: is a folder; name a file, such as {option}={path / ('new' + endings[0])}")
    _check_writable(option, path, path.absolute().parent)


def check_folder(option: str, path: Path) -> None:
    """Make sure, before the work, that files can be written to the folder of an option, which need not be there yet.

    Raises:
        ConfigError: There is a file of this name, or the folder cannot be written to.
    """
    if path.is_file():
        raise ConfigError(f"{option}={path}: is a file; name a folder")
    _check_writable(option, path, path.absolute())


def name_task_files(option: str, text: str) -> dict[str, Path]:
    """Task files by what their tasks are called: as the file, or a `task.safetensors`, which is a run's, as its folder.

    Args:
        option: The name of the option.
        text: Its value: one file, or several with commas between them.

    Raises:
        ConfigError: It names no file, one that is not there, or two of one name.
    """
    is_one = Path(text).expanduser().is_file()
    words = [word.strip() for word in ([text] if is_one else text.split(",")) if word.strip()]
    if not words:
        raise ConfigError(f"{option}={text}: names no task file")
    paths: dict[str, Path] = {}
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            raise ConfigError(
                f"{option}={word}: is a folder; name a task file in it, or type run={word} if it is a run"
            )
        if not path.is_file():
            raise ConfigError(f"{option}={word}: no such file")
        name = (path.absolute().parent.name if path.stem == "task" else "") or path.stem
        if name in paths:
            raise ConfigError(
                f"{option}={text}: {paths[name]} and {path} are both called {name}; "
                "copy one of them to a file of another name"
            )
        paths[name] = path
    return paths


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments, with quotes around paths that Hydra's grammar would stumble over (spaces are fine, `~` is not)."""
    return [_quote_path(word) for word in arguments]


def tell(error: BaseException, code: int = 2) -> int:
    """Print one error as a user should see it; return the exit code."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201  # the last word of a command
    return code


def is_for_user(error: Exception) -> bool:
    """Whether an error was made to be read: one of bad input, of the system, or of our own kinds of RuntimeError."""
    return not isinstance(error, RuntimeError) or type(error).__module__.startswith("vpt.")


def fail(error: Exception, code: int = 2) -> NoReturn:
    """Print one error as a user should see it, and exit."""
    sys.exit(tell(error, code))


def _check_writable(option: str, path: Path, folder: Path) -> None:
    """Try to write to a folder, or to that in which it would be made."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{option}={path}: cannot write to {there} ({error.strerror}); name another place") from error


def _quote_path(word: str) -> str:
    key, _, value = word.partition("=")
    plain = re.fullmatch(r"[\w/.:+,*@-]*", value, re.ASCII)
    if key.lstrip("+") not in PATH_KEYS or plain or value[:1] in ("'", '"'):
        return word
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _parse(key: str, text: str, type_: Any) -> Any:
    """The value of an option, whose type is str, int or float, or one of these and None."""
    allowed = get_args(type_) or (type_,)
    try:
        return int(text) if int in allowed else float(text) if float in allowed else text
    except ValueError as error:
        what = "a whole number" if int in allowed else "a number"
        raise ConfigError(f"{key}={text}: must be {what}") from error


def _check_key(override: Override, config_dir: Path | None) -> None:
    key = override.key_or_group
    if key.split(".")[0] == "hydra":
        return
    if override.is_delete():
        raise ConfigError(f"{override.input_line}: keys cannot be removed; set another value")
    choices = group_choices(key, config_dir)
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values if choices else []:
        if isinstance(value, str) and value not in choices:
            raise ConfigError(no_such_choice(key, value, choices))
    if key == "experiment" and not override.is_add():
        raise ConfigError(f"an experiment is added: type +experiment={values[0]}")
    keys = [*schema_keys(), *(folder.name for folder in config_folder().iterdir() if folder.is_dir())]
    if not choices and key not in keys and not key.startswith("tuning.options."):
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

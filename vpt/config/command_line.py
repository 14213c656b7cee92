"""The command line: `key=value` options of all commands, checked before anything is loaded, refused in one line."""

import contextlib
import difflib
import io
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, NoReturn, TypeVar, Union, cast, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from vpt.config.composition import compose_config, config_folder, group_choices
from vpt.config.errors import ConfigError, did_you_mean, first_line, no_such_choice, unknown_key
from vpt.config.saved import conceal
from vpt.config.schema import Config, schema_keys
from vpt.config.validation import check_ranges, describe_range, to_config

INTERRUPTED = 130  # the exit code after Ctrl-C, as in shells
HELP = {"-h", "--help"}
WIDTH = 120  # of a line of help
OptionsT = TypeVar("OptionsT")
PATH_KEYS = (
    *("dataset.root", "dataset.path", "backbone.checkpoint", "prompt.init_from", "run.root", "run.name", "cache_dir"),
    "dataset.group",  # a regular expression
)


def escape_output() -> None:
    """Let the standard streams escape what their encoding does not have, such as a class name, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class CommandLine(NamedTuple):
    """A checked command line of overrides."""

    config: Config  # of a sweep that of its last values
    composed: DictConfig  # the same as Hydra has it, with expressions
    needs_hydra: bool  # Hydra's own application must run: for a sweep, one of its options, or a `hydra.` override


def check_command_line(arguments: Sequence[str]) -> CommandLine:
    """Check the arguments of `python -m vpt.train` and compose its config; of a sweep each value, not each combination.

    A ConfigError is raised for a syntax error, an unknown key, group or value, or a wrong type.
    """
    words, config_dir = _split_arguments(arguments)
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"cannot read the command line ({first_line(error)}); options are key=value") from error
    own = [override for override in overrides if not override.is_hydra_override()]
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    for override in own:
        _check_key(override, config_dir)
        if override.is_sweep_override() and not is_sweep:
            raise ConfigError(f"{override.input_line} is a sweep over several values: add -m, or put quotes around it")
    choices = [_choices(override) for override in own]
    for number in range(max(map(len, choices), default=1)):
        composed = compose_config([values[min(number, len(values) - 1)] for values in choices], config_dir)
        config = to_config(composed)
    return CommandLine(config, composed, len(own) < len(overrides) or any(map(_is_of_hydra, arguments)))


def compose_run(arguments: Sequence[str]) -> tuple[Config, Config]:
    """The config of one run, and the same as it may be saved, see `conceal`; a ConfigError for Hydra's own options."""
    for word in filter(_is_of_hydra, arguments):
        raise ConfigError(f"{word}: not an option of this command; options are key=value, and --config-dir FOLDER")
    line = check_command_line(arguments)
    return line.config, conceal(line.config, line.composed)


def parse_options(schema: type[OptionsT], arguments: Sequence[str], about: str) -> OptionsT:
    """Read `key=value` arguments into the dataclass of a command; `--help` prints its options inside `about`.

    Fields are of the types str, Path, int, float and bool, of tuples of these for lists such as `8,5` or `[8,5]`, of
    unions of these, or dict[str, str] for `key.NAME=text`. `option` describes a field. A ConfigError is raised if a key
    is unknown or missing, or a value has the wrong type or is out of range.
    """
    if HELP & set(arguments):
        print_help(describe_options(schema), about)
    entries = {entry.name: entry for entry in fields(cast(Any, schema))}
    values: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        name, dot, part = key.partition(".")
        entry = entries.get(name if dot else key)
        is_table = entry is not None and get_origin(entry.type) is dict
        if not equals or entry is None or is_table != bool(part):
            example = f"; type {name}.NAME=..." if is_table else "" if entry else did_you_mean(key, list(entries))
            raise ConfigError(f"{word}: not an option of the form key=value{example}")
        if is_table:
            values.setdefault(name, {})[part] = text
        else:
            values[key] = _parse(key, text, entry)
    for entry in entries.values():
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in values:
            raise ConfigError(f"{entry.name} is needed: type {entry.name}=...")
    options = schema(**values)
    check_ranges(options)
    return options


def split_options(schema: type[Any], arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of a command's dataclass, and all others, for the config; a ConfigError if one is typed twice."""
    names = {entry.name for entry in fields(schema)}
    own = [word for word in arguments if re.split(r"[.=]", word, maxsplit=1)[0] in names or word in HELP]
    keys = [word.partition("=")[0] for word in own]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is typed twice; type it once")
    return own, [word for word in arguments if word not in own]


def print_help(options: str, about: str) -> NoReturn:
    """Print the help of a command with its options after the first paragraph, and exit."""
    first, _, rest = about.strip().partition("\n\n")
    print("\n\n".join(part for part in (first, options, rest) if part))  # noqa: T201
    sys.exit(0)


def describe_options(schema: type[Any], indent: str = "  ") -> str:
    """A line or more for each option: key, default or sort of value, meaning, and the values allowed."""
    entries = [entry for entry in fields(schema) if "about" in entry.metadata]
    heads = [f"{entry.name}{'.NAME' if get_origin(entry.type) is dict else ''}={_shown(entry)}" for entry in entries]
    width = min(28, max(map(len, heads), default=0)) + 2
    lines: list[str] = []
    for head, entry in zip(heads, entries, strict=True):
        first = f"{indent}{head:<{width}}" if len(head) < width else f"{indent}{head}  "
        rest = " " * (len(indent) + width)
        wrapped = textwrap.wrap(_about(entry), WIDTH, initial_indent=first, subsequent_indent=rest)
        lines += wrapped or [first.rstrip()]
    return "\n".join(lines)


def check_file(option: str, path: Path, endings: Sequence[str]) -> None:
    """A ConfigError if the file of an option has another ending, in any case, is a folder, or cannot be written to."""
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option}={path}: must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ConfigError(f"{option}={path}: is a folder; name a file, such as {option}={path / ('new' + endings[0])}")
    _check_writable(option, path, path.absolute().parent)


def check_folder(option: str, path: Path) -> None:
    """A ConfigError if the folder of an option, which need not exist, is a file or cannot be written to."""
    if path.is_file():
        raise ConfigError(f"{option}={path}: is a file; name a folder")
    _check_writable(option, path, path.absolute())


def name_task_files(option: str, text: str) -> dict[str, Path]:
    """Task files by the names of their tasks: that of the file, or of its folder for the `task.safetensors` of a run.

    The text is one file, or several with commas between them; a ConfigError if it names none, one that does not exist,
    or two of one name.
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
                f"{option}={text}: {paths[name]} and {path} are both named {name}; "
                "copy one of them to a file of another name"
            )
        paths[name] = path
    return paths


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments, with quotes around paths that are not words of Hydra's grammar (spaces are fine, `~` is not)."""
    return [_quote_path(word) for word in arguments]


def tell(error: BaseException, code: int = 2) -> int:
    """Print one error as a user should see it; return the exit code."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201  # printed for the user
    return code


def is_for_user(error: Exception) -> bool:
    """Whether the message of an error is for the user; of a RuntimeError only if its class is one of vpt."""
    return not isinstance(error, RuntimeError) or type(error).__module__.startswith("vpt.")


def fail(error: Exception, code: int = 2) -> NoReturn:
    """Print one error as a user should see it, and exit."""
    sys.exit(tell(error, code))


def _check_writable(option: str, path: Path, folder: Path) -> None:
    """Try to write to a folder, or to the first of its parents that exists."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        why = f"cannot write to {existing} ({error.strerror})"
        raise ConfigError(f"{option}={path}: {why}; name another place") from error


def _quote_path(word: str) -> str:
    key, _, value = word.partition("=")
    plain = re.fullmatch(r"[\w/.:+,*@-]*", value, re.ASCII)
    if key.lstrip("+") not in PATH_KEYS or plain or value[:1] in ("'", '"'):
        return word
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _types(entry: "Field[Any]") -> tuple[list[Any], list[Any]]:
    """Types of an option's single value, and of the elements of a list."""

    def members(type_: Any) -> list[Any]:
        return [*get_args(type_)] if get_origin(type_) in (Union, UnionType) else [type_]

    lists = [inner for type_ in members(entry.type) if get_origin(type_) is tuple for inner in get_args(type_)[:1]]
    single = [type_ for type_ in members(entry.type) if type_ is not NoneType and get_origin(type_) is not tuple]
    return single, [type_ for inner in lists for type_ in members(inner)]


def _parse(key: str, text: str, entry: "Field[Any]") -> Any:
    """The value of an option; of several types the first that it fits."""
    single, of_list = _types(entry)
    is_list = bool(of_list) and (not single or "," in text or text.startswith("["))
    types, choices = of_list if is_list else single, entry.metadata.get("choices", ())
    readers: dict[Any, Callable[[str], Any]] = {int: int, float: float, Path: _path}
    readers[bool] = {"true": True, "false": False}.__getitem__
    readers[str] = {choice: choice for choice in choices}.__getitem__ if choices else str

    def read(word: str) -> Any:
        for type_ in types if word or not is_list else ():
            with contextlib.suppress(KeyError, ValueError):
                return readers[type_](word)
        names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
        names[str] = f"one of {', '.join(choices)}" if choices else "a name"
        allowed = " or ".join(names[type_] for type_ in types)
        near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
        raise ConfigError(f"{key}={text}: must be {allowed}{f'; did you mean {near[0]}?' if near else ''}")

    words = (text[1:-1] if text.startswith("[") and text.endswith("]") else text).split(",")
    return tuple(read(word.strip()) for word in words) if is_list else read(text)


def _path(text: str) -> Path:
    if not text:
        raise ValueError(text)
    return Path(text).expanduser()


def _shown(entry: "Field[Any]") -> str:
    """What stands for the value of an option in the help."""
    single, of_list = _types(entry)
    default = entry.default
    if entry.metadata["shown"] or default in (MISSING, None, ()):
        return str(entry.metadata["shown"]) or {int: "N", float: "X", Path: "PATH"}.get((single + of_list)[0], "TEXT")
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return text.lower() if isinstance(default, bool) else text


def _about(entry: "Field[Any]") -> str:
    """Meaning, choices and range of an option."""
    is_required = entry.default is MISSING and entry.default_factory is MISSING
    choices = "" if entry.metadata["shown"] else ", ".join(entry.metadata["choices"])
    is_obvious = entry.metadata["low"] in (0, 1) and entry.metadata["high"] is None
    limits = "" if is_obvious else describe_range(entry)
    return "; ".join(filter(None, (entry.metadata["about"], choices, limits, "required" if is_required else "")))


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
        raise ConfigError(unknown_key(key, keys, str(override.input_line).partition("=")[2]))


def _is_of_hydra(word: str) -> bool:
    """Whether an argument is an option of Hydra's application."""
    return word.startswith("-") and word.partition("=")[0] not in ("-cd", "--config-dir")


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Overrides, and the folder of `--config-dir`, of a Hydra command line."""
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

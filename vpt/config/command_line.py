"""The command line: `key=value` options of all commands, checked before anything is loaded, refused in one line."""

import contextlib
import difflib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from vpt.config.composition import compose_config, group_choices, groups
from vpt.config.errors import ConfigError, did_you_mean, first_line, no_such_choice, unknown_key
from vpt.config.help import HELP, answer_help, describe_options, option_types, print_help
from vpt.config.saved import conceal
from vpt.config.schema import Config, schema_keys, schema_options
from vpt.config.text import keep_text
from vpt.config.validation import check_ranges, to_config, why_unread

INTERRUPTED = 130  # the exit code after Ctrl-C, as in shells
OptionsT = TypeVar("OptionsT")
SHORT = {"epochs": "train.epochs", "batch_size": "train.batch_size", "img_size": "backbone.img_size"}
FLAGS = {  # of Hydra, beside those with a value
    *("-m", "--multirun", "-r", "--run", "-sc", "--shell-completion", "--resolve", "--experimental-rerun"),
    *("--cfg", "--package", "--info", "--config-name", "--config-path", "-h", "--help", "--hydra-help"),
}
LR = "lr"  # short for the rate of what is tuned


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
    arguments: list[str]  # the same in full: without short names, and with the quotes of Hydra's grammar
    unread: dict[str, str]  # typed words that no run reads, and why


def check_command_line(arguments: Sequence[str]) -> CommandLine:
    """Check the arguments of `python -m vpt.train` and compose its config; of a sweep each value, not each combination.

    Paths and names may look like numbers. `epochs`, `batch_size` and `img_size` are short for the keys of these names,
    and `lr` for the learning rate of what is tuned. A ConfigError is raised for a syntax error, an unknown key, group
    or value, a wrong type, or two words for one key.
    """
    typed, config_dir = _split_arguments(arguments)
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    keys = {word: key_of(word) for word in typed}
    full = {word: _full(word, SHORT.get(keys[word])) for word in typed}
    if rates := [word for word in typed if keys[word] == LR]:
        others = _parse_overrides([full[word] for word in typed if keys[word] != LR], is_sweep, config_dir)
        names = {config.tuned_rates for config, _ in _jobs(others, config_dir)}
        if len(names) > 1 or len(min(names)) > 1:
            each = " and ".join(f"{key}=..." for key in sorted({key for several in names for key in several}))
            raise ConfigError(f"{rates[0]}: several parts are tuned; type {each}")
        full |= {word: _full(word, min(names)[0]) for word in rates}
    for word in typed:
        other = next((other for other in typed if keys[other] == key_of(full[word]) != keys[word]), None)
        if other is not None:
            raise ConfigError(f"{word} and {other} set the same key; type one of them")
    overrides = _parse_overrides(list(full.values()), is_sweep, config_dir)
    own = [override for override in overrides if not override.is_hydra_override()]
    jobs = _jobs(own, config_dir)
    return CommandLine(
        *jobs[-1],
        needs_hydra=len(own) < len(overrides) or any(map(_is_of_hydra, arguments)),
        arguments=[full.get(word, word) for word in arguments],
        unread=_unread(own, [config for config, _ in jobs]),
    )


def refuse_unread(line: CommandLine) -> None:
    """A ConfigError for the first word that has no effect."""
    for word, why in line.unread.items():
        raise ConfigError(f"{word} has no effect: {why}; leave it out")


def compose_run(arguments: Sequence[str], *, allow_unread: bool = False) -> tuple[Config, Config]:
    """The config of one run, and the same as it may be saved, see `conceal`.

    A ConfigError is raised for Hydra's own options, and for words without effect unless they are allowed.
    """
    for word in filter(_is_of_hydra, arguments):
        raise ConfigError(f"{word}: not an option of this command; options are key=value, and --config-dir FOLDER")
    line = check_command_line(arguments)
    if not allow_unread:
        refuse_unread(line)
    return line.config, conceal(line.config, line.composed)


def key_of(word: str) -> str:
    """The key or group of an override.

    Example:
        >>> key_of("+experiment=quickstart"), key_of("prompt.num_tokens=5")
        ('experiment', 'prompt.num_tokens')
    """
    return word.partition("=")[0].lstrip("+~")


def parse_options(schema: type[OptionsT], arguments: Sequence[str], about: str) -> OptionsT:
    """Read `key=value` arguments into the dataclass of a command; `--help` prints its options inside `about`.

    Fields are of the types str, Path, int, float and bool, of tuples of these for lists such as `8,5` or `[8,5]`, of
    unions of these, or dict[str, str] for `key.NAME=text`. `option` describes a field. A ConfigError is raised if a key
    is unknown or missing, or a value has the wrong type or is out of range.
    """
    entries = {entry.name: entry for entry in fields(cast(Any, schema))}
    answer_help(arguments, entries)
    if HELP & set(arguments):
        print_help(describe_options(schema), about)
    values: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.lstrip("-").partition("=")
        name, dot, part = key.partition(".")
        entry = entries.get(name if dot else key)
        is_table = entry is not None and get_origin(entry.type) is dict
        if not equals or entry is None or is_table != bool(part) or word[0] == "-":
            known = f"; type {name}{'.NAME' * is_table}=..."
            example = known if entry and (is_table or not part) else did_you_mean(key, list(entries))
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
    names = {entry.name: entry for entry in fields(schema)}
    answer_help(arguments, {**names, **dict(schema_options())})
    own = [word for word in arguments if re.split(r"[.=]", word, maxsplit=1)[0] in names or word in HELP]
    keys = [word.partition("=")[0] for word in own]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is typed twice; type it once")
    return own, [word for word in arguments if word not in own]


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


def _parse(key: str, text: str, entry: "Field[Any]") -> Any:
    """The value of an option; of several types the first that it fits."""
    single, of_list = option_types(entry)
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


def _full(word: str, key: str | None) -> str:
    """An override with its whole key, and with quotes where the value is text that Hydra's grammar reads otherwise."""
    return keep_text(f"{key}={word.partition('=')[2]}" if key else word, groups())


def _parse_overrides(words: list[str], is_sweep: bool, config_dir: Path | None) -> list[Override]:
    """The overrides, each checked alone."""
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"cannot read the command line ({first_line(error)}); options are key=value") from error
    for override in overrides:
        if override.is_hydra_override():
            continue
        _check_key(override, config_dir)
        if override.is_sweep_override() and not is_sweep:
            raise ConfigError(f"{override.input_line} is a sweep over several values: add -m, or put quotes around it")
    return overrides


def _check_key(override: Override, config_dir: Path | None) -> None:
    key = override.key_or_group
    if override.is_delete():
        raise ConfigError(f"{override.input_line}: keys cannot be removed; set another value")
    choices = group_choices(key, config_dir)
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values if choices else []:
        if isinstance(value, str) and value.strip("'") not in choices:
            raise ConfigError(no_such_choice(key, value, choices))
    if key == "experiment" and not override.is_add():
        raise ConfigError(f"an experiment is added: type +experiment={values[0]}")
    if key in ("data", "train", "run") and isinstance(override.value(), str):
        hint = f"did you mean dataset={override.value()}?" if key == "data" else f"type {key}.KEY=..."
        raise ConfigError(f"{override.input_line}: {key} is a section of keys; {hint}")
    keys = [*schema_keys(), *groups(), *SHORT, LR]
    if not choices and key not in keys and not key.startswith("tuning.options."):
        raise ConfigError(unknown_key(key, keys, str(override.input_line).partition("=")[2]))


def _jobs(overrides: list[Override], config_dir: Path | None) -> list[tuple[Config, DictConfig]]:
    """The configs of a run, or of a sweep so many that each value occurs."""
    choices = [_choices(override) for override in overrides]
    jobs = []
    for number in range(max(map(len, choices), default=1)):
        composed = compose_config([values[min(number, len(values) - 1)] for values in choices], config_dir)
        jobs.append((to_config(composed), composed))
    return jobs


def _unread(overrides: list[Override], configs: list[Config]) -> dict[str, str]:
    """Words that none of the runs reads; not of a sweep over several keys, whose combinations are not composed."""
    if sum(override.is_sweep_override() for override in overrides) > 1:
        return {}
    reasons = {str(one.input_line): [why_unread(config, one.key_or_group) for config in configs] for one in overrides}
    return {word: why[0] for word, why in reasons.items() if all(why)}


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
        elif word.partition("=")[0] not in FLAGS:
            key, _, value = word.lstrip("-").partition("=")
            raise ConfigError(f"{word}: options are typed without dashes: {key}={value or next(rest, '...')}")
    if folder and not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder}: no such folder")
    return words, Path(folder) if folder else None


def _choices(override: Override) -> list[str]:
    """The override as typed, or one for each value of a sweep `key=a,b`."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = str(override.input_line).partition("=")[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]

"""Help on the options of commands and on the keys of the config, from what their fields state."""

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import omegaconf

from vpt.config.composition import group_choices
from vpt.config.errors import ConfigError, unknown_key
from vpt.version import __version__

HELP = {"-h", "--help"}
VERSION = "--version"
WIDTH = 120  # of a line of help


def answer_help(arguments: Sequence[str], options: Mapping[str, "Field[Any]"]) -> None:
    """For `--version`, or `--help KEY`, print the answer and exit; a ConfigError for a key that does not exist."""
    if VERSION in arguments:
        print(f"vpt {__version__}")  # noqa: T201
        sys.exit(0)
    if not HELP & set(arguments):
        return
    for key in (keys := [word for word in arguments if word[:1] != "-" and "=" not in word]):
        choices = group_choices(key) if any("." in name for name in options) else []
        if key not in options and not choices:
            raise ConfigError(unknown_key(key, list(options)))
        if choices:
            print(f"  {key}=NAME  one of {', '.join(choices)}")  # noqa: T201
        inside = [name for name in options if name == key or name.startswith(f"{key}.")]
        if inside:
            print(describe_fields((name, options[name]) for name in inside))  # noqa: T201
    if keys:
        sys.exit(0)


def print_help(options: str, about: str) -> NoReturn:
    """Print the help of a command with its options after the first paragraph, and exit."""
    first, _, rest = about.strip().partition("\n\n")
    print("\n\n".join(part for part in (first, options, rest) if part))  # noqa: T201
    sys.exit(0)


def describe_options(schema: type[Any], indent: str = "  ") -> str:
    """A line or more for each option: key, default or sort of value, meaning, and the values allowed."""
    return describe_fields(((entry.name, entry) for entry in fields(schema)), indent)


def describe_fields(options: Iterable[tuple[str, "Field[Any]"]], indent: str = "  ") -> str:
    """The same for options or keys by name; sections are left out."""
    entries = [(name, entry) for name, entry in options if "about" in entry.metadata]
    parts = [".NAME" if get_origin(entry.type) is dict else "" for _, entry in entries]
    heads = [f"{name}{part}={shown_value(entry)}" for (name, entry), part in zip(entries, parts, strict=True)]
    width = min(28, max(map(len, heads), default=0)) + 2
    lines: list[str] = []
    for head, (_, entry) in zip(heads, entries, strict=True):
        first = f"{indent}{head:<{width}}" if len(head) < width else f"{indent}{head}  "
        rest = " " * (len(indent) + width)
        wrapped = textwrap.wrap(meaning(entry), WIDTH, initial_indent=first, subsequent_indent=rest)
        lines += wrapped or [first.rstrip()]
    return "\n".join(lines)


def option_types(entry: "Field[Any]") -> tuple[list[Any], list[Any]]:
    """Types of an option's single value, and of the elements of a list."""

    def members(type_: Any) -> list[Any]:
        return [*get_args(type_)] if get_origin(type_) in (Union, UnionType) else [type_]

    lists = [inner for type_ in members(entry.type) if get_origin(type_) is tuple for inner in get_args(type_)[:1]]
    single = [type_ for type_ in members(entry.type) if type_ is not NoneType and get_origin(type_) is not tuple]
    return single, [type_ for inner in lists for type_ in members(inner)]


def shown_value(entry: "Field[Any]") -> str:
    """What stands for the value of an option: its default, or a word for its type."""
    single, of_list = option_types(entry)
    default = entry.default
    if entry.metadata["shown"] or default in (MISSING, None, (), omegaconf.MISSING):
        return str(entry.metadata["shown"]) or {int: "N", float: "X", Path: "PATH"}.get((single + of_list)[0], "TEXT")
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return text.lower() if isinstance(default, bool) else text


def meaning(entry: "Field[Any]") -> str:
    """Meaning, choices and range of an option, and what it is for."""
    single, _ = option_types(entry)
    is_required = entry.default is MISSING and entry.default_factory is MISSING
    names = [name for type_ in single if isinstance(type_, type) and issubclass(type_, StrEnum) for name in type_]
    choices = "" if entry.metadata["shown"] else ", ".join([*entry.metadata["choices"], *names])
    is_obvious = entry.metadata["low"] in (0, 1) and entry.metadata["high"] is None
    parts = [entry.metadata["about"], choices, "" if is_obvious else describe_range(entry)]
    parts += [f"for {' and '.join(entry.metadata['task'])}" if entry.metadata["task"] else ""]
    parts += ["with " + entry.metadata["needs"].replace("!=", " other than ") if entry.metadata["needs"] else ""]
    return "; ".join(filter(None, [*parts, "required" if is_required else ""]))


def describe_range(entry: "Field[Any]") -> str:
    """The range of a field in words; empty without one."""
    words = {"low": "at least", "above": "above", "high": "at most"}
    bounds = {bound: entry.metadata.get(bound) for bound in words}
    return " and ".join(f"{words[bound]} {limit}" for bound, limit in bounds.items() if limit is not None)

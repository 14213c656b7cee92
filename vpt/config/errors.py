"""Errors of the config, with hints at the nearest valid choice."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

RENAMED = {  # keys of version 0.1
    "prompt.kind": "prompt.variant",
    "tuning.kind": "tuning.method",
    "dataset.kind": "dataset.reader",
    "dataset.form": "dataset.format",
    "head.taps": "head.out_indices",
}
OTHER_WORDS = {"model": "backbone", "data": "dataset", "optim.lr": "lr", "learning_rate": "lr", "num_epochs": "epochs"}


class ConfigError(ValueError):
    """A value that the user typed cannot be used; the message is one line that states what to type."""


@contextmanager
def config_keys(**keys: str) -> Iterator[None]:
    """Name config keys, given by parameter of the library, in the errors of the library calls inside.

    Raises:
        ConfigError: A ValueError or TypeError inside named one of the parameters, as in `num_tokens=0: ...`. An OSError
            keeps its type; all other errors pass as they are.

    Example:
        >>> with config_keys(num_tokens="prompt.num_tokens"):
        ...     raise ValueError("num_tokens=0: must be at least 1")
        Traceback (most recent call last):
        vpt.config.errors.ConfigError: prompt.num_tokens=0: must be at least 1
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        before, names = str(error), "|".join(keys)
        message = re.sub(rf"(?<![\w./-])(?:{names})(?==)|^(?:{names})(?=: )", lambda found: keys[found[0]], before)
        if message == before:
            raise
        raise (type(error) if isinstance(error, OSError) else ConfigError)(message) from error


def no_such_choice(group: str, name: str, choices: Sequence[str]) -> str:
    """One line for a file that a group does not have."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{group}={name}: no such choice{hint} Choices: {', '.join(choices)}"


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The nearest of the choices, or the choices, as the end of a message."""
    first, dot, rest = word.partition(".")
    word = OTHER_WORDS.get(word) or OTHER_WORDS.get(first, first) + dot + rest
    last = word.rpartition(".")[2]
    near = [word] if word in choices else [choice for choice in choices if choice.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if not near:  # the last part alone: prompt.lenght is nearer to prompt.length than any whole key
        by_last = {choice.rpartition(".")[2]: choice for choice in choices}
        near = [by_last[name] for name in difflib.get_close_matches(last, list(by_last), n=1)]
    return f"; did you mean {' or '.join(near)}?" if near else f"; valid: {', '.join(choices[:20])}"


def unknown_key(key: str, keys: Sequence[str], value: str = "...") -> str:
    """One line for a key that the config does not have."""
    if key in RENAMED:
        return f"{key} was renamed: type {RENAMED[key]}={value}"
    return f"unknown key {key}{did_you_mean(key, keys)}"


def first_line(error: Exception | str) -> str:
    """The first line of a message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

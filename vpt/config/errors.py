"""The typed schema of `conf/`, its ranges, and messages that name the nearest valid choice."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """Something that the user typed cannot be used; the message is one line that says what to type."""


def no_such_choice(group: str, name: str, choices: Sequence[str]) -> str:
    """One line for a file that a group does not have."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{group}={name}: no such choice{hint} Choices: {', '.join(choices)}"


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The nearest of the choices, or the choices, as the end of a message."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if not near:  # the last part alone: prompt.lenght is nearer to prompt.length than any whole key
        by_last = {choice.rpartition(".")[2]: choice for choice in choices}
        near = [by_last[name] for name in difflib.get_close_matches(word.rpartition(".")[2], list(by_last), n=1)]
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(choices[:20])}"


def first_line(error: Exception) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Which runs a comparison takes: methods, pictures per class, seeds and rates; their configs are those of training."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vpt.compare.methods import Method, key_of
from vpt.config.command_line import compose_run, read_config
from vpt.config.composition import group_choices
from vpt.config.errors import ConfigError, did_you_mean
from vpt.config.schema import Config, PromptConfig, PromptName, TuningConfig, TuningName, schema_keys

ALL = "all"  # of shots: every train picture
OWN_RUNS = {  # what a comparison decides itself, and what to type instead
    "seed": "seeds=3, or seeds=[3]",
    "run.name": "output=FOLDER",
    "run.title": "output=FOLDER",
    "mode": "the command of vpt.train for a dry run",
}


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        method: Name of the method.
        shots: Train pictures per class; "all" for all of them, None for what the config says.
        seed: Of the run; it also draws which pictures are split off and taken per class, unless that was typed.
        rate: What the learning rates of the method are multiplied with.
    """

    method: str
    shots: int | str | None
    seed: int
    rate: float

    @property
    def title(self) -> str:
        """The name of its run, without the digest."""
        parts = [self.method, "" if self.shots is None else f"{self.shots}shot", f"seed{self.seed}"]
        return "_".join([part for part in parts if part] + ([] if self.rate == 1 else [f"lr{self.rate:g}"]))

    def __str__(self) -> str:
        shots = "" if self.shots is None else f", {describe_shots(self.shots)}"
        return f"{self.method}{shots}, seed {self.seed}{'' if self.rate == 1 else f', learning rate x {self.rate:g}'}"


@dataclass(frozen=True)
class Plan:
    """All that a comparison was asked for.

    Args:
        words: What is typed to every run.
        methods: By name.
        seeds: Of the runs; the first is that of the search.
        rates: Multipliers that the search tries, ascending; one is no search.
        shots: Pictures per class, ascending; None alone for what the config says.

    Raises:
        ConfigError: Something typed cannot be used; every method and every number of shots is composed once.
    """

    words: tuple[str, ...]
    methods: Mapping[str, Method]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    shots: tuple[int | str | None, ...]
    _base: dict[str, Config] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._check_words()
        read_config(self.words)
        for shots in self.shots:
            self._try(Trial(next(iter(self.methods)), shots, self.seeds[0], 1.0))
        for name in self.methods:
            self._base[name] = self._try(Trial(name, self.shots[0], self.seeds[0], 1.0))

    @property
    def num_runs(self) -> int:
        """How many runs there are, if none fails."""
        return len(self.methods) * len(self.shots) * (len(self.rates) + len(self.seeds) - 1)

    def entries(self) -> Iterator[tuple[int | str | None, str]]:
        """Shots and method of each row of the table."""
        return ((shots, name) for shots in self.shots for name in self.methods)

    def compose(self, trial: Trial) -> tuple[Config, Config]:
        """The config of a run without its folder, and what of it may be written down."""
        return compose_run(self.words_of(trial))

    def place(self, trial: Trial, root: Path) -> tuple[Config, Config]:
        """The same, in a folder of its own below `root`."""
        configs = self.compose(trial)
        for config in configs:
            config.run.root, config.run.name, config.run.title = str(root), None, trial.title
        return configs

    def words_of(self, trial: Trial) -> list[str]:
        """What would be typed to `python -m vpt.train` for a run."""
        typed = {key_of(word) for word in self.words}
        words = [*self.words, *self.methods[trial.method].overrides, f"seed={trial.seed}"]
        if "dataset.split_seed" not in typed:
            words.append(f"dataset.split_seed={trial.seed}")
        if trial.shots is not None:
            words.append(f"dataset.num_per_class={'null' if trial.shots == ALL else trial.shots}")
        if trial.rate != 1:
            words += [f"{key}={value * trial.rate:.6g}" for key, value in self.rates_of(trial.method).items()]
        return words

    def rates_of(self, method: str) -> dict[str, float]:
        """The learning rates that the search of a method multiplies, as its config has them."""
        config = self._base[method]
        return {key: _get(config, key) for key in searched_rates(config)}

    def _try(self, trial: Trial) -> Config:
        try:
            return self.compose(trial)[0]
        except ConfigError as error:
            raise ConfigError(f"method {trial.method}: {error}") from error

    def _check_words(self) -> None:
        """Refuse what a comparison decides itself, and what a method sets."""
        keys = [*schema_keys()]
        for word in self.words:
            key = key_of(word)
            if key in OWN_RUNS:
                raise ConfigError(f"{word}: a comparison decides this itself; type {OWN_RUNS[key]}")
            if key not in keys and not group_choices(key) and get_close_matches(key, OPTIONS, n=1):
                raise ConfigError(f"unknown key {key}{did_you_mean(key, OPTIONS)}")
            if key == "dataset.num_per_class" and self.shots != (None,):
                raise ConfigError(f"{word}: shots says how many; leave one of them out")
            for name, method in self.methods.items():
                if key in method.keys:
                    raise ConfigError(
                        f"{word}: method {name} sets {key} itself; leave it out, or type "
                        f'define.NAME="{" ".join(method.overrides)} ..." for a method of your own'
                    )


OPTIONS = ("methods", "seeds", "rates", "shots", "output", "define")  # of the command itself


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own options, and what is for every run."""
    own = [word for word in arguments if key_of(word).split(".")[0] in OPTIONS and not word.startswith("-")]
    return own, [word for word in arguments if word not in own]


def read_seeds(value: Any) -> tuple[int, ...]:
    """Seeds 0, 1, ... of a number of them, or a list as it is.

    Raises:
        ConfigError: Another value.
    """
    if type(value) is int and value >= 1:
        return tuple(range(value))
    if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value):
        return tuple(_distinct("seeds", value))
    raise ConfigError(f"seeds={_shown(value)}: must be how many, such as 3, or a list such as [0,1,2]")


def read_rates(value: Any) -> tuple[float, ...]:
    """Multipliers, ascending.

    Raises:
        ConfigError: One is not a number above 0.
    """
    rates = listed(value)
    if not rates or not all(type(rate) in (int, float) and 0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"rates={_shown(value)}: must be numbers above 0, such as [0.3,1,3]")
    return tuple(sorted(map(float, _distinct("rates", rates))))


def read_shots(value: Any) -> tuple[int | str | None, ...]:
    """Pictures per class, ascending, all of them last; None alone where nothing was said.

    Raises:
        ConfigError: One is neither a whole number from 1 nor "all".
    """
    if value is None:
        return (None,)
    shots = listed(value)
    if not shots or not all(one == ALL or (type(one) is int and one >= 1) for one in shots):
        raise ConfigError(f"shots={_shown(value)}: must be whole numbers from 1, such as [1,5,20], or all")
    return tuple(sorted(_distinct("shots", shots), key=lambda one: float("inf") if one == ALL else one))


def listed(value: Any) -> list[Any]:
    """A list as it is, and a single value as a list of it."""
    return [*value] if isinstance(value, list) else [value]


def describe_shots(shots: int | str | None) -> str:
    """Pictures per class, for a person.

    Example:
        >>> describe_shots(5), describe_shots("all")
        ('5 a class', 'all pictures')
    """
    return "all pictures" if shots in (None, ALL) else f"{shots} a class"


def searched_rates(config: Config) -> list[str]:
    """Keys of the learning rates of what a config trains; that of the head where nothing else trains."""
    tuning, prompt = config.tuning, config.prompt
    trains_prompt = tuning.kind is TuningName.prompt or tuning.with_prompt
    keys = ["optim.prompt_lr"] if trains_prompt and prompt.kind is not PromptName.none else []
    keys += [] if tuning.kind in (TuningName.prompt, TuningName.linear) else ["tuning.lr"]
    return keys or ["optim.head_lr"]


def bare_config(config: Config) -> Config:
    """The config of the same backbone with nothing in it that is learned, and the same head."""
    bare = copy.deepcopy(config)
    bare.tuning, bare.prompt = TuningConfig(kind=TuningName.linear), PromptConfig(kind=PromptName.none)
    return bare


def _distinct(key: str, values: Sequence[Any]) -> Sequence[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{key}: {value} stands twice")
    return values


def _shown(value: Any) -> str:
    return str(value).replace("'", "").replace(" ", "")


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config

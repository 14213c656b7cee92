"""The runs of a comparison: methods, images per class, seeds and learning rates."""

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from vpt.compare.methods import Method
from vpt.config.command_line import LR, check_command_line, compose_run, key_of
from vpt.config.composition import group_choices
from vpt.config.errors import ConfigError, unknown_key
from vpt.config.schema import Config, PromptConfig, PromptName, TuningConfig, TuningName, schema_keys

ALL = "all"  # of shots: every train image
OPTIONS = ("methods", "seeds", "rates", "shots", "output", "define")  # of the command itself
OWN_RUNS = {  # keys that a comparison sets, and what to type instead
    "seed": "seeds=3, or seeds=[3]",
    "run.name": "output=FOLDER",
    "run.title": "output=FOLDER",
    "mode": "the command of vpt.train for a dry run",
}


@dataclass(frozen=True)
class Trial:
    """One run."""

    method: str
    shots: int | str | None  # train images per class; "all" for all of them, None for the number in the config
    seed: int  # it also draws the images of val and per class, unless `dataset.split_seed` is typed
    rate: float  # factor of the learning rates of the method

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
    """The plan of a comparison; a ConfigError if a method or a number of shots cannot be composed with these words."""

    words: tuple[str, ...]  # overrides of every run
    methods: Mapping[str, Method]
    seeds: tuple[int, ...]  # the first is that of the search
    rates: tuple[float, ...]  # factors that the search tries, ascending; one is no search
    shots: tuple[int | str | None, ...]  # images per class, ascending; None alone for the number in the config
    _base: dict[str, Config] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seeds", "rates", "shots"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name}=0: must be at least 1")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}={','.join(map(str, values))}: must be distinct")
        self._check_words()
        compose_run(self.words, allow_unread=True)
        for shots in self.shots:
            self._try(Trial(next(iter(self.methods)), shots, self.seeds[0], 1.0))
        for name in self.methods:
            self._base[name] = self._try(Trial(name, self.shots[0], self.seeds[0], 1.0))
        unread = [check_command_line([*self.words, *method.overrides]).unread for method in self.methods.values()]
        for word in [word for word in self.words if all(word in words for words in unread)]:
            raise ConfigError(f"{word} has no effect on any of these methods; leave it out")

    @property
    def num_runs(self) -> int:
        """The number of runs, if none fails."""
        return len(self.methods) * len(self.shots) * (len(self.rates) + len(self.seeds) - 1)

    def entries(self) -> Iterator[tuple[int | str | None, str]]:
        """Shots and method of each row of the table."""
        return ((shots, name) for shots in self.shots for name in self.methods)

    def compose(self, trial: Trial) -> tuple[Config, Config]:
        """The config of a run without its folder, and the same as it may be saved."""
        return compose_run(self.words_of(trial), allow_unread=True)

    def place(self, trial: Trial, root: Path) -> tuple[Config, Config]:
        """The same, in a folder of its own in `root`."""
        configs = self.compose(trial)
        for config in configs:
            config.run.root, config.run.name, config.run.title = str(root), None, trial.title
        return configs

    def words_of(self, trial: Trial) -> list[str]:
        """The arguments of `python -m vpt.train` for a run."""
        typed = {key_of(word) for word in self.words}
        words = [*self.words, *self.methods[trial.method].overrides, f"seed={trial.seed}"]
        if "dataset.split_seed" not in typed:
            words.append(f"dataset.split_seed={trial.seed}")
        if trial.shots is not None:
            words.append(f"dataset.num_per_class={'null' if trial.shots == ALL else trial.shots}")
        if trial.rate != 1:
            words = [word for word in words if key_of(word) != LR]
            words += [f"{key}={value * trial.rate:.6g}" for key, value in self.rates_of(trial.method).items()]
        return words

    def rates_of(self, method: str) -> dict[str, float]:
        """The learning rates that the search of a method multiplies, from its config."""
        config = self._base[method]
        return {key: operator.attrgetter(key)(config) for key in config.tuned_rates}

    def _try(self, trial: Trial) -> Config:
        try:
            return self.compose(trial)[0]
        except ConfigError as error:
            raise ConfigError(f"method {trial.method}: {error}") from error

    def _check_words(self) -> None:
        """Refuse keys that the comparison or a method sets."""
        keys = schema_keys()
        for word in self.words:
            key = key_of(word)
            if key in OWN_RUNS:
                raise ConfigError(f"{word}: a comparison sets this; type {OWN_RUNS[key]}")
            if key not in keys and not group_choices(key) and get_close_matches(key, OPTIONS, n=1):
                raise ConfigError(unknown_key(key, OPTIONS))
            if key == "dataset.num_per_class" and self.shots != (None,):
                raise ConfigError(f"{word}: shots sets it; leave one of them out")
            for name, method in self.methods.items():
                if key in method.keys:
                    raise ConfigError(
                        f"{word}: method {name} sets {key}; leave it out, or type "
                        f'define.NAME="{" ".join(method.overrides)} ..." for a method of your own'
                    )


def describe_shots(shots: int | str | None) -> str:
    """Images per class in words.

    Example:
        >>> describe_shots(5), describe_shots("all")
        ('5 a class', 'all images')
    """
    return "all images" if shots in (None, ALL) else f"{shots} a class"


def bare_config(config: Config) -> Config:
    """The config of the same backbone and head without prompt and tuning."""
    bare = copy.deepcopy(config)
    bare.tuning, bare.prompt = TuningConfig(method=TuningName.linear), PromptConfig(variant=PromptName.none)
    return bare

"""The runs of a comparison: done one after another, those that are done are not done again; val chooses the rate."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.compare.costs import Cost, measure_cost
from vpt.compare.plan import Plan, Trial
from vpt.compare.run_predictions import Answers, answers_of
from vpt.config.command_line import compose_run
from vpt.config.errors import ConfigError, first_line
from vpt.config.schema import Config
from vpt.engine.console import percent
from vpt.engine.steps import OutOfMemoryError
from vpt.runs.folder import RunFolder
from vpt.storage.files import write_json
from vpt.task_types.base import kind_of

COSTS = "costs.json"

Train = Callable[[Config, Config], object]  # a config, and what of it may be written down


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        trial: Which run.
        folder: Where it lies.
        task_bytes: Size of its task file.
        result: What it left in `result.json`; empty if it failed.
        curve: The metric that chooses on val, by epoch.
        error: Why it failed; empty if it did not.
    """

    trial: Trial
    folder: Path
    task_bytes: int
    result: Mapping[str, Any]
    curve: tuple[float, ...] = ()
    error: str = ""

    @property
    def reason(self) -> str:
        """Why it failed, without images and advice."""
        return self.error.partition(";")[0].partition(", images ")[0]

    def metric(self, split: str, name: str) -> float:
        """A metric of a split; nan if the run failed, or has no such split."""
        return float(self.result.get("metrics", {}).get(split, {}).get(name, math.nan))

    def rank(self, name: str) -> tuple[float, float]:
        """How good val says that it is: higher is better."""
        loss = self.metric("val", "loss")
        return self.metric("val", name), -math.inf if math.isnan(loss) else -loss


@dataclass(frozen=True)
class Row:
    """A method with a number of pictures per class.

    Args:
        method: Its name.
        title: What a person calls it.
        shots: Train pictures per class.
        metric: What val chooses by.
        split: What is reported.
        cost: What the method costs.
        search: Runs of the first seed, by rate, ascending.
        rate: What val of them chose; None if none of several was finite.
        outcomes: Runs with that rate, one for each seed.
        answers: Of the first seed; None if it failed.
    """

    method: str
    title: str
    shots: int | str | None
    metric: str
    split: str
    cost: Cost
    search: tuple[Outcome, ...]
    rate: float | None
    outcomes: tuple[Outcome, ...]
    answers: Answers | None

    @property
    def finished(self) -> list[Outcome]:
        """Runs that did not fail."""
        return [outcome for outcome in self.outcomes if not outcome.error]

    @property
    def runs(self) -> list[Outcome]:
        """All runs, those of the search first."""
        return [*self.search, *(outcome for outcome in self.outcomes if outcome not in self.search)]

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried, so that one beyond it may be better."""
        tried = [outcome.trial.rate for outcome in self.search]
        return len(tried) > 1 and self.rate in (tried[0], tried[-1])

    @property
    def error(self) -> str:
        """Why there is no result, or fewer than asked for; empty if all is there."""
        failed = [outcome for outcome in (*self.outcomes, *(() if self.outcomes else self.search)) if outcome.error]
        return f"{len(failed)} failed: {failed[0].reason}" if failed else ""


class Runs:
    """Everything that a plan asks for; what would stop training is found here, before a file is written.

    Args:
        plan: What is asked for.
        output: The folder of the comparison.
        tell: Says a line.

    Attributes:
        samples: The data of the first seed, by shots and split.
        costs: What each method costs with the most pictures.

    Raises:
        ValueError, OSError: Data or models cannot be used.
    """

    def __init__(self, plan: Plan, output: Path, tell: Callable[[str], object]) -> None:
        self.plan, self.output, self.tell = plan, output, tell
        self.num_begun = 0
        first = next(iter(plan.methods))
        configs = {shots: self.config(first, shots) for shots in plan.shots}
        self.kind = kind_of(next(iter(configs.values())))
        self.samples = {shots: kind_of(config).read() for shots, config in configs.items()}
        self.split = "test" if "test" in self.samples[plan.shots[0]] else "val"
        if self.split == "val":
            tell("there is no test split: val chooses and reports, which flatters; type dataset.test_fraction=0.2")
        self._kept = _read_costs(output / COSTS)
        self.costs = {name: self._measure(name) for name in plan.methods}

    def do(self, train: Train) -> list[Row]:
        """Do all runs, or find that they are done; a row for each number of shots and method.

        Args:
            train: Runs a config to its end, or finds that this was done.

        Raises:
            ValueError, OSError: As training.
        """
        write_json(self.output / COSTS, {name: cost.to_dict() for name, cost in self._kept.items()})
        return [self._row(train, shots, name) for shots, name in self.plan.entries()]

    def config(self, method: str, shots: int | str | None) -> Config:
        """Of the first run of a row."""
        return self.plan.place(Trial(method, shots, self.plan.seeds[0], 1.0), self.output / "runs")[0]

    def _measure(self, name: str) -> Cost:
        """The cost of a method, if it was not measured earlier."""
        shots = self.plan.shots[-1]
        config = self.config(name, shots)
        key = RunFolder(config, config).path.name
        if key not in self._kept:
            self.tell(f"measure {name}")
            try:
                self._kept[key] = measure_cost(config, self.samples[shots])
            except (ValueError, TypeError, OSError) as error:
                raise ConfigError(f"method {name}: {first_line(error)}") from error
        return self._kept[key]

    def _row(self, train: Train, shots: int | str | None, name: str) -> Row:
        plan = self.plan
        search = [self._run(train, Trial(name, shots, plan.seeds[0], rate)) for rate in plan.rates]
        rate = _choose(search, self.kind.select)
        outcomes = [outcome for outcome in search if outcome.trial.rate == rate]
        if rate is not None:
            outcomes += [self._run(train, Trial(name, shots, seed, rate)) for seed in plan.seeds[1:]]
        else:
            self.num_begun += len(plan.seeds) - 1
        answers = None
        if outcomes and not outcomes[0].error:
            config = self.config(name, shots)
            answers = answers_of(config, outcomes[0].folder, self.samples[shots], self.split)
        return Row(
            method=name,
            title=plan.methods[name].title,
            shots=shots,
            metric=self.kind.select,
            split=self.split,
            cost=self.costs[name],
            search=tuple(search),
            rate=rate,
            outcomes=tuple(outcomes),
            answers=answers,
        )

    def _run(self, train: Train, trial: Trial) -> Outcome:
        """Do a run, or find that it is done; a loss that is not finite is an outcome, too."""
        config, shown = self.plan.place(trial, self.output / "runs")
        folder = RunFolder(config, shown)
        self.num_begun += 1
        is_done = folder.result_file.is_file() and folder.task.is_file() and not config.fresh
        self.tell(f"[{self.num_begun}/{self.plan.num_runs}] {trial}{' (done before)' if is_done else ''}")
        try:
            train(config, shown)
        except (FloatingPointError, OutOfMemoryError) as error:
            failed = Outcome(trial, folder.path, 0, {}, error=first_line(error))
            self.tell(f"    failed: {failed.reason}")
            return failed
        curve = _read_curve(folder.path, self.kind.select)
        outcome = Outcome(trial, folder.path, folder.task.stat().st_size, folder.result(), curve)
        seconds = outcome.result["seconds"]
        self.tell(f"    val {self.kind.select} {percent(outcome.metric('val', self.kind.select))}, {seconds:.0f} s")
        return outcome


def choose_output(plan: Plan) -> Path:
    """The folder of a comparison that names none: one for each data set and recipe, whatever is compared on them."""
    config, _ = compose_run(plan.words)
    config.run.name = None
    digest = RunFolder(config, config).path.name.rpartition("_")[2]
    return Path(config.run.root).expanduser() / f"compare_{config.dataset.title}_{digest}"


def _choose(search: list[Outcome], metric: str) -> float | None:
    """The rate of the run that val likes best, the lowest of equals; none if several failed. Test is not asked."""
    if len(search) == 1:
        return search[0].trial.rate
    finished = [outcome for outcome in search if not outcome.error]
    return max(finished, key=lambda outcome: outcome.rank(metric)).trial.rate if finished else None


def _read_curve(folder: Path, metric: str) -> tuple[float, ...]:
    """The metric on val after each epoch."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # a disk was full: all else of the run is there
        return ()
    values = [line[f"val/{metric}"] for line in lines if f"val/{metric}" in line]
    return tuple(math.nan if value is None else float(value) for value in values)


def _read_costs(path: Path) -> dict[str, Cost]:
    """What was measured earlier; nothing if that cannot be read."""
    try:
        return {name: Cost.from_dict(values) for name, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}

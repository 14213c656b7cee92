"""Runs of a comparison, one after another; finished runs are not repeated, and val selects the learning rate."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.compare.costs import Cost, measure_cost
from vpt.compare.plan import Plan, Trial
from vpt.compare.run_predictions import RunPredictions, read_or_predict
from vpt.config.command_line import compose_run
from vpt.config.errors import ConfigError, first_line
from vpt.config.naming import data_name
from vpt.config.saved import to_plain
from vpt.config.schema import Config
from vpt.engine.console import percent
from vpt.engine.steps import OutOfMemoryError
from vpt.runs.folder import RunFolder
from vpt.storage.files import write_json
from vpt.task_types.base import task_type_of

COSTS = "costs.json"

Train = Callable[[Config, Config], object]  # the config of a run, and the config that may be saved


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run."""

    trial: Trial
    folder: Path
    task_bytes: int  # size of its task file
    result: Mapping[str, Any]  # content of `result.json`; empty if it failed
    curve: tuple[float, ...] = ()  # the selection metric on val, by epoch
    error: str = ""  # why it failed; empty if it did not

    @property
    def reason(self) -> str:
        """Why it failed, without images and advice."""
        return self.error.partition(";")[0].partition(", images ")[0]

    def metric(self, split: str, name: str) -> float:
        """A metric of a split; nan if the run failed, or has no such split."""
        return float(self.result.get("metrics", {}).get(split, {}).get(name, math.nan))

    def rank(self, name: str) -> tuple[float, float]:
        """The metric and the negative loss on val, to compare runs; higher is better."""
        loss = self.metric("val", "loss")
        return self.metric("val", name), -math.inf if math.isnan(loss) else -loss


@dataclass(frozen=True)
class Row:
    """A method with a number of images per class."""

    method: str
    title: str  # its name for the user
    shots: int | str | None  # train images per class
    metric: str  # the selection metric
    split: str  # the reported split
    cost: Cost
    search: tuple[Outcome, ...]  # runs of the first seed, by rate, ascending
    rate: float | None  # selected on val; None if all of several failed
    outcomes: tuple[Outcome, ...]  # runs with that rate, one for each seed
    predictions: RunPredictions | None  # of the first seed; None if it failed

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
        """Whether the best rate is the lowest or the highest tried, so that one beyond it may be better."""
        tried = [outcome.trial.rate for outcome in self.search]
        return len(tried) > 1 and self.rate in (tried[0], tried[-1])

    @property
    def error(self) -> str:
        """Why results are missing; empty if none are."""
        failed = [outcome for outcome in (*self.outcomes, *(() if self.outcomes else self.search)) if outcome.error]
        return f"{len(failed)} failed: {failed[0].reason}" if failed else ""


class Runs:
    """All runs of a plan; data and models are checked when it is created, before any file is written.

    A ValueError or OSError is raised if data or models cannot be used.
    """

    def __init__(self, plan: Plan, output: Path, log: Callable[[str], object]) -> None:
        self.plan, self.output, self.log = plan, output, log
        self.num_begun = 0
        first = next(iter(plan.methods))
        configs = {shots: self.config(first, shots) for shots in plan.shots}
        self.task_type = task_type_of(next(iter(configs.values())))
        self.samples = {shots: task_type_of(config).read() for shots, config in configs.items()}  # of the first seed
        self.split = "test" if "test" in self.samples[plan.shots[0]] else "val"
        if self.split == "val":
            log("no test split: val both selects and reports, which is optimistic; type dataset.test_fraction=0.2")
        self._saved_costs = _read_costs(output / COSTS)
        self.costs = {name: self._measure(name) for name in plan.methods}  # with the most images

    def do(self, train: Train) -> list[Row]:
        """Do all runs that are not finished; returns a row for each number of shots and method.

        `train` trains a config to its end, or returns at once if the run is finished; its errors pass.
        """
        write_json(self.output / COSTS, {name: cost.to_dict() for name, cost in self._saved_costs.items()})
        return [self._row(train, shots, name) for shots, name in self.plan.entries()]

    def config(self, method: str, shots: int | str | None) -> Config:
        """The config of the first run of a row."""
        return self.plan.place(Trial(method, shots, self.plan.seeds[0], 1.0), self.output / "runs")[0]

    def _measure(self, name: str) -> Cost:
        """The cost of a method, measured unless it is saved."""
        shots = self.plan.shots[-1]
        config = self.config(name, shots)
        key = RunFolder(config, config).path.name
        if key not in self._saved_costs:
            self.log(f"measure {name}")
            try:
                self._saved_costs[key] = measure_cost(config, self.samples[shots])
            except (ValueError, TypeError, OSError) as error:
                raise ConfigError(f"method {name}: {first_line(error)}") from error
        return self._saved_costs[key]

    def _row(self, train: Train, shots: int | str | None, name: str) -> Row:
        plan, metric = self.plan, self.task_type.main_metric
        search = [self._run(train, Trial(name, shots, plan.seeds[0], rate)) for rate in plan.rates]
        rate = _choose(search, metric)
        outcomes = [outcome for outcome in search if outcome.trial.rate == rate]
        if rate is not None:
            outcomes += [self._run(train, Trial(name, shots, seed, rate)) for seed in plan.seeds[1:]]
        else:
            self.num_begun += len(plan.seeds) - 1
        predictions = None
        if outcomes and not outcomes[0].error:
            folder, samples = outcomes[0].folder, self.samples[shots]
            predictions = read_or_predict(self.config(name, shots), folder, samples, self.split)
        title, cost = plan.methods[name].title, self.costs[name]
        found = tuple(search), rate, tuple(outcomes), predictions
        return Row(name, title, shots, metric, self.split, cost, *found)

    def _run(self, train: Train, trial: Trial) -> Outcome:
        """Do a run unless it is finished; a loss that is not finite is an outcome, too."""
        config, shown = self.plan.place(trial, self.output / "runs")
        folder = RunFolder(config, shown)
        self.num_begun += 1
        is_done = folder.result_file.is_file() and folder.task.is_file() and not config.fresh
        self.log(f"[{self.num_begun}/{self.plan.num_runs}] {trial}{' (finished before)' if is_done else ''}")
        try:
            train(config, shown)
        except (FloatingPointError, OutOfMemoryError) as error:
            failed = Outcome(trial, folder.path, 0, {}, error=first_line(error))
            self.log(f"    failed: {failed.reason}")
            return failed
        metric, size = self.task_type.main_metric, folder.task.stat().st_size
        outcome = Outcome(trial, folder.path, size, folder.result(), _read_curve(folder.path, metric))
        self.log(f"    val {metric} {percent(outcome.metric('val', metric))}, {outcome.result['seconds']:.0f} s")
        return outcome


def choose_output(plan: Plan) -> Path:
    """The default folder: one for each data set and recipe, whatever is compared on them."""
    config, shown = compose_run(plan.words, allow_unread=True)
    config.run.name = None
    digest = RunFolder(config, config).path.name.rpartition("_")[2]
    return Path(config.run.root).expanduser() / f"compare_{data_name(to_plain(shown)['dataset'])}_{digest}"


def _choose(search: list[Outcome], metric: str) -> float | None:
    """The rate of the best run on val, the lowest of equals; None if all of several failed."""
    if len(search) == 1:
        return search[0].trial.rate
    finished = [outcome for outcome in search if not outcome.error]
    return max(finished, key=lambda outcome: outcome.rank(metric)).trial.rate if finished else None


def _read_curve(folder: Path, metric: str) -> tuple[float, ...]:
    """The metric on val after each epoch."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # after a full disk, for example; the rest of the run is complete
        return ()
    values = [line[f"val/{metric}"] for line in lines if f"val/{metric}" in line]
    return tuple(math.nan if value is None else float(value) for value in values)


def _read_costs(path: Path) -> dict[str, Cost]:
    """The saved costs; empty if they cannot be read."""
    try:
        return {name: Cost.from_dict(values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}

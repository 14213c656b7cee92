"""python -m vpt.compare methods=[...] seeds=3: train several methods on the same data and compare them."""

import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.compare.methods import METHODS, choose_methods
from vpt.compare.plan import Plan
from vpt.config.command_line import check_folder, escape_output, fail, is_for_user, parse_options, split_options
from vpt.config.errors import ConfigError
from vpt.config.schema import Config, option
from vpt.engine.signals import STOPPED, Stopped, StopSignal

if TYPE_CHECKING:
    from vpt.compare.report import Comparison
    from vpt.compare.runs import Train

MARK = "comparison.json"  # marks the folder of a comparison

USAGE = f"""python -m vpt.compare: train several methods on the same data; a table, CSV and an offline HTML report.

Lists are typed with brackets or without, methods=linear,bias.
All other options go to every run, as if typed to `python -m vpt.train`: +experiment=NAME dataset=... train.epochs=...
The same command again resumes: a finished run is not repeated, also with other methods, seeds, rates or shots.

Methods:
{chr(10).join(f"  {name:<18} {method.title:<22} {' '.join(method.overrides)}" for name, method in METHODS.items())}

Exit codes: 0 done, 1 a method has no finished run, 2 the command cannot be used, 75 stopped, resume it.
Example: python -m vpt.compare +experiment=quickstart methods=[linear,prompt_deep,bias] seeds=3 shots=[1,5]"""


@dataclass
class CompareOptions:
    """Options of `python -m vpt.compare` beside those of `vpt.train`."""

    methods: tuple[str, ...] = option(
        (), "some of the methods below; by default all that need no other package", shown="[NAME,NAME]"
    )
    define: dict[str, str] = option({}, "a method of your own: overrides of vpt.train", shown='"prompt=deep ..."')
    seeds: int | tuple[int, ...] = option(
        3, "runs of each method: seeds 0, 1, 2; or a list, such as seeds=[7,8]", low=0
    )
    rates: tuple[float, ...] = option(
        (1.0,),
        "a search: val of the first seed chooses the factor of the method's learning rates; as many tries for every "
        "method; [1] is no search",
        above=0,
        shown="[0.3,1,3]",
    )
    shots: tuple[int | str, ...] = option(
        (),
        "the whole comparison for each number of train images per class",
        low=1,
        choices=("all",),
        shown="[1,5,20,all]",
    )
    output: Path | None = option(
        None, "report.html, table.csv, runs.csv and the runs; by default runs/compare_...", shown="FOLDER"
    )


@dataclass(frozen=True)
class Request:
    """A comparison to make."""

    plan: Plan
    output: Path | None  # the folder of the results; None to choose one
    command: str  # as typed


def main() -> None:
    """Read the options, compare, print the table."""
    escape_output()
    try:
        with StopSignal() as stop:
            comparison = compare(read_options(sys.argv[1:]), stop)
    except Stopped as error:
        fail(RuntimeError(f"stopped by {error}; the same command resumes where it stopped"), STOPPED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)
    if any(not row.finished for row in comparison.rows):
        sys.exit(1)


def read_options(arguments: Sequence[str]) -> Request:
    """The options, checked before anything is loaded; a ConfigError if one cannot be used."""
    own, words = split_options(CompareOptions, arguments)
    options = parse_options(CompareOptions, own, USAGE)
    shots = sorted(options.shots, key=lambda shots: math.inf if isinstance(shots, str) else shots)
    plan = Plan(
        words=tuple(words),
        methods=choose_methods(options.methods, options.define),
        seeds=tuple(range(options.seeds)) if isinstance(options.seeds, int) else options.seeds,
        rates=tuple(sorted(options.rates)),
        shots=tuple(shots) or (None,),
    )
    return Request(plan, options.output, shlex.join(["python", "-m", "vpt.compare", *arguments]))


def compare(options: Request, stop: StopSignal | None = None) -> "Comparison":
    """Train what is not trained yet, print the table, write the files."""
    stop = stop or StopSignal()
    with stop.deferred():  # an exception in the middle of an import of C++ ends the process
        from vpt.compare.report import Comparison, write_report
        from vpt.compare.runs import Runs, choose_output
        from vpt.compare.table import describe_table, write_tables
        from vpt.storage.files import write_json
        from vpt.storage.lock import locked
    stop.check()
    output = options.output or choose_output(options.plan)
    check_folder("output", output)
    if output.is_dir() and not (output / MARK).is_file() and any(output.iterdir()):
        raise ConfigError(f"output={output}: holds other files; name a new folder, or that of a comparison")
    if output.is_dir():
        with locked(output / ".lock", output):  # a folder in use is refused now, not after minutes of measuring
            pass
    print(f"{options.plan.num_runs} runs, into {output}", flush=True)
    runs = Runs(options.plan, output, partial(print, flush=True))
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".lock", output):
        write_json(output / MARK, {"command": options.command, "vpt": version("vpt")})
        comparison = Comparison.of(runs, runs.do(_trainer(output / "log.txt", stop)), options.command)
        write_tables(output, comparison.rows)
        write_report(output / "report.html", comparison)
    print(f"\n{describe_table(comparison.rows)}\n\n{output} contains report.html, table.csv and runs.csv")
    return comparison


def _trainer(log: Path, stop: StopSignal) -> "Train":
    """Train as `python -m vpt.train`, with the output of runs in a file."""
    from vpt.train.training import run

    def train(config: Config, shown: Config) -> None:
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file, redirect_stdout(file):
            run(config, shown, stop=stop)

    return train


if __name__ == "__main__":
    main()

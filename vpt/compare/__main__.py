"""python -m vpt.compare methods=[...] seeds=3: train several methods on the same data, and report what each buys."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vpt.compare.methods import METHODS, choose_methods
from vpt.compare.plan import Plan, listed, read_rates, read_seeds, read_shots, split_words
from vpt.config.command_line import check_folder, fail, is_for_user, quote_paths
from vpt.config.errors import ConfigError, first_line
from vpt.config.schema import Config
from vpt.engine.signals import STOPPED, Stopped, StopSignal

if TYPE_CHECKING:
    from vpt.compare.report import Comparison
    from vpt.compare.runs import Train

LISTS = ("methods", "seeds", "rates", "shots")
MARK = "comparison.json"  # makes a folder known as that of a comparison

USAGE = f"""python -m vpt.compare: train several methods on the same data; a table, CSV and a report that opens offline.

  methods=[NAME,NAME]  which; all that need no other package when left out
  define.NAME="prompt=deep prompt.num_tokens=50"   a method of your own: overrides as typed to vpt.train
  seeds=3              runs of each method: seeds 0, 1, 2; or a list, seeds=[7,8]
  rates=[0.3,1,3]      a search: val of the first seed chooses what the method's learning rate is multiplied with;
                       as many tries for every method; [1], which is no search, when left out
  shots=[1,5,20,all]   the whole comparison for each number of train pictures per class
  output=FOLDER        report.html, table.csv, runs.csv and the runs; runs/compare_... when left out

Lists are typed with brackets or without, methods=linear,bias.
All else goes to every run, as if typed to `python -m vpt.train`: +experiment=NAME dataset=... train.epochs=...
The same command again goes on: a run that is done is not done again, also with other methods, seeds, rates or shots.

Methods:
{chr(10).join(f"  {name:<18} {method.title:<22} {' '.join(method.overrides)}" for name, method in METHODS.items())}

Exit codes: 0 done, 1 a method has no finished run, 2 the command cannot be used, 75 stopped: type it again.
Example: python -m vpt.compare +experiment=quickstart methods=[linear,prompt_deep,bias] seeds=3 shots=[1,5]"""


@dataclass(frozen=True)
class CompareOptions:
    """What `python -m vpt.compare` was asked for.

    Args:
        plan: The runs.
        output: Folder of all that is made; None to choose one.
        command: What was typed.
    """

    plan: Plan
    output: Path | None
    command: str


def main() -> None:
    """Read the options, compare, print the table."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    try:
        with StopSignal() as stop:
            comparison = compare(read_options(arguments), stop)
    except Stopped as error:
        fail(RuntimeError(f"stopped by {error}; type the same command again, and it goes on where it stopped"), STOPPED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)
    if any(not row.finished for row in comparison.rows):
        sys.exit(1)


def read_options(arguments: Sequence[str]) -> CompareOptions:
    """The options, all of them checked, before anything is loaded.

    Raises:
        ConfigError: One cannot be used.
    """
    own, words = split_words(arguments)
    values: dict[str, Any] = {}
    for word in own:
        values |= _read_word(word, values)
    defined = values.pop("define", {})
    if not isinstance(defined, dict) or not all(isinstance(text, str) for text in defined.values()):
        raise ConfigError('define: type define.NAME="prompt=deep prompt.num_tokens=50"')
    plan = Plan(
        words=tuple(quote_paths(words)),
        methods=choose_methods(_read_names(values.get("methods", [])), defined),
        seeds=read_seeds(values.get("seeds", 3)),
        rates=read_rates(values.get("rates", 1)),
        shots=read_shots(values.get("shots")),
    )
    output = values.get("output")
    if "output" in values and (not isinstance(output, str | int) or not str(output)):
        raise ConfigError(f"output={output or ''}: name a folder")
    command = shlex.join(["python", "-m", "vpt.compare", *arguments])
    return CompareOptions(plan, None if output is None else Path(str(output)).expanduser(), command)


def compare(options: CompareOptions, stop: StopSignal | None = None) -> "Comparison":
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
    _check_output(output)
    if output.is_dir():
        with locked(output / ".lock", output):  # it is measured for minutes before there is something to write
            pass
    print(f"{options.plan.num_runs} runs, into {output}", flush=True)
    runs = Runs(options.plan, output, _say)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".lock", output):
        write_json(output / MARK, {"command": options.command, "vpt": version("vpt")})
        comparison = Comparison.of(runs, runs.do(_trainer(output / "log.txt", stop)), options.command)
        write_tables(output, comparison.rows)
        write_report(output / "report.html", comparison)
    print(f"\n{describe_table(comparison.rows)}\n\n{output} holds report.html, table.csv and runs.csv")
    return comparison


def _trainer(log: Path, stop: StopSignal) -> "Train":
    """Trains as the command does; what a run tells goes to a file."""
    with stop.deferred():
        from vpt.train.training import run

    def train(config: Config, shown: Config) -> None:
        with log.open("a") as file, redirect_stdout(file):
            run(config, shown, stop=stop)

    return train


def _say(line: str) -> None:
    print(line, flush=True)


def _check_output(output: Path) -> None:
    """Refuse a folder that holds other things than a comparison."""
    check_folder("output", output)
    if output.is_dir() and not (output / MARK).is_file() and any(output.iterdir()):
        raise ConfigError(f"output={output}: holds other files; name a new folder, or that of a comparison")


def _read_word(word: str, values: dict[str, Any]) -> dict[str, Any]:
    """The value of an option, as YAML reads it; a definition joins those before it."""
    key, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"{word}: not an option of the form key=value")
    is_list = key in LISTS and "," in text and not text.startswith("[")  # some shells want quotes around brackets
    try:
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=[{text}]" if is_list else word]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{word}: cannot be read ({first_line(error)})") from error
    option, _, rest = key.partition(".")
    if (option == "define") != bool(rest):
        raise ConfigError(f'{word}: type define.NAME="prompt=deep prompt.num_tokens=50" for a method of your own')
    if option == "define":
        return {"define": values.get("define", {}) | read["define"]}
    if option in values:
        raise ConfigError(f"{word}: {option} stands twice")
    return dict(read)


def _read_names(value: Any) -> list[str]:
    """Names of methods."""
    names = listed(value)
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"methods={value or ''}: must be names, such as methods=[linear,prompt_deep]")
    return names


if __name__ == "__main__":
    main()

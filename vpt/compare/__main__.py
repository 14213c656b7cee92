"""python -m vpt.compare methods=[...] seeds=3: train several methods on the same data and compare them."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
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
MARK = "comparison.json"  # marks the folder of a comparison

USAGE = f"""python -m vpt.compare: train several methods on the same data; a table, CSV and an offline HTML report.

  methods=[NAME,NAME]  default: all that need no other package
  define.NAME="prompt=deep prompt.num_tokens=50"   a method of your own: overrides as typed to vpt.train
  seeds=3              runs of each method: seeds 0, 1, 2; or a list, seeds=[7,8]
  rates=[0.3,1,3]      learning rate search: factors of the learning rate of each method, selected on val with the
                       first seed; default: [1], no search
  shots=[1,5,20,all]   repeat the comparison for each number of train images per class
  output=FOLDER        for report.html, table.csv, runs.csv and the runs; default: runs/compare_...

Lists may be typed without brackets: methods=linear,bias.
All other options go to every run, as in `python -m vpt.train`: +experiment=NAME dataset=... train.epochs=...
The same command resumes: finished runs are not repeated, also with other methods, seeds, rates or shots.

Methods:
{chr(10).join(f"  {name:<18} {method.title:<22} {' '.join(method.overrides)}" for name, method in METHODS.items())}

Exit codes: 0 done, 1 a method has no finished run, 2 the command cannot be used, 75 stopped, resume it.
Example: python -m vpt.compare +experiment=quickstart methods=[linear,prompt_deep,bias] seeds=3 shots=[1,5]"""


@dataclass(frozen=True)
class CompareOptions:
    """Options of `python -m vpt.compare`.

    Args:
        plan: The runs.
        output: Folder of all files; None for the default.
        command: The command as typed.
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
        fail(RuntimeError(f"stopped by {error}; the same command resumes where it stopped"), STOPPED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)
    if any(not row.finished for row in comparison.rows):
        sys.exit(1)


def read_options(arguments: Sequence[str]) -> CompareOptions:
    """Read and check all options, before anything is loaded.

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
    """Do the runs that are not finished, print the table, write the files."""
    stop = stop or StopSignal()
    with stop.patient():  # an exception in the middle of an import of C++ ends the process
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
        with locked(
            output / ".lock", output
        ):  # refuse a folder in use now: the first write comes after minutes of measuring
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
    from vpt.train.__main__ import run

    def train(config: Config, shown: Config) -> None:
        with log.open("a") as file, redirect_stdout(file):
            run(config, shown, stop=stop)

    return train


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

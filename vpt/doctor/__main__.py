"""python -m vpt.doctor dataset=...: check a data set before training."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from vpt.config.command_line import (
    INTERRUPTED,
    check_file,
    compose_run,
    escape_output,
    fail,
    is_for_user,
    parse_options,
    split_options,
)
from vpt.config.schema import Config, option

FOUND = 1

USAGE = """python -m vpt.doctor: read every image once, report problems and what training would do with the data.

All other options are those of vpt.train, and change nothing:
  dataset=NAME         and its keys: dataset.root=PATH, dataset.path=FILE, dataset.val_fraction=0.2, ...
  +experiment=NAME     or an experiment, as in training
  backbone=NAME        image sizes are compared with its input; also backbone.img_size=448; no weights are loaded
  num_workers=N        loader processes, as in training
`python -m vpt.train --help` lists all keys.

Reported are images that cannot be read, are too large or unusual; duplicates within a split, across splits (leakage)
and under different labels; classes with few images or none, imbalance; sizes that do not fit the backbone; wrong boxes,
and boxes too small to be detected.

Exit codes: 0 training would run; 1 it would stop, or images are in two splits; 2 the command cannot be used.
Example: python -m vpt.doctor dataset=folder dataset.root=photos backbone=vit_tiny json=found.json"""


@dataclass
class DoctorOptions:
    """Options of `python -m vpt.doctor` beside those of `vpt.train`."""

    json: Path | None = option(None, "a file for everything found, with all file names", shown="FILE.json")


def main() -> None:
    """Check the command line and the data, and report."""
    escape_output()
    try:
        own, words = split_options(DoctorOptions, sys.argv[1:])
        output = parse_options(DoctorOptions, own, USAGE).json
        if output is not None:
            check_file("json", output, (".json",))
        config, _ = compose_run(words)
        is_fine = examine(config, output, shlex.join(["python", "-m", "vpt.train", *words]))
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted before every image was read; nothing was written"), INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)
    if not is_fine:
        sys.exit(FOUND)


def examine(config: Config, output: Path | None, command: str) -> bool:
    """Check the data of a run, print the report, write it as JSON; returns whether there are no errors."""
    from vpt.doctor.report import check
    from vpt.storage.files import write_json

    report = check(config, command)
    print(report)
    if output is not None:
        write_json(output, report.to_dict())
        print(f"json      {output}")
    return report.is_fine


if __name__ == "__main__":
    main()

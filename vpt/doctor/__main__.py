"""python -m vpt.doctor dataset=...: look at every picture once, and say what training would make of the data."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vpt.config.command_line import INTERRUPTED, check_file, fail, is_for_user, quote_paths, read_config
from vpt.config.errors import ConfigError
from vpt.config.schema import Config

FOUND = 1

USAGE = """python -m vpt.doctor: look at every picture once, and say what training would make of the data.

It takes what vpt.train takes, and changes nothing:

  dataset=NAME         and its keys: dataset.root=PATH, dataset.path=FILE, dataset.val_fraction=0.2, ...
  +experiment=NAME     or an experiment, as in training
  backbone=NAME        sizes are compared with its input; also backbone.img_size=448; no weights are loaded
  num_workers=N        processes that read, as in training
  json=FILE.json       write everything that was found, with all files, for programs

`python -m vpt.train --help` lists all keys. It finds pictures that cannot be read, are too large or unusual; copies in
a split, in two splits (leakage), and under different labels; classes with few pictures or none, imbalance; sizes that
do not fit the backbone; wrong boxes, and boxes too small to be found.

Exit codes: 0 training would run; 1 it would stop, or pictures are in two splits; 2 the command cannot be used.
Example: python -m vpt.doctor dataset=folder dataset.root=photos backbone=vit_tiny json=found.json"""


def main() -> None:
    """Check the command line, look at the data, say what was found."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    try:
        output, words = _take_json(arguments)
        config = read_config(quote_paths(words))
        is_fine = examine(config, output, shlex.join(["python", "-m", "vpt.train", *words]))
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted before every picture was looked at; nothing was written"), INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)
    if not is_fine:
        sys.exit(FOUND)


def examine(config: Config, output: Path | None, command: str) -> bool:
    """Look at the data, print what was found, write it as JSON; return whether it is free of errors.

    Args:
        config: Of the run that would train on the data.
        output: The JSON file, if one is wanted.
        command: What would train on the data.
    """
    from vpt.doctor.report import check
    from vpt.storage.files import write_json

    checkup = check(config, command)
    print(checkup)
    if output is not None:
        write_json(output, checkup.to_dict())
        print(f"json      {output}")
    return checkup.is_fine


def _take_json(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The doctor's own key out of the arguments, which are for Hydra; and the others."""
    own = [word for word in arguments if word.partition("=")[0] == "json"]
    others = [word for word in arguments if word not in own]
    if not own:
        return None, others
    if len(own) > 1:
        raise ConfigError(f"{' '.join(own)}: name one file")
    _, equals, value = own[0].partition("=")
    if not equals or not value:
        raise ConfigError(f"{own[0]}: name a file, such as json=found.json")
    path = Path(value).expanduser()
    check_file("json", path, (".json",))
    return path, others


if __name__ == "__main__":
    main()

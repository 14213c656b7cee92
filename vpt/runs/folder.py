"""The folder of a run: its name, its lock, and whether the run in it has finished or can be resumed.

The same command resumes in the same folder. Without `run.name`, and in a sweep, the name of the folder ends in a digest
of all settings that decide the result, so that each config has a folder of its own, also one with a name of 0.1.
"""

import glob
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import yaml

from vpt.config.errors import ConfigError, first_line
from vpt.config.naming import data_name
from vpt.config.saved import PLACES, ROUNDING, WITHOUT_EFFECT, first_names, rename_keys, to_plain
from vpt.config.schema import Config, Mode, TrainConfig
from vpt.engine.checkpoint import NAMES, NEW
from vpt.engine.console import warn
from vpt.runs.record import RECORD
from vpt.storage.files import replace, write_bytes
from vpt.storage.lock import locked

CONFIG, RESULT, TASK, LOCK = "config.yaml", "result.json", "task.safetensors", ".lock"


class RunFolder:
    """The folder of one run, locked while entered unless the run has finished.

    Args:
        config: The run's config.
        shown: The config as it may be saved; `config_text` is its YAML.
        is_sweep: Whether it is one of several runs of one command.

    Attributes:
        path: The folder, which may not exist yet; `task` and `result_file`, which a run writes last, are in it.
        is_finished: Whether the run has finished.
        is_extended: Whether it has finished, and `extend=true` begins more epochs; `make` then renames its result.
    """

    def __init__(self, config: Config, shown: Config, *, is_sweep: bool = False) -> None:
        self.config, self.values = config, to_plain(shown)
        run, root = config.run, Path(config.run.root).expanduser()
        dry = "_dry" if config.mode is Mode.dry else ""
        self.path = root / f"{run.name}{dry}"
        if run.name is None or is_sweep:
            start, end = f"{run.name}_" if run.name else "", f"_{_digest(to_plain(config), is_sweep)[:8]}{dry}"
            of_0_1 = run.name or f"{config.dataset.title}_{config.tuning.title}{config.head.title}"
            named = [root / f"{start}{run.title}{end}", root / f"{of_0_1}{end}"]
            data = f"{data_name(self.values['dataset'])}_"
            if run.title.startswith(data):  # the same config, typed with other words
                named += sorted(root.glob(f"{glob.escape(start + data)}*{end}"))
            self.path = next((path for path in named if path.is_dir()), named[0])
        self.task, self.result_file = self.path / TASK, self.path / RESULT
        self.config_text = yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)
        self.is_finished = self.is_extended = False
        self._former_epochs: int | None = None  # of a result that is no longer that of the run
        self._stack, self._is_locked = ExitStack(), False

    def __enter__(self) -> Self:
        """Lock the folder if it exists, and check that it is of this run.

        Raises:
            ConfigError: It is of another run or of no run, or `fresh=true` cannot rename it.
            LockedError: Another process trains in it.
        """
        if not _is_begun(self.path):
            if self.config.extend:
                raise ConfigError(f"extend=true: there is no run in {self.path}; name a finished one, run.name=NAME")
            return self
        with self._stack:
            if self.config.fresh or self.config.mode is Mode.dry:
                self._move_away()
            else:
                self._resume()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def result(self) -> dict[str, Any]:
        """Read `result.json` of a finished run, with nan for null; ConfigError if it is damaged."""
        try:
            result = dict(json.loads(self.result_file.read_text(encoding="utf-8")))
            metrics = {
                split: {name: math.nan if value is None else float(value) for name, value in values.items()}
                for split, values in result["metrics"].items()
            }
            return {**result, "epochs": int(result["epochs"]), "metrics": metrics}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{self.result_file}: damaged ({error!r}); delete it, and it is written again") from error

    def make(self) -> None:
        """Create and lock the folder, and save the config; remove the logs of a run that has no checkpoint.

        Raises:
            ConfigError: The folder cannot be created or written to.
            LockedError: Another process was faster.
        """
        try:
            if not self._is_locked:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock()
                if _is_begun(self.path):  # another process created it meanwhile
                    self._refuse_changes()
            for name in (CONFIG, RESULT, TASK, NEW, RECORD):
                for leftover in self.path.glob(f".{name}.*"):  # of a process that was killed while writing
                    leftover.unlink()
            if not any((self.path / name).exists() for name in NAMES):
                for leftover in [*self.path.glob("events.out.tfevents.*"), self.path / "metrics.jsonl"]:
                    leftover.unlink(missing_ok=True)
            write_bytes(self.path / CONFIG, self.config_text.encode())
            if self._former_epochs is not None:
                replace(self.result_file, self.path / f"result_{self._former_epochs}.json")
        except OSError as error:
            where = f"run.root={self.config.run.root}"
            raise ConfigError(f"{where}: {error.strerror}; choose a folder that can be written to") from error

    def _resume(self) -> None:
        """Lock the folder, or set `is_finished`; a finished run requires no lock and no permission to write."""
        before = self._refuse_changes()
        was, now = dict(_decisive(before)).get("train.epochs", TrainConfig.epochs), self.config.train.epochs
        is_done, planned = self.result_file.is_file() and self.task.is_file(), self._planned_epochs() or was
        if was != now and not is_done:
            raise ConfigError(
                f"{self.path}: extend=true is for a finished run, and this one has not done its {was} epochs: type "
                f"train.epochs={was} without extend=true first"
            )
        if was > now:
            raise ConfigError(f"train.epochs={now}: the run in {self.path} has {was} epochs; extend=true needs more")
        self.is_extended = was < now
        if is_done and planned != now:
            self._former_epochs = planned  # a process may have been killed when the config was written
            self._lock()
        elif is_done and dict(_places(before)) == dict(_places(self.values)):
            self.is_finished = True  # moved data are first compared with those of the checkpoint
        else:
            self._lock()

    def _planned_epochs(self) -> int | None:
        """The `train.epochs` that the result is of; None without one, or where it does not state it, as in 0.1."""
        try:
            return int(json.loads(self.result_file.read_text(encoding="utf-8"))["planned_epochs"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _lock(self) -> None:
        try:
            self._stack.enter_context(locked(self.path / LOCK, self.path))
        except OSError as error:  # a full disk, for example
            raise ConfigError(f"{self.path}: cannot be locked: {error.strerror}; make it writable") from error
        self._is_locked = True

    def _unlock(self) -> None:
        self._stack.close()
        self._is_locked = False

    def _read_config(self) -> dict[str, Any]:
        """Read the saved config; refuse a folder that is no run folder."""
        another = "choose another run.name"
        try:
            found = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path}: exists and is no run folder; {another}") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            why = f"cannot be read ({first_line(error)}); {another}, or rename the folder with fresh=true"
            raise ConfigError(f"{self.path / CONFIG}: {why}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{self.path / CONFIG}: is no config; {another}, or rename the folder with fresh=true")
        return rename_keys(found)

    def _refuse_changes(self) -> dict[str, Any]:
        """Refuse a config that would change the result of the run; return the saved config.

        Keys that the saved config does not have had their defaults.
        """
        before, defaults = self._read_config(), dict(_decisive(to_plain(Config())))
        was, now = defaults | dict(_decisive(before)), dict(_decisive(self.values))
        keys = [key for key in {**now, **dict(_decisive(before))} if was.get(key) != now.get(key)]
        changed = [f"{key} was {was.get(key)}, is now {now.get(key)}" for key in keys]
        if changed and not (self.config.extend and keys == ["train.epochs"]):
            extend = "extend=true to train it on once it has finished, or " if keys == ["train.epochs"] else ""
            raise ConfigError(
                f"{self.path}: was started with another config ({'; '.join(changed)}); restore these values, name "
                f"another folder with run.name=NAME, or type {extend}fresh=true to rename this one and start anew"
            )
        for key in ROUNDING:
            if before.get(key) != self.values.get(key):
                warn(f"{key} was {before.get(key)}, is now {self.values.get(key)}: last digits of numbers may differ")
        return before

    def _move_away(self) -> None:
        """Rename the folder, for instance to `NAME_1`; delete that of a dry run."""
        if not (self.path / CONFIG).exists():
            self._read_config()  # raises the reason
        is_dry = self.config.mode is Mode.dry
        if is_dry and self._read_config().get("mode") != Mode.dry:
            raise ConfigError(f"{self.path}: exists and is no dry run; choose another run.name")
        self._lock()
        if is_dry:
            shutil.rmtree(self.path)
        else:
            names = (self.path.with_name(f"{self.path.name}_{number}") for number in range(1, 10_000))
            away = next(path for path in names if not path.exists())
            self.path.rename(away)
            (away / LOCK).unlink(missing_ok=True)
            warn(f"{self.path} existed and was renamed to {away}")
        self._unlock()


def _is_begun(path: Path) -> bool:
    """Whether a folder has files other than locks and parts of files, which a killed process leaves."""
    return path.is_dir() and any(not inner.name.startswith(".") for inner in path.iterdir())


def _digest(values: Mapping[str, Any], is_sweep: bool) -> str:
    """A digest of all settings that decide the result, with absolute paths; in a sweep, of all but the run's own."""
    ignored = ("run", "fresh") if is_sweep else (*WITHOUT_EFFECT, *ROUNDING)
    absolute = {
        key: str(Path(value).expanduser().absolute()) if isinstance(value, str) else value
        for key, value in _places(values)
    }
    found = {key: value for key, value in _flat(values) if not set(key.split(".")) & set(ignored)}
    return hashlib.sha256(json.dumps(first_names({**found, **absolute}), sort_keys=True).encode()).hexdigest()


def _decisive(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values that decide the result, such as "train.epochs"; of paths, which may move, the last part only."""
    for key, value in _flat(values):
        if not set(key.split(".")) & {*WITHOUT_EFFECT, *ROUNDING}:
            is_place = key.rpartition(".")[2] in PLACES and isinstance(value, str)
            yield key, Path(value).name if is_place else value


def _places(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of the paths of data and weights, not those of the run."""
    for key, value in _flat(values):
        if key.rpartition(".")[2] in PLACES and not key.startswith("run."):
            yield key, value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys such as "train.epochs" and their values."""
    for key, value in values.items():
        if isinstance(value, dict) and key not in PLACES:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value

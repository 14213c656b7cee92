"""The folder of a run: which one a command means, whose it is, and whether there is anything left to do in it.

The same command goes on in the same folder. A name that was given is that of the folder; without one, and in a sweep,
a digest of all that decides the result is in it, so that each config has a folder of its own.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from vpt.config import PLACES, ROUNDING, WITHOUT_EFFECT, Config, ConfigError, Mode, to_plain
from vpt.engine.checkpoint import NAMES, NEW
from vpt.engine.console import warn
from vpt.files import write_bytes
from vpt.lock import locked

CONFIG, RESULT, TASK, LOCK = "config.yaml", "result.json", "task.safetensors", ".lock"


class RunFolder:
    """The folder of one run, locked while entered.

    Args:
        config: The run's config.
        shown: The config as it may be written down.
        is_sweep: Whether it is one of many runs that one command asks for.

    Attributes:
        path: Where it is, or will be.
        task: Its task file.
        result_file: What a run leaves last.
        config_text: The config as YAML, as it is written down.
    """

    def __init__(self, config: Config, shown: Config, *, is_sweep: bool = False) -> None:
        self.config, self.values = config, to_plain(shown)
        name = config.run.name or config.run.title
        if config.run.name is None or is_sweep:
            name += f"_{_digest(self.values)[:8]}"
        self.path = Path(config.run.root).expanduser() / (name + ("_dry" if config.mode is Mode.dry else ""))
        self.task, self.result_file = self.path / TASK, self.path / RESULT
        self.config_text = yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)
        self._stack, self._is_locked = ExitStack(), False

    def __enter__(self) -> Self:
        """Lock the folder if it is there, and make sure that it is this run's.

        Raises:
            ConfigError: It is not, or not known to be; or `fresh=true` cannot put it away.
            LockedError: Another process trains in it.
        """
        with self._stack:
            if self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                self._lock()
                before = self._read_config()
                if self.config.mode is Mode.dry and before.get("mode") != Mode.dry:
                    raise ConfigError(f"{self.path}: is there, and no dry run; choose another run.name")
                if self.config.fresh or self.config.mode is Mode.dry:
                    self._unlock()
                    self._put_away()
                else:
                    self._refuse_changes(before)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result_file.is_file() and self.task.is_file()

    def result(self) -> dict[str, Any]:
        """What a finished run left in `result.json`."""
        try:
            return dict(json.loads(self.result_file.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.result_file}: damaged ({error}); delete it, and it is made again") from error

    def make(self) -> None:
        """Make the folder if it is not there, lock it, and write down the config.

        What a run left that was killed before its first checkpoint is removed.

        Raises:
            ConfigError: The folder cannot be made or written to.
            LockedError: Another process was faster.
        """
        try:
            if not self._is_locked:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock()
                if (self.path / CONFIG).exists():  # another process made it meanwhile
                    self._refuse_changes(self._read_config())
            for name in (CONFIG, RESULT, TASK, NEW):
                for leftover in self.path.glob(f".{name}.*"):  # of a process that was killed while it wrote
                    leftover.unlink()
            if not any((self.path / name).exists() for name in NAMES):
                for leftover in [*self.path.glob("events.out.tfevents.*"), self.path / "metrics.jsonl"]:
                    leftover.unlink(missing_ok=True)
            write_bytes(self.path / CONFIG, self.config_text.encode())
        except OSError as error:
            where = f"run.root={self.config.run.root}"
            raise ConfigError(f"{where}: {error.strerror}; choose a folder that can be written to") from error

    def _lock(self) -> None:
        self._stack.enter_context(locked(self.path / LOCK, self.path))
        self._is_locked = True

    def _unlock(self) -> None:
        self._stack.close()
        self._is_locked = False

    def _read_config(self) -> dict[str, Any]:
        """The config that is written in the folder; refuses a folder that is no run's."""
        try:
            found = yaml.safe_load((self.path / CONFIG).read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path}: is there, and no run folder; choose another run.name") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.path / CONFIG}: cannot be read ({error}); choose another run.name") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{self.path / CONFIG}: is no config; choose another run.name")
        return found

    def _refuse_changes(self, before: Mapping[str, Any]) -> None:
        """Refuse a config that would give another result than the one that was begun with."""
        was, now = dict(_decisive(before)), dict(_decisive(self.values))
        changed = [f"{key} was {was[key]}, is now {now[key]}" for key in now if key in was and was[key] != now[key]]
        if changed:
            raise ConfigError(
                f"{self.path}: was begun with another config ({'; '.join(changed)}); give these the values they had, "
                "name another folder with run.name=NAME, or type fresh=true to put this one away and start anew"
            )
        for key in ROUNDING:
            if before.get(key) != self.values.get(key):
                warn(f"{key} was {before.get(key)}, is now {self.values.get(key)}: last digits of numbers may differ")

    def _put_away(self) -> None:
        """Give the folder another name, `NAME_1` say; that of a dry run is deleted."""
        if self.config.mode is Mode.dry:
            shutil.rmtree(self.path)
            return
        names = (self.path.with_name(f"{self.path.name}_{number}") for number in range(1, 10_000))
        away = next(path for path in names if not path.exists())
        self.path.rename(away)
        warn(f"{self.path} was there; it is {away} now")


def digest_of(samples: Mapping[str, Any]) -> str:
    """A digest of which pictures there are, of what size in bytes, and what is said of them, in every split."""
    digest = hashlib.sha256()
    for split, members in samples.items():
        digest.update(f"{split} {members.classes} {members.names}".encode())
        for name in ("targets", "boxes", "labels", "crowd"):
            for value in getattr(members, name, ()):
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else f"{value} ".encode())
        digest.update(f"{[path.stat().st_size for path in members.paths]}".encode())
    return digest.hexdigest()


def _digest(values: Mapping[str, Any]) -> str:
    """A digest of all that decides the result; of paths their absolute form, as the same data have."""
    return hashlib.sha256(json.dumps(dict(_decisive(values, resolve=True)), sort_keys=True).encode()).hexdigest()


def _decisive(values: Mapping[str, Any], prefix: str = "", resolve: bool = False) -> Iterator[tuple[str, Any]]:
    """Keys and values that decide the result, such as "train.epochs"; of paths, which may move, the last part."""
    for key, value in values.items():
        if key in WITHOUT_EFFECT or prefix + key in ROUNDING:
            continue
        if key in PLACES and isinstance(value, str):
            path = Path(value).expanduser()
            yield prefix + key, str(path.absolute()) if resolve and "${" not in value else path.name
        elif isinstance(value, dict):
            yield from _decisive(value, f"{prefix}{key}.", resolve)
        else:
            yield prefix + key, value

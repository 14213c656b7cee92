"""Checkpoints of a run: `last.checkpoint`, and `previous.checkpoint` in case the last one is damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vpt.engine.console import warn
from vpt.storage.files import read_tensors, replace, write_tensors

NAMES = ("last.checkpoint", "previous.checkpoint")
NEW = "next.checkpoint"  # until it was read back
FORMER_KEYS = {"images or labels": "pictures or labels"}  # of `made_from`, in checkpoints of version 0.1


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint and its path."""

    path: Path
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def check_run_dir(path: Path) -> None:
    """Raise a FileNotFoundError if the folder of a run that has begun is gone."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: the run folder was moved or removed while the run was at work; move it back, and type the same "
            "command again"
        )


class Checkpoints:
    """The two last states of a run; a file that is damaged by its sha256 is replaced by the other one.

    Args:
        run_dir: The run folder.
        made_from: Digests of what the run depends on, such as {"data": ...}; a state with others is refused.
        made_with: What last digits of numbers depend on, such as {"threads": 2}; a state with others is reported.

    Attributes:
        error: Why the last `save` failed; None if it did not.
    """

    def __init__(
        self,
        run_dir: Path,
        made_from: Mapping[str, str] | None = None,
        made_with: Mapping[str, str | int | None] | None = None,
    ) -> None:
        self.made_from, self.made_with = dict(made_from or {}), dict(made_with or {})
        self.last, self.previous = (run_dir / name for name in NAMES)
        self.error: OSError | None = None
        self._is_damaged = False  # the last file, so that it must not take the place of the previous one

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> bool:
        """Write a state, read it back, and make it the last one; the last one becomes the previous one.

        A full disk is a warning: the last state stays, and the next call tries again. `numbers` are JSON values.
        Returns whether the state is on the disk. FileNotFoundError if the run folder is gone; it is not made again.
        """
        check_run_dir(self.last.parent)
        new = self.last.with_name(NEW)
        try:
            write_tensors(new, tensors, {**numbers, "made_from": self.made_from, "made_with": self.made_with})
            read_tensors(new, max_bytes=float("inf"))
            if self.last.exists() and not self._is_damaged:
                replace(self.last, self.previous)
            replace(new, self.last)
            self._is_damaged = False
        except (OSError, ValueError) as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            new.unlink(missing_ok=True)
            warn(f"no checkpoint: {self.error}. Training continues, and the next checkpoint is tried again")
            return False
        self.error = None
        return True

    def load(self) -> Saved | None:
        """The last state that is not damaged; None if none was ever saved.

        ValueError if all files are damaged, or the run depends on other data or weights.
        """
        found = [path for path in (self.last, self.previous) if path.exists()]
        errors = []
        for path in found:
            try:
                tensors, numbers = read_tensors(path, max_bytes=float("inf"))
            except (ValueError, OSError) as error:
                errors.append(str(error))
                self._is_damaged |= path == self.last
                continue
            if errors:
                warn(f"{errors[0]}; resuming from {path.name}")
            self._check_made_from(path, numbers.get("made_from"))
            for key, value in numbers.get("made_with", {}).items():  # version 0.1 did not save it
                if value != (now := self.made_with.get(key)):
                    warn(f"{path}: {key} was {value}, is now {now}: last digits of numbers may differ")
            return Saved(path, tensors, numbers)
        if errors:
            raise ValueError(f"{'; '.join(errors)}; no checkpoint is left")
        return None

    def _check_made_from(self, path: Path, made_from: object) -> None:
        known = made_from if isinstance(made_from, dict) else {}
        known = {new: known[old] for new, old in FORMER_KEYS.items() if old in known} | known
        if changed := [name for name, digest in self.made_from.items() if known.get(name) != digest]:
            raise ValueError(
                f"{path}: the {' and the '.join(changed)} of this run changed since it was started; "
                "restore them, or start a new run"
            )

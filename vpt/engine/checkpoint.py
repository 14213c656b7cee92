"""Checkpoints of a run: `last.checkpoint`, and `previous.checkpoint` in case that the last one is damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vpt.engine.console import warn
from vpt.storage.files import read_tensors, replace, write_tensors

NAMES = ("last.checkpoint", "previous.checkpoint")
NEW = "next.checkpoint"  # until it has been read again


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, and where it was found."""

    path: Path
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class Checkpoints:
    """The two last states of a run; a damaged or cut file is noticed by its sha256, and the other one taken.

    Args:
        run_dir: The run folder.
        made_from: Digests of what the run is made from, such as {"data": ...}; a state goes on with the same only.

    Attributes:
        error: Why the last `save` failed; None if it did not.
    """

    def __init__(self, run_dir: Path, made_from: Mapping[str, str] | None = None) -> None:
        self.made_from = dict(made_from or {})
        self.last, self.previous = (run_dir / name for name in NAMES)
        self.error: OSError | None = None
        self._is_damaged = False  # the last file, so that it must not take the place of the previous one

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> bool:
        """Write a state and read it again, before it takes the place of the last one, which becomes the previous one.

        A disk that is full is told, and no reason to stop: the last state stays, and the next call tries again.

        Args:
            tensors: The tensors of the state.
            numbers: The rest, as JSON values.

        Returns:
            Whether the state is on the disk.
        """
        new = self.last.with_name(NEW)
        try:
            write_tensors(new, tensors, {**numbers, "made_from": self.made_from})
            read_tensors(new, max_bytes=float("inf"))
            if self.last.exists() and not self._is_damaged:
                replace(self.last, self.previous)
            replace(new, self.last)
            self._is_damaged = False
        except (OSError, ValueError) as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            new.unlink(missing_ok=True)
            warn(f"no checkpoint: {self.error}. Training goes on, and the next checkpoint is tried again")
            return False
        self.error = None
        return True

    def load(self) -> Saved | None:
        """The last state that is whole; None if the run has never saved one.

        Raises:
            ValueError: There are files, and none of them is whole; or the run was made from something else.
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
                warn(f"{errors[0]}; going on from {path.name}")
            self._refuse_others(path, numbers.get("made_from"))
            return Saved(path, tensors, numbers)
        if errors:
            raise ValueError(f"{'; '.join(errors)}; no checkpoint is left: type fresh=true to start anew")
        return None

    def _refuse_others(self, path: Path, made_from: object) -> None:
        known = made_from if isinstance(made_from, dict) else {}
        changed = [name for name, digest in self.made_from.items() if known.get(name) != digest]
        if changed:
            raise ValueError(
                f"{path}: the {' and the '.join(changed)} of this run are not those that it was begun with; "
                "bring them back, or type fresh=true to put the run away and start anew"
            )

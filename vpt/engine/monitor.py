"""What a run writes down while it trains: TensorBoard events and `metrics.jsonl`.

The only file that knows TensorBoard. Events lie directly in the run's folder, so that `tensorboard --logdir runs` shows
one entry for each run, named like its folder.
"""

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, SupportsFloat

from vpt.engine.console import warn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

MEASURED = ("perf/", "memory/")

OVERVIEW: Mapping[str, Sequence[str]] = {
    "loss": ["^train/loss$", "^val/loss$"],
    "accuracy": ["^val/top1$", "^val/mean_per_class$"],
    "learning rate": ["^lr/"],
    "prompt gradient norm": [r"^prompt(_factor\d)?_grad_norm/"],
    "prompt norm": [r"^prompt(_factor\d)?_norm/"],
    "prompt update ratio": [r"^prompt(_factor\d)?_update_ratio/"],
    "images per second": ["^perf/images_per_s$"],
    "data wait fraction": ["^perf/data_wait_fraction$"],
    "peak memory, MiB": ["^memory/peak_mib$"],
}
"""The charts of the page "overview" under Custom Scalars: title -> regular expressions of the tags that it shows."""

DETECTION_OVERVIEW: Mapping[str, Sequence[str]] = {
    "loss": ["^train/loss$", "^val/loss$"],
    "losses apart": ["^train/.*_loss$"],
    "mean average precision": ["^val/map$", "^val/map50$", "^val/map75$"],
    **{title: tags for title, tags in OVERVIEW.items() if title not in ("loss", "accuracy")},
}


class Monitor:
    """Writes scalars, pictures, text and hyperparameters of one run; in a run of many processes, the first makes one.

    A file that cannot be written (a full disk, a lost share) is reported once, as a warning, and training goes on.

    `metrics.jsonl` is the same whenever the run is the same, also if it was stopped and went on: paces and memory are
    in the events only.

    Args:
        run_dir: The run's folder; made if it is missing.
        layout: Charts of the overview page, title -> regular expressions of tags; None for `OVERVIEW`.
        going_on: Of a run that goes on: the bytes of `metrics.jsonl`, as `sync` told them, and the step; what was
            written after that is taken back.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Monitor(Path(folder)) as monitor:
        ...     monitor.scalars({"train/loss": 0.5}, step=1)
        ...     print((Path(folder) / "metrics.jsonl").read_text(), end="")
        {"step": 1, "train/loss": 0.5}
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        layout: Mapping[str, Sequence[str]] | None = None,
        going_on: tuple[int, int] | None = None,
    ) -> None:
        self._metrics_file = run_dir / "metrics.jsonl"
        self._warned: set[str] = set()
        num_bytes, self._last_step = going_on or (0, 0)
        self._writer: SummaryWriter | None = None
        self._before, threading.excepthook = threading.excepthook, self._on_thread_error
        self._attempt("metrics.jsonl", lambda: run_dir.mkdir(parents=True, exist_ok=True))
        self._attempt("metrics.jsonl", lambda: self._cut(num_bytes))
        self._attempt("TensorBoard events", lambda: self._open_events(run_dir, going_on))
        if going_on is not None:
            return
        charts = OVERVIEW if layout is None else layout
        multiline = {title: ["Multiline", list(tags)] for title, tags in charts.items()}
        self._write_events(lambda writer: writer.add_custom_scalars({"overview": multiline}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalars(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        """Write numbers, one point for each tag and one line of `metrics.jsonl`, where nan and inf become null.

        What differs from one run to its repetition, `perf/` and `memory/`, is left out of `metrics.jsonl`.

        Args:
            values: Tag -> a number or a tensor of one element.
            step: Optimiser updates so far.

        Raises:
            ValueError: If a tag is "step", the name that `metrics.jsonl` keeps for the step.
        """
        if "step" in values:
            raise ValueError('The tag "step" is taken: metrics.jsonl keeps the step under this name.')
        numbers = {tag: float(value) for tag, value in values.items()}
        self._last_step = step
        kept = {tag: number for tag, number in numbers.items() if not tag.startswith(MEASURED)}
        self._attempt("metrics.jsonl", lambda: _append(self._metrics_file, step, kept))

        def write(writer: "SummaryWriter") -> None:
            for tag, number in numbers.items():
                writer.add_scalar(tag, number, step)

        self._write_events(write)

    def images(self, tag: str, pictures: "NDArray[np.uint8] | Sequence[NDArray[np.uint8]]", step: int) -> None:
        """Write one picture under `tag`, or several under `tag_00`, `tag_01`, ...

        Args:
            tag: The tag.
            pictures: (H, W, 3) uint8, or a sequence of such.
            step: Optimiser updates so far.

        Raises:
            ValueError: If a picture has another shape or type.
        """
        if isinstance(pictures, Sequence) or pictures.ndim == 4:
            tagged = {f"{tag}_{i:02d}": picture for i, picture in enumerate(pictures)}
        else:
            tagged = {tag: pictures}
        for name, picture in tagged.items():
            _check_picture(name, picture)

        def write(writer: "SummaryWriter") -> None:
            for name, picture in tagged.items():
                writer.add_image(name, picture, step, dataformats="HWC")

        self._write_events(write)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write text, which TensorBoard reads as Markdown: put code between fences."""
        self._write_events(lambda writer: writer.add_text(tag, text, step))

    def hparams(self, hparams: Mapping[str, object], metrics: Mapping[str, SupportsFloat]) -> None:
        """Write the row of this run in the table of hyperparameters; call it once, when the run has ended.

        TensorBoard shows the first row that a run writes: a later call changes the scalars only.

        Args:
            hparams: Name -> value; a nested mapping becomes `outer.inner`, what is no number becomes text.
            metrics: The columns of results, tag -> number; also written as scalars, at the last step.
        """
        self.scalars(metrics, self._last_step)

        def write(writer: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import hparams as summaries

            # writer.add_hparams would open a second run inside of this one.
            file_writer: Any = writer.file_writer
            for summary in summaries(_flat(hparams), dict(metrics)):  # type: ignore[no-untyped-call]
                file_writer.add_summary(summary)

        self._write_events(write)

    def sync(self) -> int:
        """Bring all that was written to the disk, for a run that may go on from here; return metrics.jsonl's bytes."""
        self._write_events(lambda writer: writer.flush())
        self._attempt("metrics.jsonl", lambda: _sync(self._metrics_file))
        return self._metrics_file.stat().st_size if self._metrics_file.is_file() else 0

    def close(self) -> None:
        """Write what is still waiting, and close the events file."""
        self._write_events(lambda writer: writer.close())
        threading.excepthook = self._before

    def _on_thread_error(self, error: "threading.ExceptHookArgs") -> None:
        """TensorBoard's thread fails with a traceback, and again at the next event, where it is told in a line."""
        is_told = isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")
        if not is_told:
            self._before(error)

    def _open_events(self, run_dir: Path, going_on: tuple[int, int] | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = None if going_on is None else going_on[1] + 1  # TensorBoard then hides what was written later
        self._writer = SummaryWriter(str(run_dir), purge_step=purged, flush_secs=30)

    def _cut(self, num_bytes: int) -> None:
        if self._metrics_file.exists() and self._metrics_file.stat().st_size > num_bytes:
            os.truncate(self._metrics_file, num_bytes)

    def _write_events(self, write: "Callable[[SummaryWriter], Any]") -> None:
        writer = self._writer
        if writer is not None:
            self._attempt("TensorBoard events", lambda: write(writer))

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if what in self._warned:
                return
            self._warned.add(what)
            warn(f"{what} of {self._metrics_file.parent} cannot be written: {error}. Training goes on without.")


def _append(metrics_file: Path, step: int, numbers: Mapping[str, float]) -> None:
    finite = {tag: number if math.isfinite(number) else None for tag, number in numbers.items()}
    # Opened for each line: nothing waits in a buffer when the process dies, and a share that comes back is used again.
    with metrics_file.open("ab", buffering=0) as file:
        num_bytes, line = file.tell(), (json.dumps({"step": step, **finite}) + "\n").encode()
        try:
            is_whole = file.write(line) == len(line)
        except OSError:
            is_whole = False
        if not is_whole:
            file.truncate(num_bytes)  # half a line would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(metrics_file))


def _sync(metrics_file: Path) -> None:
    if metrics_file.exists():
        with metrics_file.open("a") as file:
            os.fsync(file.fileno())


def _check_picture(tag: str, picture: "NDArray[np.uint8]") -> None:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != "uint8":
        raise ValueError(f"{tag}: a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}.")


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if type(value) in (int, float, str) else str(value)
    return flat

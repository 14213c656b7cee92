"""Logs of a run: TensorBoard events and `metrics.jsonl`.

The only module that imports TensorBoard. Events are written directly into the run's folder, so that
`tensorboard --logdir runs` shows one entry for each run, named like its folder.
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

Charts = Mapping[str, Sequence[str]]  # title -> regular expressions of tags

CHARTS: Charts = {
    "learning rate": ["^lr/"],
    "prompt gradient norm": [r"^prompt(_factor\d)?_grad_norm/"],
    "prompt norm": [r"^prompt(_factor\d)?_norm/"],
    "prompt update ratio": [r"^prompt(_factor\d)?_update_ratio/"],
    "images per second": ["^perf/images_per_s$"],
    "data wait fraction": ["^perf/data_wait_fraction$"],
    "peak memory, MiB": ["^memory/peak_mib$"],
}
"""Charts of every run on the page "overview" under Custom Scalars, after those of its task type."""


def overview(charts: Charts, block: int | None = None) -> Charts:
    """The charts of a run: its loss, those of its task type, and `CHARTS`.

    With `block` the charts of prompts have the curve of this block only, so that those of many runs can be read.
    """
    one = "" if block is None else f"(block_{block:02d}|all_blocks)$"
    of_prompts = {
        title: [f"{tag}{one}" for tag in tags] for title, tags in CHARTS.items() if title.startswith("prompt")
    }
    return {"loss": ["^train/loss$", "^val/loss$"], **charts, **CHARTS, **of_prompts}


class Monitor:
    """Writes scalars, figures, text and hyperparameters of one run; of many processes, only the first makes one.

    A file that cannot be written (a full disk, a lost share) is reported once, as a warning, and training continues.

    The same run writes the same `metrics.jsonl`, also if it was stopped and resumed: `perf/` and `memory/` values are
    in the events only.

    Args:
        run_dir: The run's folder; created if it is missing.
        layout: Charts of the overview page, see `overview`.
        resume_at: Of a run that resumes: the bytes of `metrics.jsonl`, as `sync` returned them, and the step; what was
            written after that is removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Monitor(Path(folder)) as monitor:
        ...     monitor.scalars({"train/loss": 0.5}, step=1)
        ...     print((Path(folder) / "metrics.jsonl").read_text(), end="")
        {"step": 1, "train/loss": 0.5}
    """

    def __init__(
        self, run_dir: Path, *, layout: Charts | None = None, resume_at: tuple[int, int] | None = None
    ) -> None:
        self._metrics_file = run_dir / "metrics.jsonl"
        self._warned: set[str] = set()
        num_bytes, self._last_step = resume_at or (0, 0)
        self._writer: SummaryWriter | None = None
        self._before, threading.excepthook = threading.excepthook, self._on_thread_error
        self._attempt("metrics.jsonl", lambda: run_dir.mkdir(parents=True, exist_ok=True))
        self._attempt("metrics.jsonl", lambda: self._truncate(num_bytes))
        self._attempt("TensorBoard events", lambda: self._open_events(run_dir, resume_at))
        if resume_at is None:
            charts = overview({}) if layout is None else layout
            multiline = {title: ["Multiline", list(tags)] for title, tags in charts.items()}
            self._write_events(lambda writer: writer.add_custom_scalars({"overview": multiline}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalars(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        """Write numbers, one point for each tag and one line of `metrics.jsonl`, where nan and inf become null.

        `values` are numbers or tensors of one element by tag, `step` the optimiser updates; ValueError for tag "step".
        """
        if "step" in values:
            raise ValueError('values: "step" is the name of the step in metrics.jsonl; choose another tag')
        numbers = {tag: float(value) for tag, value in values.items()}
        self._last_step = step
        repeatable = {tag: number for tag, number in numbers.items() if not tag.startswith(MEASURED)}
        self._attempt("metrics.jsonl", lambda: _append(self._metrics_file, step, repeatable))

        def write(writer: "SummaryWriter") -> None:
            for tag, number in numbers.items():
                writer.add_scalar(tag, number, step)

        self._write_events(write)

    def images(self, tag: str, images: "NDArray[np.uint8] | Sequence[NDArray[np.uint8]]", step: int) -> None:
        """Write one image under `tag`, or several under `tag_00`, `tag_01`, ...; ValueError if not (H, W, 3) uint8."""
        if isinstance(images, Sequence) or images.ndim == 4:
            tagged = {f"{tag}_{i:02d}": image for i, image in enumerate(images)}
        else:
            tagged = {tag: images}
        for name, image in tagged.items():
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != "uint8":
                raise ValueError(f"{name}: an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")

        def write(writer: "SummaryWriter") -> None:
            for name, image in tagged.items():
                writer.add_image(name, image, step, dataformats="HWC")

        self._write_events(write)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write text in Markdown."""
        self._write_events(lambda writer: writer.add_text(tag, text, step))

    def hparams(
        self,
        hparams: Mapping[str, object],
        metrics: Mapping[str, SupportsFloat],
        usual: Mapping[str, object] | None = None,
    ) -> None:
        """Write the row of this run in the table of hyperparameters, once, at the end of the run.

        TensorBoard shows the first row of a run: a later call changes the scalars only. A nested mapping becomes
        `outer.inner`, values other than numbers become text. Those that differ from the `usual` ones come first. The
        metrics are also written as scalars, at the last step.
        """
        self.scalars(metrics, self._last_step)
        defaults = _flat(usual or {})
        ordered = sorted(_flat(hparams).items(), key=lambda item: defaults.get(item[0]) == item[1])

        def write(writer: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import hparams as summaries

            # writer.add_hparams would open a second run in this one
            file_writer: Any = writer.file_writer
            for summary in summaries(dict(ordered), dict(metrics)):  # type: ignore[no-untyped-call]
                file_writer.add_summary(summary)

        self._write_events(write)

    def sync(self) -> int:
        """Flush all logs to the disk; return the bytes of `metrics.jsonl`, for a run that resumes from here."""
        self._write_events(lambda writer: writer.flush())
        if not self._metrics_file.is_file():
            return 0
        self._attempt("metrics.jsonl", self._sync_metrics)
        return self._metrics_file.stat().st_size

    def close(self) -> None:
        """Flush and close the events file."""
        self._write_events(lambda writer: writer.close())
        threading.excepthook = self._before

    def _on_thread_error(self, error: "threading.ExceptHookArgs") -> None:
        # TensorBoard's thread prints a traceback, and raises the error again at the next event, where it is reported.
        is_reported = isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")
        if not is_reported:
            self._before(error)

    def _open_events(self, run_dir: Path, resume_at: tuple[int, int] | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = None if resume_at is None else resume_at[1] + 1  # TensorBoard hides events of this step and later
        self._writer = SummaryWriter(str(run_dir), purge_step=purged, flush_secs=30)

    def _sync_metrics(self) -> None:
        with self._metrics_file.open("a") as file:
            os.fsync(file.fileno())

    def _truncate(self, num_bytes: int) -> None:
        if self._metrics_file.exists() and self._metrics_file.stat().st_size > num_bytes:
            os.truncate(self._metrics_file, num_bytes)

    def _write_events(self, write: "Callable[[SummaryWriter], Any]") -> None:
        if (writer := self._writer) is not None:
            self._attempt("TensorBoard events", lambda: write(writer))

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if what not in self._warned:
                self._warned.add(what)
                warn(f"{what} of {self._metrics_file.parent} cannot be written: {error}. Training continues without.")


def _append(metrics_file: Path, step: int, numbers: Mapping[str, float]) -> None:
    finite = {tag: number if math.isfinite(number) else None for tag, number in numbers.items()}
    # Opened for each line: no buffer is lost when the process dies, and a share that is back is used again.
    with metrics_file.open("ab", buffering=0) as file:
        num_bytes, line = file.tell(), (json.dumps({"step": step, **finite}) + "\n").encode()
        try:
            is_whole = file.write(line) == len(line)
        except OSError:
            is_whole = False
        if not is_whole:
            file.truncate(num_bytes)  # half a line would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(metrics_file))


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if type(value) in (int, float, str) else str(value)
    return flat

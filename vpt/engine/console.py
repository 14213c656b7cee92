"""Console output: warnings, progress of an epoch, aligned tables, percentages."""

import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Self, SupportsFloat, TextIO

from tqdm import tqdm

from vpt.storage.text import printable

_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?(%|x|[kKMGT]i?B?|[mu]?s))?|-|nan|")


def warn(message: str) -> None:
    """Print a warning to the standard error."""
    sys.stderr.write(f"warning: {message}\n")
    sys.stderr.flush()


class Progress:
    """Progress of one pass over a loader: a bar with an ETA on a terminal, plain lines anywhere else.

    A log file gets one line at the end of the pass and, in a long pass, at most one line every `interval_s` seconds.
    `total` is the number of batches, `description` names the pass; the stream is by default the standard error.

    Example:
        >>> with Progress(total=1, description="epoch 1/1", stream=sys.stdout) as progress:
        ...     progress.advance(64, loss=0.25)  # doctest: +ELLIPSIS
        epoch 1/1: 1/1 batches, ... images/s, loss 0.25, 0:00
    """

    def __init__(self, total: int, description: str, *, stream: TextIO | None = None, interval_s: float = 30.0) -> None:
        self._total, self._description = total, description
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._interval_s = 0.2 if self._is_terminal else interval_s
        self._batches, self._images = 0, 0
        self._values: dict[str, SupportsFloat] = {}

    def __enter__(self) -> Self:
        self._start = self._shown = time.monotonic()
        if self._is_terminal:
            options = {"unit": "batch", "file": self._stream, "dynamic_ncols": True}
            self._bar = tqdm(total=self._total, desc=self._description, **options)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._show_bar()
            self._bar.close()
        elif self._batches:
            self._write_line()

    def skip(self, num_batches: int) -> None:
        """Count batches that were done before a resume."""
        self._batches += num_batches

    def advance(self, num_images: int, **values: SupportsFloat) -> None:
        """Count one batch. A tensor in `values` is read only when it is shown, so that the GPU is not synchronised."""
        self._batches += 1
        self._images += num_images
        self._values |= values
        now = time.monotonic()
        if now - self._shown >= self._interval_s and self._batches < self._total:
            self._shown = now
            (self._show_bar if self._is_terminal else self._write_line)()

    def _show_bar(self) -> None:
        self._bar.set_postfix_str(", ".join([self._rate(), *self._numbers()]), refresh=False)
        self._bar.update(self._batches - self._bar.n)
        self._bar.refresh()

    def _write_line(self) -> None:
        seconds = time.monotonic() - self._start
        left = self._total - self._batches
        duration = f"{_clock(seconds / self._batches * left)} left" if left > 0 else _clock(seconds)
        parts = [f"{self._batches}/{self._total} batches", self._rate(), *self._numbers(), duration]
        self._stream.write(f"{self._description}: {', '.join(parts)}\n")
        self._stream.flush()

    def _rate(self) -> str:
        return f"{self._images / max(time.monotonic() - self._start, 1e-9):.0f} images/s"

    def _numbers(self) -> list[str]:
        return [f"{name} {float(value):.4g}" for name, value in self._values.items()]


def percent(fraction: float) -> str:
    """A fraction in [0, 1] as text; "-" for nan.

    Example:
        >>> percent(0.9128)
        '91.3 %'
    """
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f} %"


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Format an aligned table of plain text; columns of numbers, with a unit or not, are aligned to the right.

    Control characters in a cell, such as those of a class name, are escaped. ValueError if a row is longer or shorter
    than the header.

    Example:
        >>> print(format_table([["deep", "92,160"], ["linear", "0"]], header=["prompt", "tuned"]))
        prompt   tuned
        ------  ------
        deep    92,160
        linear       0
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: {list(row)} has {len(row)} cells, the header has {len(header)}")
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    widths = [max(map(len, (name, *column))) for name, column in zip(header, columns, strict=True)]
    aligns = [">" if column and all(map(_NUMBER.fullmatch, column)) else "<" for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(line, aligns, widths, strict=True)).rstrip()
        for line in lines
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

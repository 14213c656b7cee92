import contextlib
import io
import math
from types import SimpleNamespace

import pytest
import torch

from vpt.engine import console
from vpt.engine.console import Progress, format_table, percent


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("total", "seconds", "num_images", "lines"),
    [
        (
            *(100, 1, 10),
            [
                "epoch 1/1: 30/100 batches, 10 images/s, 1:10 left",
                "epoch 1/1: 60/100 batches, 10 images/s, 0:40 left",
                "epoch 1/1: 90/100 batches, 10 images/s, 0:10 left",
                "epoch 1/1: 100/100 batches, 10 images/s, 1:40",
            ],
        ),
        (2, 40, 80, ["epoch 1/1: 1/2 batches, 2 images/s, 0:40 left", "epoch 1/1: 2/2 batches, 2 images/s, 1:20"]),
        (0, 0, 0, []),
    ],
)
def test_a_log_gets_a_line_every_thirty_seconds_at_most_and_the_last_one_once(clock, total, seconds, num_images, lines):
    stream = io.StringIO()
    with Progress(total=total, description="epoch 1/1", stream=stream) as progress:
        for _ in range(total):
            clock.now += seconds
            progress.advance(num_images)
    assert stream.getvalue().splitlines() == lines


def test_a_short_epoch_is_one_line_in_a_log_and_only_the_values_that_it_shows_are_read(clock):
    reads, stream = [], io.StringIO()

    class Costly(float):
        def __float__(self):
            reads.append(self)
            return super().__float__()

    with Progress(total=3, description="epoch 3/20", stream=stream) as progress:
        for loss in (0.3, 0.2, 0.1234567):
            clock.now += 2
            progress.advance(64, loss=Costly(loss))
    assert stream.getvalue() == "epoch 3/20: 3/3 batches, 32 images/s, loss 0.1235, 0:06\n"
    assert reads == [0.1234567]


def test_an_interrupted_epoch_says_how_far_it_came(clock):
    stream = io.StringIO()
    with contextlib.suppress(KeyboardInterrupt), Progress(total=4, description="epoch 1/1", stream=stream) as progress:
        clock.now += 3600
        progress.advance(8)
        clock.now += 1
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1] == "epoch 1/1: 1/4 batches, 0 images/s, 3:00:03 left"


def test_a_terminal_gets_a_bar_with_rate_and_values():
    stream = Terminal()
    with Progress(total=3, description="epoch 3/20", stream=stream) as progress:
        for _ in range(3):
            progress.advance(64, loss=torch.tensor(0.25))
    last = stream.getvalue().split("\r")[-1]
    assert all(text in last for text in ("epoch 3/20: 100%", "3/3", "images/s, loss 0.25"))


def test_progress_goes_to_the_standard_error(capsys):
    with Progress(total=1, description="val") as progress:
        progress.advance(1)
    captured = capsys.readouterr()
    assert captured.err.startswith("val: 1/1 batches")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.913, "91.3 %"), (0, "0.0 %"), (1.0, "100.0 %"), (math.nan, "-"), (0.99949, "99.9 %")]
)
def test_percent_shows_one_decimal(fraction, text):
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("rows", "header", "lines"),
    [
        (
            [["deep", "92,160", "91.3 %", "1e-3"], ["linear probe", "0", "-", "12"]],
            ["method", "tuned", "top1", "x"],
            [
                "method         tuned    top1     x",
                "------------  ------  ------  ----",
                "deep          92,160  91.3 %  1e-3",
                "linear probe       0       -    12",
            ],
        ),
        ([["1"], ["all"]], ["blocks"], ["blocks", "------", "1", "all"]),  # a column with one word
        ([], ["a", "long"], ["a  long", "-  ----"]),
        ([["\x1b[1m\n"]], ["class"], ["class", "---------", r"\x1b[1m\n"]),  # controls no terminal
    ],
)
def test_a_table_is_aligned_and_columns_of_numbers_are_set_to_the_right(rows, header, lines):
    assert format_table(rows, header).splitlines() == lines


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"\['x'\] has 1 cells"):
        format_table([["x"]], header=["a", "b"])

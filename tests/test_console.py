import contextlib
import io
import math

import pytest
import torch

from vpt.engine import console
from vpt.engine.console import Progress, format_table, percent


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_a_short_epoch_is_one_line_in_a_log(clock):
    stream = io.StringIO()
    with Progress(total=3, description="epoch 3/20", stream=stream) as progress:
        for loss in (0.3, 0.2, 0.1234567):
            clock.now += 2
            progress.advance(64, loss=loss)
    assert stream.getvalue() == "epoch 3/20: 3/3 batches, 32 images/s, loss 0.1235, 0:06\n"


def test_a_long_epoch_is_a_line_every_thirty_seconds_at_most(clock):
    stream = io.StringIO()
    with Progress(total=100, description="epoch 1/1", stream=stream) as progress:
        for _ in range(100):
            clock.now += 1
            progress.advance(10)
    assert stream.getvalue().splitlines() == [
        "epoch 1/1: 30/100 batches, 10 images/s, 1:10 left",
        "epoch 1/1: 60/100 batches, 10 images/s, 0:40 left",
        "epoch 1/1: 90/100 batches, 10 images/s, 0:10 left",
        "epoch 1/1: 100/100 batches, 10 images/s, 1:40",
    ]


def test_the_last_line_is_not_written_twice(clock):
    stream = io.StringIO()
    with Progress(total=2, description="val", stream=stream) as progress:
        for _ in range(2):
            clock.now += 40
            progress.advance(80)
    assert stream.getvalue().splitlines() == [
        "val: 1/2 batches, 2 images/s, 0:40 left",
        "val: 2/2 batches, 2 images/s, 1:20",
    ]


def test_an_interrupted_epoch_says_how_far_it_came(clock):
    stream = io.StringIO()
    with contextlib.suppress(KeyboardInterrupt), Progress(total=4, description="epoch 1/1", stream=stream) as progress:
        clock.now += 3600
        progress.advance(8)
        clock.now += 1
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1] == "epoch 1/1: 1/4 batches, 0 images/s, 3:00:03 left"


def test_an_epoch_without_batches_is_silent_in_a_log():
    stream = io.StringIO()
    with Progress(total=0, description="val", stream=stream):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_rate_and_values():
    stream = Terminal()
    with Progress(total=3, description="epoch 3/20", stream=stream) as progress:
        for _ in range(3):
            progress.advance(64, loss=torch.tensor(0.25))
    last = stream.getvalue().split("\r")[-1]
    assert "epoch 3/20: 100%" in last
    assert "3/3" in last
    assert "images/s, loss 0.25" in last


def test_values_are_read_only_when_they_are_shown(clock):
    class Costly:
        reads = 0

        def __float__(self):
            Costly.reads += 1
            return 0.5

    with Progress(total=50, description="epoch 1/1", stream=io.StringIO()) as progress:
        for _ in range(50):
            progress.advance(1, loss=Costly())
    assert Costly.reads == 1


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


def test_a_table_is_aligned_and_numbers_are_set_to_the_right():
    rows = [["deep", "92,160", "91.3 %", "1e-3"], ["linear probe", "0", "-", "12"]]
    assert format_table(rows, header=["method", "tuned", "top1", "x"]).splitlines() == [
        "method         tuned    top1     x",
        "------------  ------  ------  ----",
        "deep          92,160  91.3 %  1e-3",
        "linear probe       0       -    12",
    ]


def test_a_column_with_one_word_is_set_to_the_left():
    assert format_table([["1"], ["all"]], header=["blocks"]).splitlines()[2:] == ["1", "all"]


def test_a_table_without_rows_is_its_header():
    assert format_table([], header=["a", "long"]) == "a  long\n-  ----"


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"\['x'\] has 1 cells"):
        format_table([["x"]], header=["a", "b"])

import signal
import subprocess
import sys
import time

import pytest

from vpt.engine.signals import SIGNALS, Stopped, StopSignal


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_at_once_or_where_it_is_deferred_at_the_next_check(number):
    with pytest.raises(Stopped, match=number.name), StopSignal():
        signal.raise_signal(number)
    with StopSignal() as stop, stop.deferred():
        stop.check()
        signal.raise_signal(number)  # nothing yet
        with pytest.raises(Stopped, match=number.name):
            stop.check()


def test_an_interruptible_wait_ends_at_once():
    with StopSignal() as stop, stop.deferred():
        with pytest.raises(Stopped), stop.interruptible():
            signal.raise_signal(signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        with pytest.raises(Stopped), stop.interruptible():  # a second one does not begin
            pytest.fail("it waited")


def test_a_signal_that_is_ignored_stays_ignored():  # as under nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.received is None
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_the_former_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_signal_ends_the_process_at_once():
    code = """
import time
from vpt.engine.signals import StopSignal
with StopSignal() as stop, stop.deferred():
    print("ready", flush=True)
    time.sleep(60)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT
    process.stdout.close()

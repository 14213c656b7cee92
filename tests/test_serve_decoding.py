"""Decoding in processes: the same pixels and errors as without one, and an end for what does not end by itself."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers import png_bytes
from vpt.data.images import ImageError
from vpt.serve.decoding import Decoders, Upload, read_upload

GOOD = Upload("a.png", png_bytes())


@pytest.fixture
def decoders():
    decoders = Decoders(1, 20)
    yield decoders
    decoders.kill()


@pytest.fixture
def process(decoders):
    """The started process."""
    decoders.decode(GOOD)
    return decoders._all[0]._process


def test_pixels_and_errors_are_those_of_reading_without_a_process(decoders, process):
    for upload in (GOOD, Upload("b.jpg", png_bytes(1, (31, 50), "JPEG"))):
        assert decoders.decode(upload).tobytes() == read_upload(upload).tobytes()
    for data in (b"", b"junk", GOOD.data[:400]):
        with pytest.raises(ImageError) as wanted:
            read_upload(Upload("日本", data))
        with pytest.raises(ImageError) as found:
            decoders.decode(Upload("日本", data))
        assert str(found.value) == str(wanted.value)
    assert decoders._all[0]._process is process  # a refused image costs no process


@pytest.mark.parametrize(("number", "why"), [(signal.SIGPROF, "takes more"), (signal.SIGSEGV, "ends its decoder")])
def test_an_image_that_ends_its_process_is_refused_and_the_next_one_decoded(decoders, process, number, why):
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoders.decode, GOOD)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        with pytest.raises(ImageError, match=rf"a\.png: {why}"):
            running.result()
    assert decoders.decode(GOOD).size == (90, 60)


def test_the_end_waits_for_no_image(decoders, process):
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoders.decode, GOOD)
        threading.Timer(0.1, decoders.kill).start()
        with pytest.raises(ImageError, match="ends"):
            running.result(20)


def test_a_process_ends_when_the_server_is_gone(decoders, process):
    decoders._all[0]._pipe.close()
    assert process.wait(20) == 0

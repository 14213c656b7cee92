"""Measure requests per second of `python -m vpt.serve` with many tasks: mixed micro-batches and one image at a time.

Two servers run the same tasks, one with `max_batch=32` and one with `max_batch=1`. In turns, one server at a time is
loaded for a few seconds by clients that wait for each response before the next request. Each request is one image for
one task, in random order. Clients and servers share the machine. The table shows medians over the rounds.

Example:
    python scripts/measure_serving.py num_tasks=8     # the bundled backbone, tasks with random weights
    python scripts/measure_serving.py backbone=NAME checkpoint=FILE clients=8,32
"""

import contextlib
import http.client
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vpt
from vpt.config.command_line import fail, parse_options
from vpt.config.schema import option
from vpt.engine.console import format_table

SERVERS = {"one at a time": ["max_batch=1", "max_wait_ms=0"], "micro-batches": ["max_batch=32", "max_wait_ms=5"]}
NUM_IMAGES = 16


@dataclass
class MeasureOptions:
    """Options of this script."""

    backbone: str = "vit_nano_patch8_64"
    checkpoint: str | None = None
    num_tasks: int = option(8, low=1)
    num_tokens: int = option(10, low=1)
    clients: str = "1,4,16,64"
    seconds: float = option(4.0, above=0)
    rounds: int = option(5, low=1)
    side: int = option(256, low=8)  # pixels of the images that are sent


@dataclass
class Measured:
    """One round of one server: responses per second, latencies in milliseconds, and images per batch."""

    rate: float
    median_ms: float
    p95_ms: float
    batch: float


def main() -> None:
    """Measure and print the table."""
    options = parse_options(MeasureOptions, sys.argv[1:], str(__doc__))
    counts = [int(word) for word in options.clients.split(",")]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        make_tasks(Path(folder), options)
        ports = {name: stack.enter_context(server(folder, options, limits)) for name, limits in SERVERS.items()}
        requests = make_requests(options)
        for port in ports.values():
            measure(port, requests, 8, 2.0)  # warm up
        rows = []
        for count in counts:
            rounds = [
                {name: measure(port, requests, count, options.seconds) for name, port in ports.items()}
                for _ in range(options.rounds)
            ]
            rows += [row(count, name, [measured[name] for measured in rounds]) for name in SERVERS]
    print(format_table(rows, ["clients", "server", "requests/s", "range", "median ms", "95 % ms", "images/batch"]))


def make_tasks(folder: Path, options: MeasureOptions) -> None:
    """Save tasks with random weights and different numbers of tokens and classes."""
    for seed in range(options.num_tasks):
        torch.manual_seed(seed)
        sizes = {"num_tokens": options.num_tokens + seed % 3, "num_classes": 10 + seed}
        model = vpt.create_model(options.backbone, checkpoint=options.checkpoint, prompt="deep", **sizes)
        vpt.save_task(model, folder / f"task{seed}.safetensors")


def make_requests(options: MeasureOptions) -> list[tuple[str, bytes]]:
    """Paths and bodies of requests: each image with each task, in random order."""
    draw = np.random.default_rng(0)
    images = []
    for _ in range(NUM_IMAGES):
        coarse = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((options.side, options.side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    requests = [(f"/predict?task=task{task}", body) for task in range(options.num_tasks) for body in images]
    return [requests[index] for index in draw.permutation(len(requests))]


@contextlib.contextmanager
def server(folder: str, options: MeasureOptions, limits: list[str]) -> Iterator[int]:
    """Run a server in its own process; yields its port."""
    command = [sys.executable, "-m", "vpt.serve", f"tasks={folder}", "port=0", *limits]
    if options.checkpoint:
        command += [f"checkpoint={options.checkpoint}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start")
            yield int(found[1])
        finally:
            process.terminate()


def measure(port: int, requests: list[tuple[str, bytes]], num_clients: int, seconds: float) -> Measured:
    """Send requests with concurrent clients, each on its own connection, for some seconds."""
    latencies: list[list[float]] = [[] for _ in range(num_clients)]
    before, begin = batches(port), time.perf_counter()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        position = number * 37
        while (sent := time.perf_counter()) < begin + seconds:
            path, body = requests[position % len(requests)]
            position += 1
            connection.request("POST", path, body, {"Content-Type": "image/jpeg"})
            response = connection.getresponse()
            text = response.read()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {text.decode()}")
            latencies[number].append(time.perf_counter() - sent)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begin
    after = batches(port)
    values = sorted(1000 * latency for client_latencies in latencies for latency in client_latencies)
    per_batch = (after[0] - before[0]) / max(1, after[1] - before[1])
    return Measured(len(values) / took, statistics.median(values), values[int(0.95 * len(values))], per_batch)


def batches(port: int) -> tuple[int, int]:
    """Numbers of predictions and batches so far."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    health = json.loads(connection.getresponse().read())
    connection.close()
    return health["predictions"], health["batches"]


def row(count: int, name: str, rounds: list[Measured]) -> list[str]:
    """Row of the table."""
    rates, *others = ([getattr(of, key) for of in rounds] for key in ("rate", "median_ms", "p95_ms", "batch"))
    rate, median_ms, p95_ms, batch = map(statistics.median, (rates, *others))
    times = [f"{rate:.0f}", f"{min(rates):.0f} to {max(rates):.0f}", f"{median_ms:.0f}", f"{p95_ms:.0f}"]
    return [str(count), name, *times, f"{batch:.1f}"]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        fail(error)

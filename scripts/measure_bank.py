"""Measure the cost of a TaskBank.

Compares eight tasks mixed in a batch with one task per batch, and every task on every image with one pass per task;
measures the time to load and to switch tasks, and the size of a task. Weights are random, which costs the same. Times
are medians of interleaved rounds.

Example:
    python scripts/measure_bank.py backbone=vit_base_patch16_224 batch_size=32 rounds=7
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vpt
from vpt.config.command_line import parse_options
from vpt.config.schema import option
from vpt.engine.console import format_table
from vpt.engine.measure import count_flops, median_ratio, time_rounds
from vpt.models.vit import load_vit

NUM_TASKS, LAST_BLOCKS = 8, 3


@dataclass
class Options:
    """Options of this script."""

    backbone: str = "vit_tiny_patch16_224"
    batch_size: int = option(32, low=8)
    num_tokens: int = option(10, low=1)
    num_classes: int = option(100, low=1)
    rounds: int = option(7, low=1)
    num_loaded: int = option(100, low=1)
    device: str = "cpu"


def main() -> None:
    """Measure and print tables."""
    options = parse_options(Options, sys.argv[1:], __doc__ or "")
    bank = vpt.TaskBank(load_vit(options.backbone, pretrained=False), device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for task in range(NUM_TASKS):
            files[f"all {task}"] = save(bank, Path(folder) / f"all_{task}", options)
            files[f"last {task}"] = save(bank, Path(folder) / f"last_{task}", options, blocks=f"last:{LAST_BLOCKS}")
            fewer = max(1, options.num_tokens - task)
            files[f"ragged {task}"] = save(bank, Path(folder) / f"ragged_{task}", options, num_tokens=fewer)
        for name, path in files.items():
            bank.load(path, name)
        print(cost_table(bank, options))
        print(loading_table(bank, files["all 0"], options))


def save(bank: vpt.TaskBank, path: Path, options: Options, **prompt: Any) -> Path:
    """Save a task with random weights."""
    prompt = {"num_tokens": options.num_tokens, **prompt}
    model = vpt.create_model(bank.vit, num_classes=options.num_classes, **prompt)
    torch.nn.init.normal_(model.head.weight)
    return vpt.save_task(model, path.with_suffix(".safetensors"))


def cost_table(bank: vpt.TaskBank, options: Options) -> str:
    """FLOPs and times of mixed batches and of every task on every image, as ratios."""
    size = bank.metadata("all 0").preprocessing["size"]
    images = torch.randn(options.batch_size, 3, *size, device=bank.device)
    few = images[: options.batch_size // NUM_TASKS]
    mixed = [f"all {row % NUM_TASKS}" for row in range(len(images))]
    last = [f"last {task}" for task in range(NUM_TASKS)]
    calls = {
        "one": lambda: bank(images, ["all 0"] * len(images)),
        "mixed": lambda: bank(images, mixed),
        "ragged": lambda: bank(images, [name.replace("all", "ragged") for name in mixed]),
        "passes": lambda: [bank(few, name) for name in last],
        "every": lambda: bank.every(few, last),
        "one by one": lambda: [bank(images[row : row + 1], name) for row, name in enumerate(mixed)],
    }
    flops = {name: count_flops(call) for name, call in calls.items()}
    for call in calls.values():
        call()
    measured = list(time_rounds(calls, options.rounds, bank.device))
    times = {name: [seconds[name] for seconds in measured] for name in calls}
    pairs = [
        (f"{NUM_TASKS} tasks mixed in a batch of {len(images)} / one task in it", "mixed", "one"),
        (f"the same / each of the {len(images)} images on its own", "mixed", "one by one"),
        ("mixed, with different numbers of tokens / one task in the batch", "ragged", "one"),
        (f"every, {NUM_TASKS} tasks prompted in the last {LAST_BLOCKS} blocks / {NUM_TASKS} passes", "every", "passes"),
    ]
    rows = [[what, f"{flops[a] / flops[b]:.3f}", f"{median_ratio(times[a], times[b]):.2f}"] for what, a, b in pairs]
    return format_table(rows, [f"{options.backbone}, P={options.num_tokens}", "FLOPs", "time"])


def loading_table(bank: vpt.TaskBank, path: Path, options: Options) -> str:
    """Size of a task on disk and in memory, and times to load it and to switch to it."""
    seconds = []
    for number_ in range(options.num_loaded):
        start = time.perf_counter()
        bank.load(path, f"more {number_}")
        seconds.append(time.perf_counter() - start)
    size = bank.metadata("all 0").preprocessing["size"]
    image = torch.randn(1, 3, *size, device=bank.device)
    turns = iter(range(10**9))
    calls = {"stay": lambda: bank(image, "all 0"), "switch": lambda: bank(image, f"more {next(turns) % len(seconds)}")}
    measured = list(time_rounds(calls, 10 * options.rounds, bank.device))
    switch = statistics.median(of_round["switch"] - of_round["stay"] for of_round in measured)
    stay = statistics.median(of_round["stay"] for of_round in measured)
    in_memory = bank.num_bytes("more 0")
    rows = [
        ["file", f"{path.stat().st_size / 1000:,.0f} kB"],
        ["in memory", f"{in_memory / 1000:,.0f} kB; of 1,000 tasks {in_memory / 1e3:,.0f} MB"],
        ["load", f"{1000 * statistics.median(seconds):.1f} ms"],
        ["switch", f"{1000 * switch:.2f} ms; one image takes {1000 * stay:.1f} ms"],
    ]
    return "\n" + format_table(rows, [f"{options.num_classes} classes", ""])


if __name__ == "__main__":
    main()

"""python -m vpt.benchmark: what prompts cost, side by side with the bare ViT, full fine-tuning and LoRA."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from vpt.config.command_line import INTERRUPTED, escape_output, fail, parse_options, tell
from vpt.config.errors import ConfigError
from vpt.config.schema import option

SUBJECTS = {
    "bare": "the ViT in timm's own code, training a linear head; always measured",
    "linear": "the same as a model of vpt, prompt=none",
    "full": "full fine-tuning of timm's ViT",
    "lora": "LoRA of rank 8 on queries, keys and values, by peft",
    "deep": "a deep prompt as keys and values, impl=auto, for each P",
    "deep_concat": "a deep prompt as tokens in the sequence, impl=concat, for each P",
    "shallow": "a shallow prompt, impl=auto, for each P",
    "shallow_concat": "a shallow prompt, impl=concat, for each P",
    "last_concat": "a deep prompt in the last quarter of the blocks, P=10, impl=concat",
    "last_cached": "the same with impl=auto, training from cached tokens of the first prompted block",
}

USAGE = f"""python -m vpt.benchmark: FLOPs, time and memory of prompts against the bare ViT, in one interleaved run.

Subjects:
{chr(10).join(f"  {name:<15} {text}" for name, text in SUBJECTS.items())}

Example: python -m vpt.benchmark backbone=vit_small_patch16_224 batch_size=8 num_tokens=10,100 rounds=3"""


@dataclass
class BenchmarkOptions:
    """Options of `python -m vpt.benchmark`."""

    backbone: str = option("vit_base_patch16_224", "any name of timm; its weights are random, which costs the same")
    img_size: int = option(0, "pixels; 0: the model's own", low=0)
    batch_size: int = option(32, "of inference and of training", low=1)
    num_tokens: tuple[int, ...] = option((1, 10, 50, 100, 200), "P, prompt tokens", low=1)
    num_classes: int = option(100, "of the head", low=1)
    only: tuple[str, ...] = option(
        ("all",), "some of the subjects below, such as only=deep,deep_concat", choices=("all", *SUBJECTS), shown="all"
    )
    rounds: int = option(5, "passes over all subjects; times are medians over them", low=1)
    precision: str = option(
        "fp32",
        "bf16: every backbone is held in bf16, without autocast; also for full and lora, whose usual float32 weights "
        "under autocast are slower; prompt and head stay float32",
        choices=("fp32", "bf16"),
    )
    compile: bool = option(False, "true: times and saved bytes are those under torch.compile, FLOPs those without")
    device: str = option("auto", "auto, cpu, cuda, ...")
    threads: int = option(0, "0: the choice of torch", low=0)
    peak_tflops: int = option(0, "peak of the device in this precision, to print the fraction reached", low=0)
    output: str = option("benchmark", "a folder for benchmark.csv, .json and .png")

    @property
    def subjects(self) -> list[str]:
        """Names of the chosen subjects; the bare model is always one."""
        chosen = {"bare", *self.only}
        return [name for name in SUBJECTS if name in chosen or "all" in chosen]

    @property
    def all_num_tokens(self) -> list[int]:
        """P, ascending."""
        return sorted(set(self.num_tokens))


def main() -> None:
    """Read the options, measure, print the tables and write the files."""
    escape_output()
    try:
        is_complete = benchmark(parse_options(BenchmarkOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        sys.exit(tell(RuntimeError("interrupted before the end of the first round; nothing was written"), INTERRUPTED))
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    if not is_complete:
        sys.exit(tell(RuntimeError("interrupted; the files contain the rounds until then"), INTERRUPTED))


def benchmark(options: BenchmarkOptions) -> bool:
    """Measure all subjects, print the tables, write the files; returns False if interrupted after the first round."""
    import torch

    from vpt import build
    from vpt.benchmark import subjects as building
    from vpt.benchmark import tables
    from vpt.engine.measure import check_attention_is_counted, describe_machine

    if options.threads:
        torch.set_num_threads(options.threads)
    device = build.pick_device(options.device)
    if options.compile:
        build.check_compiler(device)
        # Models of one class share a cache of compiled code, whose default limit is small.
        torch._dynamo.config.recompile_limit = 1000
        torch._dynamo.config.accumulated_recompile_limit = 1000
    check_attention_is_counted(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    try:
        subjects = list(building.build_subjects(options, device, print))
        Path(options.output).expanduser().mkdir(parents=True, exist_ok=True)  # fails before the measurement, not after
        is_complete = building.measure(subjects, options, device)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "out of memory; make it or num_tokens smaller, or use only=..."
        raise ConfigError(f"batch_size={options.batch_size}: {message}") from error
    machine = describe_machine(device)
    compiled = ", compiled" if options.compile else ""
    where = machine["gpu"] or f"{machine['cpu']}, threads={machine['threads']}"
    title = f"{options.backbone}, batch {options.batch_size}, {options.precision}{compiled}, {where}"
    rows = tables.make_rows(subjects, options)
    print(tables.format_rows(rows, options, title))
    rounds = [
        {"subject": subject.name, "num_tokens": subject.num_tokens}
        | {f"{kind}_s": cost.seconds for kind, cost in subject.passes.items()}
        for subject in subjects
    ]
    record = {"options": asdict(options), "machine": machine, "rounds": rounds}
    names = tables.write_files(Path(options.output).expanduser(), rows, record, title)
    print(f"{options.output} contains {', '.join(names)}")
    return is_complete


if __name__ == "__main__":
    main()

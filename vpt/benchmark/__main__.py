"""python -m vpt.benchmark: what prompts cost, side by side with the bare ViT, full fine-tuning and LoRA."""

import copy
import csv
import importlib.util
import io
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.config.command_line import INTERRUPTED, fail, parse_options, tell
from vpt.config.errors import ConfigError, config_keys
from vpt.config.schema import option

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

INSTALL = 'uv pip install -p .venv -e ".[benchmark]" -c constraints.txt'

SUBJECTS = {
    "bare": "the ViT in timm's own code, its step trains a linear head; always measured",
    "linear": "the same as a model of vpt, prompt=none",
    "full": "full fine-tuning of timm's ViT",
    "lora": "LoRA of rank 8 on queries, keys and values, by peft",
    "deep": "a deep prompt as keys and values, impl=auto, for each P",
    "deep_concat": "a deep prompt as tokens in the sequence, impl=concat, for each P",
    "shallow": "a shallow prompt, impl=auto, for each P",
    "shallow_concat": "a shallow prompt, impl=concat, for each P",
    "last_concat": "a deep prompt in the last quarter of the blocks, P=10, impl=concat",
    "last_cached": "the same with impl=auto, a step from cached tokens that enter the first prompted block",
}
CONCAT = {"deep": "deep_concat", "shallow": "shallow_concat", "last_cached": "last_concat"}
LAST_NUM_TOKENS = 10
LINES = {  # colours that colour-blind readers can tell apart; the wide line shows from under the one that it equals
    "deep_concat": ("#e69f00", 4.0),
    "shallow_concat": ("#882255", 1.5),
    "shallow": ("#009e73", 1.5),
    "deep": ("#0072b2", 2.5),
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


@dataclass
class Pass:
    """What is known of inference ("forward") or of a training step ("step") of a subject."""

    flops: int
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass
class Subject:
    """One line of the tables: a model for inference, one to train, and what enters it.

    They are two, because the step changes the prompt, of which inference keeps constants.
    """

    name: str
    num_tokens: int | None
    inferring: "nn.Module | None"
    training: "nn.Module"
    inputs: "Tensor"
    passes: dict[str, Pass] = field(default_factory=dict)


def main() -> None:
    """Read the options, measure, print the tables and write the files."""
    try:
        is_whole = benchmark(parse_options(BenchmarkOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        sys.exit(tell(RuntimeError("interrupted before the end of the first round; nothing is written"), INTERRUPTED))
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    if not is_whole:
        sys.exit(tell(RuntimeError("interrupted; the files hold the rounds until then"), INTERRUPTED))


def benchmark(options: BenchmarkOptions) -> bool:
    """Measure all subjects, print the tables, write the files; False if that was interrupted after a round."""
    import torch

    from vpt import build
    from vpt.engine.measure import check_attention_is_counted, describe_machine

    if importlib.util.find_spec("matplotlib") is None:
        print(f"there will be no picture: matplotlib is not installed; type {INSTALL}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = build.pick_device(options.device)
    if options.compile:
        build.check_compiler(device)
        # Models of one class share a cache of compiled code, which is made for few of them.
        torch._dynamo.config.recompile_limit = 1000
        torch._dynamo.config.accumulated_recompile_limit = 1000
    check_attention_is_counted(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    try:
        subjects = list(_build_subjects(options, device))
        Path(options.output).expanduser().mkdir(parents=True, exist_ok=True)  # refused before, not after, the long part
        is_whole = _measure(subjects, options, device)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ConfigError(
            f"batch_size={options.batch_size}: out of memory; make it or num_tokens smaller, or use only=..."
        ) from error
    machine = describe_machine(device)
    compiled = ", compiled" if options.compile else ""
    where = machine["gpu"] or f"{machine['cpu']}, threads={machine['threads']}"
    title = f"{options.backbone}, batch {options.batch_size}, {options.precision}{compiled}, {where}"
    rows = _rows(subjects, options)
    print(_tables(rows, options, title))
    rounds = [
        {"subject": subject.name, "num_tokens": subject.num_tokens}
        | {f"{kind}_s": cost.seconds for kind, cost in subject.passes.items()}
        for subject in subjects
    ]
    _write(rows, {"options": asdict(options), "machine": machine, "rounds": rounds}, options, title)
    return is_whole


def _build_subjects(options: BenchmarkOptions, device: "torch.device") -> Iterator[Subject]:
    """The chosen subjects; all but full fine-tuning and LoRA share one ViT in memory."""
    import torch

    from vpt.models.vit import load_vit, preprocessing_of

    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    with config_keys(name="backbone"):
        vit = load_vit(options.backbone, pretrained=False, img_size=options.img_size or None)
    vit.to(device, dtype).requires_grad_(False).eval()
    images = torch.randn(options.batch_size, 3, *preprocessing_of(vit)["size"], device=device, dtype=dtype)
    for name in options.subjects:
        if name in ("bare", "full", "lora"):
            yield from _build_plain(name, vit, images, options)
        elif name in ("linear", "last_concat", "last_cached"):
            yield _build_prompted(name, None if name == "linear" else LAST_NUM_TOKENS, vit, images, options)
        else:
            for num_tokens in options.all_num_tokens:
                yield _build_prompted(name, num_tokens, vit, images, options)


def _build_plain(name: str, vit: Any, images: "Tensor", options: BenchmarkOptions) -> Iterator[Subject]:
    """A subject without vpt: timm's model and a linear head; none if it cannot be had."""
    from torch import nn

    held = vit
    if name == "full":
        held = copy.deepcopy(vit).requires_grad_(True)
    elif name == "lora":
        held = _add_lora(copy.deepcopy(vit), images[:1])
    if held is not None:
        head = nn.Linear(vit.embed_dim, options.num_classes, device=images.device, dtype=images.dtype)
        inferring = nn.Sequential(vit if name == "full" else held, head)  # frozen, see the next function
        yield Subject(name, None, inferring, nn.Sequential(held, head), images)


def _build_prompted(
    name: str, num_tokens: int | None, vit: Any, images: "Tensor", options: BenchmarkOptions
) -> Subject:
    """A subject that is a model of vpt, on the ViT that all of them share."""
    from vpt.models.classifier import TunedPart
    from vpt.models.create import create_model

    kind, _, impl = name.partition("_")
    prompt: dict[str, Any] = {
        "prompt": kind,
        "num_tokens": num_tokens,
        "impl": "concat" if impl == "concat" else "auto",
    }
    if kind == "linear":
        prompt = {"prompt": None}
    elif kind == "last":
        prompt |= {"prompt": "deep", "blocks": f"last:{max(1, len(vit.blocks) // 4)}"}
    # A head of zeros would send back gradients of zeros, which a GPU multiplies faster than others.
    keys: dict[str, Any] = {"num_classes": options.num_classes, "head_init": "paper", **prompt}
    inferring, training = (create_model(vit, **keys).to(images.device) for _ in range(2))
    # torch refuses to count FLOPs where a view of a tuned parameter enters a module in inference: nothing is tuned.
    inferring.requires_grad_(False).eval()
    training.train()
    if name != "last_cached":
        return Subject(name, num_tokens, inferring, training, images)
    tokens, position = training.backbone.forward_frozen(images)
    return Subject(name, num_tokens, None, TunedPart(training, position), tokens)


def _add_lora(vit: Any, images: "Tensor") -> "nn.Module | None":
    """The ViT with adapters of LoRA in it, which alone are tuned; None, and a line that says why, if that cannot be."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        print(f"lora is left out: peft is not installed; type {INSTALL}")
        return None
    adapted: nn.Module = inject_adapter_in_model(
        LoraConfig(r=8, target_modules=["qkv", "q_proj", "k_proj", "v_proj"]), vit
    )
    adapted(images.clone().requires_grad_()).sum().backward()  # has a gradient even where no adapter is used
    if any(parameter.requires_grad and parameter.grad is None for parameter in adapted.parameters()):
        print("lora is left out: this ViT reads the weights of its projections past the adapters")
        return None
    adapted.zero_grad(set_to_none=True)
    return adapted


def _measure(subjects: Sequence[Subject], options: BenchmarkOptions, device: "torch.device") -> bool:
    """Fill in the passes of all subjects; False if that was interrupted after the first round."""
    from vpt.engine.console import Progress
    from vpt.engine.measure import time_rounds

    functions: dict[tuple[int, str], Any] = {}
    with Progress(total=len(subjects), description="count") as progress:
        for index, subject in enumerate(subjects):
            functions |= {(index, kind): run for kind, run in _count(subject, options, device)}
            progress.advance(options.batch_size)
    with Progress(total=options.rounds * len(functions), description="time") as progress:
        rounds = time_rounds(functions, options.rounds, device, lambda: progress.advance(options.batch_size))
        try:
            for seconds in rounds:
                for (index, kind), value in seconds.items():
                    subjects[index].passes[kind].seconds.append(value)
        except KeyboardInterrupt:
            if not subjects[0].passes["step"].seconds:
                raise
            return False
    return True


def _count(subject: Subject, options: BenchmarkOptions, device: "torch.device") -> Iterator[tuple[str, Any]]:
    """Count what does not vary from call to call; give, by kind of pass, the function to time, warmed up."""
    import torch

    from vpt.engine import measure

    def fast(model: "nn.Module") -> Any:
        return torch.compile(model) if options.compile else model

    if subject.inferring is not None:
        measure.inference(subject.inferring, subject.inputs)()  # the constants of a prompt are made in the first call
        flops = measure.count_flops(measure.inference(subject.inferring, subject.inputs))
        subject.passes["forward"] = Pass(flops)
        forward = measure.inference(fast(subject.inferring), subject.inputs)
        forward()
        yield "forward", forward
    model, inputs = subject.training, subject.inputs
    targets = torch.arange(options.batch_size, device=device) % options.num_classes
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    flops = measure.count_flops(measure.training_step(model, inputs, targets, optimizer))
    compiled = fast(model)
    step = measure.training_step(compiled, inputs, targets, optimizer)
    step()
    saved = measure.count_saved_bytes(measure.training_loss(compiled, inputs, targets), measure.model_tensors(model))
    peak = measure.peak_bytes(step, device)
    held = measure.count_held_bytes(model, optimizer)  # as if this subject were alone in memory
    subject.passes["step"] = Pass(flops, saved, None if peak is None else peak + held)
    yield "step", step


def _rows(subjects: Sequence[Subject], options: BenchmarkOptions) -> list[dict[str, Any]]:
    """What the CSV holds: a row for each subject; what is not known is None."""
    by_key = {(subject.name, subject.num_tokens): subject.passes for subject in subjects}
    bare = by_key["bare", None]
    rows = []
    for subject in subjects:
        concat = by_key.get((CONCAT.get(subject.name, ""), subject.num_tokens), {})
        tuned = sum(parameter.numel() for parameter in subject.training.parameters() if parameter.requires_grad)
        row: dict[str, Any] = {"subject": subject.name, "num_tokens": subject.num_tokens, "tuned_parameters": tuned}
        for kind, cost in subject.passes.items():
            values = _describe(cost, bare[kind], concat.get(kind), options)
            row |= {f"{kind}_{name}": value for name, value in values.items()}
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _describe(cost: Pass, bare: Pass, concat: Pass | None, options: BenchmarkOptions) -> dict[str, Any]:
    """The columns of one pass, against the same pass of the bare model and of the longer sequence."""
    from vpt.engine.measure import median_ratio, spread

    seconds = statistics.median(cost.seconds)
    values: dict[str, Any] = {
        "s": seconds,
        "spread": spread(cost.seconds) if len(cost.seconds) > 1 else None,
        "images_per_s": options.batch_size / seconds,
        "flops": cost.flops,
        "peak_fraction": cost.flops / seconds / (options.peak_tflops * 1e12) if options.peak_tflops else None,
    }
    for name, other in {"bare": bare, "concat": concat}.items():
        values[f"flops_vs_{name}"] = other and cost.flops / other.flops
        values[f"time_vs_{name}"] = other and median_ratio(cost.seconds, other.seconds)
    if cost.saved_bytes is not None:
        saved_by_concat = concat.saved_bytes if concat is not None else None
        values["saved_bytes"], values["peak_bytes"] = cost.saved_bytes, cost.peak_bytes
        values["saved_vs_concat"] = saved_by_concat and cost.saved_bytes / saved_by_concat
    return values


def _tables(rows: Sequence[dict[str, Any]], options: BenchmarkOptions, title: str) -> str:
    """Two tables for a person, inference and training step, of the columns that are known."""
    from vpt.engine.console import format_table

    columns = {
        "s": ("ms", 1e3, ",.1f"),
        "spread": ("spread", 1, ".0%"),
        "images_per_s": ("images/s", 1, ",.1f"),
        "flops": ("GFLOPs/image", 1e-9 / options.batch_size, ",.3f"),
        "peak_fraction": ("of peak", 1, ".1%"),
        "saved_bytes": ("saved MiB", 2**-20, ",.1f"),
        "peak_bytes": ("peak MiB", 2**-20, ",.1f"),
        **{f"flops_vs_{name}": (f"FLOPs/{name}", 1, ".3f") for name in ("bare", "concat")},
        **{f"time_vs_{name}": (f"time/{name}", 1, ".3f") for name in ("bare", "concat")},
        "saved_vs_concat": ("saved/concat", 1, ".3f"),
    }
    texts = []
    for kind, name in (("forward", "inference"), ("step", "training step")):
        known = [column for column in columns if any(row.get(f"{kind}_{column}") is not None for row in rows)]
        header = ["subject", "P", "tuned", *(columns[column][0] for column in known)]
        cells = [
            [row["subject"], _cell(row["num_tokens"], 1, "d"), _cell(row["tuned_parameters"], 1, ",d")]
            + [_cell(row[f"{kind}_{column}"], *columns[column][1:]) for column in known]
            for row in rows
            if row[f"{kind}_s"] is not None
        ]
        texts.append(f"{name}: {title}\n\n{format_table(cells, header)}\n")
    return "\n".join(texts)


def _cell(value: float | None, scale: float, spec: str) -> str:
    return "-" if value is None else f"{value * scale:{spec}}"


def _write(rows: Sequence[dict[str, Any]], record: dict[str, Any], options: BenchmarkOptions, title: str) -> None:
    """Write the CSV, the record of how it was measured and, if it can be drawn, the picture; say so."""
    from vpt.storage.files import write_bytes, write_json

    folder = Path(options.output).expanduser()
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(folder / "benchmark.csv", buffer.getvalue().encode())
    write_json(folder / "benchmark.json", record)
    names = ["benchmark.csv", "benchmark.json"]
    if importlib.util.find_spec("matplotlib") is not None and set(LINES) & set(options.subjects):
        write_bytes(folder / "benchmark.png", _draw(rows, title))
        names.append("benchmark.png")
    print(f"{folder} holds {', '.join(names)}")


def _draw(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG of ratios against P: inference to the bare ViT, a training step to the concat path."""
    from matplotlib.figure import Figure

    styles = {
        "flops": ("FLOPs", "-", "o"),
        "time": ("time", "--", "^"),
        "saved": ("bytes saved for backward", ":", "s"),
    }
    panels = (("Inference", "forward", "bare"), ("Training step", "step", "concat"))
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=9, color="0.4")
    for axes, (heading, kind, reference) in zip(figure.subplots(1, 2), panels, strict=True):
        drawn: dict[str, dict[str, Any]] = {}
        for name, (color, width) in LINES.items():
            for quantity, (label, line, marker) in styles.items():
                column = f"{kind}_{quantity}_vs_{reference}"
                points = [
                    (row["num_tokens"], row[column]) for row in rows if row["subject"] == name and row.get(column)
                ]
                if points:
                    style = {"linestyle": line, "marker": marker, "markersize": 5}
                    axes.plot(*zip(*points, strict=True), color=color, linewidth=width if line == "-" else 1.5, **style)
                    drawn |= {name: {"color": color, "linewidth": width}, label: {"color": "0.3", **style}}
        for label, style in sorted(drawn.items(), key=lambda item: "marker" in item[1]):  # stable: subjects come first
            axes.plot([], label=label, **style)
        axes.axhline(1, color="0.3", linewidth=1.2, zorder=1.9)  # above the grid, below the lines
        axes.set(title=heading, xlabel="P, prompt tokens", ylabel=f"ratio to {reference}", ylim=(0, None))
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        if drawn:
            axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


if __name__ == "__main__":
    main()

"""Subjects of the benchmark: models to measure, and their FLOPs, memory and times."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vpt.engine import measure as measuring
from vpt.engine.console import Progress
from vpt.models.backbone import PromptedViT
from vpt.models.create import create_model
from vpt.models.task_model import TaskModel, TunedPart
from vpt.models.vit import load_vit, preprocessing_of

if TYPE_CHECKING:
    from vpt.benchmark.__main__ import BenchmarkOptions


INSTALL = 'uv pip install -p .venv -e ".[benchmark]" -c constraints.txt'
LAST_NUM_TOKENS = 10

Log = Callable[[str], object]


@dataclass
class Pass:
    """Costs of inference ("forward") or of a training step ("step") of a subject."""

    flops: int
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass
class Subject:
    """One line of the tables: a model for inference, a model to train, and their inputs.

    Two models, since inference caches the keys and values of the prompt, which a training step changes.
    """

    name: str
    num_tokens: int | None
    inferring: nn.Module | None
    training: nn.Module
    inputs: Tensor
    passes: dict[str, Pass] = field(default_factory=dict)


def build_subjects(options: "BenchmarkOptions", device: torch.device, log: Log) -> Iterator[Subject]:
    """The chosen subjects; all but full fine-tuning and LoRA share one ViT in memory."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    vit = load_vit(options.backbone, pretrained=False, img_size=options.img_size or None)
    vit.to(device, dtype).requires_grad_(False).eval()
    images = torch.randn(options.batch_size, 3, *preprocessing_of(vit)["size"], device=device, dtype=dtype)
    for name in options.subjects:
        if name in ("bare", "full", "lora"):
            yield from _build_plain(name, vit, images, options, log)
        elif name in ("linear", "last_concat", "last_cached"):
            yield _build_prompted(name, None if name == "linear" else LAST_NUM_TOKENS, vit, images, options.num_classes)
        else:
            for num_tokens in options.all_num_tokens:
                yield _build_prompted(name, num_tokens, vit, images, options.num_classes)


def _build_plain(name: str, vit: Any, images: Tensor, options: "BenchmarkOptions", log: Log) -> Iterator[Subject]:
    """A subject without vpt: the timm model with a linear head; none if LoRA cannot be used."""
    held = vit
    if name == "full":
        held = copy.deepcopy(vit).requires_grad_(True)
    elif name == "lora":
        held = _add_lora(copy.deepcopy(vit), images[:1], log)
    if held is not None:
        head = nn.Linear(vit.embed_dim, options.num_classes, device=images.device, dtype=images.dtype)
        inferring = nn.Sequential(vit if name == "full" else held, head)  # frozen, as in _build_prompted
        yield Subject(name, None, inferring, nn.Sequential(held, head), images)


def _build_prompted(name: str, num_tokens: int | None, vit: Any, images: Tensor, num_classes: int) -> Subject:
    """A model of vpt on the shared ViT."""
    variant, _, impl = name.partition("_")
    options: dict[str, Any] = {"num_tokens": num_tokens or 1, "impl": impl if impl == "concat" else "auto"}
    if variant == "last":
        options["blocks"] = f"last:{max(1, len(vit.blocks) // 4)}"
    prompt: Any = {"linear": None, "last": "deep"}.get(variant, variant)

    def build() -> TaskModel:
        backbone = PromptedViT(vit, prompt, **options)
        # With a head of zeros all gradients would be zero, which a GPU multiplies faster than others.
        return create_model(backbone, num_classes=num_classes, head_init="paper").to(images.device)

    inferring, training = build(), build()
    # In inference torch cannot count FLOPs where a view of a tuned parameter enters a module, so nothing is tuned.
    inferring.requires_grad_(False).eval()
    training.train()
    if name != "last_cached":
        return Subject(name, num_tokens, inferring, training, images)
    tokens, position = training.backbone.forward_frozen(images)
    return Subject(name, num_tokens, None, TunedPart(training, position), tokens)


def _add_lora(vit: Any, images: Tensor, log: Log) -> nn.Module | None:
    """The ViT with LoRA adapters, the only tuned parameters; logs why and returns None if they cannot be used."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        log(f"lora is skipped: peft is not installed; type {INSTALL}")
        return None
    config = LoraConfig(r=8, target_modules=["qkv", "q_proj", "k_proj", "v_proj"])
    adapted: nn.Module = inject_adapter_in_model(config, vit)
    adapted(images.clone().requires_grad_()).sum().backward()  # has a gradient even if no adapter is used
    if any(parameter.requires_grad and parameter.grad is None for parameter in adapted.parameters()):
        log("lora is skipped: this ViT bypasses adapters of its projections")
        return None
    adapted.zero_grad(set_to_none=True)
    return adapted


def measure(subjects: Sequence[Subject], options: "BenchmarkOptions", device: torch.device) -> bool:
    """Fill in the passes of all subjects; returns False if interrupted after the first round."""
    functions: dict[tuple[int, str], Any] = {}
    with Progress(total=len(subjects), description="count") as progress:
        for index, subject in enumerate(subjects):
            functions |= {(index, kind): run for kind, run in _count(subject, options, device)}
            progress.advance(options.batch_size)
    with Progress(total=options.rounds * len(functions), description="time") as progress:
        rounds = measuring.time_rounds(functions, options.rounds, device, lambda: progress.advance(options.batch_size))
        try:
            for seconds in rounds:
                for (index, kind), value in seconds.items():
                    subjects[index].passes[kind].seconds.append(value)
        except KeyboardInterrupt:
            if not subjects[0].passes["step"].seconds:
                raise
            return False
    return True


def _count(subject: Subject, options: "BenchmarkOptions", device: torch.device) -> Iterator[tuple[str, Any]]:
    """Count FLOPs and memory; yields the name of each pass and the function to time, warmed up."""
    fast: Any = torch.compile if options.compile else lambda model: model
    if subject.inferring is not None:
        measuring.inference(subject.inferring, subject.inputs)()  # the first call caches the prompt's keys and values
        subject.passes["forward"] = Pass(measuring.count_flops(measuring.inference(subject.inferring, subject.inputs)))
        forward = measuring.inference(fast(subject.inferring), subject.inputs)
        forward()
        yield "forward", forward
    model, inputs = subject.training, subject.inputs
    targets = torch.arange(options.batch_size, device=device) % options.num_classes
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    flops = measuring.count_flops(measuring.training_step(model, inputs, targets, optimizer))
    compiled = fast(model)
    step = measuring.training_step(compiled, inputs, targets, optimizer)
    step()
    loss = measuring.training_loss(compiled, inputs, targets)
    saved = measuring.count_saved_bytes(loss, measuring.model_tensors(model))
    peak = measuring.peak_bytes(step, device)
    held = measuring.count_held_bytes(model, optimizer)  # as if only this subject were in memory
    subject.passes["step"] = Pass(flops, saved, None if peak is None else peak + held)
    yield "step", step

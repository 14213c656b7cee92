"""Programs: models in a form that torch can trace, and files of them that other runtimes run.

A *self-contained* program is one task: images -> logits, or boxes and scores. Its deep prompts are constants, the keys
and values that they are in each block. A *shared* program is the backbone alone, and takes the prompts and heads of any
number of tasks as inputs; in one batch each image may be of another task.

Legend: B images, T tasks, L blocks of the backbone, P prompt tokens, S shallow prompt tokens, N sequence, D embed_dim,
K classes, A points of a dense head.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from vpt.models.attention import KeysValues, prompt_keys_values, run_block, why_not_fast
from vpt.models.backbone import PromptedViT
from vpt.models.classifier import ClassificationModel
from vpt.models.detector import DetectionModel
from vpt.models.heads.dense import DenseHead
from vpt.models.prompts import VisualPrompt
from vpt.models.task_file import open_task
from vpt.models.task_schema import TaskMetadata
from vpt.models.vit import ViT, embed, name_of, pools_prefix_only, preprocessing_of, rope_and_bias

ONNX = ".onnx"  # what a file of it ends in
MAX_ONNX_BYTES = 2 * 1024**3 - 32 * 1024**2  # protobuf's 2 GiB, less room for the graph
NOT_TOLD = ("format_version", "prompt", "head", "tuned_backbone", "config")  # of a task, by a file that is not one
EXTRA_FILE = "vpt.json"  # in a .pt2
CHATTY = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch.__trace")  # loggers

Run = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


class Program(nn.Module):
    """A model whose inputs and outputs are tensors with names, and that torch can trace.

    It holds the modules of the model that it is made of and not copies: they are frozen and put in eval mode.

    Attributes:
        inputs: In their order; of each the axes whose length is free, and a name for it.
        outputs: The same of the outputs.
    """

    inputs: ClassVar[Mapping[str, dict[int, str]]] = {"images": {0: "batch"}}
    outputs: ClassVar[Mapping[str, dict[int, str]]]

    def examples(self) -> dict[str, Tensor]:
        """Inputs that it takes, by name, with two or more along every free axis."""
        raise NotImplementedError


class ClassificationProgram(Program):
    """Images (B, 3, H, W) -> logits (B, K), of one task.

    Args:
        model: The model of the task.

    Raises:
        ValueError: The backbone is not held in float32.
    """

    outputs: ClassVar = {"logits": {0: "batch"}}

    def __init__(self, model: ClassificationModel) -> None:
        super().__init__()
        backbone = model.backbone
        num_read = backbone.num_prefix_tokens if backbone.computes_prefix_only else None
        self.backbone = ConstantPromptViT(backbone, num_read)
        self.head = model.head
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, 3, H, W)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def examples(self) -> dict[str, Tensor]:
        """Black images."""
        return {"images": _black_images(self.backbone.vit)}


class DetectionProgram(Program):
    """Images (B, 3, H, W) -> boxes (B, A, 4) and scores (B, A, K) of all points, before any is dropped.

    Boxes are x1, y1, x2, y2 in pixels of the input and end at its border; scores are probabilities.

    Args:
        model: The model of the task; its head is "dense".

    Raises:
        ValueError: The head is another one, or the backbone is not held in float32.
    """

    outputs: ClassVar = {"boxes": {0: "batch"}, "scores": {0: "batch"}}

    def __init__(self, model: DetectionModel) -> None:
        super().__init__()
        if not isinstance(model.head, DenseHead):
            raise ValueError(cannot_be_traced(model.head_name))
        self.backbone = ConstantPromptViT(model.backbone)
        self.taps, self.pyramid, self.head = model.taps, model.pyramid, model.head
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, A, 4) and scores (B, A, K) of normalised images (B, 3, H, W)."""
        logits, boxes = self.head(self.pyramid(self.backbone.feature_maps(images, self.taps)))
        return clip_boxes_to_image(boxes, (images.shape[-2], images.shape[-1])), logits.sigmoid()

    def examples(self) -> dict[str, Tensor]:
        """Black images."""
        return {"images": _black_images(self.backbone.vit)}


class SharedProgram(Program):
    """Images, each of one of T tasks, and the prompts and heads of the tasks -> logits (B, K).

    `pack_tasks` makes the inputs that tell the tasks. Where tasks differ in numbers of tokens and classes they are
    padded, and what is padding is not looked at: results are those of each task's own model.

    Args:
        vit: The backbone, pretrained.

    Raises:
        ValueError: A block is not understood well enough to mask its attention, or the ViT is not held in float32.
    """

    inputs: ClassVar = {
        "images": {0: "batch"},
        "task": {0: "batch"},
        "prompts": {0: "tasks", 2: "num_tokens"},
        "num_tokens": {0: "tasks"},
        "shallow": {0: "tasks", 1: "num_shallow"},
        "num_shallow": {0: "tasks"},
        "head_weight": {0: "tasks", 1: "num_classes"},
        "head_bias": {0: "tasks", 1: "num_classes"},
    }
    outputs: ClassVar = {"logits": {0: "batch", 1: "num_classes"}}

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        _check_float32(vit)
        for index, block in enumerate(vit.blocks):
            reason = why_not_fast(block)
            if reason is not None:
                raise ValueError(f"{name_of(vit)} cannot be shared, in block {index} {reason}; export each task alone")
        self.vit = vit
        self.requires_grad_(False).eval()

    def forward(
        self,
        images: Tensor,
        task: Tensor,
        prompts: Tensor,
        num_tokens: Tensor,
        shallow: Tensor,
        num_shallow: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
    ) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W).

        Args:
            images: Normalised as the task of each wants them.
            task: Which of the T tasks each image is for, (B,) int64.
            prompts: Tokens of deep prompts, (T, L, P, D).
            num_tokens: How many of the P there are in each block, (T, L) int64; 0 where a prompt does not enter.
            shallow: Tokens of shallow prompts, (T, S, D).
            num_shallow: How many of the S there are, (T,) int64.
            head_weight: (T, K, D).
            head_bias: (T, K); -inf for classes that a task has not.
        """
        vit, prefix, num_blocks = self.vit, self.vit.num_prefix_tokens, len(self.vit.blocks)
        tokens, position = embed(vit, images)
        tokens = torch.cat([tokens[:, :prefix], shallow[task], tokens[:, prefix:]], dim=1)
        is_there = torch.cat(  # in the sequence
            [
                _ones(tokens[:, :prefix]),
                _counted(num_shallow[task], shallow.shape[1]),
                _ones(tokens[:, prefix + shallow.shape[1] :]),
            ],
            dim=1,
        )
        num_read = None
        for index in range(num_blocks):
            num_read = prefix if index == num_blocks - 1 and pools_prefix_only(vit) else None
            keys, values = prompt_keys_values(vit.blocks[index], prompts[:, index], num_read)
            seen = torch.cat([_counted(num_tokens[task, index], prompts.shape[2]), is_there], dim=1)
            rope, bias = rope_and_bias(vit, index, position, shallow.shape[1])
            tokens = run_block(
                vit.blocks[index],
                tokens,
                (keys[task], values[task]),
                rope=rope,
                bias=bias,
                mask=torch.where(seen, 0.0, -torch.inf)[:, None, None],
                num_queries=num_read,
            )
        if num_read is None:
            tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix + shallow.shape[1] :]], dim=1)
        features = vit.forward_head(vit.norm(tokens), pre_logits=True)
        return torch.einsum("bd,bkd->bk", features, head_weight[task]) + head_bias[task]

    def examples(self) -> dict[str, Tensor]:
        """Two black images, for three tasks of five classes, with four prompt tokens and two shallow ones."""
        num_blocks, width = len(self.vit.blocks), int(self.vit.embed_dim)
        return {
            "images": _black_images(self.vit),
            "task": torch.tensor([0, 2]),
            "prompts": torch.zeros(3, num_blocks, 4, width),
            "num_tokens": torch.full((3, num_blocks), 4),
            "shallow": torch.zeros(3, 2, width),
            "num_shallow": torch.tensor([0, 1, 2]),
            "head_weight": torch.zeros(3, 5, width),
            "head_bias": torch.zeros(3, 5),
        }


class ConstantPromptViT(PromptedViT):
    """A prompted backbone in which the keys and values of a deep prompt are constants, computed when it is made.

    Args:
        backbone: The backbone; its ViT and its prompt are held and not copied.
        num_read: How many tokens will be read of the last block; None is all.

    Raises:
        ValueError: The ViT is not held in float32.
    """

    def __init__(self, backbone: PromptedViT, num_read: int | None = None) -> None:
        super().__init__(backbone.vit, backbone.prompt, impl=backbone.impl)
        _check_float32(backbone.vit)
        for index in [index for index, path in self.paths.items() if path == "kv"]:
            assert self.prompt is not None
            with torch.no_grad():
                last = num_read if index == self.depth - 1 else None
                pair = self.prompt.keys_values(self.vit.blocks[index], index, 1, torch.float32, last)
                copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in pair]
            for name, tensor in zip(("keys", "values"), copies, strict=True):
                self.register_buffer(f"{name}_{index}", tensor)

    def _keys_values(self, prompt: VisualPrompt, index: int, tokens: Tensor, num_read: int | None) -> KeysValues:
        return self.get_buffer(f"keys_{index}"), self.get_buffer(f"values_{index}")


def make_program(model: ClassificationModel | DetectionModel) -> Program:
    """The self-contained program of a model.

    Raises:
        ValueError: It is a detection model whose head is not "dense", or its backbone is not held in float32.
    """
    return DetectionProgram(model) if isinstance(model, DetectionModel) else ClassificationProgram(model)


def outputs_of(model: ClassificationModel | DetectionModel, images: Tensor) -> dict[str, NDArray[Any]]:
    """What the outputs of a model's program must be for images (B, 3, H, W), as the model itself computes them."""
    with torch.no_grad():
        if isinstance(model, ClassificationModel):
            return {"logits": model(images).numpy()}
        assert isinstance(model.head, DenseHead)
        logits, boxes = model.head(model.levels(images))
    size = images.shape[-2], images.shape[-1]
    return {"boxes": clip_boxes_to_image(boxes, size).numpy(), "scores": logits.sigmoid().numpy()}


def cannot_be_traced(head: str) -> str:
    """Why a head of torchvision is refused."""
    return f"head={head} is torchvision's, and what it computes depends on what it finds; only head=dense is exported"


def pack_tasks(paths: Sequence[str | Path], depth: int) -> dict[str, NDArray[Any]]:
    """The inputs of a shared program that tell its tasks, of task files of one backbone; task 0 is the first.

    Args:
        paths: Task files of kind classification, in any dtype.
        depth: L.

    Returns:
        prompts, num_tokens, shallow, num_shallow, head_weight and head_bias, see `SharedProgram.forward`; float32 and
        int64. P, S and K are the largest of all tasks; P and S may be 0.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No file, one that cannot be read, or a task that cannot share the backbone with the first.
    """
    if not paths:
        raise ValueError("there are no tasks to pack; name a task file or more")
    opened = [open_task(path) for path in paths]
    for path, (metadata, _) in zip(paths, opened, strict=True):
        check_shareable(Path(path), metadata, opened[0][0])
    tensors = [{name: tensor.float().numpy() for name, tensor in held.items()} for _, held in opened]
    prompts = [metadata.prompt or {"kind": None, "num_tokens": 0, "blocks": [0]} for metadata, _ in opened]
    num_tasks, width = len(opened), tensors[0]["head.weight"].shape[1]
    num_tokens, num_shallow = (
        max(prompt["num_tokens"] * (prompt["kind"] == kind) for prompt in prompts) for kind in ("deep", "shallow")
    )
    num_classes = max(metadata.num_classes for metadata, _ in opened)
    packed: dict[str, NDArray[Any]] = {
        "prompts": np.zeros((num_tasks, depth, num_tokens, width), np.float32),
        "num_tokens": np.zeros((num_tasks, depth), np.int64),
        "shallow": np.zeros((num_tasks, num_shallow, width), np.float32),
        "num_shallow": np.zeros(num_tasks, np.int64),
        "head_weight": np.zeros((num_tasks, num_classes, width), np.float32),
        "head_bias": np.full((num_tasks, num_classes), -np.inf, np.float32),
    }
    for task, (path, prompt, held) in enumerate(zip(paths, prompts, tensors, strict=True)):
        widths = {tensor.shape[-1] for name, tensor in held.items() if name != "head.bias"}
        if widths != {width} or prompt["blocks"][-1] >= depth:
            raise ValueError(f"{path}: does not fit a backbone of embed_dim {width} and {depth} blocks")
        packed["head_weight"][task, : len(held["head.weight"])] = held["head.weight"]
        packed["head_bias"][task, : len(held["head.bias"])] = held["head.bias"]
        if prompt["kind"] == "deep":
            packed["prompts"][task, prompt["blocks"], : prompt["num_tokens"]] = held["prompt.tokens"]
            packed["num_tokens"][task, prompt["blocks"]] = prompt["num_tokens"]
        elif prompt["kind"] == "shallow":
            packed["shallow"][task, : prompt["num_tokens"]] = held["prompt.tokens"][0]
            packed["num_shallow"][task] = prompt["num_tokens"]
    return packed


def check_shareable(path: Path, metadata: TaskMetadata, first: TaskMetadata) -> None:
    """Refuse a task that cannot share the backbone with the first one.

    Raises:
        ValueError: It is no classification, its backbone was tuned, its prompt has no tokens, or it was made for
            another backbone.
    """
    if metadata.kind != "classification":
        raise ValueError(f"{path}: a task of kind {metadata.kind} cannot share a backbone; export it alone")
    if metadata.prompt is not None and metadata.prompt["kind"] == "kv":
        raise ValueError(f"{path}: has keys and values, and a shared program takes prompt tokens; export it alone")
    if metadata.tuned_backbone:
        raise ValueError(f"{path}: parameters of the backbone were tuned, so it cannot be shared; export it alone")
    if metadata.fingerprint != first.fingerprint:
        same = " with other weights" if metadata.backbone == first.backbone else ""
        raise ValueError(
            f"{path}: made for the backbone {metadata.backbone}{same}, the first task for {first.backbone}; "
            "tasks share a backbone only if they were made for the same one"
        )


def describe_task(metadata: TaskMetadata) -> dict[str, Any]:
    """What a file of a self-contained program tells: a task's metadata, without what only training needs."""
    return {name: value for name, value in asdict(metadata).items() if name not in NOT_TOLD}


def describe_backbone(metadata: TaskMetadata) -> dict[str, Any]:
    """What a file of a shared program tells: which tasks it serves, by one of them."""
    told = {name: getattr(metadata, name) for name in ("kind", "backbone", "fingerprint", "versions")}
    return told | {"size": metadata.preprocessing["size"]}


def write_program(program: Program, path: Path, told: Mapping[str, Any]) -> None:
    """Trace a program and write it to a file, ONNX or torch.export's by its ending; not whole if it is interrupted.

    Args:
        program: What to write.
        path: Ends in .onnx or .pt2.
        told: Plain JSON values that go with it: in ONNX under the metadata key "vpt", in a .pt2 as the extra file
            "vpt.json".

    Raises:
        ValueError: The program is too large for one file of ONNX, or torch's exporter does not understand it.
    """
    text = json.dumps({**told, "inputs": list(program.inputs), "outputs": list(program.outputs)}, ensure_ascii=False)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict().values())
    is_onnx = path.suffix.lower() == ONNX
    if is_onnx and num_bytes > MAX_ONNX_BYTES:
        raise ValueError(f"{num_bytes / 1e9:.1f} GB of weights, more than an ONNX file holds; use format=torch_export")
    try:
        # With gradients torch plans another attention kernel, whose result lies in memory in another order.
        with torch.no_grad(), _quiet():
            exported = _trace(program)
            if is_onnx:
                _write_onnx(exported, program, path, text)
            else:
                torch.export.save(exported, path, extra_files={EXTRA_FILE: text})
    except OSError:
        raise
    except Exception as error:  # the exporter's steps raise kinds of their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"torch cannot export this model: {first_line}") from error


def open_program(path: Path) -> Run:
    """Read a file that `write_program` wrote, with onnxruntime or torch; run it on arrays by name, on the CPU."""
    if path.suffix.lower() == ONNX:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))
    extra = {EXTRA_FILE: ""}
    module = torch.export.load(path, extra_files=extra).module()
    told = json.loads(extra[EXTRA_FILE])

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            found = module(*(torch.from_numpy(inputs[name]) for name in told["inputs"]))
        found = (found,) if isinstance(found, Tensor) else found
        return {name: tensor.numpy() for name, tensor in zip(told["outputs"], found, strict=True)}

    return run


def _trace(program: Program) -> torch.export.ExportedProgram:
    examples = program.examples()
    exported = torch.export.export(program, tuple(examples.values()), dynamic_shapes=_dimensions(program))
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    return exported


def _dimensions(program: Program) -> dict[str, dict[int, Any]]:
    names = {name for axes in program.inputs.values() for name in axes.values()}
    dimensions = {name: torch.export.Dim(name) for name in names}
    return {given: {axis: dimensions[name] for axis, name in axes.items()} for given, axes in program.inputs.items()}


def _write_onnx(exported: torch.export.ExportedProgram, program: Program, path: Path, text: str) -> None:
    made = torch.onnx.export(
        exported,
        dynamo=True,
        verbose=False,
        input_names=list(program.inputs),
        output_names=list(program.outputs),
        dynamic_shapes=_dimensions(program),
    )
    assert made is not None
    for node in made.model.graph:
        node.metadata_props.clear()  # the history of each, a third of a small file
    made.model.metadata_props["vpt"] = text
    made.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say of their own insides."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used")  # that of another input is
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _check_float32(vit: ViT) -> None:
    dtypes = {parameter.dtype for parameter in vit.parameters()} - {torch.float32}
    if dtypes:
        raise ValueError(f"{name_of(vit)} is held in {dtypes.pop()}; programs are float32: load it without dtype")


def _black_images(vit: ViT) -> Tensor:
    height, width = preprocessing_of(vit)["size"]
    return torch.zeros(2, 3, height, width)


def _ones(tokens: Tensor) -> Tensor:
    """True for each token (B, N, D): (B, N)."""
    return torch.ones_like(tokens[..., 0], dtype=torch.bool)


def _counted(num: Tensor, size: int) -> Tensor:
    """Which of `size` places are among the first `num` (B,): (B, size) bool."""
    return torch.arange(size, device=num.device) < num[:, None]

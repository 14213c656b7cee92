"""Files of exported models: ONNX or torch.export, with the metadata of the task inside; written, and read again."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vpt.export.traced import Traceable
from vpt.models.task_schema import TaskMetadata

ONNX = ".onnx"  # suffix of such a file
MAX_ONNX_BYTES = 2 * 1024**3 - 32 * 1024**2  # protobuf's 2 GiB, less room for the graph
LEFT_OUT = ("format_version", "prompt", "head", "tuned_backbone", "config")  # metadata that only a task file needs
EXTRA_FILE = "vpt.json"  # in a .pt2
CHATTY = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch.__trace")  # loggers

Run = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def describe_task(metadata: TaskMetadata) -> dict[str, Any]:
    """Metadata of an exported task: that of the task file, without what only a task file needs."""
    return {name: value for name, value in metadata.to_json().items() if name not in LEFT_OUT}


def describe_backbone(metadata: TaskMetadata) -> dict[str, Any]:
    """Metadata of an exported backbone, from one of the tasks that it serves."""
    names, values = ("kind", "backbone", "fingerprint", "versions"), metadata.to_json()
    return {name: values[name] for name in names} | {"size": metadata.preprocessing["size"]}


def write_model(model: Traceable, path: Path, metadata: Mapping[str, Any]) -> None:
    """Trace a model and write it to a file, ONNX or torch.export's by its suffix; an interruption leaves it incomplete.

    The metadata, plain JSON values, is in ONNX under the metadata key "vpt", in a .pt2 the extra file "vpt.json".
    ValueError if the model is too large for one file of ONNX, or torch cannot export it.
    """
    text = json.dumps({**metadata, "inputs": list(model.inputs), "outputs": list(model.outputs)}, ensure_ascii=False)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    is_onnx = path.suffix.lower() == ONNX
    if is_onnx and num_bytes > MAX_ONNX_BYTES:
        raise ValueError(f"{num_bytes / 1e9:.1f} GB of weights, more than an ONNX file holds; use format=torch_export")
    try:
        # With gradients torch selects another attention kernel, whose result has another memory layout.
        with torch.no_grad(), _quiet():
            examples = tuple(model.examples().values())
            exported = torch.export.export(model, examples, dynamic_shapes=_dimensions(model))
            for node in exported.graph.nodes:
                node.meta.pop("stack_trace", None)  # contains paths of this machine
            if is_onnx:
                _write_onnx(exported, model, path, text)
            else:
                torch.export.save(exported, path, extra_files={EXTRA_FILE: text})
    except OSError:
        raise
    except Exception as error:  # each step of the exporter raises its own class
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"torch cannot export this model: {first_line}") from error


def open_model(path: Path) -> Run:
    """Read a file that `write_model` wrote, with onnxruntime or torch; run it on arrays by name, on the CPU."""
    if path.suffix.lower() == ONNX:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))
    extra = {EXTRA_FILE: ""}
    module = torch.export.load(path, extra_files=extra).module()
    metadata = json.loads(extra[EXTRA_FILE])

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            found = module(*(torch.from_numpy(inputs[name]) for name in metadata["inputs"]))
        found = (found,) if isinstance(found, Tensor) else found
        return {name: tensor.numpy() for name, tensor in zip(metadata["outputs"], found, strict=True)}

    return run


def _dimensions(model: Traceable) -> dict[str, dict[int, Any]]:
    names = {name for axes in model.inputs.values() for name in axes.values()}
    dimensions = {name: torch.export.Dim(name) for name in names}
    return {given: {axis: dimensions[name] for axis, name in axes.items()} for given, axes in model.inputs.items()}


def _write_onnx(exported: torch.export.ExportedProgram, model: Traceable, path: Path, text: str) -> None:
    made = torch.onnx.export(
        exported,
        dynamo=True,
        verbose=False,
        input_names=list(model.inputs),
        output_names=list(model.outputs),
        dynamic_shapes=_dimensions(model),
    )
    assert made is not None
    for node in made.model.graph:
        node.metadata_props.clear()  # the history of each node, a third of a small file
    made.model.metadata_props["vpt"] = text
    made.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used")  # another input uses the name
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

"""Export of a task with adapters of PEFT to a folder that PEFT reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vpt.models.adapters import ADAPTER, PEFT_METHODS, peft_config
from vpt.models.task_model import model_named
from vpt.models.task_schema import TaskMetadata


def why_no_peft_folder(metadata: TaskMetadata) -> str | None:
    """Why PEFT cannot represent a task; None if it can."""
    if metadata.adapters is None or metadata.adapters["method"] not in PEFT_METHODS:
        return "has no adapters of PEFT"
    if metadata.prompt is not None:
        return "has a prompt, which PEFT does not support in a ViT"
    is_linear = model_named(metadata.task_type).has_linear_head
    return None if is_linear else f"is of type {metadata.task_type}, with a neck and a head"


def write_peft_folder(folder: str | Path, metadata: TaskMetadata, tensors: Mapping[str, Tensor]) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as PEFT does; return the folder's path.

    PEFT reads it onto the timm model with a head of as many classes:
    `PeftModel.from_pretrained(timm.create_model(NAME, pretrained=True, num_classes=K), folder)`. Preprocessing and
    class names are lost, and it cannot be converted back: keep the task file. FileExistsError if the folder is not
    empty, or is a file; ValueError if PEFT cannot represent the task.
    """
    folder, reason = Path(folder), why_no_peft_folder(metadata)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists already; name a new folder")
    if reason is not None or metadata.adapters is None:
        raise ValueError(f"{folder}: the task {reason}; PEFT cannot represent it")
    config: Any = peft_config(**metadata.adapters)
    config.modules_to_save, config.base_model_name_or_path = ["head"], metadata.backbone
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "base_model.model." + re.sub(rf"\.{ADAPTER}(?=\.|$)", "", name.removeprefix("backbone.")): tensor.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder

"""Visual prompt tuning: learn a few tokens, keep the vision transformer frozen.

The names below are loaded when they are first used, so that `import vpt` and `--help` are fast.
"""

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from vpt.version import __version__ as __version__

if TYPE_CHECKING:
    from vpt.hub import from_pretrained, push_to_hub
    from vpt.models.adapters import Adapters
    from vpt.models.backbone import PromptedViT
    from vpt.models.bank import TaskBank
    from vpt.models.classifier import Classifier
    from vpt.models.create import create_model
    from vpt.models.detector import Detector
    from vpt.models.inspection import inspect_attention, nearest_patches
    from vpt.models.prompt_init import start_from_patches
    from vpt.models.prompts import VisualPrompt
    from vpt.models.segmenter import Segmenter
    from vpt.models.task_file import load_task, read_task, save_task
    from vpt.models.task_model import TaskModel
    from vpt.models.tuning import count_parameters, tune, tuned_parameters
    from vpt.models.vit import load_vit

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else the hub receives the versions of installed packages

_HOMES = {
    "Adapters": "vpt.models.adapters",
    "Classifier": "vpt.models.classifier",
    "Detector": "vpt.models.detector",
    "PromptedViT": "vpt.models.backbone",
    "Segmenter": "vpt.models.segmenter",
    "TaskBank": "vpt.models.bank",
    "TaskModel": "vpt.models.task_model",
    "VisualPrompt": "vpt.models.prompts",
    "count_parameters": "vpt.models.tuning",
    "create_model": "vpt.models.create",
    "from_pretrained": "vpt.hub",
    "inspect_attention": "vpt.models.inspection",
    "load_task": "vpt.models.task_file",
    "load_vit": "vpt.models.vit",
    "nearest_patches": "vpt.models.inspection",
    "push_to_hub": "vpt.hub",
    "read_task": "vpt.models.task_file",
    "save_task": "vpt.models.task_file",
    "start_from_patches": "vpt.models.prompt_init",
    "tune": "vpt.models.tuning",
    "tuned_parameters": "vpt.models.tuning",
}

RENAMED = {"ClassificationModel": "Classifier", "DetectionModel": "Detector"}

__all__ = ["Adapters", "Classifier", "Detector", "PromptedViT", "Segmenter", "TaskBank", "TaskModel"]
__all__ += ["VisualPrompt", "count_parameters", "create_model", "from_pretrained", "inspect_attention", "load_task"]
__all__ += ["load_vit", "nearest_patches", "push_to_hub", "read_task", "save_task", "start_from_patches"]
__all__ += ["tune", "tuned_parameters"]


def __getattr__(name: str) -> Any:
    if name in RENAMED:
        raise AttributeError(f"vpt.{name} was renamed: use vpt.{RENAMED[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'vpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _TimmFinder:
    """Registers the bundled backbone with timm as soon as timm is imported; to import timm here would take seconds."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "timm" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module
            loader.exec_module = lambda module: (execute(module), importlib.import_module("vpt.models.nano"))
        return spec


if "timm" in sys.modules:
    importlib.import_module("vpt.models.nano")
else:
    sys.meta_path.insert(0, _TimmFinder())

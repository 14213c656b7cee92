"""What trains: the tuned parameters of a model, and how many there are."""

from dataclasses import dataclass

from torch import nn

from vpt.models.backbone import PromptedViT


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: of the prompt, of the head, of the backbone that is held, and all that train."""

    prompt: int
    head: int
    backbone: int
    tuned: int

    @property
    def share(self) -> float:
        """Tuned parameters as a fraction of the backbone's."""
        return self.tuned / self.backbone


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; hand `.values()` to an optimiser."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count what a prompted backbone, or a model that holds one as `.backbone`, is made of.

    Raises:
        TypeError: There is no prompted backbone in the model.
    """
    backbone = model if isinstance(model, PromptedViT) else getattr(model, "backbone", None)
    if not isinstance(backbone, PromptedViT):
        raise TypeError(f"expected a PromptedViT or a model with one as .backbone, got {type(model).__name__}")
    head = getattr(model, "head", None)
    return ParameterCount(
        prompt=_count(backbone.prompt),
        head=_count(head if isinstance(head, nn.Module) else None),
        backbone=_count(backbone.vit),
        tuned=sum(parameter.numel() for parameter in tuned_parameters(model).values()),
    )


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

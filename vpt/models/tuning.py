"""Tuning methods: selection of the parameters that train, by name and by part, and their numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from vpt.models.adapters import Adapters, add_adapters
from vpt.models.backbone import PromptedViT
from vpt.models.vit import ViT, fingerprint, norms_of, preprocessing_of, traits_of

Tuning = Literal["prompt", "linear", "bias", "proj_bias", "norm", "partial", "full", "adapters"]

BIASES = ("bias", "q_bias", "v_bias", "mlp_bias")  # names of bias vectors in timm's modules


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part, and how many of them train; `backbone_tuned` counts adapters, `backbone` not."""

    prompt: int
    neck: int
    head: int
    adapters: int
    backbone: int
    backbone_tuned: int
    tuned: int

    @property
    def share(self) -> float:
        """Tuned parameters as a fraction of the backbone's."""
        return self.tuned / self.backbone


@dataclass(frozen=True)
class Origin:
    """State of a ViT before any of its parameters were tuned; stored with the ViT, which models may share.

    `tuned` are names of the ViT's parameters that may have changed since, and of tensors of adapters; `traits` are
    those of `vit.traits_of`, None where they are not known.
    """

    fingerprint: str
    tuned: frozenset[str]
    adapters: Adapters | None = None
    traits: Mapping[str, Any] | None = None


def tune(model: nn.Module, tuning: Tuning, *, num_blocks: int = 1, adapters: Adapters | None = None) -> None:
    """Select the parameters of the ViT that train, and freeze its others, also those selected by an earlier call.

    Neck, head and prompt always train. Of the ViT:

    - "prompt": nothing. Without a prompt this is a linear probe.
    - "linear": nothing, and there must be no prompt.
    - "bias": every bias vector, including those of norms. A fused bias of queries, keys and values trains as a whole.
      A separate key bias is left out where keys are neither normed nor rotated, since softmax cancels it.
    - "proj_bias": the bias of the output projection of attention in each block. A bias of the values would be
      equivalent, because the weights of a query sum to one.
    - "norm": weights and biases of all norms.
    - "partial": the last `num_blocks` blocks and the final norm.
    - "full": everything.
    - "adapters": the modules that `adapters` inserts.

    Parameters that the model does not use stay frozen: the ViT's own classifier; for a detector also the final norm,
    pooling, and blocks after the last of `out_indices`. The ViT stays in eval mode. It is not copied: all methods but
    "prompt" and "linear" change it for every model that shares it, so such a model needs its own ViT.

    The model is a prompted backbone, or holds one as `.backbone`, also inside DataParallel or torch.compile; its
    pretrained weights are loaded. Only "partial"
    uses `num_blocks`, and only "adapters" uses `adapters`.

    Raises:
        TypeError: There is no prompted backbone in the model.
        ValueError: The method is unknown, there is a prompt with "linear", `num_blocks` is out of range, adapters do
            not fit or exist already, or weights to train have less than 32 bits. At most adapters were then added.

    References:
        BitFit (Zaken et al., 2022), https://arxiv.org/abs/2106.10199, section 3, for "bias"; DA-VPT (Ren et al., CVPR
        2025) for a bias beside prompts; VPT (Jia et al., 2022), https://arxiv.org/abs/2203.12119, section 4.1.
    """
    backbone = _held_backbone(model)
    if tuning not in get_args(Tuning):
        raise ValueError(f"tuning={tuning!r}: must be one of {', '.join(get_args(Tuning))}")
    if tuning == "linear" and backbone.prompt is not None:
        raise ValueError(
            'tuning=linear: trains the head alone, but there is a prompt; use prompt=None or tuning="prompt"'
        )
    if (tuning == "adapters") != (adapters is not None):
        raise ValueError(
            f"tuning={tuning}: adapters=Adapters(...) is required for tuning=adapters, and not possible otherwise"
        )
    added = frozenset() if adapters is None else _add(backbone.vit, adapters)
    backbone.check_prompt()
    chosen = _choose(model, backbone, tuning, num_blocks, added)
    origin = origin_of(backbone.vit)
    if chosen and adapters is None and origin is not None and origin.adapters is not None:
        raise ValueError(f"tuning={tuning}: this ViT has {origin.adapters.method} adapters; load it again")
    if narrow := {parameter.dtype for parameter in chosen if torch.finfo(parameter.dtype).bits < 32}:
        what = "weights of the backbone" if adapters is None else "adapters that follow its weights"
        raise ValueError(
            f"tuning={tuning}: trains {what}, which are {narrow.pop()}; "
            "load the backbone in float32, or use tuning=prompt"
        )
    _store_origin(backbone.vit, chosen)
    model.requires_grad_(False)
    for part in (backbone.prompt, *_neck_and_head(model).values()):
        if part is not None:
            part.requires_grad_(True)
    for parameter in chosen:
        parameter.requires_grad_(True)


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; pass `.values()` to an optimiser."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tuned_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that train, by non-empty part: "prompt", "neck", "head", "backbone"; see `tune` for errors."""
    backbone = _held_backbone(model)
    modules = {"prompt": backbone.prompt, **_neck_and_head(model), "backbone": backbone.vit}
    return {
        name: trained
        for name, module in modules.items()
        if module is not None and (trained := [part for part in module.parameters() if part.requires_grad])
    }


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a prompted backbone, or of a model with one as `.backbone`; see `tune` for errors."""
    backbone = _held_backbone(model)
    origin = origin_of(backbone.vit)
    own = dict(backbone.vit.named_parameters())
    pretrained = set(own) if origin is None or origin.adapters is None else set(own) - origin.tuned
    return ParameterCount(
        prompt=_count(backbone.prompt),
        **{name: _count(part) for name, part in _neck_and_head(model).items()},
        adapters=sum(parameter.numel() for name, parameter in own.items() if name not in pretrained),
        backbone=sum(own[name].numel() for name in pretrained),
        backbone_tuned=sum(parameter.numel() for parameter in backbone.vit.parameters() if parameter.requires_grad),
        tuned=sum(parameter.numel() for parameter in tuned_parameters(model).values()),
    )


def pretrained_fingerprint(vit: ViT) -> str:
    """Digest of the weights that a ViT had before any of them were tuned."""
    origin = origin_of(vit)
    return fingerprint(vit) if origin is None else origin.fingerprint


def origin_now(vit: ViT) -> Origin:
    """The state of the ViT before tuning, which is its present one if it was never tuned."""
    traits = None if origin_of(vit) else traits_of(vit, preprocessing_of(vit)["size"])
    return origin_of(vit) or Origin(fingerprint(vit), frozenset(), traits=traits)


def origin_of(vit: ViT) -> Origin | None:
    """The state of the ViT before tuning; None if none of its parameters was ever tuned."""
    return vit.__dict__.get("vpt_origin")


def set_origin(vit: ViT, origin: Origin) -> None:
    """Store an origin with the ViT, so that its copies and all models that share it have it."""
    vit.__dict__["vpt_origin"] = origin


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel or the result of torch.compile."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def _held_backbone(model: nn.Module) -> PromptedViT:
    model = unwrapped(model)
    backbone = model if isinstance(model, PromptedViT) else getattr(model, "backbone", None)
    if not isinstance(backbone, PromptedViT):
        raise TypeError(f"expected a PromptedViT or a model with one as .backbone, got {type(model).__name__}")
    return backbone


def _neck_and_head(model: nn.Module) -> dict[str, nn.Module | None]:
    model = unwrapped(model)
    return {"neck": getattr(model, "neck", None), "head": getattr(model, "head", None)}


def _add(vit: ViT, adapters: Adapters) -> frozenset[str]:
    known = origin_of(vit)
    if known is not None and known.adapters is not None:
        raise ValueError(f"this ViT has {known.adapters.method} adapters already; load it again")
    if known is not None and known.tuned:
        raise ValueError("adapters: weights of this ViT were tuned, and adapters need pretrained ones; load it again")
    is_empty = next(vit.parameters()).is_meta  # there are no weights on the meta device
    before = Origin("", frozenset()) if is_empty else origin_now(vit)
    adapters = adapters.for_vit(vit)
    added = add_adapters(vit, adapters, is_empty=is_empty)
    set_origin(vit, replace(before, tuned=added, adapters=adapters))
    return added


def _choose(
    model: nn.Module, backbone: PromptedViT, tuning: Tuning, num_blocks: int, added: frozenset[str]
) -> list[nn.Parameter]:
    """The parameters of the ViT that train; `added` are names of tensors of adapters."""
    vit: Any = backbone.vit
    out_indices: tuple[int, ...] = getattr(
        unwrapped(model), "out_indices", ()
    )  # of a TaskModel; other modules pool features
    num_used = max(out_indices) + 1 if out_indices else backbone.depth
    if tuning == "partial" and not 1 <= num_blocks <= num_used:
        raise ValueError(f"num_blocks={num_blocks}: must be from 1 to {num_used}, the blocks that the model uses")
    unused = [vit.head, getattr(vit, "head_dist", None)]  # the second is DeiT's
    if out_indices:
        unused += [vit.norm, vit.fc_norm, getattr(vit, "attn_pool", None), *vit.blocks[num_used:]]
    left_out = {parameter for module in unused if module is not None for parameter in module.parameters()}
    chosen: list[nn.Parameter] = []
    if tuning == "bias":
        chosen = _bias_vectors(vit)
    elif tuning == "proj_bias":
        chosen = _projection_biases(vit)
    elif tuning == "norm":
        chosen = [parameter for norm in norms_of(vit) for parameter in norm.parameters()]
    elif tuning == "adapters":
        chosen = [parameter for name, parameter in vit.named_parameters() if name in added]
    elif tuning == "partial":
        behind = (*vit.blocks[num_used - num_blocks : num_used], vit.norm, vit.fc_norm)
        chosen = [parameter for module in behind for parameter in module.parameters()]
    elif tuning == "full":
        chosen = list(vit.parameters())
    return [parameter for parameter in chosen if parameter not in left_out]


def _bias_vectors(vit: Any) -> list[nn.Parameter]:
    """All bias vectors of a ViT that have an effect."""
    without_effect = {
        module.k_proj.bias
        for module in vit.modules()
        if isinstance(getattr(module, "k_proj", None), nn.Linear)
        and isinstance(getattr(module, "k_norm", None), nn.Identity | None)
        and getattr(vit, "rope", None) is None
    }
    found = [getattr(module, name, None) for module in vit.modules() for name in BIASES]
    return [bias for bias in found if isinstance(bias, nn.Parameter) and bias not in without_effect]


def _projection_biases(vit: Any) -> list[nn.Parameter]:
    found = [getattr(getattr(getattr(block, "attn", None), "proj", None), "bias", None) for block in vit.blocks]
    biases = [bias for bias in found if isinstance(bias, nn.Parameter)]
    if len(biases) < len(found):
        raise ValueError("tuning=proj_bias: this ViT has blocks without a bias behind attention; use tuning=bias")
    return biases


def _store_origin(vit: ViT, chosen: list[nn.Parameter]) -> None:
    """Store the digest of the pretrained weights before any training, and the names of parameters that will change."""
    if not chosen or chosen[0].is_meta:  # there are no weights on the meta device
        return
    changing = set(chosen)
    names = {name for name, parameter in vit.named_parameters() if parameter in changing}
    known = origin_now(vit)
    set_origin(vit, replace(known, tuned=known.tuned | names))


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

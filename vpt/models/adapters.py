"""Adapters: small trained modules inside a frozen ViT. Bottlenecks of our own, and the methods of the library PEFT.

A bottleneck wraps the MLP of each block. A PEFT method, selected by its PEFT name, wraps linear layers of the blocks.
`tuning.origin_of` describes what was added to the ViT.

Legend: B batch, N tokens of the sequence, D embed_dim, w bottleneck width.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vpt.models.vit import ViT, preprocessing_of

Option = bool | int | float | list[str]

PEFT_METHODS = (  # those whose state is fully in parameters and buffers, so that a task file can store it
    *("lora", "loha", "lokr", "ia3", "oft", "hra", "fourierft", "beft", "deft", "delora", "glora", "gralora"),
    *("hira", "lily", "miss", "peanut", "psoft", "road", "waveft"),
)
METHODS = ("sequential", "parallel", *PEFT_METHODS)
MODULE_NAME = re.compile(r"[A-Za-z0-9_.]{1,100}")
MAX_NAMES = 10_000
MAX_NUMBER = 16_384
# Allowed options and their ranges. Others are refused: some of PEFT's import modules, copy the ViT or never return.
INTEGERS = {
    **{"width": (1, 16_384), "r": (0, 1024), "oft_block_size": (0, 1024), "decompose_factor": (-1, 1024)},
    **{"n_frequency": (1, 1_000_000), "random_loc_seed": (0, 2**31 - 1), "group_size": (1, 1024)},
}
NUMBERS = ("scale", "lora_alpha", "alpha", "lora_dropout", "rank_dropout", "module_dropout", "eps", "scaling")
SWITCHES = ("use_rslora", "use_dora", "coft", "block_share", "decompose_both", "apply_GS")
LISTS = ("target_modules", "feedforward_modules")
ADAPTER = "vpt"  # the adapter name inside PEFT layers


@dataclass(frozen=True)
class Adapters:
    """Method and options of adapters.

    Args:
        method: "sequential" or "parallel" (see `Bottleneck`), or a PEFT method such as "lora".
        options: `width` and `scale` of a bottleneck. For PEFT, its options that are listed above, such as r and
            lora_alpha; target_modules defaults to all linear layers of attention.

    Raises:
        ValueError: The method or an option is unknown, or a value is out of range.
    """

    method: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: must be one of {', '.join(METHODS)}")
        for name, value in self.options.items():
            allowed = _allowed(name)
            if allowed is None:
                known = ", ".join((*INTEGERS, *NUMBERS, *SWITCHES, *LISTS))
                raise ValueError(f"options: {str(name)[:100]} is unknown; the options are {known}")
            if not allowed[0](value):
                raise ValueError(f"options: {name}={str(value)[:100]} must be {allowed[1]}")

    def for_vit(self, vit: ViT) -> "Adapters":
        """Fill in the default modules of a PEFT method for this ViT."""
        if self.method not in PEFT_METHODS:
            return self
        default: dict[str, Option] = {"target_modules": _attention_layers(vit)}
        if self.method == "ia3":
            default["feedforward_modules"] = []
        return Adapters(self.method, default | dict(self.options))


class Bottleneck(nn.Module):
    """MLP with a bottleneck adapter of width w and scale s: tokens (B, N, D) -> (B, N, D).

    - sequential: h + s W_up GELU(W_down h) with h = MLP(x);
    - parallel (`is_parallel`): MLP(x) + s W_up ReLU(W_down x).

    W_up is initialised to zero, so the ViT is unchanged at first. W_down is initialised at random: with both at zero,
    as in the original VPT code, neither would ever receive a gradient.

    References:
        Sequential: Parameter-Efficient Transfer Learning for NLP (Houlsby et al., 2019), section 2.1, after the MLP
        only (Pfeiffer et al., 2021): https://arxiv.org/abs/1902.00751, https://arxiv.org/abs/2005.00247. Parallel:
        AdaptFormer (Chen et al., NeurIPS 2022), https://arxiv.org/abs/2205.13535, equations 4 and 5.

    Example:
        >>> mlp = nn.Linear(8, 8)
        >>> adapted, tokens = Bottleneck(mlp, 8, width=2), torch.randn(1, 5, 8)
        >>> torch.equal(adapted(tokens), mlp(tokens))
        True
    """

    def __init__(
        self, mlp: nn.Module, embed_dim: int, *, width: int = 8, scale: float = 1.0, is_parallel: bool = False
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.down, self.up = nn.Linear(embed_dim, width), nn.Linear(width, embed_dim)
        self.activation = nn.ReLU() if is_parallel else nn.GELU()
        self.scale, self.is_parallel = scale, is_parallel
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zeros in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zeros)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> (B, N, D)."""
        output: Tensor = self.mlp(tokens)
        source = (tokens if self.is_parallel else output).to(self.down.weight.dtype)
        change: Tensor = self.up(self.activation(self.down(source)))
        return output + (self.scale * change).to(output.dtype)

    def extra_repr(self) -> str:
        """Placement and scale."""
        return f"{'parallel' if self.is_parallel else 'sequential'}, scale={self.scale}"


def add_adapters(vit: ViT, adapters: Adapters, *, is_empty: bool = False) -> frozenset[str]:
    """Insert adapters into a ViT in place, and return the names of the new tensors in its state dict.

    With `is_empty`, the parameters are created on the meta device, to be filled in later.

    Raises:
        ValueError: Options are unknown or contradictory, the ViT lacks or does not call a target module, or PEFT is not
            installed. The ViT may then contain some of the adapters.
    """
    before = set(map(id, vit.state_dict(keep_vars=True).values()))
    if adapters.method in PEFT_METHODS:
        _add_peft(vit, adapters, is_empty)
    else:
        with torch.device("meta" if is_empty else next(vit.parameters()).device):
            _add_bottlenecks(vit, adapters)
    if not is_empty:
        _check_called(vit)
    return frozenset(name for name, tensor in vit.state_dict(keep_vars=True).items() if id(tensor) not in before)


def peft_layers(vit: nn.Module) -> Iterator[nn.Module]:
    """PEFT layers in a ViT. They may have dropout, so unlike the frozen ViT they follow the training mode."""
    return (module for module in vit.modules() if _is_peft(module))


def fold_adapters(vit: ViT) -> ViT:
    """Merge adapters into the weights in place, where their method supports it, and return the ViT.

    Changes of a weight then cost nothing in inference. Adapters that are functions of tokens stay.
    """
    modules: Any = vit.named_modules()
    for name, layer in [pair for pair in modules if _is_peft(pair[1])]:
        try:
            layer.merge(safe_merge=True)
        except NotImplementedError:
            continue
        parent, _, last = name.rpartition(".")
        setattr(vit.get_submodule(parent), last, layer.get_base_layer())
    return vit


def _add_bottlenecks(vit: Any, adapters: Adapters) -> None:
    odd = sorted(set(adapters.options) - {"width", "scale"})
    if odd:
        raise ValueError(f"options: {odd[0]} is unknown; {adapters.method} adapters have width and scale")
    width, scale = adapters.options.get("width", 8), adapters.options.get("scale", 1.0)
    assert isinstance(width, int)  # checked by `Adapters`
    assert isinstance(scale, int | float)
    if any(not isinstance(getattr(block, "mlp", None), nn.Module) for block in vit.blocks):
        raise ValueError(f"method={adapters.method!r}: needs an MLP in each block, and a block of this ViT has none")
    for block in vit.blocks:
        is_parallel = adapters.method == "parallel"
        block.mlp = Bottleneck(block.mlp, vit.embed_dim, width=width, scale=float(scale), is_parallel=is_parallel)


def _add_peft(vit: ViT, adapters: Adapters, is_empty: bool) -> None:
    config = peft_config(adapters.method, adapters.options)
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(config, vit, adapter_name=ADAPTER, low_cpu_mem_usage=is_empty)
    except Exception as error:  # PEFT methods raise various exceptions
        raise _refused(adapters.method, error) from error


def peft_config(method: str, options: Mapping[str, Option]) -> Any:
    """Create the PEFT config of a method.

    Raises:
        ValueError: PEFT is not installed, or does not have the method or an option.
    """
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ValueError(f'method={method!r}: needs PEFT ({error}); type pip install "vpt[baselines]"') from error

    configs: dict[str, Any] = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in configs:
        raise ValueError(f"method={method!r}: not in peft {peft.__version__}; install a newer version")
    try:
        return configs[method](**options)
    except Exception as error:  # so do the PEFT configs
        raise _refused(method, error) from error


def _refused(method: str, error: Exception) -> ValueError:
    return ValueError(f"{method} adapters: {next(iter(str(error).splitlines()), type(error).__name__)}")


def _attention_layers(vit: Any) -> list[str]:
    """Names of the linear layers of attention, except a fused projection whose weight the ViT reads without a call."""
    named = dict(vit.named_modules())
    return [
        name
        for name, module in named.items()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[0] in {f"blocks.{index}.attn" for index in range(len(vit.blocks))}
        and not (name.endswith(".qkv") and getattr(named[name.rpartition(".")[0]], "q_bias", None) is not None)
    ]


@torch.no_grad()
def _check_called(vit: Any) -> None:
    """Refuse adapters around a layer that the ViT does not call but reads the weight of; they would have no effect."""
    around = {name: module for name, module in vit.named_modules() if _is_peft(module)}
    like = next(vit.parameters())
    if not around or like.is_meta:
        return
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in around.values()]
    vit.forward_features(like.new_zeros(1, 3, *preprocessing_of(vit)["size"]))
    for hook in hooks:
        hook.remove()
    odd = [name for name, module in around.items() if module not in called]
    if odd:
        why = "has no effect; this ViT reads its weight without calling it"
        raise ValueError(f"target_modules: an adapter around {odd[0]} {why}")


def _is_peft(module: nn.Module) -> bool:
    """Whether this is a PEFT layer, without importing peft, which takes seconds."""
    return type(module).__module__.startswith("peft.") and hasattr(module, "get_base_layer")


def _allowed(name: object) -> tuple[Callable[[Any], bool], str] | None:
    """Check and description of the values of an option; None if there is no such option."""
    if name in INTEGERS:
        low, high = INTEGERS[str(name)]
        return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"
    if name in NUMBERS:
        return lambda value: type(value) in (int, float) and abs(value) <= MAX_NUMBER, f"at most {MAX_NUMBER} in size"
    if name in SWITCHES:
        return lambda value: type(value) is bool, "true or false"
    if name in LISTS:
        return _are_module_names, "a list of module names"
    return None


def _are_module_names(value: object) -> bool:
    is_short = isinstance(value, list) and len(value) <= MAX_NAMES
    return is_short and all(isinstance(name, str) and MODULE_NAME.fullmatch(name) for name in value)  # type: ignore[attr-defined]

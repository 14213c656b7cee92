"""Adapters: small modules that are added to a ViT and train in the place of its weights; ours, and those of PEFT.

Ours stand at the MLP of each block. All others are the layers of the library `peft`, by the name of their method,
around linear layers of the blocks. They are put into the ViT itself; `tuning.origin_of` tells of what was added.

Legend: B batch, N tokens in the sequence, D embed_dim, w width of the bottleneck.
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

PEFT_METHODS = (  # those whose every number is a parameter or a buffer that a task file can hold; a test walks them
    *("lora", "loha", "lokr", "ia3", "oft", "hra", "fourierft", "beft", "deft", "delora", "glora", "gralora"),
    *("hira", "lily", "miss", "peanut", "psoft", "road", "waveft"),
)
METHODS = ("sequential", "parallel", *PEFT_METHODS)
MODULE_NAME = re.compile(r"[A-Za-z0-9_.]{1,100}")
MAX_NAMES = 10_000
MAX_NUMBER = 16_384
# Options and their ranges. There are no others: some of PEFT's import modules, copy parts of the ViT or run for ever.
INTEGERS = {
    **{"width": (1, 16_384), "r": (0, 1024), "oft_block_size": (0, 1024), "decompose_factor": (-1, 1024)},
    **{"n_frequency": (1, 1_000_000), "random_loc_seed": (0, 2**31 - 1), "group_size": (1, 1024)},
}
NUMBERS = ("scale", "lora_alpha", "alpha", "lora_dropout", "rank_dropout", "module_dropout", "eps", "scaling")
SWITCHES = ("use_rslora", "use_dora", "coft", "block_share", "decompose_both", "apply_GS")
LISTS = ("target_modules", "feedforward_modules")
ADAPTER = "vpt"  # what our layers are called among those that a peft layer may have


@dataclass(frozen=True)
class Adapters:
    """Which adapters a ViT gets.

    Args:
        method: "sequential" or "parallel", see `Bottleneck`; or a method of PEFT, such as "lora".
        options: `width` and `scale` of a bottleneck. For PEFT those of its own that are in the lists above, such as r,
            lora_alpha, use_dora; its target_modules are by default all linear layers of attention.

    Raises:
        ValueError: An unknown method or option, or a value out of its range.
    """

    method: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"adapters must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name, value in self.options.items():
            allowed = _allowed(name)
            if allowed is None:
                known = ", ".join((*INTEGERS, *NUMBERS, *SWITCHES, *LISTS))
                raise ValueError(f"{str(name)[:100]} is none of the options that are known: {known}")
            if not allowed[0](value):
                raise ValueError(f"{name}={str(value)[:100]} cannot be an option of adapters: it must be {allowed[1]}")

    def for_vit(self, vit: ViT) -> "Adapters":
        """The same with the names of modules that a method of PEFT takes by default."""
        if self.method not in PEFT_METHODS:
            return self
        default: dict[str, Option] = {"target_modules": _attention_layers(vit)}
        if self.method == "ia3":
            default["feedforward_modules"] = []
        return Adapters(self.method, default | dict(self.options))


class Bottleneck(nn.Module):
    """An MLP with an adapter: tokens (B, N, D) -> (B, N, D).

    - sequential: h + s W_up GELU(W_down h), with h = MLP(x), for what the MLP makes of x;
    - parallel: MLP(x) + s W_up ReLU(W_down x).

    W_up starts at zero, so that the ViT starts as it was. W_down starts at random: with both at zero, as in the
    original VPT code, no gradient would ever reach either of them.

    Args:
        mlp: The MLP of a block, which stays as it is.
        embed_dim: D.
        width: w.
        scale: s.
        is_parallel: Whether the adapter looks at what the MLP looks at.

    References:
        Sequential: Parameter-Efficient Transfer Learning for NLP (Houlsby et al., 2019),
        https://arxiv.org/abs/1902.00751, section 2.1, after the MLP only (Pfeiffer et al., 2021,
        https://arxiv.org/abs/2005.00247). Parallel: AdaptFormer (Chen et al., NeurIPS 2022),
        https://arxiv.org/abs/2205.13535, equations 4 and 5.

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
        """What the MLP makes of tokens, and the adapter of either."""
        made: Tensor = self.mlp(tokens)
        seen = (tokens if self.is_parallel else made).to(self.down.weight.dtype)
        changed: Tensor = self.up(self.activation(self.down(seen)))
        return made + (self.scale * changed).to(made.dtype)

    def extra_repr(self) -> str:
        """Where it stands, and its scale."""
        return f"{'parallel' if self.is_parallel else 'sequential'}, scale={self.scale}"


def add_adapters(vit: ViT, adapters: Adapters, *, is_empty: bool = False) -> frozenset[str]:
    """Put adapters into a ViT, in place; return the names of the tensors in its state that came with them.

    Args:
        vit: It has none yet.
        adapters: Which.
        is_empty: Make their parameters without memory, on the meta device, to be given later.

    Raises:
        ValueError: Options that are unknown or do not go together, modules that the ViT has not or does not call, or a
            method of PEFT without PEFT; the ViT may then have some of the adapters.
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
    """PEFT's layers in a ViT; they may have dropout, so their mode is that of training, unlike the ViT's."""
    return (module for module in vit.modules() if _is_peft(module))


def fold_adapters(vit: ViT) -> ViT:
    """Add what adapters changed to the weights, in place, as far as their method can; return the ViT.

    Changes of a weight, such as low-rank ones, then cost nothing in inference; an adapter that is a function of tokens
    cannot be folded and stays.
    """
    for name, module in list(vit.named_modules()):
        if not _is_peft(module):
            continue
        layer: Any = module
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
        raise ValueError(f"{odd[0]} is no option of {adapters.method} adapters, which have width and scale")
    width, scale = adapters.options.get("width", 8), adapters.options.get("scale", 1.0)
    assert isinstance(width, int)  # as `Adapters` has checked
    assert isinstance(scale, int | float)
    if any(not isinstance(getattr(block, "mlp", None), nn.Module) for block in vit.blocks):
        raise ValueError(f"{adapters.method} adapters stand at the MLP of each block, and this ViT has blocks without")
    for block in vit.blocks:
        is_parallel = adapters.method == "parallel"
        block.mlp = Bottleneck(block.mlp, vit.embed_dim, width=width, scale=float(scale), is_parallel=is_parallel)


def _add_peft(vit: ViT, adapters: Adapters, is_empty: bool) -> None:
    config = peft_config(adapters.method, adapters.options)
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(config, vit, adapter_name=ADAPTER, low_cpu_mem_usage=is_empty)
    except Exception as error:  # its methods raise kinds of their own
        raise _refused(adapters.method, error) from error


def peft_config(method: str, options: Mapping[str, Option]) -> Any:
    """PEFT's own config of one of its methods.

    Raises:
        ValueError: PEFT is not installed, or does not know the method or an option.
    """
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ValueError(f'{method} adapters are those of PEFT ({error}); type pip install "vpt[baselines]"') from error

    kinds = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in kinds:
        raise ValueError(f"peft {peft.__version__} does not know {method}; install a newer one")
    make_config: Any = kinds[method]
    try:
        return make_config(**options)
    except Exception as error:  # its configs, too
        raise _refused(method, error) from error


def _refused(method: str, error: Exception) -> ValueError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return ValueError(f"{method} adapters: {reason}")


def _attention_layers(vit: Any) -> list[str]:
    """Names of the linear layers of attention, but for one of which the ViT reads the weight and does not call it."""
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
    """Refuse adapters around a layer of which the ViT reads the weight, since they would change nothing."""
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
        raise ValueError(f"adapters around {odd[0]} would change nothing: this ViT reads its weight and never calls it")


def _is_peft(module: nn.Module) -> bool:
    """Whether it is one of PEFT's layers; without an import of peft, which takes seconds."""
    return type(module).__module__.startswith("peft.") and hasattr(module, "get_base_layer")


def _allowed(name: object) -> tuple[Callable[[Any], bool], str] | None:
    """Whether a value may be that of an option, and what may; None for what is no option."""
    if name in INTEGERS:
        low, high = INTEGERS[str(name)]
        return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"
    if name in NUMBERS:
        return lambda value: type(value) in (int, float) and abs(value) <= MAX_NUMBER, f"at most {MAX_NUMBER} in size"
    if name in SWITCHES:
        return lambda value: type(value) is bool, "true or false"
    if name in LISTS:
        return _is_list_of_modules, "a list of names of modules"
    return None


def _is_list_of_modules(value: object) -> bool:
    is_short = isinstance(value, list) and len(value) <= MAX_NAMES
    return is_short and all(isinstance(name, str) and MODULE_NAME.fullmatch(name) for name in value)  # type: ignore[attr-defined]

"""Methods to compare, each a set of overrides of the training config; a new method is a new row."""

import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpt.config.command_line import key_of
from vpt.config.errors import ConfigError, did_you_mean
from vpt.config.validation import RUN_NAME

MAX_NAME = 30  # characters; it is in the name of each run
SAME_FOR_ALL = ("seed", "dataset", "data", "run", "mode", "fresh", "experiment")  # keys that no method may set


@dataclass(frozen=True)
class Method:
    """One way to adapt a backbone."""

    title: str  # in tables
    overrides: tuple[str, ...]  # arguments of `python -m vpt.train`
    needs: str = ""  # a module of another package; empty for none

    @property
    def keys(self) -> list[str]:
        """Keys and groups that it sets."""
        return [key_of(word) for word in self.overrides]


METHODS: Mapping[str, Method] = {
    "linear": Method("head only", ("tuning=linear",)),
    "prompt_shallow": Method("shallow prompt", ("tuning=prompt", "prompt=shallow")),
    "prompt_deep": Method("deep prompt", ("tuning=prompt", "prompt=deep")),
    "prompt_last4": Method("deep, last 4 blocks", ("tuning=prompt", "prompt=deep", "prompt.blocks=last:4")),
    "prompt_uniform": Method("deep, random start", ("tuning=prompt", "prompt=deep", "prompt.init=uniform")),
    "prompt_bilinear": Method("bilinear prompt", ("tuning=prompt", "prompt=bilinear")),
    "prompt_fourier": Method("Fourier prompt", ("tuning=prompt", "prompt=fourier")),
    "prompt_kv": Method("keys and values", ("tuning=prompt", "prompt=kv")),
    "prompt_shared": Method("shared prompt", ("tuning=prompt", "prompt=shared")),
    "prompt_bias": Method("bilinear prompt, biases", ("tuning=prompt_bias", "prompt=bilinear")),
    "prompt_proj_bias": Method("bilinear, attention biases", ("tuning=prompt_proj_bias", "prompt=bilinear")),
    "bias": Method("biases (BitFit)", ("tuning=bias",)),
    "norm": Method("norms", ("tuning=norm",)),
    "adapter": Method("adapters", ("tuning=adapter",)),
    "adaptformer": Method("parallel adapters", ("tuning=adaptformer",)),
    "lora": Method("LoRA", ("tuning=lora",), needs="peft"),
    "partial": Method("last block", ("tuning=partial",)),
    "full": Method("full fine-tuning", ("tuning=full",)),
}


def choose_methods(names: Sequence[str], defined: Mapping[str, str]) -> dict[str, Method]:
    """The methods of these names, or all that need no other package, then those defined, each as a text of overrides.

    A ConfigError is raised for an unknown or repeated name, a definition that cannot be used, or a missing package.
    """
    known = {**METHODS, **{name: _define(name, text) for name, text in defined.items()}}
    chosen = [*names] or [name for name, method in METHODS.items() if not method.needs]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"methods: there is no method {name}{did_you_mean(name, list(known))}")
        if chosen.count(name) > 1:
            raise ConfigError(f"methods: {name} is named twice")
        if (needs := known[name].needs) and importlib.util.find_spec(needs) is None:
            raise ConfigError(f"methods: {name} needs the package {needs}, which is not installed")
    return {name: known[name] for name in dict.fromkeys([*chosen, *defined])}


def _define(name: str, text: str) -> Method:
    where = f"define.{name}"
    if name in METHODS:
        raise ConfigError(f"{where}: {name} is a method of vpt; choose another name")
    if not RUN_NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ConfigError(f"{where}: must be 1 to {MAX_NAME} of A-Z a-z 0-9 . _ - without a dot in front")
    try:
        words = shlex.split(text)
        if len(words) == 1:  # quoted once more
            words = shlex.split(words[0])
    except ValueError as error:
        raise ConfigError(f"{where}={text}: cannot be read ({error})") from error
    if not words:
        raise ConfigError(f'{where}: has no overrides; type define.{name}="prompt=deep prompt.num_tokens=50"')
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{where}: {word} is not an override of the form key=value")
        if (key := key_of(word)).split(".")[0] in SAME_FOR_ALL:
            raise ConfigError(f"{where}: {key} is the same for all methods; leave it out, or type it for all")
    return Method(name, tuple(words))

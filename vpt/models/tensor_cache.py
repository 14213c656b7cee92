"""Constants: what is computed of tensors once, and again only after one of them has changed."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Constants(Generic[Value]):
    """Values by key, each kept until a tensor that it was computed of changes.

    A change is another storage, dtype or device, or any edit in place that torch counts: an optimiser's step, a load,
    `copy_`. An edit through `.data` or NumPy is not counted; `clear` after it. Copies and pickles hold no values.

    Example:
        >>> source, constants = torch.ones(2), Constants()
        >>> def total():
        ...     print("computed")
        ...     return source.sum()
        >>> constants.get("sum", [source], total), constants.get("sum", [source], total)
        computed
        (tensor(2.), tensor(2.))
        >>> _ = source.add_(1)
        >>> constants.get("sum", [source], total)
        computed
        tensor(4.)
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[object, Value, list[Tensor]]] = {}

    def get(
        self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Value], given: Hashable = None
    ) -> Value:
        """The value of this key, computed without gradients when it is not known or no longer true.

        Args:
            key: One value is kept for each.
            sources: The tensors that the value is computed of.
            compute: Computes it.
            given: What else decides the value; another one replaces the value.
        """
        stamp = _stamp(sources, given)
        kept = self._kept.get(key)
        if stamp is not None and kept is not None and kept[0] == stamp:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():  # a later call with gradients may use the value
            value = compute()
        if stamp is not None:
            # The sources are held, so that their addresses cannot be used again while the stamp has them.
            self._kept[key] = (stamp, value, [source.detach() for source in sources])
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all values."""
        self._kept.clear()


def _stamp(sources: Sequence[Tensor], given: Hashable) -> object:
    """Equal for as long as the sources, and how torch computes with them, stay; None if that cannot be told."""
    try:
        versions = [(source.data_ptr(), source._version, source.dtype, source.device) for source in sources]
    except RuntimeError:  # tensors made in inference mode, and those of torch.func, count no versions
        return None
    device = sources[0].device.type
    return versions, given, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)

"""Cache of values computed from tensors, invalidated when a tensor changes."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class TensorCache(Generic[Value]):
    """Cache of values computed from tensors, invalidated when a tensor changes.

    A change is another storage, dtype or device, or an in-place edit that torch counts: an optimiser step, loading a
    state dict, `copy_`. Edits through `.data` or NumPy are not counted: pass small tensors to `compare` before use, and
    call `clear` after such an edit of others. Copies and pickles start empty.

    Example:
        >>> source, cache = torch.ones(2), TensorCache()
        >>> total = lambda: print("computed") or source.sum()
        >>> cache.get("sum", [source], total), cache.get("sum", [source], total)
        computed
        (tensor(2.), tensor(2.))
        >>> _ = source.add_(1)
        >>> cache.get("sum", [source], total)
        computed
        tensor(4.)
    """

    def __init__(self) -> None:
        self._cached: dict[Hashable, tuple[object, Value, list[Tensor]]] = {}
        self._compared: list[Tensor] = []

    def compare(self, sources: Sequence[Tensor]) -> None:
        """Remove all values if a number of these tensors differs from the last call, however it was changed."""
        if sources[0].is_cuda and torch.cuda.is_current_stream_capturing():  # a comparison would end the capture
            return
        try:
            pairs = zip(sources, self._compared, strict=True)
            is_same = all(one.dtype is other.dtype and torch.equal(one, other) for one, other in pairs)
        except (ValueError, RuntimeError):  # another number, another device, or tensors without numbers
            is_same = False
        if not is_same:
            self.clear()
            self._compared = [source.detach().clone() for source in sources]

    def get(
        self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Value], given: Hashable = None
    ) -> Value:
        """Return the cached value of `key`, or compute it without gradients if it is missing or out of date.

        It is out of date if the tensors `sources` or `given`, anything else that determines the value, changed.
        """
        stamp = _stamp(sources, given)
        cached = self._cached.get(key)
        if stamp is not None and cached is not None and cached[0] == stamp:
            return cached[1]
        with torch.inference_mode(False), torch.no_grad():  # so that a later call with gradients can use the value
            value = compute()
        if stamp is not None:
            # Holding the sources prevents their addresses, which are part of the stamp, from being reused.
            self._cached[key] = (stamp, value, [source.detach() for source in sources])
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"_cached": {}, "_compared": []}

    def __len__(self) -> int:
        return len(self._cached)

    def clear(self) -> None:
        """Remove all values."""
        self._cached.clear()


def _stamp(sources: Sequence[Tensor], given: Hashable) -> object:
    """A stamp that changes with the sources or the autocast state; None if changes cannot be detected."""
    try:
        versions = [(source.data_ptr(), source._version, source.dtype, source.device) for source in sources]
    except RuntimeError:  # inference-mode and torch.func tensors have no version counter
        return None
    device = sources[0].device.type
    return versions, given, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)

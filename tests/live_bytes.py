"""How many bytes of tensors live at once: the same number on every processor, unlike resident memory."""

import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(NamedTuple):
    """Bytes of the tensors that a piece of work made: the most at once, and what lives when it has ended."""

    peak: int
    left: int


def live_bytes(work: Callable[[], object]) -> LiveBytes:
    """Counts the tensors that `work` makes on this thread, by storages, as they come, go, grow and shrink.

    What this does not count: scratch memory inside a kernel, which depends on the processor, and tensors made before.
    """
    gc.collect()
    gc.disable()  # a cycle is freed by chance: here it counts to the end
    try:
        with _Counter() as counter:
            work()
    finally:
        gc.enable()
    gc.collect()
    return LiveBytes(counter.peak, counter.living())


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._is_new = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._is_new.setdefault(storage, False)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._is_new.setdefault(storage, True)
        self.peak = max(self.peak, self.living())
        return result

    def living(self) -> int:
        return sum(storage.nbytes() for storage, is_new in self._is_new.items() if is_new)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))

"""Megatron-core without a GPU: what its sources need, applied as they are imported.

Megatron-core speaks of `torch.cuda` in some hundred places. Patching torch itself would reach other libraries, so an
import hook rewrites the sources of `megatron.core` alone, in memory and with their line numbers:

    torch.cuda.X                  -> a stand-in namespace's X (a few no-ops; the rest is torch.cuda's own)
    tensor.cuda(...)              -> tensor.cpu()
    tensor.is_cuda                -> tensor.is_cpu
    "cuda"                        -> "cpu"
    "torch.cuda.FloatTensor"      -> "torch.FloatTensor"
    pin_memory=True               -> pin_memory=False
    barrier(device_ids=...)       -> barrier()

and a few modules are mended after they ran (`_MENDS`). Loaded only where there is no CUDA.
"""

import ast
import contextlib
import logging
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch

from common.vision import declare_vision_operators

_PACKAGE = "megatron.core"
_NAMESPACE = "__compute_device__"


def install() -> None:
    """Puts the import hook in place; once is enough, and a second call does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    assert _PACKAGE not in sys.modules, f"{_PACKAGE} was imported before the hook that rewrites it"
    sys.meta_path.insert(0, _Finder())
    declare_vision_operators()


class _Stream:
    """A stream or an event: there is one queue, and it is always done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or _Stream()

    def elapsed_time(self, end: "_Stream") -> float:
        del end
        return 0.0


def _nothing(*_: Any, **__: Any) -> None:
    """Does nothing."""


def _no_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _zero(*_: Any, **__: Any) -> int:
    return 0


class _Namespace(ModuleType):
    """Stands for `torch.cuda` inside Megatron-core."""

    def __init__(self) -> None:
        super().__init__(_NAMESPACE)
        stream = _Stream()
        memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
        nothing = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
        get_state, set_state = _get_rng_state, _set_rng_state
        self.__dict__.update(
            dict.fromkeys(memory, _zero)
            | dict.fromkeys(nothing, _nothing)
            | {
                "current_device": lambda: torch.device("cpu"),
                "device_count": lambda: 1,
                "manual_seed": torch.manual_seed,
                "get_rng_state": get_state,
                "set_rng_state": set_state,
                "random": SimpleNamespace(get_rng_state=get_state, set_rng_state=set_state),
                "Stream": _Stream,
                "Event": _Stream,
                "current_stream": lambda *_: stream,
                "default_stream": lambda *_: stream,
                "stream": _no_context,
                "nvtx": SimpleNamespace(range_push=_nothing, range_pop=_nothing, mark=_nothing, range=_no_context),
            }
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


class _Rewriter(ast.NodeTransformer):
    """Rewrites one source as the module's docstring says; f-strings, which are messages, stay."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "cuda":
            return ast.copy_location(ast.Name(_NAMESPACE, node.ctx), node)
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            node.attr = "is_cpu"
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if method == "barrier":
            node.keywords = [k for k in node.keywords if k.arg != "device_ids"]
        for keyword in node.keywords:
            if keyword.arg == "pin_memory" and isinstance(keyword.value, ast.Constant):
                keyword.value = ast.copy_location(ast.Constant(value=False), keyword.value)
        self.generic_visit(node)
        if method == "cuda" and isinstance(node.func, ast.Attribute):
            node.func.attr, node.args, node.keywords = "cpu", [], []
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        value = node.value
        if value == "cuda":
            return ast.copy_location(ast.Constant("cpu"), node)
        if isinstance(value, str) and value.startswith("torch.cuda.") and value.endswith("Tensor"):
            return ast.copy_location(ast.Constant(value.replace("cuda.", "")), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        return node


class _Loader(SourceFileLoader):
    """Compiles the rewritten source; never reads or writes the byte code that other processes share."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _Rewriter().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_NAMESPACE] = _DEVICE
        super().exec_module(module)
        mend = _MENDS.get(module.__name__)
        if mend is not None:
            mend(module)


class _Finder(MetaPathFinder):
    """Finds what is below `megatron.core`, and gives it the rewriting loader."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(f"{_PACKAGE}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _use_cpu_generator(module: Any) -> None:
    module._get_cuda_rng_state, module._set_cuda_rng_state = _get_rng_state, _set_rng_state
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _switch_off_compilation(module: Any) -> None:
    module.disable_jit_fuser()  # torch.compile needs a C++ compiler, and half a minute


def _skip_collectives_of_one_rank(module: Any) -> None:
    """They write a buffer onto itself; gloo copies it over and back, which is a tenth of a tiny model's time."""
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(module, name, _of_several_ranks(getattr(module, name)))


def _of_several_ranks(collective: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(*tensors: torch.Tensor, group: Any, **options: Any) -> Any:
        return None if group.size() == 1 else collective(*tensors, group=group, **options)

    return in_place


_DEVICE = _Namespace()
_MENDS: dict[str, Callable[[Any], None]] = {
    "megatron.core.distributed.param_and_grad_buffer": _skip_collectives_of_one_rank,
    "megatron.core.jit": _switch_off_compilation,
    "megatron.core.tensor_parallel.random": _use_cpu_generator,
}

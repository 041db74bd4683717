"""A mend for torchvision, which transformers imports with its models and nothing here needs."""

import importlib.metadata
import importlib.util
from typing import Any

_kept: list[Any] = []  # a library that is collected takes its operators along


def declare_vision_operators() -> None:
    """Lets a torchvision that was built for CUDA be imported beside a torch that was not: two schemas are missing.

    Imports torch only when called.
    """
    import torch

    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    if "+cpu" in importlib.metadata.version("torchvision"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)

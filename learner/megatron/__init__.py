"""The policy on Megatron-core; the only folder that knows it."""

import warnings

import torch

# Megatron-core causes these in every process: what is not installed, its own defaults, its own use of torch.
_WARNINGS = (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
)
for _message in _WARNINGS:
    warnings.filterwarnings("ignore", message=_message)

if not torch.cuda.is_available():  # before the first import of megatron.core, which this package's modules make
    from learner.megatron.cpu import install

    install()

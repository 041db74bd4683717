"""The policy on Megatron-core; the only folder that knows it."""

import warnings

import torch

# Megatron-core says these of itself in every process: of what is not installed, of its own defaults, of its own loops.
for _message in (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is",
):
    warnings.filterwarnings("ignore", message=_message)

if not torch.cuda.is_available():  # before the first import of megatron.core, which this package's modules make
    from learner.megatron.cpu import install

    install()

"""The policy on Megatron-core; the only folder that knows it."""

import torch

if not torch.cuda.is_available():  # before the first import of megatron.core, which this package's modules make
    from learner.megatron.cpu import install

    install()

"""The frozen reference of the KL term: a second set of parameters for the same model."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.config import Config
from common.log import logger


class Reference:
    """The parameters as they were, on the host, until they change places with those that learn.

    It needs no second model and no process groups, so it works with every division of the model over ranks.

    What this does not do: it leaves gradients, buffers and the optimizer's masters alone. Nothing may learn, be saved
    or be exported while the places are changed.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copies the parameters of this rank as they are now."""
        self._parameters = list(parameters)
        self._elsewhere = [_on_the_host(parameter.detach()) for parameter in self._parameters]

    @property
    def size_bytes(self) -> int:
        """Host memory that it takes, on this rank."""
        return sum(copy.nbytes for copy in self._elsewhere)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The model computes with the reference inside; afterwards its parameters are what they were, bit for bit."""
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    @torch.no_grad()
    def _change_places(self) -> None:
        """One parameter at a time, so that no third set of them is ever in memory."""
        for parameter, elsewhere in zip(self._parameters, self._elsewhere, strict=True):
            before = parameter.clone()
            parameter.copy_(elsewhere)
            elsewhere.copy_(before)


def keep_reference(config: Config, parameters: Iterable[nn.Parameter]) -> Reference | None:
    """The parameters, which must be those of `config.model`, as the reference that the loss asks for; None without."""
    if config.loss.kl_coefficient == 0:
        return None
    reference = Reference(parameters)
    logger().info(
        "reference_model",
        model=config.model,
        host_bytes_per_rank=reference.size_bytes,
        extra_forward_sequences_per_step=config.groups_per_step * config.group_size,
    )
    return reference


def _on_the_host(parameter: Tensor) -> Tensor:
    """A copy in host memory; pinned where there is CUDA, so that it moves fast."""
    return torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda).copy_(parameter)

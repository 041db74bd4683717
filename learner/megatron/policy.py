"""The policy: a Megatron model that gives logprobs, learns, and hands out its weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from common.config import Config
from common.shape import read_shape
from learner.batch import MicroBatch
from learner.megatron import checkpoint, parallel
from learner.megatron.attention import packed_runs
from learner.megatron.convert import export_weights, import_weights
from learner.megatron.logprobs import packed_logprobs
from learner.megatron.model import build_model
from learner.megatron.optimizer import Optimizer, wrap_model
from learner.megatron.routing import RoutingReplay
from learner.megatron.substitutes import substitute_transformer_engine
from learner.megatron.weights import WeightFiles
from learner.trainable import Loss, UpdateResult


class Policy:
    """A model of one rank, with its optimizer.

    Attributes:
        vocab_size: Of the Hugging Face config.
    """

    def __init__(self, config: Config) -> None:
        """Loads the model of `config.model`.

        Raises:
            ModelError: The directory holds no model that is supported.
        """
        self._shape = read_shape(Path(config.model))
        files = WeightFiles(Path(config.model))
        parallel.initialize(config.seed)
        substitute_transformer_engine()
        self._device = parallel.compute_device()
        self._temperature = config.sampling.temperature
        dtype = torch.bfloat16 if config.learner.dtype == "bfloat16" else torch.float32
        model = build_model(self._shape, dtype, self._device)
        import_weights(model, self._shape, files)
        self._module = model
        self._routing = RoutingReplay(model) if config.learner.routing_replay else None
        self._model = wrap_model(model)
        self._optimizer = Optimizer(config, self._model, dtype)
        model.config.finalize_model_grads_func = _reduce_gradients
        model.config.no_sync_func = self._model.no_sync
        self.vocab_size = self._shape.vocab_size

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch) -> Float[Tensor, " tokens"]:
        """Logprob of each token at the sampling temperature, on the CPU; 0 for the first token of a sequence.

        Bit for bit what `update` gives its loss for the same micro-batch before it changes the weights.
        """
        return self._forward_micro(micro)[0].cpu()

    @torch.no_grad()
    def sequence_logprobs(self, token_ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """Logprob of each token of one sequence at temperature 1, on the CPU; 0 for the first. Nothing is replayed."""
        num_tokens = len(token_ids)
        starts = torch.tensor([0, num_tokens], dtype=torch.int32)
        return self._forward(token_ids.long(), torch.arange(num_tokens), starts, 1.0)[0].cpu()

    def update(self, micros: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        """One optimizer update on the sum of the micro-batches' losses.

        Args:
            micros: At least one.
            loss: Given a micro-batch, its learner_logprobs Float[T] with gradient and the entropies Float[T] without,
                both on the CPU, its share of the loss: the caller divides, nothing is averaged here.
        """
        self._model.zero_grad_buffer()
        self._optimizer.megatron.zero_grad()
        get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, loss=loss),
            data_iterator=iter(micros),
            model=self._model,
            num_microbatches=len(micros),
            seq_length=0,
            micro_batch_size=1,
            forward_only=False,
        )
        if self._routing is not None:
            self._routing.forget()
        grad_norm, finite = self._optimizer.step()
        return UpdateResult(grad_norm=grad_norm, skipped=not finite, lr=self._optimizer.lr)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and tensor of each weight; a tied output layer is left out.

        Some tensors are views of the parameters: take or copy them before the next update.
        """
        return export_weights(self._module, self._shape)

    def save(self, path: Path) -> None:
        """Writes model, optimizer, schedule and random states into a directory, which is made.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        checkpoint.save(path, self._module, self._optimizer)

    def load(self, path: Path) -> None:
        """Goes back to what `save` wrote: updates go on bit for bit as they would have.

        Raises:
            RunDirectoryError: It is missing, broken, or of another model.
        """
        checkpoint.load(path, self._module, self._optimizer)

    def _forward_step(
        self, micros: Iterator[MicroBatch], model: torch.nn.Module, *, loss: Loss
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """One micro-batch, in the form that Megatron's schedules call."""
        assert model is self._model
        micro = next(micros)
        logprobs, entropy = self._forward_micro(micro)

        def total(logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return loss(micro, logprobs.cpu(), entropy.cpu()), torch.zeros((), dtype=torch.int), {}

        return logprobs, total

    def _forward_micro(self, micro: MicroBatch) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """`_forward` of a micro-batch at the sampling temperature, by the engine's routes where they are replayed."""
        routes = micro.routed_experts
        assert (routes is None) == (self._routing is None), "routed experts and learner.routing_replay differ"
        return self._forward(micro.token_ids, micro.position_ids, micro.sequence_starts, self._temperature, routes)

    def _forward(
        self,
        token_ids: Int[Tensor, " tokens"],
        position_ids: Int[Tensor, " tokens"],
        sequence_starts: Int[Tensor, " sequences_and_end"],
        temperature: float,
        routes: UInt8[Tensor, "tokens choices"] | None = None,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """Logprobs and entropies, on the compute device."""
        token_ids = token_ids.to(self._device)
        packed = packed_runs(sequence_starts, self._device)
        positions = position_ids.to(self._device)
        with nullcontext() if self._routing is None else self._routing.forward(routes):
            hidden = self._model(token_ids[None], positions[None], attention_mask=None, packed_seq_params=packed)
        starts = packed.cu_seqlens_q[:-1].long()
        return packed_logprobs(hidden[:, 0], self._module.output_weight, token_ids, starts, temperature)


def _reduce_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Sums the gradients over ranks. Megatron would divide them by the tokens that it counted; the loss is divided."""
    del num_tokens
    finalize_model_grads(model, None, **options)

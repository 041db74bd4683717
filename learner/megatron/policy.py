"""The policy: a Megatron model that gives logprobs, learns, and hands out its weights."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from common.config import Config
from common.shape import check_division, check_experts, read_shape
from learner.batch import MicroBatch
from learner.megatron import checkpoint, parallel
from learner.megatron.convert import export_weights, import_weights
from learner.megatron.kernels import choose, installed
from learner.megatron.logprobs import linear_logprobs
from learner.megatron.model import build_model
from learner.megatron.optimizer import Optimizer, wrap_model
from learner.megatron.parallel import Place
from learner.megatron.reference import keep_reference
from learner.megatron.routing import RoutingReplay
from learner.megatron.substitutes import substitute_transformer_engine
from learner.megatron.tokens import PackedTokens, Tokens, shard_tokens
from learner.megatron.weights import WeightFiles
from learner.sharded import State
from learner.trainable import BatchShare, Loss, UpdateResult


class _Packed(NamedTuple):
    """Packed tokens without anything to learn."""

    token_ids: Tensor
    sequence_starts: Tensor
    routed_experts: Tensor | None = None


class Policy:
    """This rank's part of a model, with its optimizer. All ranks must call each method at the same time.

    Attributes:
        share: This rank's share of the batch.
        vocab_size: Of the Hugging Face config.
        kernels: What the model is made of.
    """

    def __init__(self, config: Config) -> None:
        """Loads the model of `config.model`.

        Raises:
            ModelError: The directory holds no model that is supported.
            ConfigError: The model cannot be divided as configured.
        """
        self._shape = read_shape(Path(config.model))
        check_division(self._shape, config.learner.parallel)
        check_experts(self._shape, config.learner)
        files = WeightFiles(Path(config.model))
        self._place = parallel.initialize(config.learner.parallel, config.seed)
        substitute_transformer_engine()
        self._device = parallel.compute_device()
        self._temperature = config.sampling.temperature
        dtype = torch.bfloat16 if config.learner.dtype == "bfloat16" else torch.float32
        self.kernels = choose(installed(), dtype, adam_on_host=config.learner.offload_optimizer)
        self._pieces = build_model(self._shape, config.learner, dtype, self._device, self.kernels)
        import_weights(self._pieces, self._shape, self._place, files)
        self._replays = [RoutingReplay(piece) for piece in self._pieces] if config.learner.routing_replay else []
        self._wrapped = wrap_model(self._pieces)
        self._optimizer = Optimizer(config, self._wrapped, dtype)
        self._reference = keep_reference(config, [p for piece in self._pieces for p in piece.parameters()])
        options: Any = self._pieces[0].config
        options.finalize_model_grads_func = _reduce_gradients
        options.no_sync_func = _one_or_all([piece.no_sync for piece in self._wrapped])
        self.share = _batch_share(self._place)
        self.vocab_size = self._shape.vocab_size

    def logprobs(self, micros: Sequence[MicroBatch]) -> list[Float[Tensor, " tokens"]]:
        """Logprob of each token at the sampling temperature, on the CPU; 0 for the first token of a sequence.

        Bit for bit what `update` gives its loss for the same micro-batches before it changes the weights. Empty on
        ranks of other pipeline stages than the last.
        """
        return [logprobs.cpu() for logprobs in self._forward(micros, self._temperature)]

    def reference_logprobs(self, micros: Sequence[MicroBatch]) -> list[Float[Tensor, " tokens"]]:
        """What `logprobs` gives under the weights of `config.model`, whatever was learned since.

        The configuration must ask for a reference: `loss.kl_coefficient` above 0.
        """
        assert self._reference is not None
        with self._reference.in_place():
            return self.logprobs(micros)

    def sequence_logprobs(self, token_ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """Logprob of each token of one sequence at temperature 1, on the CPU; 0 for the first."""
        sequence = _Packed(token_ids.long(), torch.tensor([0, len(token_ids)], dtype=torch.int32))
        found = self._forward([sequence] * self.share.multiple, 1.0)
        logprobs = found[0] if found else torch.empty(len(token_ids), device=self._device)
        stages = self._place.pipeline
        dist.broadcast(logprobs, group=stages.group, group_src=stages.size - 1)
        return logprobs.cpu()

    def update(self, micros: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        """One optimizer update on the sum of all ranks' micro-batches' losses.

        Args:
            micros: At least one, as many on each rank.
            loss: Given a micro-batch, its learner_logprobs Float[T] with gradient and the entropies Float[T] without,
                both on the CPU, its share of the loss: the caller divides, nothing is averaged here. It is called on
                the last pipeline stage, and must say the same on all ranks that share the micro-batch.
        """
        for piece in self._wrapped:
            piece.zero_grad_buffer()
        self._optimizer.megatron.zero_grad()
        self._schedule(micros, partial(self._train_step, loss=loss), forward_only=False)
        for replay in self._replays:
            replay.forget()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        grad_norm, finite = self._optimizer.step()
        seconds = time.monotonic() - began
        return UpdateResult(grad_norm=grad_norm, skipped=not finite, lr=self._optimizer.lr, optimizer_s=seconds)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face name and tensor of each weight that is this rank's to hand out; a tied output layer is left out.

        All ranks must take all of theirs. Some tensors are views of the parameters: take or copy them before the next
        update.
        """
        return export_weights(self._pieces, self._shape, self._place)

    def snapshot(self) -> State:
        """This rank's part of model, optimizer, schedule and random states, in host memory."""
        return checkpoint.snapshot(self._pieces, self._optimizer, self._shape, self._place)

    def load(self, path: Path) -> None:
        """Goes back to a snapshot that was written to a directory: updates go on bit for bit as they would have.

        Also from another division over ranks; then they go on as closely as divisions agree.

        Raises:
            RunDirectoryError: It is missing, broken, or of another model.
        """
        checkpoint.load(path, self._pieces, self._optimizer, self._shape, self._place)

    @torch.no_grad()
    def _forward(self, batches: Sequence[PackedTokens], temperature: float) -> list[Float[Tensor, " tokens"]]:
        """Logprobs of each batch's tokens, on the compute device; empty on other stages than the last."""

        def step(rest: Iterator[PackedTokens], piece: torch.nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
            hidden, tokens = self._hidden(next(rest), piece)
            return hidden, lambda hidden, **_: self._logprobs(hidden, tokens, temperature)[0]

        return self._schedule(batches, step, forward_only=True)

    def _train_step(
        self, rest: Iterator[MicroBatch], piece: torch.nn.Module, *, loss: Loss
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        micro = next(rest)
        hidden, tokens = self._hidden(micro, piece)

        def total(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logprobs, entropy = self._logprobs(hidden, tokens, self._temperature)
            return loss(micro, logprobs.cpu(), entropy.cpu()), torch.zeros((), dtype=torch.int), {}

        return hidden, total

    def _schedule(self, batches: Sequence[PackedTokens], step: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        """Runs `step` on each batch and piece, in Megatron's order; returns what it makes of each batch."""
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=_one_or_all([iter(batches) for _ in self._wrapped]),
            model=_one_or_all(self._wrapped),
            num_microbatches=len(batches),
            seq_length=0,  # they differ, and are told
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _hidden(self, batch: PackedTokens, piece: torch.nn.Module) -> tuple[Float[Tensor, "t 1 hidden"], Tokens]:
        """What a piece of the model makes of this rank's tokens."""
        tokens = shard_tokens(batch, self._place, self._device)
        positions = tokens.position_ids[None]
        with self._replaying(batch, tokens, piece):
            hidden = piece(tokens.token_ids[None], positions, attention_mask=None, packed_seq_params=tokens.packed)
        return hidden, tokens

    def _replaying(self, batch: PackedTokens, tokens: Tokens, piece: torch.nn.Module) -> AbstractContextManager[None]:
        """Inside, a piece of the model sends its tokens where the engine sent them, if that is to be replayed."""
        if not self._replays:
            assert batch.routed_experts is None, "found routed experts without learner.routing_replay"
            return nullcontext()
        replay = self._replays[self._wrapped.index(piece)]  # type: ignore[arg-type]
        return replay.forward(tokens.routes_of(batch))

    def _logprobs(
        self, hidden: Float[Tensor, "t 1 hidden"], tokens: Tokens, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies of the batch's tokens, on the compute device."""
        group = self._place.tensor.group if self._place.tensor.size > 1 else None
        weight = self._pieces[-1].output_weight
        found = linear_logprobs(hidden[:, 0], weight, tokens.targets, temperature, group)
        logprobs, entropy = (tokens.of_the_batch(part) for part in found)
        return logprobs, entropy


def _batch_share(place: Place) -> BatchShare:
    """Pieces of a pipeline take turns in rounds of as many micro-batches as there are stages."""
    multiple = place.pipeline.size if place.virtual_pipeline > 1 else 1
    return BatchShare(place.data.rank, place.data.size, multiple, speaks=place.speaks)


def _one_or_all(items: list[Any]) -> Any:
    """Megatron takes a list only where there are several."""
    return items if len(items) > 1 else items[0]


def _reduce_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Sums the gradients over ranks. Megatron would divide them by the tokens that it counted; the loss is divided."""
    del num_tokens
    finalize_model_grads(model, None, **options)

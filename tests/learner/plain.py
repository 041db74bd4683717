"""A policy in plain PyTorch: `learner.trainable.Trainable` around any causal model."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from learner.batch import MicroBatch
from learner.trainable import BatchShare, Loss, UpdateResult


class PlainPolicy:
    """AdamW on a module that maps token ids Int[B, L] to logits Float[B, L, V]; temperature 1."""

    def __init__(
        self, model: nn.Module, lr: float, clip_norm: float = 1.0, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.model = model
        self.share = BatchShare()
        self._reference = deepcopy(model)
        self._clip_norm = clip_norm
        matrices = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]  # norms and biases do not decay
        decaying = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(decaying, lr=lr, betas=(0.9, 0.95), eps=eps)

    @torch.no_grad()
    def logprobs(self, micros: Sequence[MicroBatch]) -> list[Tensor]:
        return [self._forward(self.model, micro)[0] for micro in micros]

    @torch.no_grad()
    def reference_logprobs(self, micros: Sequence[MicroBatch]) -> list[Tensor]:
        return [self._forward(self._reference, micro)[0] for micro in micros]

    def update(self, micros: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        self._optimizer.zero_grad()
        for micro in micros:
            logprobs, entropy = self._forward(self.model, micro)
            loss(micro, logprobs, entropy.detach()).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        finite = bool(norm.isfinite())
        if finite:
            self._optimizer.step()
        return UpdateResult(grad_norm=float(norm), skipped=not finite, lr=self._optimizer.param_groups[0]["lr"])

    def _forward(self, model: nn.Module, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies of packed tokens: the sequences side by side, padded behind."""
        rows, columns = micro.sequence_of_token, micro.position_ids
        padded = torch.zeros(len(micro.advantages), int(columns.max()) + 1, dtype=torch.long)
        padded[rows, columns] = micro.token_ids
        distributions = torch.log_softmax(model(padded)[:, :-1], -1)
        logprobs = distributions.gather(2, padded[:, 1:, None])[..., 0]
        entropies = -(distributions.exp() * distributions).sum(-1)
        first = logprobs.new_zeros(len(padded), 1)
        packed = [torch.cat([first, values], dim=1)[rows, columns] for values in (logprobs, entropies)]
        return packed[0], packed[1]

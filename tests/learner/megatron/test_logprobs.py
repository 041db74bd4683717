"""Logprobs and entropies from logits, in chunks."""

import pytest
import torch

from learner.megatron import logprobs as module
from learner.megatron.logprobs import token_logprobs

STARTS = torch.tensor([0, 4, 5])


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 7, requires_grad=True)
    tokens = torch.randint(0, 7, (9,))
    weights = torch.randn(9)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * rows)
    logprobs, entropy = token_logprobs(logits, tokens, STARTS, 0.5)
    (logprobs * weights).sum().backward()

    copy = logits.detach().clone().requires_grad_()
    distributions = torch.distributions.Categorical(logits=copy[:-1] / 0.5)
    expected = torch.cat([torch.zeros(1), distributions.log_prob(tokens[1:])])
    expected_entropy = torch.cat([torch.zeros(1), distributions.entropy()])
    inside = torch.ones(9).index_fill(0, STARTS, 0.0)
    (expected * inside * weights).sum().backward()
    torch.testing.assert_close(logprobs, expected * inside)
    torch.testing.assert_close(entropy, expected_entropy * inside)
    torch.testing.assert_close(logits.grad, copy.grad)


def test_numbers_written_out() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 1.0986123], [5.0, 5.0]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1, 0]), torch.tensor([0]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -0.6931472, -1.3862944]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.6931472, 0.5623351]))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64)
    tokens = torch.randint(0, 5, (6,))
    wide = logits.float().requires_grad_()
    token_logprobs(wide, tokens, torch.tensor([0, 3]), 0.7)[0].sum().backward()
    for row, column in ((0, 0), (1, 3), (2, 2), (4, 1), (5, 0)):
        step = torch.zeros_like(logits)
        step[row, column] = 1e-6
        up, down = (_sum(logits + sign * step, tokens) for sign in (1, -1))
        assert wide.grad is not None
        assert float(wide.grad[row, column]) == pytest.approx(float(up - down) / 2e-6, abs=1e-5)


def test_a_token_that_cannot_be_drawn_makes_no_nan() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 2]), torch.tensor([0]), 1.0)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert entropy.isfinite().all()


def _sum(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(logits / 0.7, -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    return logprobs[[0, 1, 3, 4]].sum()

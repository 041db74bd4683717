"""Logprobs from hidden states: the bits of whole logits and their gradients, on one rank and on two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from learner.megatron import logprobs as module
from learner.megatron.logprobs import even_chunks, linear_logprobs
from tests.ranks import run_ranks


def example(tokens: int, hidden: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = (0.2 * torch.randn(vocab, hidden)).requires_grad_()
    return states, weight, torch.randint(0, vocab, (tokens,)), torch.randn(tokens)


def from_whole_logits(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies in plain torch."""
    distributions = torch.log_softmax((hidden @ weight.t()) / temperature, dim=-1)
    return distributions.gather(1, tokens[:, None])[:, 0], torch.special.entr(distributions.exp()).sum(-1)


@pytest.mark.parametrize("size", [(1000, 64, 501), (333, 128, 4099), (191, 256, 64), (130, 32, 20_011)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_what_whole_logits_give(
    size: tuple[int, int, int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, tokens, factors = example(*size)
    whole = from_whole_logits(hidden, weight, tokens, temperature)
    (whole[0] * factors).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    expected = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    logprobs, entropy = linear_logprobs(hidden, weight, tokens, temperature)
    torch.testing.assert_close(logprobs, whole[0], rtol=2e-6, atol=2e-6)  # some units in the last place
    torch.testing.assert_close(entropy, whole[1], rtol=2e-6, atol=2e-6)
    (logprobs * factors).sum().backward()
    for gradient, wanted in zip((hidden.grad, weight.grad), expected, strict=True):
        assert gradient is not None
        assert float((gradient - wanted).norm()) <= 1e-6 * float(wanted.norm())


@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 9), (63, 9), (64, 1 << 24), (127, 1 << 24), (1000, 1 << 20)])
def test_no_chunk_is_small_unless_all_is(num_rows: int, vocab: int) -> None:
    sizes = [rows.stop - rows.start for rows in even_chunks(num_rows, vocab)]
    assert sum(sizes) == num_rows
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(num_rows, module.MIN_CHUNK_ROWS)
    assert max(sizes) < 2 * max(module.MIN_CHUNK_ROWS, module.CHUNK_ELEMENTS // vocab)


def test_numbers_written_out() -> None:
    hidden = torch.tensor([[0.0], [1.0]])
    weight = torch.tensor([[0.0], [1.0986123]])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([1, 0]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([-0.6931472, -1.3862944]))
    torch.testing.assert_close(entropy, torch.tensor([0.6931472, 0.5623351]))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(6, 4), torch.randn(5, 4), torch.randint(0, 5, (6,))
    watched = hidden.clone().requires_grad_()
    linear_logprobs(watched, weight, tokens, 0.7)[0].sum().backward()
    assert watched.grad is not None

    def total(states: torch.Tensor) -> float:
        return float(torch.log_softmax(states @ weight.double().t() / 0.7, -1).gather(1, tokens[:, None]).sum())

    for row, column in ((0, 0), (1, 3), (2, 2), (4, 1), (5, 0)):
        step = torch.zeros(6, 4, dtype=torch.float64)
        step[row, column] = 1e-6
        slope = (total(hidden.double() + step) - total(hidden.double() - step)) / 2e-6
        assert float(watched.grad[row, column]) == pytest.approx(slope, abs=1e-5)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, tokens, _ = example(70, 8, 20)
    linear_logprobs(hidden, weight.detach(), tokens, 1.0)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bfloat16_sums_the_weights_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    hidden, weight, tokens, _ = example(6400, 8, 20)
    linear_logprobs(hidden, weight, tokens, 1.0)[0].sum().backward()
    narrow_hidden, narrow = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    linear_logprobs(narrow_hidden, narrow, tokens, 1.0)[0].sum().backward()
    assert narrow.grad is not None
    assert weight.grad is not None
    assert float((narrow.grad.float() - weight.grad).norm()) <= 0.01 * float(weight.grad.norm())


def test_two_ranks_that_share_the_vocabulary_agree_with_one(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, _share_the_vocabulary)


def _share_the_vocabulary() -> None:
    rank = dist.get_rank()
    hidden, weight, tokens, factors = example(300, 16, 502)
    expected = linear_logprobs(hidden, weight, tokens, 0.7)
    (expected[0] * factors).sum().backward()
    mine = slice(251 * rank, 251 * (rank + 1))
    states, part = hidden.detach().clone().requires_grad_(), weight.detach()[mine].clone().requires_grad_()
    got = linear_logprobs(states, part, tokens, 0.7, dist.group.WORLD)
    (got[0] * factors).sum().backward()
    for ours, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    assert states.grad is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    dist.all_reduce(states.grad)
    torch.testing.assert_close(states.grad, hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.grad, weight.grad[mine], rtol=1e-5, atol=1e-6)

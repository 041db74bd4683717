"""The policy against transformers: logprobs, gradients, updates."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.megatron.policy import Policy
from learner.sharded import write
from tests.learner.megatron import tiny

TEMPERATURE = 0.8
LENGTHS = [5, 9, 9, 9, 12, 2, 30, 9]
UNCLIPPED: dict[str, Any] = {"optimizer": {"clip_norm": 1e9}}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_logprobs_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    policy, reference = _both(kind, tmp_path)
    micro = tiny.micro_batches(LENGTHS)[0]
    with torch.no_grad():
        expected = tiny.reference_logprobs(reference, micro, TEMPERATURE)
    torch.testing.assert_close(policy.logprobs([micro])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_update_sees_the_very_logprobs_that_a_forward_pass_gives(kind: str, tmp_path: Path) -> None:
    policy, _ = _both(kind, tmp_path)
    micros = tiny.micro_batches(LENGTHS, max_tokens=40)
    before = policy.logprobs(micros)
    seen: list[torch.Tensor] = []
    policy.update(micros, _keeping(seen))
    assert len(seen) == len(micros) > 1
    assert all(torch.equal(a, b) for a, b in zip(before, seen, strict=True))
    assert not torch.equal(policy.logprobs(micros[:1])[0], before[0])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradients_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    policy, reference = _both(kind, tmp_path, **UNCLIPPED)
    micros = tiny.micro_batches(LENGTHS, max_tokens=40)
    for micro in micros:
        logprobs = tiny.reference_logprobs(reference, micro, TEMPERATURE)
        tiny.masked_mean_loss(micro, logprobs, logprobs).backward()
    expected = {name: _grad(parameter) for name, parameter in reference.named_parameters()}
    norm = float(torch.stack([grad.square().sum() for grad in expected.values()]).sum().sqrt())
    result = policy.update(micros, tiny.masked_mean_loss)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, grad in tiny.gradients(policy).items():
        wanted = tiny.of_saved(expected, name)
        assert float((grad - wanted).norm()) <= 1e-5 * max(float(wanted.norm()), 1e-2 * norm), name


def test_accumulation_is_a_plain_sum(tmp_path: Path) -> None:
    policy, _ = _both("qwen3", tmp_path, **UNCLIPPED)
    policy.update(tiny.micro_batches(LENGTHS, max_tokens=40), tiny.masked_mean_loss)
    apart = tiny.gradients(policy)
    policy, _ = _both("qwen3", tmp_path, **UNCLIPPED)
    policy.update(tiny.micro_batches(LENGTHS), tiny.masked_mean_loss)
    for name, grad in tiny.gradients(policy).items():
        torch.testing.assert_close(apart[name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3-moe"])
def test_packed_sequences_do_not_see_each_other(kind: str, tmp_path: Path) -> None:
    policy, _ = _both(kind, tmp_path)
    micro = tiny.micro_batches(LENGTHS)[0]
    policy._temperature = 1.0
    alone = torch.cat([policy.sequence_logprobs(tokens) for tokens in tiny.sequences_of(micro)])
    torch.testing.assert_close(policy.logprobs([micro])[0], alone, rtol=0, atol=1e-5)


def test_a_sequence_is_judged_at_temperature_one(tmp_path: Path) -> None:
    policy, reference = _both("qwen3-tied", tmp_path)
    micro = tiny.micro_batches([20])[0]
    with torch.no_grad():
        expected = tiny.reference_logprobs(reference, micro, 1.0)
    logprobs = policy.sequence_logprobs(micro.token_ids.int())
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert logprobs[0] == 0


def test_the_same_seed_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3-moe")
    runs = []
    for _ in range(2):
        policy = Policy(tiny.config(tmp_path))
        for seed in range(3):
            policy.update(tiny.micro_batches(LENGTHS, seed=seed, max_tokens=40), tiny.masked_mean_loss)
        runs.append({name: tensor.clone() for name, tensor in policy.export()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(bad: float, tmp_path: Path) -> None:
    policy, _ = _both("qwen3", tmp_path)
    before = {name: tensor.clone() for name, tensor in policy.export()}
    micros = tiny.micro_batches(LENGTHS)
    result = policy.update(micros, lambda _, logprobs, __: logprobs.sum() * bad)
    assert result.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.export())
    assert not policy.update(micros, tiny.masked_mean_loss).skipped
    assert all(tensor.isfinite().all() for _, tensor in policy.export())


def test_the_learning_rate_warms_up_from_the_first_update(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3")
    config = tiny.config(tmp_path, optimizer={"lr": 1e-3, "warmup_steps": 2}, updates_per_step=2)
    policy = Policy(config)
    micros = tiny.micro_batches([9])
    rates = [policy.update(micros, tiny.masked_mean_loss).lr for _ in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"schedule": "linear"}, [1 - n / 9 for n in range(1, 9)]),
        (
            {"schedule": "linear", "warmup_steps": 1, "final_lr_share": 0.3},
            [0.5, 1, *(1 - n / 10 for n in range(1, 7))],
        ),
        (
            {"schedule": "cosine", "warmup_share": 0.25},
            [0.5, 1, *(0.5 + 0.5 * math.cos(math.pi * n / 7) for n in range(1, 7))],
        ),
        ({"warmup_share": 0.5}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_falls_as_scheduled(options: dict[str, Any], shares: list[float], tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3")
    config = tiny.config(tmp_path, optimizer={"lr": 1e-3, **options}, steps=4, updates_per_step=2)
    policy = Policy(config)
    micros = tiny.micro_batches([9])
    rates = [policy.update(micros, tiny.masked_mean_loss).lr for _ in range(8)]
    assert rates == pytest.approx([1e-3 * share for share in shares])


def test_a_longer_run_goes_on_with_its_own_schedule(tmp_path: Path) -> None:
    tiny.build(tmp_path / "model", "qwen3")
    micros = tiny.micro_batches([9])

    def policy(steps: int) -> Policy:
        options = {"lr": 1e-3, "schedule": "linear"}
        return Policy(tiny.config(tmp_path / "model", optimizer=options, steps=steps, updates_per_step=1))

    short = policy(2)
    assert short.update(micros, tiny.masked_mean_loss).lr == pytest.approx(1e-3 * 2 / 3)
    write(tmp_path / "checkpoint", short.snapshot(), None)
    longer = policy(9)
    longer.load(tmp_path / "checkpoint")
    assert longer.update(micros, tiny.masked_mean_loss).lr == pytest.approx(1e-3 * 8 / 10)


def test_an_update_is_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    policy, reference = _both("qwen3", tmp_path, optimizer={"lr": 1e-2, "clip_norm": 0.5, "weight_decay": 0.1})
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        micros = tiny.micro_batches(LENGTHS, seed=seed)
        policy.update(micros, tiny.masked_mean_loss)
        adamw.zero_grad()
        logprobs = tiny.reference_logprobs(reference, micros[0], TEMPERATURE)
        tiny.masked_mean_loss(micros[0], logprobs, logprobs).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        adamw.step()
    wanted = reference.state_dict()
    for name, tensor in policy.export():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-4)


def test_entropies_are_those_of_the_tempered_distributions(tmp_path: Path) -> None:
    policy, reference = _both("qwen2", tmp_path)
    micro = tiny.micro_batches([7])[0]
    seen: list[torch.Tensor] = []

    def loss(micro: Any, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        seen.append(entropy)
        assert not entropy.requires_grad
        return logprobs.sum()

    policy.update([micro], loss)
    logits = reference(micro.token_ids[None]).logits[0, :-1] / TEMPERATURE
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(seen[0][1:], expected, rtol=0, atol=1e-5)
    assert seen[0][0] == 0


def test_bfloat16_parameters_have_float32_masters(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3-moe", dtype=torch.bfloat16)
    config = tiny.config(tmp_path, learner={"dtype": "bfloat16"}, optimizer={"lr": 1e-6})
    policy = Policy(config)
    assert {tensor.dtype for _, tensor in policy.export()} == {torch.bfloat16}
    masters = policy._optimizer.megatron.get_parameters()
    assert {master.dtype for master in masters} == {torch.float32}
    before = [master.detach().clone() for master in masters]
    micros = tiny.micro_batches(LENGTHS)
    seen: list[torch.Tensor] = []
    logprobs = policy.logprobs(micros[:1])[0]
    policy.update(micros, _keeping(seen))
    assert torch.equal(seen[0], logprobs)
    assert logprobs.dtype is torch.float32
    assert any(not torch.equal(a, b) for a, b in zip(before, policy._optimizer.megatron.get_parameters(), strict=True))


def _both(kind: str, path: Path, **changes: Any) -> tuple[Policy, Any]:
    tiny.build(path, kind)
    reference = tiny.reference_class(kind).from_pretrained(path, dtype=torch.float32)
    return Policy(tiny.config(path, sampling={"temperature": TEMPERATURE}, **changes)), reference


def _keeping(seen: list[torch.Tensor]) -> Any:
    def loss(micro: Any, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        seen.append(logprobs.detach().clone())
        return tiny.masked_mean_loss(micro, logprobs, entropy)

    return loss


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def test_a_sequence_of_one_token_predicts_nothing(tmp_path: Path) -> None:
    policy, _ = _both("qwen3", tmp_path)
    assert policy.sequence_logprobs(torch.tensor([3], dtype=torch.int32)).tolist() == [0.0]

"""The pure tensor functions refuse wrong shapes and dtypes under pytest (`--jaxtyping-packages` in pyproject.toml)."""

import dataclasses

import jaxtyping
import numpy as np
import pytest
import torch

from common.learning import LossConfig
from learner.advantage import group_advantages
from learner.batch import MicroBatch, Sequence, pack
from learner.gspo import trust_region
from learner.megatron.logprobs import linear_logprobs


def micro_batch() -> MicroBatch:
    tokens = np.arange(3, dtype=np.int32)
    sequence = Sequence(
        prompt=tokens, response=tokens, generator_logprobs=np.zeros(3, np.float32), advantage=1.0, staleness=0
    )
    return pack([sequence], max_tokens=8)[0]


def test_rewards_and_their_mask_have_one_length() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        group_advantages(torch.zeros(3), torch.ones(4, dtype=torch.bool))


def test_staleness_is_whole() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        trust_region(torch.zeros(3), LossConfig())


def test_a_micro_batch_has_one_number_of_tokens() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        dataclasses.replace(micro_batch(), position_ids=torch.arange(5))


def test_there_is_a_hidden_state_for_each_token() -> None:
    targets = torch.zeros(5, dtype=torch.long)
    with pytest.raises(jaxtyping.TypeCheckError):
        linear_logprobs(torch.zeros(4, 8), torch.zeros(9, 8), targets, 1.0)

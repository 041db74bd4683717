"""Which tokens a rank works on."""

import numpy as np
from hypothesis import given, strategies as st

from learner.megatron.parallel import Share
from learner.megatron.tokens import _divided, _whole


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_one_rank_that_has_all_tokens_finds_them_as_ranks_that_share_them_would(lengths: list[int]) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    token_ids = np.random.default_rng(0).integers(1, 99, starts[-1])
    alone = Share(0, 1, None)  # type: ignore[arg-type]
    whole, divided = _whole(token_ids, starts), _divided(token_ids, starts, alone, None)
    followed = ~whole.is_first
    assert (whole.before[followed] == divided.before[followed]).all()
    for name in ("micro_index", "position", "targets", "padded_starts", "is_first"):
        assert (getattr(whole, name) == getattr(divided, name)).all(), name

"""Which keys may change on resume."""

from typing import Any

import msgspec
import pytest

from common.config import Config
from common.errors import ConfigError
from common.resume import check_resume

FIXED = set(
    """
    model seed group_size groups_per_step updates_per_step max_staleness tiny.num_experts
    data.train data.test data.max_prompt_tokens data.over_long data.system_prompt data.shuffle
    sampling.temperature sampling.top_p sampling.top_k sampling.max_tokens sampling.stop sampling.stop_token_ids
    evaluation.num_samples evaluation.sampling.temperature evaluation.sampling.top_p evaluation.sampling.top_k
    evaluation.sampling.max_tokens evaluation.sampling.stop evaluation.sampling.stop_token_ids
    learner.dtype learner.routing_replay
    """.split()  # noqa: SIM905
)


def test_every_key_either_may_change_or_is_fixed_for_a_reason() -> None:
    """A new key has to be put on one of the two sides."""
    refused = {key for key in _keys(msgspec.to_builtins(Config())) if not _may_change(key)}
    assert refused == FIXED


def test_a_change_is_told_and_what_stays_is_not() -> None:
    found, wanted = Config(steps=3), Config(steps=5, made_for="x")
    assert check_resume(found, wanted, "RUN") == ["made_for: '' before, 'x' now", "steps: 3 before, 5 now"]
    assert check_resume(found, _changed("run.dir", "elsewhere", found), "RUN") == []
    assert check_resume(found, found, "RUN") == []


def test_a_key_that_may_not_change_is_one_line_with_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(Config(), Config(seed=1), "RUN/config.json")
    assert str(caught.value).startswith(
        "seed: found 1, expected 0 as in RUN/config.json: with run.resume only these keys may change: steps, made_for, "
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [({}, {"a": 1}), ({"a": 1}, {}), ({"a": 1}, {"a": 2})])
def test_a_table_of_the_users_own_keys_may_not_change_either(before: dict[str, int], after: dict[str, int]) -> None:
    found, wanted = (_changed("data.chat_template_kwargs", table, Config()) for table in (before, after))
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        check_resume(found, wanted, "RUN")


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in values.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return keys


def _may_change(key: str) -> bool:
    try:
        check_resume(Config(), _changed(key, "another", Config()), "RUN")
    except ConfigError:
        return False
    return True


def _changed(key: str, value: Any, config: Any) -> Any:
    first, _, rest = key.partition(".")
    inner = _changed(rest, value, getattr(config, first)) if rest else value
    return msgspec.structs.replace(config, **{first: inner})

"""Which keys may have another value when a run goes on, and which may not."""

from typing import Any

import msgspec

from common.config import Config
from common.errors import ConfigError

MAY_CHANGE = (
    "steps",
    "made_for",
    "run.*",
    "evaluation.every",
    "loss.*",
    "optimizer.*",
    "learner.max_tokens_per_microbatch",
    "learner.recompute",
    "learner.offload_optimizer",
    "learner.checkpoint_every",
    "learner.keep_checkpoints",
    "learner.keep_every",
    "learner.parallel.*",
    "generator.*",
    "verifier.*",
    "lease.*",
    "weights.*",
    "placement.*",
)
_SILENT = ("run.",)  # where a run lives, and how long it waits, is no change of the run


def check_resume(found: Config, wanted: Config, where: str) -> list[str]:
    """What changes when the run that was configured as `found` goes on as `wanted`, in lines for people.

    What is not in `MAY_CHANGE` would break the accounts (how many groups make a step, what is stored of one), the order
    of the data, the identity of the weights, or what the run's figures mean (`max_staleness`, how it is evaluated).

    Args:
        found: The run's.
        wanted: That of this start.
        where: The file of `found`.

    Raises:
        ConfigError: A key differs that may not.
    """
    before, after = (_leaves(msgspec.to_builtins(config), "") for config in (found, wanted))
    lines: list[str] = []
    for key in before | after:
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if not _may_change(key):
            raise ConfigError(
                f"{key}: found {new!r}, expected {old!r} as in {where}: with run.resume only these keys may change: "
                f"{', '.join(MAY_CHANGE)}"
            )
        if not key.startswith(_SILENT):
            lines.append(f"{key}: {old!r} before, {new!r} now")
    return lines


def _may_change(key: str) -> bool:
    return any(key.startswith(rule[:-1]) if rule.endswith("*") else key == rule for rule in MAY_CHANGE)


def _leaves(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Values by their path; a table that a user fills (`chat_template_kwargs`) is flattened, too."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves

"""Leases as a generator gets them."""

import hashlib

from common import wire
from common.config import Config
from learner.ledger.evaluations import EvaluationVisit
from learner.ledger.judgement import min_completions
from learner.ledger.store import Store
from learner.ledger.visits import Visit

_SEEDS = (1 << 31) - (1 << 16)


def training_lease(store: Store, config: Config, visit: Visit) -> wire.Lease:
    """The lease of a training visit."""
    return wire.Lease(
        key=visit.key,
        prompt=store.prompt(visit.prompt),
        num_completions=config.group_size,
        sampling=config.sampling.on_wire(),
        seed=lease_seed(config.seed, visit.key),
        deadline_s=config.lease.completion_timeout_s,
        min_completions=min_completions(config),
        routed_experts=config.learner.routing_replay,
    )


def evaluation_lease(store: Store, config: Config, visit: EvaluationVisit) -> wire.Lease:
    """The lease of an evaluation visit, pinned to the version that is evaluated."""
    return wire.Lease(
        key=visit.key,
        prompt=store.prompt(visit.prompt),
        num_completions=config.evaluation.num_samples,
        sampling=config.evaluation.sampling.on_wire(),
        seed=lease_seed(config.seed, visit.key),
        deadline_s=config.lease.completion_timeout_s,
        min_completions=config.evaluation.num_samples,
        pinned_version=visit.version,
    )


def lease_seed(seed: int, key: wire.LeaseKey) -> int:
    """The seed of a lease's first completion: 31 bits, with room above for the others' numbers."""
    digest = hashlib.blake2b(f"{seed} {key.visit} {key.attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _SEEDS

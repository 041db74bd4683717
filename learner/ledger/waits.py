"""What a run waits for, in words that change as long as it gets on: who waits for too long for the same may give up."""

from common.config import Config
from common.versions import Version
from common.wire import Manifest, Role, VisitState
from learner.ledger.evaluations import Evaluations
from learner.ledger.fleet import Fleet
from learner.ledger.state import Ledger


class PinWait:
    """How long batches are late for pinned visits alone.

    Attributes:
        seconds: Of the newest whole batch.
    """

    def __init__(self, config: Config) -> None:
        self._num_groups = config.groups_per_step
        self._version: Version | None = None
        self._since: float | None = None
        self.seconds = 0.0

    def look(self, ledger: Ledger, version: Version | None, now: float) -> None:
        """The learner has asked for its batch; `version` is that of the step where it got it."""
        if version is None:
            if self._since is None and ledger.accounts()[VisitState.SCORED] >= self._num_groups:
                self._since = now
        elif version != self._version:
            self.seconds = 0.0 if self._since is None else now - self._since
            self._version, self._since = version, None


def run_waits_for(
    config: Config, ledger: Ledger, evaluations: Evaluations, fleet: Fleet | None, manifest: Manifest | None
) -> str:
    """What keeps the next step from beginning; empty where nothing does. `fleet` is None where no one can tell."""
    if ledger.track.current is None:
        return "the learner to begin"
    if ledger.closing:
        return evaluation_waits_for(evaluations, fleet) if evaluations.num_pending else ""
    if ledger.visits(VisitState.RESERVED):
        return ""
    if (
        manifest is None
        or not ledger.track.includes(manifest.version)
        or manifest.version.lineage != ledger.track.current.lineage
    ):
        return f"the learner to publish version {ledger.track.current}"
    return batch_waits_for(config, ledger, fleet)


def batch_waits_for(config: Config, ledger: Ledger, fleet: Fleet | None) -> str:
    """What keeps a batch from being whole; empty where nothing does."""
    if pins := ledger.awaited_pins():
        numbers = ", ".join(str(visit.number) for visit in pins)
        text = f"visit {numbers} at version {ledger.track.current}: expired before, and due in this step"
    else:
        accounts = ledger.accounts()
        missing = config.groups_per_step - accounts[VisitState.SCORED]
        if missing <= 0:
            return ""
        leased, waiting = accounts[VisitState.LEASED], accounts[VisitState.WAITING]
        groups = "group" if missing == 1 else "groups"
        text = f"{missing} more {groups} at version {ledger.track.current}: {leased} leased, {waiting} given back"
        text += f", {accounts[VisitState.FILTERED]} filtered so far"
    return text + _news(fleet)


def evaluation_waits_for(evaluations: Evaluations, fleet: Fleet | None) -> str:
    """What keeps evaluations from being finished."""
    versions = ", ".join(str(version) for version in sorted(evaluations.versions()))
    return f"{evaluations.num_pending} more groups of the evaluation of {versions}" + _news(fleet)


def lease_waits_for(config: Config, ledger: Ledger, behind: int) -> str:
    """Why a generator that is `behind` updates gets no lease."""
    if ledger.track.current is None:
        return "the learner to begin"
    if ledger.closing:
        return f"nothing: {ledger.closing}"
    if behind > config.max_staleness:
        return (
            f"the engine to load {ledger.track.current}: it is {behind} updates behind, expected {config.max_staleness}"
        )
    return (
        f"the learner to step from {ledger.track.current}: {ledger.num_admitted} groups are admitted and not consumed"
    )


def _news(fleet: Fleet | None) -> str:
    """Who is absent, or else how much was sampled: a long completion is no standstill."""
    if fleet is None:
        return ""
    absent = [role for role in (Role.GENERATOR, Role.VERIFIER) if not fleet.count(role)]
    return "".join(f"; no {role} is alive" for role in absent) or f"; {fleet.num_sampled} tokens sampled"

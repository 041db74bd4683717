"""The ledger as all ranks of the learner see it: the first one asks, and each hears the answer."""

from collections.abc import Callable

from common import wire
from common.membership import Activity
from common.versions import Lineages, Version
from learner.link import LedgerLink
from learner.ranks import Ranks

NO_COMMIT = wire.Committed(sequence=0, num_visits=0)
_Groups = tuple[wire.TrainingGroup, ...]


class SharedLedger:
    """What the training loop says to the ledger, on every rank at the same time.

    Attributes:
        activity: What the learner's beats report.
        newest: On the first rank: what the ledger said of the commit that made the weights.
    """

    def __init__(self, ranks: Ranks, link: LedgerLink | None) -> None:
        """`link` is the first rank's; the others have none."""
        assert (link is not None) == ranks.is_first
        self._ranks, self._link = ranks, link
        self.activity = Activity() if link is None else link.activity
        self.newest = NO_COMMIT

    def begin(self, checkpoint: Version | None, commit: wire.Committed) -> tuple[Version, Lineages]:
        """The version under which training goes on from a checkpoint, and all lineages.

        Args:
            checkpoint: What the policy holds; None for the starting weights.
            commit: What the ledger said when they were made; `NO_COMMIT` for the starting weights.

        Raises:
            RunDirectoryError: The ledger and the checkpoint do not belong together.
        """
        self.newest = commit

        def ask() -> wire.Begun:
            version, lineages = self._first.begin(checkpoint, commit)
            return wire.Begun(version=version, branches=lineages.branches)

        begun = self._ranks.share(ask, wire.Begun)
        return begun.version, Lineages(begun.branches)

    def reserve(self, version: Version, num_groups: int, check: Callable[[], None]) -> _Groups | None:
        """The groups of the step that starts at `version`, oldest first; None where the run is asked to stop.

        `check` is called on the first rank every so often; what it raises, all ranks do.

        Raises:
            StallError: Nothing the ledger waits for changed within `run.stall_timeout_s`.
        """
        return self._ranks.share(lambda: self._first.reserve(version, num_groups, check) or (), _Groups) or None

    def commit(self, version: Version, groups: _Groups) -> Version:
        """Tells the ledger that the step from `version` trained `groups`; returns the version that it made."""
        if self._link is not None:
            self.newest = self._link.commit(version, groups)
        return version.next()

    def publish(self, manifest: wire.Manifest) -> None:
        """Announces a version."""
        if self._link is not None:
            self._link.publish(manifest)

    def checkpointed(self, version: Version) -> None:
        """Tells the ledger that the checkpoint of `version` is durable."""
        if self._link is not None:
            self._link.checkpointed(version)

    def evaluate(self, version: Version) -> None:
        """Asks for an evaluation of a published version."""
        if self._link is not None:
            self._link.evaluate(version)

    def status(self, num_evaluations: int) -> wire.StatusReport:
        """How the run stands; for the first rank alone."""
        return self._first.status(num_evaluations)

    def finish(self, reason: str, check: Callable[[], None]) -> dict[str, int]:
        """Ends the run in the ledger, waits for the last evaluations, and returns the accounts; `check` as above.

        Raises:
            StallError: The evaluations did not get on within `run.stall_timeout_s`.
        """
        return self._ranks.share(lambda: self._first.finish(reason, check), dict[str, int])

    @property
    def _first(self) -> LedgerLink:
        assert self._link is not None, "only the first rank has a link"
        return self._link

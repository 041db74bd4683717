"""The learner's track: the version it is at, those it came by, and the checkpoints that it may return to."""

from common.errors import RefusedError
from common.versions import Lineages, Version
from learner.ledger.visits import Head

START = Version(0, 0)


def check_position(checkpoint: Version, num_visits: int, num_handed_out: int) -> None:
    """Checks that a ledger is not older than a checkpoint that knows of `num_visits` visits.

    Raises:
        RefusedError: It has handed out fewer.
    """
    if num_visits > num_handed_out:
        raise RefusedError(
            f"found a resume from {checkpoint}, which knows of {num_visits} visits, expected at most the "
            f"{num_handed_out} that were handed out: the ledger is older than the checkpoint"
        )


class Track:
    """Where the learner is in the tree of versions.

    Attributes:
        current: The learner's version; None before it began.
        lineages: All lineages so far.
        checkpoints: Durable ones on the path of the current version, oldest first.
        horizon: The oldest that a resume may use; None while all of the run is kept.
        num_commits: Steps in all lineages.
        commits_before: How many there were when each lineage began.
    """

    def __init__(self, head: Head) -> None:
        """The track as it was stored."""
        self.current, self.lineages = head.current, Lineages(head.branches)
        self.checkpoints, self.horizon, self.num_commits = head.checkpoints, head.horizon, head.num_commits
        self.commits_before = head.commits_before

    def staleness(self, version: Version) -> int:
        """Updates between a version and the current one."""
        assert self.current is not None
        return self.lineages.staleness(version, self.current)

    def knows(self, version: Version) -> bool:
        """Whether the version's lineage has begun."""
        return version.lineage <= self.lineages.newest

    def leads_to(self, version: Version, descendant: Version) -> bool:
        """Whether `version` is `descendant` or one of the versions that it was trained from."""
        if not self.knows(version):
            return False
        branch = self.lineages.branches[version.lineage]
        if branch is not None and version.number < branch.number:
            return False
        return self.lineages.staleness(version, descendant) == descendant.number - version.number

    def includes(self, version: Version) -> bool:
        """Whether the learner's weights were once those of `version`."""
        return self.current is not None and self.leads_to(version, self.current)

    def sequence(self, version: Version) -> int:
        """Number of the commit that made a version, in the order of all lineages; 0 for the starting weights."""
        branch = self.lineages.branches[version.lineage]
        if branch is not None and version.number == branch.number:
            return self.sequence(branch)
        return self.commits_before[version.lineage] + version.number - (branch.number if branch else 0)

    def check_resume(self, checkpoint: Version, sequence: int) -> None:
        """Checks that the learner can go on from a checkpoint that commit `sequence` made.

        Raises:
            RefusedError: It is not on the track, or what followed it is no longer kept.
        """
        if not self.includes(checkpoint):
            raise RefusedError(
                f"found a resume from {checkpoint}, commit {sequence}, expected a version on the path of "
                f"{self.current}, commit {self.num_commits}, the ledger's newest"
            )
        if sequence != (expected := self.sequence(checkpoint)):
            raise RefusedError(
                f"found a resume from {checkpoint}, commit {sequence}, expected commit {expected} of the ledger: the "
                "checkpoint is of another run, or the ledger of another time"
            )
        if self.horizon is not None and not self.leads_to(self.horizon, checkpoint):
            raise RefusedError(
                f"found a resume from {checkpoint}, expected {self.horizon} or later: older are not kept"
            )

    def resume(self, checkpoint: Version) -> Version:
        """Opens a lineage at the checkpoint; returns its first version."""
        self.commits_before = (*self.commits_before, self.num_commits)
        self.lineages = self.lineages.opened_at(checkpoint)
        self.current = Version(self.lineages.newest, checkpoint.number)
        self.checkpoints = tuple(c for c in self.checkpoints if self.includes(c))
        return self.current

    def advance(self) -> Version:
        """One more step; returns the version after it."""
        assert self.current is not None
        self.current, self.num_commits = self.current.next(), self.num_commits + 1
        return self.current

    def save(self, version: Version, keep: int) -> bool:
        """A checkpoint is durable, the newest `keep` are kept; returns whether the horizon moved.

        Raises:
            RefusedError: The version is not on the track.
        """
        if not self.includes(version):
            raise RefusedError(f"found a checkpoint of {version}, expected one on the path of {self.current}")
        if version in self.checkpoints or (self.checkpoints and version.number < self.checkpoints[-1].number):
            return False
        self.checkpoints = (*self.checkpoints, version)[-keep:]
        if len(self.checkpoints) < keep:
            return False
        self.horizon = self.checkpoints[0]
        return True

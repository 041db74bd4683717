"""Held-out evaluations: one visit a held-out prompt, outside the training accounts. No sockets, no clock of its own."""

import math
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import islice

import msgspec

from common import wire
from common.config import Config
from common.versions import Version
from learner.ledger.judgement import malformed_reason, versions_of
from learner.ledger.routes import unexpected_routes
from learner.ledger.visits import Leasable, renew

OLD_ENGINE_AFTER = 1 / 10  # of run.stall_timeout_s


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What became of one held-out prompt.

    Attributes:
        correct: Sum of the correctness of the graded samples.
        num_graded: Samples with a grade.
        num_failed: Samples without.
        solved: Whether one sample was correct.
        versions: Oldest and newest that produced a token; empty where none did.
    """

    correct: float
    num_graded: int
    num_failed: int
    solved: bool
    versions: tuple[Version, ...] = ()


@dataclass(slots=True, kw_only=True)
class EvaluationVisit(Leasable):
    """One held-out prompt of one evaluation.

    Attributes:
        source: Name of its set.
        version: That the evaluation is of.
        asked_at: Wall-clock seconds since the epoch; infinite until engines can have the version.
        result: None until it is in.
    """

    source: str
    version: Version
    asked_at: float
    result: Result | None = None

    @property
    def is_free(self) -> bool:
        """Whether it can be leased."""
        return self.result is None and not self.holder


@dataclass(slots=True)
class EvaluationChanges:
    """What has to be stored: visits that changed, visits that are summed up or abandoned, and new results."""

    visits: list[EvaluationVisit]
    dropped: list[int]
    finished: list[wire.Evaluation]

    def __bool__(self) -> bool:
        """Whether there is anything to store."""
        return bool(self.visits or self.dropped or self.finished)


class Evaluations:
    """All evaluations of a run.

    Attributes:
        finished: Results, in the order in which they came in.
    """

    def __init__(
        self,
        config: Config,
        prompts: Iterable[tuple[int, str]],
        *,
        visits: Iterable[EvaluationVisit] = (),
        finished: Iterable[wire.Evaluation] = (),
        next_number: int = -1,
    ) -> None:
        """`prompts` are rows and sources of the held-out prompts, `next_number` is the next free (negative) visit."""
        self._config, self._prompts, self._next = config, tuple(prompts), next_number
        self.finished = list(finished)
        self._visits = {visit.number: visit for visit in visits}
        self._free = {visit.number: visit for visit in self._visits.values() if visit.is_free}
        self._missing = Counter(visit.version for visit in self._visits.values() if visit.result is None)
        self._changes = EvaluationChanges([], [], [])

    @property
    def num_pending(self) -> int:
        """Visits without a result."""
        return self._missing.total()

    def drain(self) -> EvaluationChanges:
        """What changed since the last call."""
        changes, self._changes = self._changes, EvaluationChanges([], [], [])
        return changes

    def ask(self, version: Version, now: float) -> None:
        """Begins an evaluation of `version` on all sets; nothing where there was one before.

        `now` is infinite where the version is not published yet: until it is, older engines do not get it.
        """
        asked = {visit.version for visit in self._visits.values()} | {e.version for e in self.finished}
        if version in asked:
            return
        for prompt, source in self._prompts:
            visit = EvaluationVisit(number=self._next, prompt=prompt, source=source, version=version, asked_at=now)
            self._visits[self._next] = self._free[self._next] = visit
            self._changes.visits.append(visit)
            self._missing[version] += 1
            self._next -= 1

    def published(self, version: Version, now: float) -> None:
        """Engines can have a version from now on."""
        for visit in self._visits.values():
            if visit.result is None and visit.version <= version and math.isinf(visit.asked_at):
                visit.asked_at = now
                self._changes.visits.append(visit)

    def abandon(self, keep: Iterable[Version]) -> None:
        """Drops what is pending of versions that are not in `keep`: the learner has left their path."""
        kept = set(keep)
        gone = [number for number, visit in self._visits.items() if visit.version not in kept]
        for number in gone:
            self._free.pop(number, None)
            del self._missing[self._visits.pop(number).version]
        self._changes.dropped += gone

    def versions(self) -> set[Version]:
        """Versions with an evaluation that is not finished."""
        return {visit.version for visit in self._visits.values()}

    def grant(self, name: str, version: Version, room: int, now: float) -> list[EvaluationVisit]:
        """Leases up to `room` visits, oldest first, to a generator whose engine holds `version`.

        An engine older than the version wanted gets one only where that would stall the evaluation; a newer one does.
        """
        patience_s = OLD_ENGINE_AFTER * self._config.run.stall_timeout_s
        fitting = (v for v in self._free.values() if version >= v.version or now - v.asked_at > patience_s)
        granted = list(islice(fitting, room))
        for visit in granted:
            visit.lease(name, version, now)
            del self._free[visit.number]
        self._changes.visits += granted
        return granted

    def beat(
        self, name: str, holds: tuple[wire.LeaseKey, ...], now: float, finished: Container[wire.LeaseKey] = ()
    ) -> tuple[wire.LeaseKey, ...]:
        """Renews the leases that a generator holds, and returns those that are no longer wanted.

        Of those that are `finished`, as it says, no completion is late any more.
        """
        return renew(self._visits.get, name, holds, now, finished)

    def give_back(self, name: str, lease: wire.Returned) -> bool:
        """Ends the attempt that its holder gives back; returns whether it still had it."""
        visit = self._visits.get(lease.key.visit)
        if visit is None or not visit.is_held(lease.key, name):
            return False
        self._give_back(visit)
        return True

    def free(self, name: str) -> int:
        """Ends the leases of a process that was replaced; returns how many there were."""
        held = [visit for visit in self._visits.values() if visit.holder == name]
        for visit in held:
            self._give_back(visit)
        return len(held)

    def expire(self, now: float) -> int:
        """Ends the leases whose heartbeat or completions are overdue; returns how many there were."""
        overdue = [v for v in self._visits.values() if v.holder and v.lapse_reason(self._config.lease, now)]
        for visit in overdue:
            self._give_back(visit)
        return len(overdue)

    def store(self, scored: wire.ScoredGroup, num_lineages: int) -> wire.Verdict:
        """Takes a scored group, or says why not. Fenced by (visit, attempt)."""
        key = scored.group.key
        visit = self._visits.get(key.visit)
        if visit is None:
            known = self._next < key.visit < 0
            return wire.Verdict(status="duplicate" if known else "refused", reason=f"evaluation {key.visit} is over")
        if visit.result is not None:
            return wire.Verdict(status="duplicate", reason=f"evaluation {key.visit} has its result")
        if visit.attempt != key.attempt or not visit.holder:
            return wire.Verdict(status="refused", reason=f"attempt {key.attempt} at evaluation {key.visit} is over")
        versions = versions_of(scored.group)
        num_samples = self._config.evaluation.num_samples
        reason = malformed_reason(scored, versions, (num_samples, num_samples), num_lineages)
        if reason := reason or unexpected_routes(scored.group):
            self._give_back(visit)
            return wire.Verdict(status="refused", reason=f"malformed: {reason}")
        self._conclude(visit, _result(scored, versions))
        return wire.Verdict(status="stored")

    def _give_back(self, visit: EvaluationVisit) -> None:
        """Ends an attempt; where all are used up, every sample counts as failed."""
        visit.holder = ""
        self._changes.visits.append(visit)
        if visit.attempt >= self._config.lease.max_attempts:
            self._conclude(visit, Result(0.0, 0, self._config.evaluation.num_samples, solved=False))
        else:
            self._free = {visit.number: visit, **self._free}

    def _conclude(self, visit: EvaluationVisit, result: Result) -> None:
        visit.result, visit.holder = result, ""
        self._changes.visits.append(visit)
        self._missing[visit.version] -= 1
        if self._missing[visit.version]:
            return
        of_version = [v for v in self._visits.values() if v.version == visit.version]
        for source in dict.fromkeys(v.source for v in of_version):
            results = [v.result for v in of_version if v.source == source and v.result is not None]
            evaluation = _summary(visit.version, source, results, self._config.evaluation.num_samples)
            self.finished.append(evaluation)
            self._changes.finished.append(evaluation)
        for done in of_version:
            del self._visits[done.number]
            self._changes.dropped.append(done.number)


def _result(scored: wire.ScoredGroup, versions: tuple[Version, ...]) -> Result:
    graded = [grade for grade in scored.grades if grade.outcome.graded]
    return Result(
        correct=sum(grade.correct for grade in graded),
        num_graded=len(graded),
        num_failed=len(scored.grades) - len(graded),
        solved=any(grade.outcome is wire.Outcome.CORRECT for grade in graded),
        versions=(versions[0], versions[-1]),
    )


def _summary(version: Version, source: str, results: list[Result], num_samples: int) -> wire.Evaluation:
    """The evaluation of one set; its means are NaN where nothing was graded."""
    num_graded = sum(result.num_graded for result in results)
    answered = [result for result in results if result.num_graded]
    versions = [v for result in results for v in result.versions] or [version]
    return wire.Evaluation(
        version=version,
        source=source,
        accuracy=sum(result.correct for result in results) / num_graded if num_graded else math.nan,
        pass_at_k=sum(result.solved for result in answered) / len(answered) if answered else math.nan,
        num_prompts=len(results),
        num_samples=num_samples,
        num_failed=sum(result.num_failed for result in results),
        oldest=min(versions),
        newest=max(versions),
    )

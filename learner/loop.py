"""The training loop."""

from contextlib import closing
from pathlib import Path

from common import wire
from common.config import Config
from common.errors import StallError
from common.log import AFRESH, bind, logger
from common.metrics import COMPLETE, STOPPED
from common.versions import Lineages, Version
from learner.checkpoints import Checkpoints, Saved
from learner.megatron.policy import Policy
from learner.publish import Publisher
from learner.ranks import Ranks
from learner.record import Recorder, Stopwatch
from learner.shared import NO_COMMIT, SharedLedger
from learner.step import SkipLimit, train_step


class Learner:
    """Takes groups, trains, publishes: design, sections 1 and 3.

    Attributes:
        version: That the policy holds.
    """

    def __init__(self, config: Config, run_dir: Path, policy: Policy, ledger: SharedLedger, ranks: Ranks) -> None:
        """`policy` is this rank's part; `ranks` are all."""
        self._config = config
        self._policy = policy
        self._ledger = ledger
        self._ranks = ranks
        self._checkpoints = Checkpoints(config, run_dir, ranks)
        self._recorder = Recorder(config, run_dir) if ranks.is_first else None
        self._publisher = Publisher(config, run_dir, policy.vocab_size, ranks, ledger.publish)
        self._skips = SkipLimit(config)
        self._lineages = Lineages()
        self._saved = 0
        self._watch = Stopwatch()
        self.version = Version(0, 0)

    def train(self) -> None:
        """Trains until the last step, or until it is asked to stop; either way what is trained is checkpointed.

        Raises:
            StallError: The run cannot go on; what is trained is checkpointed.
        """
        with closing(self._publisher):
            self._begin()
            try:
                self._steps()
            except StallError:
                self._save()
                self._finish_save()
                raise
            self._save()
            self._finish_save()
            self._end(STOPPED if self.version.number < self._config.steps else COMPLETE)

    def _steps(self) -> None:
        watch = self._watch = Stopwatch()  # what was before is no step's
        while self.version.number < self._config.steps:
            with watch("wait"):
                groups = self._ledger.reserve(self.version, self._config.groups_per_step, self._publisher.check)
            if groups is None:
                return
            with watch("update"), self._ledger.activity.working():
                metrics = train_step(
                    self._policy, groups, self._config, self.version, self._lineages, self._ranks.gather, watch
                )
            self._skips.count(metrics)
            self.version = self._ledger.commit(self.version, groups)
            with watch("publish"):
                self._publish()
            with watch("checkpoint"):
                self._tell(self._checkpoints.look())
                self._evaluate_and_save()
            self._record(groups, metrics, watch)

    def _begin(self) -> None:
        checkpoint = self._checkpoints.load_newest(self._policy)
        with self._checkpoints.fallback.naming_damage():
            if checkpoint is None:
                self.version, self._lineages = self._ledger.begin(None, NO_COMMIT)
            else:
                self.version, self._lineages = self._ledger.begin(checkpoint.version, checkpoint.commit)
        self._checkpoints.fallback.set_aside()
        if checkpoint is None and self.version.lineage > 0:
            logger().warning(AFRESH, version=str(self.version))
        self._saved = self.version.number
        logger().info("training_begins", version=str(self.version), steps=self._config.steps)
        self._publish()
        if checkpoint is None:
            self._ledger.evaluate(self.version)

    def _publish(self) -> None:
        bind(version=str(self.version))
        self._publisher.publish(self.version, self._policy.export, self._policy.sequence_logprobs, self._watch)

    def _evaluate_and_save(self) -> None:
        last = self.version.number == self._config.steps
        if last or self.version.number % self._config.evaluation.every == 0:
            self._ledger.evaluate(self.version)
        if last or self.version.number % self._config.learner.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        """Begins a checkpoint, once the one before is whole, where there is something new since."""
        if self.version.number > self._saved:
            self._finish_save()
            self._checkpoints.save(self._policy, self.version, self._ledger.newest)
            self._saved = self.version.number

    def _finish_save(self) -> None:
        self._tell(self._checkpoints.finish())

    def _tell(self, saved: Saved | None) -> None:
        """Lets the ledger know of a checkpoint that is whole."""
        if saved is not None:
            self._ledger.checkpointed(saved.version)
            seconds = {"write_s": round(saved.write_s, 3), "checksum_s": round(saved.checksum_s, 3)}
            logger().info("checkpoint_saved", path=str(saved.path), **seconds)

    def _record(self, groups: tuple[wire.TrainingGroup, ...], metrics: dict[str, float], watch: Stopwatch) -> None:
        times = watch.lap()
        if self._recorder is None:
            return
        status = self._ledger.status(self._recorder.num_evaluations)
        self._record_evaluations(self._recorder, status)
        self._ledger.activity.count(num_tokens=int(metrics["num_tokens"]), num_items=1)
        self._recorder.step(self.version, groups, metrics | self._publisher.report(), times, status)

    def _record_evaluations(self, recorder: Recorder, status: wire.StatusReport) -> None:
        """Writes what came in; the best checkpoint is the one with the best mean over all held-out prompts."""
        recorder.evaluations(status.evaluations)
        for version in dict.fromkeys(evaluation.version for evaluation in status.evaluations):
            sets = [e for e in status.evaluations if e.version == version]
            num_right = sum(e.accuracy * e.num_prompts for e in sets)
            self._checkpoints.mark_best(version, num_right / sum(e.num_prompts for e in sets))

    def _end(self, reason: str) -> None:
        """The accounts, after the final evaluation where the run is complete; a stopped run can go on later."""
        if self.version.number == self._config.steps:
            self._ledger.finish(reason, self._publisher.check)
        weights = self._checkpoints.write_hugging_face(self._policy, self.version.number)
        checkpoint = "" if weights is None else str(weights)
        if self._recorder is not None:
            status = self._ledger.status(self._recorder.num_evaluations)
            self._record_evaluations(self._recorder, status)
            self._recorder.end(self.version, reason, status.accounts, checkpoint, status)
        logger().info("training_ends", reason=reason, checkpoint=checkpoint)

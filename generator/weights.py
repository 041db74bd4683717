"""New weights: pulled when the directory names a newer version, checked before the engine may sample for training."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from common import wire
from common.config import Config, GeneratorConfig
from common.errors import DeadlineError, GateError, RefusedError, WeightsError
from common.log import bind, logger
from common.membership import Activity
from common.transport import Client
from generator.engine import Engine
from generator.weights_copy import Brought, WeightsCopy

RETRY_S = 0.2


class Weights:
    """Follows the directory and keeps the engine at the newest version.

    Attributes:
        directory: The newest that was heard.
        ready: Set once the engine holds a published version that passed the gate.
    """

    def __init__(
        self,
        engine: Engine,
        copy: WeightsCopy,
        ledger: Client,
        config: Config,
        activity: Activity,
        *,
        before_load: Callable[[], Awaitable[None]],
    ) -> None:
        """`before_load` is awaited before each load: what must end under the old version ends there."""
        self._engine = engine
        self._copy = copy
        self._ledger = ledger
        self._config = config.generator
        self._activity = activity
        self._before_load = before_load
        self._deadline_s = config.run.stall_timeout_s
        self._changed = asyncio.Event()
        self.directory = wire.Directory(revision=0, manifest=None, verifiers=(), closing=False)
        self.ready = asyncio.Event()

    async def watch(self, heard: Callable[[wire.Directory], None]) -> None:
        """Hears of every change of the directory, until cancelled."""
        while True:
            request = wire.Watch(revision=self.directory.revision)
            self.directory = await self._ledger.ask(request, wire.Directory, deadline_s=self._deadline_s)
            heard(self.directory)
            self._changed.set()

    async def follow(self) -> None:
        """Pulls and loads each newest version, until cancelled; versions in between are skipped.

        While it pulls, the engine goes on with the version that it has.

        Raises:
            GateError: The engine's logprobs are not the learner's.
            EngineError: The engine could not load the version.
            DeadlineError: Loading takes too long, which would hold up the next version, too; or none can be pulled.
            RefusedError: No version can be pulled.
            WeightsError: No version can be pulled.
            RunDirectoryError: There is no room for it.
        """
        failing_since: float | None = None
        clock = asyncio.get_running_loop().time
        while True:
            self._changed.clear()
            manifest = self.directory.manifest
            if manifest is None or manifest.version == self._engine.version:
                await self._changed.wait()
                continue
            began = clock()
            try:
                brought = await self._bring(manifest)
            except (RefusedError, DeadlineError, WeightsError) as error:
                failing_since = began if failing_since is None else failing_since
                if clock() - failing_since > self._deadline_s:
                    raise
                logger().warning("pull_failed", new_version=str(manifest.version), reason=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            failing_since = None
            if self.ready.is_set():
                await self._before_load()
                self.ready.clear()
            await self._load(manifest, brought)

    async def _bring(self, manifest: wire.Manifest) -> Brought:
        """Pulls a version; given up once another learner publishes: the one that hands this out is gone.

        Raises:
            RefusedError: Another learner publishes, or a publisher no longer has the version.
            DeadlineError: A publisher is silent.
            WeightsError: What it hands out is damaged.
            RunDirectoryError: There is no room.
        """
        logger().info("weights_pulling", new_version=str(manifest.version))
        bringing = asyncio.create_task(self._copy.bring(manifest))
        try:
            while not bringing.done():
                self._changed.clear()
                newest = self.directory.manifest
                if newest is not None and newest.publishers != manifest.publishers:
                    raise RefusedError(f"found {newest.version} at other publishers, expected {manifest.version}")
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait({bringing, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            return bringing.result()
        finally:
            bringing.cancel()
            await asyncio.wait({bringing})

    async def _load(self, manifest: wire.Manifest, brought: Brought) -> None:
        logger().info("weights_loading", new_version=str(manifest.version))
        pause_s = await self._engine.load(self._copy.directory, manifest.version)
        loaded = time.monotonic()
        bind(version=str(manifest.version))
        await self._check(manifest)
        self.ready.set()
        seconds = {"transfer_s": brought.transfer_s, "decode_s": brought.decode_s, "pause_s": pause_s}
        self._activity.gauges |= {**seconds, "pulled_bytes": float(brought.num_bytes)}
        logger().info(
            "weights_loaded",
            size_bytes=manifest.size_bytes,
            pulled_bytes=brought.num_bytes,
            num_whole=brought.num_whole,
            gate_s=round(time.monotonic() - loaded, 4),
            **{name: round(value, 4) for name, value in seconds.items()},
        )

    async def _check(self, manifest: wire.Manifest) -> None:
        ours = await self._engine.logprobs(wire.ints(manifest.probe_token_ids))
        difference = check_gate(ours, wire.floats(manifest.probe_logprobs), self._config, str(manifest.version))
        self._activity.gauges["gate_difference"] = difference


def check_gate(
    ours: NDArray[np.float32], learners: NDArray[np.float32], config: GeneratorConfig, version: str
) -> float:
    """The largest difference between the engine's and the learner's logprobs of the same tokens.

    Raises:
        GateError: They differ by more than the configured limits: the largest in float32; mean and 99th percentile in
            bfloat16, where single tokens differ for good reasons.
    """
    finite = int(np.isfinite(ours).sum())
    if ours.shape != learners.shape or finite != len(ours) or not np.isfinite(learners).all():
        raise GateError(
            f"version {version}: found {finite} finite logprobs of the probe in the engine and "
            f"{int(np.isfinite(learners).sum())} in the learner, expected {len(learners)} in both"
        )
    difference = np.abs(ours.astype(np.float64) - learners.astype(np.float64))
    figures = {"largest": float(difference.max()), "mean": float(difference.mean())}
    figures["99th percentile"] = float(np.percentile(difference, 99))
    limits = {"mean": config.gate_mean, "99th percentile": config.gate_p99}
    if config.dtype == "float32":
        limits = {"largest": config.gate_max}
    for name, limit in limits.items():
        if not figures[name] <= limit:
            raise GateError(
                f"version {version}: found a {name} difference of {figures[name]:.2g} between the engine's and the "
                f"learner's logprobs of {len(ours)} probe tokens, expected at most {limit:g}: the engine does not hold "
                "the learner's weights"
            )
    return figures["largest"]

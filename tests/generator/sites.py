"""A generator's parts at work on a real engine, for a real ledger; verifier and learner are driven by hand."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common import wire
from common.config import Config
from common.layout import write_resolved
from common.membership import Activity, Membership
from common.rendezvous import RunKeys
from common.sections import DataConfig
from common.transport import Client, Service
from generator.engine import Engine
from generator.handover import Handover
from generator.rollouts import Rollouts
from generator.weights import Weights
from generator.weights_copy import WeightsCopy
from tests.clocks import PATIENCE_S
from tests.groups import grade
from tests.learner.ledger.roles import Learner, serving

NAME = "generator-0"


class Verifier:
    """One that reads no answer: every second completion is right."""

    def __init__(self, ledger: Client) -> None:
        self._ledger = ledger
        self.groups: list[wire.Group] = []
        self.is_open = True

    async def handle(self, peer: bytes, request: wire.Request) -> wire.Answer:
        del peer
        if isinstance(request, wire.RoomRequest):
            await asyncio.sleep(0.0 if self.is_open else 0.2)
            return wire.Room(num_groups=request.num_groups if self.is_open else 0)
        assert isinstance(request, wire.Group)
        self.groups.append(request)
        grades = tuple(grade(float(i % 2)) for i in range(len(request.completions)))
        scored = wire.ScoredGroup(group=request, grades=grades, verifier="verifier-0")
        return await self._ledger.ask(scored, wire.Verdict, deadline_s=PATIENCE_S)


class Site(NamedTuple):
    """What there is."""

    ledger: Client
    rollouts: Rollouts
    weights: Weights
    verifier: Verifier
    learner: Learner
    stop: Callable[[], None]

    async def status(self) -> wire.StatusReport:
        return await self.ledger.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)


def make_run(run_dir: Path, model: Path, prompts: list[str], **values: Any) -> Config:
    """A run directory over these prompts, trained on in their order, with two other prompts held out."""
    train, test = run_dir / "train.jsonl", run_dir / "test.jsonl"
    run_dir.mkdir()
    train.write_text("".join(json.dumps({"prompt": prompt, "answer": 1}) + "\n" for prompt in prompts))
    test.write_text("".join(json.dumps({"prompt": f"{i}=", "answer": 1}) + "\n" for i in (8, 9)))
    data = DataConfig(train=str(train), test=str(test), shuffle=False)
    config = Config(model=str(model), data=data, groups_per_step=2, updates_per_step=1, **values)
    write_resolved(config, run_dir)
    RunKeys.create(run_dir)
    return config


@asynccontextmanager
async def site(engine: Engine, run_dir: Path, config: Config) -> AsyncGenerator[Site]:
    """A generator at work until the block ends."""
    keys, activity = RunKeys.load(run_dir), Activity()
    async with serving(run_dir) as (_, client):
        verifier, learner, handover = Verifier(client), Learner(client, config), Handover(keys, activity)
        rollouts = Rollouts(NAME, engine, client, handover, config, activity)
        copy = WeightsCopy(run_dir, Path(config.model), keys, deadline_s=PATIENCE_S)
        weights = Weights(engine, copy, client, config, activity, before_load=rollouts.finish_pinned)
        weights.ready.set()
        hello = wire.Hello(role=wire.Role.GENERATOR, name=NAME, run=keys.public)
        membership = Membership(
            client,
            hello,
            activity,
            deadline_s=PATIENCE_S,
            holds=rollouts.holds,
            finished=rollouts.finished,
            cancel=rollouts.cancel,
        )
        await membership.join()
        await learner.begin()
        async with Service(verifier.handle, keys=keys) as service, asyncio.TaskGroup() as tasks:
            hello = wire.Hello(role=wire.Role.VERIFIER, name="verifier-0", run=keys.public, endpoint=service.endpoint)
            verifiers = Membership(client, hello, Activity(), deadline_s=PATIENCE_S)
            await verifiers.join()
            parts = (service.serve(), membership.keep(), verifiers.keep(), rollouts.work(weights))
            working = [tasks.create_task(part) for part in parts]
            handover.meet((service.endpoint,), tasks)

            def stop() -> None:
                for task in (*working, *handover.tasks()):
                    task.cancel()

            try:
                yield Site(client, rollouts, weights, verifier, learner, stop)
            finally:
                stop()

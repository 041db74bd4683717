"""Whoever asks the real engine for something is cancelled at each moment of it: the engine goes on as if not."""

import asyncio
import gc
import os
import signal
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest

from common.config import SamplingConfig
from common.wire import FinishReason
from generator.engine import Engine
from tests.clocks import PATIENCE_S
from tests.generator.bigrams import ENDLESS
from tests.generator.conftest import RunningEngine, until

PROMPT = np.array([2, 9, 12, 6, 7, 15], dtype=np.int32)
SHORT, LONG = (SamplingConfig(max_tokens=num).on_wire() for num in (8, 2000))


@asynccontextmanager
async def unharmed(engine: Engine) -> AsyncGenerator[None]:
    """Whatever is cancelled in the block: the engine samples after it, and its event loop had nothing to report."""
    said: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: said.append(context))
    try:
        yield
        after = engine.generate(PROMPT, SHORT, seed=1, request_id="afterwards")
        assert (await asyncio.wait_for(after, PATIENCE_S)).num_tokens > 0
        await until(lambda: engine.load_now().num_running == 0, "the engine to be idle")
        gc.collect()  # an exception that nobody asked for is reported when its task dies
    finally:
        loop.set_exception_handler(None)
    assert said == []


@contextmanager
def held(engine: Engine, name: str) -> Generator[tuple[asyncio.Event, Callable[[], None]]]:
    """Holds each call of a control request of SGLang's until it is let go; the event says that one was made."""
    made, may_go = asyncio.Event(), asyncio.Event()
    real: Any = getattr(engine._manager, name)

    async def call(request: object) -> object:
        made.set()
        await may_go.wait()
        return await real(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._manager, name, call)
        yield made, may_go.set


@contextmanager
def standing_still(engine: Engine) -> Generator[tuple[asyncio.Event, Callable[[], None]]]:
    """Stops the scheduler's process until it is let go; the event says that it was told something."""
    told, scheduler = asyncio.Event(), engine._engine.get_all_child_pids()[0]
    real: Any = engine._manager._dispatch_to_scheduler

    def dispatch(request: object) -> None:
        real(request)
        told.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._manager, "_dispatch_to_scheduler", dispatch)
        os.kill(scheduler, signal.SIGSTOP)
        try:
            yield told, lambda: os.kill(scheduler, signal.SIGCONT)
        finally:
            os.kill(scheduler, signal.SIGCONT)


@pytest.mark.parametrize(
    "moment",
    [
        lambda engine: held(engine, "pause_generation"),
        lambda engine: held(engine, "update_weights_from_disk"),
        standing_still,
        lambda engine: held(engine, "continue_generation"),
    ],
    ids=["before it is paused", "while it is paused", "in the middle of the load", "before it continues"],
)
def test_a_load_goes_on_to_its_end_when_whoever_asked_is_cancelled(running: RunningEngine, moment: Any) -> None:
    engine = running.engine
    assert engine.version is not None
    newer = engine.version.next()

    async def scenario() -> None:
        async with unharmed(engine):
            with moment(engine) as (made, let_go):
                loading = asyncio.create_task(engine.load(running.model, newer))
                await asyncio.wait_for(made.wait(), PATIENCE_S)
                loading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(loading, PATIENCE_S)
                let_go()
                await until(lambda: engine.version == newer, "the load to end")

    running.run(scenario())


def test_a_load_that_is_asked_for_while_another_is_under_way_comes_after_it(running: RunningEngine) -> None:
    engine = running.engine
    assert engine.version is not None
    first, second = engine.version.next(), engine.version.next().next()

    async def scenario() -> None:
        async with unharmed(engine):
            with held(engine, "update_weights_from_disk") as (made, let_go):
                loading = asyncio.create_task(engine.load(running.model, first))
                await asyncio.wait_for(made.wait(), PATIENCE_S)
                loading.cancel()
                again = asyncio.create_task(engine.load(running.model, second))
                await asyncio.wait([loading])
                let_go()
                await asyncio.wait_for(again, PATIENCE_S)
            assert engine.version == second

    running.run(scenario())


def test_a_gate_that_is_broken_off_is_stopped_in_the_engine(running: RunningEngine) -> None:
    engine = running.engine

    async def scenario() -> None:
        async with unharmed(engine):
            with standing_still(engine) as (told, let_go):
                asking = asyncio.create_task(engine.logprobs(np.tile(PROMPT, 20)))
                await asyncio.wait_for(told.wait(), PATIENCE_S)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(asking, PATIENCE_S)
                let_go()
            await until(lambda: not engine._manager.rid_to_state, "SGLang to forget the probe")

    running.run(scenario())


def test_an_aborted_request_ends_at_once_and_may_be_cancelled_meanwhile(bigrams: RunningEngine) -> None:
    engine, endless = bigrams.engine, np.array([ENDLESS], dtype=np.int32)

    async def scenario() -> None:
        async with unharmed(engine):
            ids = [f"stopped-{i}." for i in range(8)]
            asking = [asyncio.create_task(engine.generate(endless, LONG, seed=1, request_id=name)) for name in ids]
            await until(lambda: engine.load_now().num_running == 8, "the engine to begin")
            for i, task in enumerate(asking):
                engine.abort(ids[i])
                if i % 2:
                    task.cancel()
            await asyncio.wait(asking, timeout=PATIENCE_S)
            assert [task.cancelled() for task in asking] == [False, True] * 4
            assert {task.result().finish_reason for task in asking[::2]} == {FinishReason.ABORT}
            await until(lambda: not engine._manager.rid_to_state, "SGLang to forget the requests")

    bigrams.run(scenario())

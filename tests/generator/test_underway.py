"""What was asked of an engine ends before the engine does, whoever asked for it."""

import asyncio

import pytest

from common.errors import DeadlineError, EngineError
from generator.underway import Underway
from tests.clocks import PATIENCE_S

LONG_S = PATIENCE_S


class Request:
    """One that ends when it is let."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.outcome = "has not begun"

    async def __call__(self) -> str:
        self.outcome = "under way"
        self.begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.outcome = "broken off"
            raise
        self.outcome = "done"
        return self.outcome


def test_a_control_request_goes_on_to_its_end_when_whoever_asked_is_cancelled() -> None:
    async def scenario() -> None:
        underway, request = Underway(), Request()
        asking = asyncio.create_task(underway.to_its_end(request(), "a load", deadline_s=LONG_S))
        await request.begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert request.outcome == "under way"
        finishing = asyncio.create_task(underway.finish(deadline_s=LONG_S))
        await asyncio.sleep(0)
        assert not finishing.done()
        request.may_end.set()
        await finishing
        assert request.outcome == "done"

    asyncio.run(scenario())


def test_whoever_waits_too_long_for_a_control_request_is_told_for_what_and_it_goes_on() -> None:
    async def scenario() -> None:
        underway, request = Underway(), Request()
        with pytest.raises(DeadlineError, match=r"waited 0\.01 s for a load"):
            await underway.to_its_end(request(), "a load", deadline_s=0.01)
        assert request.outcome == "under way"
        await underway.finish(deadline_s=2 * PATIENCE_S)  # which it does not take: nobody waits for it any more
        assert request.outcome == "under way"
        await underway.break_off(deadline_s=LONG_S)
        assert request.outcome == "broken off"

    asyncio.run(scenario())


def test_a_control_request_that_fails_tells_whoever_asks_and_nobody_else() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise EngineError("no")

    async def scenario() -> list[object]:
        said: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        underway = Underway()
        with pytest.raises(EngineError, match="no"):
            await underway.to_its_end(fail(), "a load", deadline_s=LONG_S)
        asking = asyncio.create_task(underway.to_its_end(fail(), "a load", deadline_s=LONG_S))
        await asyncio.sleep(0)
        asking.cancel()
        await underway.finish(deadline_s=LONG_S)
        with pytest.raises(asyncio.CancelledError):
            await asking
        return said

    assert asyncio.run(scenario()) == []


def test_a_request_to_sample_is_broken_off_with_whoever_asked_and_at_the_end() -> None:
    async def scenario() -> None:
        underway, first, second = Underway(), Request(), Request()
        asking = [asyncio.create_task(underway.while_asked(request())) for request in (first, second)]
        await first.begun.wait()
        await second.begun.wait()
        asking[0].cancel()
        await asyncio.wait(asking[:1])
        assert (first.outcome, second.outcome) == ("broken off", "under way")
        await underway.finish(deadline_s=LONG_S)
        assert second.outcome == "broken off"

    asyncio.run(scenario())


def test_a_closed_engine_takes_no_requests() -> None:
    async def scenario() -> None:
        underway = Underway()
        await underway.finish(deadline_s=LONG_S)
        with pytest.raises(EngineError, match="the engine is closed"):
            await underway.while_asked(Request()())
        with pytest.raises(EngineError, match="the engine is closed"):
            await underway.to_its_end(Request()(), "a load", deadline_s=LONG_S)

    asyncio.run(scenario())

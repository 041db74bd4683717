"""Credits: never more groups than there is room for."""

import asyncio

from tests.clocks import pass_time, run_by_hand, settle
from verifier.rooms import Rooms


def test_no_more_room_is_granted_than_there_is() -> None:
    async def body() -> None:
        rooms = Rooms(3)
        assert await rooms.reserve(b"a", 2, hold_s=0) == 2
        assert await rooms.reserve(b"b", 2, hold_s=0) == 1
        assert await rooms.reserve(b"b", 2, hold_s=0) == 0
        assert await rooms.take(b"a", hold_s=0)
        assert rooms.num_free == 0
        assert not await rooms.take(b"c", hold_s=0)
        assert await rooms.take(b"b", hold_s=0)
        rooms.release()
        assert rooms.num_free == 1
        assert await rooms.take(b"c", hold_s=0)

    run_by_hand(body())


def test_a_request_is_held_until_there_is_room() -> None:
    async def body() -> None:
        rooms = Rooms(1)
        assert await rooms.take(b"a", hold_s=1.0)
        waiting = asyncio.create_task(rooms.reserve(b"b", 4, hold_s=5.0))
        await pass_time(4.0)
        assert not waiting.done()
        rooms.release()
        assert await waiting == 1

    run_by_hand(body())


def test_a_request_is_held_no_longer_than_it_says() -> None:
    async def body() -> None:
        rooms = Rooms(1)
        assert await rooms.take(b"a", hold_s=1.0)
        waiting = asyncio.create_task(rooms.reserve(b"b", 4, hold_s=5.0))
        await pass_time(5.0)
        assert await waiting == 0
        rooms.release()
        assert rooms.num_free == 1

    run_by_hand(body())


def test_a_reservation_that_is_not_used_expires() -> None:
    async def body() -> None:
        rooms = Rooms(1, reserved_s=2.0)
        assert await rooms.reserve(b"a", 1, hold_s=0) == 1
        waiting = asyncio.create_task(rooms.reserve(b"b", 1, hold_s=9.0))
        await pass_time(1.0)
        assert not waiting.done()
        await pass_time(1.0)
        await settle()
        assert waiting.done()
        assert await waiting == 1

    run_by_hand(body())

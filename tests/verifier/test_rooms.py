"""Credits: never more groups than there is room for."""

import asyncio
import time

from verifier.rooms import Rooms


def test_no_more_room_is_granted_than_there_is() -> None:
    async def body() -> None:
        rooms = Rooms(3)
        assert await rooms.reserve(b"a", 2, hold_s=0.05) == 2
        assert await rooms.reserve(b"b", 2, hold_s=0.05) == 1
        assert await rooms.reserve(b"b", 2, hold_s=0.05) == 0
        assert await rooms.take(b"a", hold_s=0.05)
        assert rooms.num_free == 0
        assert not await rooms.take(b"c", hold_s=0.05)
        assert await rooms.take(b"b", hold_s=0.05)
        rooms.release()
        assert rooms.num_free == 1
        assert await rooms.take(b"c", hold_s=0.05)

    asyncio.run(body())


def test_a_request_is_held_until_there_is_room() -> None:
    async def body() -> None:
        rooms = Rooms(1)
        assert await rooms.take(b"a", hold_s=1.0)
        waiting = asyncio.create_task(rooms.reserve(b"b", 4, hold_s=5.0))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        rooms.release()
        assert await asyncio.wait_for(waiting, 0.5) == 1

    asyncio.run(body())


def test_a_reservation_that_is_not_used_expires() -> None:
    async def body() -> None:
        rooms = Rooms(1, reserved_s=0.2)
        assert await rooms.reserve(b"a", 1, hold_s=0.05) == 1
        began = time.monotonic()
        assert await rooms.reserve(b"b", 1, hold_s=2.0) == 1
        assert 0.1 < time.monotonic() - began < 1.0

    asyncio.run(body())

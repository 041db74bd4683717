"""Groups from process to process: bytes a token and tokens a second, with CURVE off and on."""

import asyncio
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from common import wire
from common.transport import Client, RunKeys, Service
from common.versions import Version
from tests.bench.report import Figure

GROUP_SIZE = 16
TOKENS = 1000
NUM_GROUPS = 4000
IN_FLIGHT = 16
PEER = "prime-rl: 35.1 B a token, 4.3-5.0 M tokens/s"


def run() -> list[Figure]:
    """Measures the wire."""
    size = len(wire.encode(_group(0)))
    figures = [Figure("bytes a token, logprobs included", size / (GROUP_SIZE * TOKENS), "B", PEER)]
    for curve in (False, True):
        rate = _tokens_per_s(curve)
        figures.append(
            Figure(f"groups over tcp loopback, CURVE {'on' if curve else 'off'}", rate / 1e6, "M tokens/s", PEER)
        )
    return figures


def _group(visit: int) -> wire.Group:
    rng = np.random.default_rng(visit)
    completions = tuple(
        wire.Completion(
            token_ids=wire.int_bytes(rng.integers(0, 150_000, TOKENS, dtype=np.int32)),
            logprobs=wire.float_bytes(-rng.exponential(size=TOKENS).astype(np.float32)),
            versions=wire.span_bytes([wire.VersionSpan(600, Version(0, 11)), wire.VersionSpan(TOKENS, Version(0, 12))]),
            finish_reason=wire.FinishReason.STOP,
            seed=i,
        )
        for i in range(GROUP_SIZE)
    )
    key = wire.LeaseKey(visit, 1)
    return wire.Group(
        key=key,
        generator="generator-0",
        prompt_id="train:1",
        answer="42",
        reward="math",
        completions=completions,
        seconds=1.0,
    )


def _tokens_per_s(curve: bool) -> float:
    """Tokens of groups sent by this process and received, decoded, checked and acknowledged by another."""
    keys = RunKeys.create(Path(tempfile.mkdtemp())) if curve else None
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    receiver = context.Process(target=_receive, args=(there, keys))
    receiver.start()
    try:
        return asyncio.run(_send(here.recv(), keys))
    finally:
        receiver.kill()
        receiver.join()


def _receive(pipe: Connection, keys: RunKeys | None) -> None:
    async def handler(peer: bytes, group: wire.Request) -> wire.Answer:
        assert isinstance(group, wire.Group)
        return wire.Verdict(status="stored")

    async def serve() -> None:
        async with Service(handler, keys=keys) as service:
            pipe.send(service.endpoint)
            await service.serve()

    asyncio.run(serve())


async def _send(endpoint: str, keys: RunKeys | None) -> float:
    groups = [_group(i) for i in range(8)]
    async with Client(lambda: endpoint, keys=keys, name="receiver") as client:
        await client.ask_once(groups[0], wire.Verdict)
        remaining = iter(range(NUM_GROUPS))

        async def lane() -> None:
            for i in remaining:
                await client.ask_once(groups[i % len(groups)], wire.Verdict)

        began = time.monotonic()
        async with asyncio.TaskGroup() as lanes:
            for _ in range(IN_FLIGHT):
                lanes.create_task(lane())
        return NUM_GROUPS * GROUP_SIZE * TOKENS / (time.monotonic() - began)

"""A verifier's answers: room for groups, and for each group what the ledger made of its grades."""

import asyncio
from typing import Final

import msgspec
from tokenizers import Tokenizer

from common import wire
from common.config import Config
from common.errors import RefusedError
from common.log import logger
from common.membership import Activity
from common.transport import Client
from verifier.rooms import Rooms
from verifier.sandbox import Sandbox
from verifier.tasks import Task

HOLD_S: Final = 2.0


class VerifierService:
    """The handler of a `common.transport.Service`.

    A group that is sent again while it is in work joins the work. Failures of the process itself are never answered:
    they come out of `work`, the process ends, and its peers turn to another.
    """

    def __init__(
        self, name: str, ledger: Client, tokenizer: Tokenizer, sandbox: Sandbox, activity: Activity, config: Config
    ) -> None:
        self._name = name
        self._ledger = ledger
        self._tokenizer = tokenizer
        self._sandbox = sandbox
        self._activity = activity
        self._ledger_timeout_s = config.run.stall_timeout_s
        self._rooms = Rooms(config.verifier.max_groups)
        self._in_work: dict[tuple[wire.LeaseKey, str], asyncio.Task[wire.Answer]] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handle(self, peer: bytes, request: wire.Request) -> wire.Answer:
        """The answer to a request.

        Raises:
            RefusedError: It is no request to a verifier, or a group without room.
        """
        match request:
            case wire.RoomRequest():
                num_groups = await self._rooms.reserve(peer, request.num_groups, hold_s=HOLD_S)
                return wire.Room(num_groups=num_groups)
            case wire.Group():
                return await self._verdict(peer, request)
            case _:
                raise RefusedError(
                    f"found {type(request).__name__} from {peer.hex()}, expected a request to a verifier"
                )

    async def work(self) -> None:
        """Waits until cancelled, then ends the groups in work.

        Raises:
            SluiceError: The process cannot grade, or the ledger is gone.
        """
        try:
            await self._failed
        finally:
            in_work = list(self._in_work.values())
            for task in in_work:
                task.cancel()
            await asyncio.gather(*in_work, return_exceptions=True)

    async def _verdict(self, peer: bytes, group: wire.Group) -> wire.Answer:
        key = (group.key, group.generator)
        if key in self._in_work:
            self._rooms.give_up_reservation(peer)
        elif not await self._rooms.take(peer, hold_s=HOLD_S):
            raise RefusedError(f"found no room for {group.key}, expected a group to come after room was granted")
        elif key in self._in_work:
            self._rooms.release()
        else:
            self._in_work[key] = asyncio.create_task(self._score(group))
            self._in_work[key].add_done_callback(lambda done: self._done(key, done))
            self._count_groups()
        task = self._in_work[key]
        await asyncio.wait([task])
        return task.result() if not self._failed.done() else await asyncio.Future()

    def _done(self, key: tuple[wire.LeaseKey, str], task: asyncio.Task[wire.Answer]) -> None:
        del self._in_work[key]
        self._count_groups()
        self._rooms.release()
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    def _count_groups(self) -> None:
        self._activity.gauges["groups_in_work"] = len(self._in_work)

    async def _score(self, group: wire.Group) -> wire.Answer:
        with self._activity.working():
            texts = await asyncio.to_thread(self._decode, group)
            tasks = [Task(group.reward, group.answer, text) for text in texts]
            grades = tuple(map(_cut_is_wrong, group.completions, await self._sandbox.grade(tasks)))
            self._report(group, grades)
        scored = wire.ScoredGroup(group=group, grades=grades, verifier=self._name)
        try:
            return await self._ledger.ask(scored, wire.Verdict, deadline_s=self._ledger_timeout_s)
        except RefusedError as error:
            return wire.Refused(reason=str(error))

    def _decode(self, group: wire.Group) -> list[str]:
        token_ids = [wire.ints(completion.token_ids).tolist() for completion in group.completions]
        return self._tokenizer.decode_batch(token_ids, skip_special_tokens=True)

    def _report(self, group: wire.Group, grades: tuple[wire.Grade, ...]) -> None:
        self._activity.count(num_tokens=sum(c.num_tokens for c in group.completions), num_items=len(grades))
        for outcome, number in self._sandbox.num_failures.items():
            self._activity.gauges[f"num_{outcome}"] = number
        self._activity.gauges["num_workers_replaced"] = self._sandbox.num_replaced
        failed = [grade.outcome.value for grade in grades if not grade.outcome.graded]
        if failed:
            counts = {f"num_{outcome}": failed.count(outcome) for outcome in set(failed)}
            logger().warning("grading_failed", visit=group.key.visit, prompt=group.prompt_id, **counts)


def _cut_is_wrong(completion: wire.Completion, grade: wire.Grade) -> wire.Grade:
    """The grade, though a completion that the length limit cut is never correct: it did not come to its end."""
    if grade.outcome is wire.Outcome.CORRECT and completion.finish_reason is wire.FinishReason.LENGTH:
        return msgspec.structs.replace(grade, outcome=wire.Outcome.WRONG, correct=0.0, reward=0.0)
    return grade

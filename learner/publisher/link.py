"""A learner rank's link to its publisher: a process that is started anew where it dies."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from threading import Condition, Thread

import msgspec

from common.errors import DeadlineError, WeightsError
from common.log import logger
from common.process import LIVED_WELL_S
from common.versions import Version
from learner.publisher.reports import Encode, Encoded, Listening

_RESPAWN_S = 0.5
_END_S = 10.0
_Process = subprocess.Popen[bytes]


class PublisherLink:
    """Starts the publisher of a part, tells it of versions, and hears when they are encoded.

    A publisher that dies is started again at the same port, `run.max_restarts` times, counted anew where it lived for
    ten minutes; it then has the newest version alone, as an anchor.

    Attributes:
        endpoint: Where it listens.
    """

    def __init__(self, run_dir: Path, directory: Path, part: int, *, deadline_s: float, max_restarts: int) -> None:
        """Starts it and waits until it listens, as it waits for all else: until it is done, late, or dead for good.

        Raises:
            DeadlineError: It is late.
            WeightsError: It dies too often.
        """
        self._command = [sys.executable, "-m", "learner.publisher", str(run_dir), str(directory), str(part)]
        self._part, self._deadline_s, self._max_restarts = part, deadline_s, max_restarts
        self._changed = Condition()
        self._is_closing = False
        self._process: _Process | None = None
        self._order: Encode | None = None
        self._encoded: Encoded | None = None
        self._death = ""
        self.endpoint = ""
        keep = copy_context().run  # with what the log is bound to
        Thread(target=keep, args=(self._keep,), name=f"publisher-{part}", daemon=True).start()
        try:
            self._wait(lambda: bool(self.endpoint), "listen")
        except (DeadlineError, WeightsError):
            self.close()
            raise

    def encode(self, version: Version, path: Path) -> None:
        """Tells of a version that is written; the file is the publisher's from now on."""
        with self._changed:
            self._order = Encode(version, str(path))
            self._send(self._order)

    def await_encoded(self) -> Encoded:
        """What the newest version that it was told of came to, once it is encoded.

        Raises:
            DeadlineError: It takes too long.
            WeightsError: It dies too often.
        """
        order = self._order
        assert order is not None

        def is_done() -> bool:
            return self._encoded is not None and self._encoded.version == order.version

        self._wait(is_done, f"encode version {order.version}")
        assert self._encoded is not None
        return self._encoded

    def close(self) -> None:
        """Ends the publisher."""
        with self._changed:
            self._is_closing = True
            process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _keep(self) -> None:
        """Starts the publisher as often as it may end; this thread is the one that it dies with."""
        num_left = self._max_restarts
        while (process := self._start()) is not None:
            began = time.monotonic()
            self._listen(process)
            exit_code = process.wait()
            if self._is_closing:
                continue
            if time.monotonic() - began >= LIVED_WELL_S:
                num_left = self._max_restarts
            logger().warning("publisher_ended", part=self._part, exit_code=exit_code, num_restarts_left=num_left)
            if num_left == 0:
                self._give_up(f"dead {self._max_restarts + 1} times")
                return
            num_left -= 1
            time.sleep(_RESPAWN_S)

    def _listen(self, process: _Process) -> None:
        """Hears all that a publisher says; what else a library prints there is logged."""
        assert process.stdout is not None
        for line in filter(None, map(bytes.strip, process.stdout)):
            try:
                self._hear(msgspec.json.decode(line, type=Listening | Encoded))
            except msgspec.MsgspecError:
                logger().warning("publisher_printed", part=self._part, line=line.decode(errors="replace"))

    def _give_up(self, death: str) -> None:
        with self._changed:
            self._death = death
            self._changed.notify_all()

    def _start(self) -> _Process | None:
        with self._changed:
            if self._is_closing:
                return None
            port = self.endpoint.rpartition(":")[2] or "0"
            try:
                self._process = subprocess.Popen(
                    [*self._command, port],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # what torchrun tells the rank to stop by is not for it
                )
            except OSError as error:
                self._give_up(f"not started ({error.strerror})")
                return None
            if self._order is not None:
                self._send(self._order)
            return self._process

    def _send(self, order: Encode) -> None:
        """Writes a line; one that has died is told when it has been started again."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            logger().info("publisher_gone", part=self._part)

    def _hear(self, report: Listening | Encoded) -> None:
        with self._changed:
            if isinstance(report, Listening):
                self.endpoint = report.endpoint
            else:
                self._encoded = report
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: done() or self._death, self._deadline_s):
                raise DeadlineError(f"waited {self._deadline_s:g} s for the publisher of part {self._part} to {what}")
            if not done():
                raise WeightsError(
                    f"found the publisher of part {self._part} {self._death}, expected it to {what}; its lines are "
                    "above"
                )

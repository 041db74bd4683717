"""`python child.py PARENT COMMAND...` runs a command and leaves none of its descendants behind.

Every process of a run is started through this one, which stays its parent. When the command ends, however it ends,
what it started ends too, in whatever session it is; so it does when the launcher (PARENT) is killed. SIGTERM, SIGINT
and SIGUSR1 are passed on; SIGHUP kills at once. The exit code is the command's, or 128 + n where signal n killed it.

It imports nothing of Sluice and no installed package, so that it starts in milliseconds. Linux only.
"""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_HEARD = (*_PASSED_ON, signal.SIGHUP, signal.SIGCHLD)


def main(parent: int, command: list[str]) -> int:
    """Runs the command; returns the exit code."""
    # Signals wait until they are asked for: a handler could be called just before a wait begins, and not end it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans among the descendants become children of this process
    if os.getppid() != parent:
        return 128 + signal.SIGHUP
    unblock = functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    child = subprocess.Popen(command, preexec_fn=unblock)  # noqa: PLW1509  # this process has one thread
    while (status := _reap(child.pid)) is None:
        number = signal.sigwait(_HEARD)
        if number == signal.SIGHUP:
            _kill_descendants()
            return 128 + signal.SIGKILL
        if number in _PASSED_ON:
            os.kill(child.pid, number)  # ended or not, it has not been reaped
    _kill_descendants()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _reap(pid: int) -> int | None:
    """Reaps what has ended, adopted orphans too; the status of the command if it is among them."""
    while True:
        reaped, status = os.waitpid(-1, os.WNOHANG)
        if reaped == pid:
            return status
        if reaped == 0:
            return None


def _kill_descendants() -> None:
    """Kills the children until there are none: those of a killed child become this process's own."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    children: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                children.append(int(stat.parent.name))
    return children


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

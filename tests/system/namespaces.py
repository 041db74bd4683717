"""Two machines on one: network namespaces with a cable between them, and a /dev/shm and mounts of its own for one."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which
from typing import NamedTuple
from uuid import uuid4

import pytest

from tests.system.conftest import HANG_S, REPOSITORY, Run

HERE, THERE = "10.213.0.1", "10.213.0.2"  # in networks of their own: other tests may have the same


class Namespaces(NamedTuple):
    """Their names: of the machine with the address HERE, and of that with THERE."""

    here: str
    there: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command on the first."""
        return "ip", "netns", "exec", self.here

    def set_cable(self, state: str) -> None:
        """Cuts it (`down`), or mends it (`up`)."""
        _ip("-n", self.here, "link", "set", "cable", state)


@contextmanager
def two_machines() -> Generator[Namespaces]:
    """Two namespaces until the block ends."""
    if os.geteuid() != 0 or which("ip") is None or which("unshare") is None:
        pytest.skip("namespaces are made by root alone, with iproute2's `ip` and util-linux's `unshare`")
    names = Namespaces(*(f"sluice-{end}-{uuid4().hex}" for end in ("a", "b")))
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names.here, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names.there)
        for name, address in zip(names, (HERE, THERE), strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def distant_generator(run: Run, names: Namespaces, name: str, model: Path) -> Generator["subprocess.Popen[bytes]"]:
    """A generator on the second machine: a /dev/shm of its own, and no weight file of the model within its reach."""
    hidden = " && ".join(f"mount --bind /dev/null {path}" for path in model.glob("*.safetensors"))
    own = f"mount -t tmpfs tmpfs /dev/shm && mkdir {run.memory} && {hidden}"
    generator = f"exec {sys.executable} -m generator {run.directory} {name}"
    command = with_own_mounts(names.there, f"{own} && {generator}")
    log = run.directory / "logs" / f"{name}.out"
    with log.open("wb") as output:
        distant = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True)
    try:
        yield distant
        distant.terminate()
        assert distant.wait(HANG_S) == 0, log.read_text()[-2000:]
    finally:
        with suppress(ProcessLookupError):  # else it has ended, and all of its group
            os.killpg(distant.pid, signal.SIGKILL)


def with_own_mounts(name: str, script: str) -> list[str]:
    """The command that runs a shell script in a namespace, where it may mount what it wants."""
    return ["ip", "netns", "exec", name, "unshare", "--mount", "--propagation", "private", "sh", "-c", script]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

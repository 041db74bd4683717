"""How the processes of a run find and trust each other: two small files in the run directory."""

import socket
from pathlib import Path
from typing import Self

import msgspec
import zmq

from common.errors import RunDirectoryError
from common.files import read_private, write_atomically

RENDEZVOUS = "rendezvous.json"
_KEYS = "keys.json"


class RunKeys(msgspec.Struct, frozen=True):
    """The run's CURVE key pair (Z85). Who can read it belongs to the run: it is server key and client key at once."""

    public: str
    secret: str

    @classmethod
    def create(cls, run_dir: Path) -> Self:
        """New keys, written to the run directory with mode 0600."""
        public, secret = zmq.curve_keypair()
        keys = cls(public.decode(), secret.decode())
        write_atomically(run_dir / _KEYS, msgspec.json.encode(keys), mode=0o600)
        return keys

    @classmethod
    def load_or_create(cls, run_dir: Path) -> Self:
        """Those of a run that goes on, or new ones."""
        return cls.load(run_dir) if (run_dir / _KEYS).exists() else cls.create(run_dir)

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """The keys of the run.

        Raises:
            RunDirectoryError: There are none, or others may read them.
        """
        return msgspec.json.decode(read_private(run_dir / _KEYS), type=cls)


class Rendezvous(msgspec.Struct, frozen=True):
    """Where the ledger listens: the only well-known address of a run."""

    address: str
    public_key: str
    incarnation: int

    def write(self, run_dir: Path) -> None:
        """Writes the file whole or not at all."""
        write_atomically(run_dir / RENDEZVOUS, msgspec.json.encode(self))

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """The rendezvous of the run.

        Raises:
            FileNotFoundError: The ledger has not started yet.
        """
        return msgspec.json.decode((run_dir / RENDEZVOUS).read_bytes(), type=cls)


def address_towards(endpoint: str) -> str:
    """The address of this machine from which packets to an endpoint such as `tcp://10.0.0.1:7171` go; none is sent.

    Raises:
        RunDirectoryError: There is no way there.
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))
        except OSError as error:
            raise RunDirectoryError(f"{endpoint}: found no way there from this machine: {error.strerror}") from error
        return probe.getsockname()[0]

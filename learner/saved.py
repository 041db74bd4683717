"""The directories of checkpoints, and what each says of itself."""

import re
import zlib
from pathlib import Path
from typing import Self

import msgspec

from common import wire
from common.errors import DamageError
from common.files import write_atomically
from common.versions import Version
from learner.sums import Sums, read_error

VERSION, MEGATRON, HUGGING_FACE = "version.json", "megatron", "huggingface"
WEIGHT = "weight."  # how the names of weights in `megatron/` begin: Hugging Face's follow


class SavePoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`version.json`, which is written last.

    Attributes:
        version: Of the weights.
        sequence: Number of the commit that made them, in the ledger's order.
        num_visits: The position in the data: visits that the ledger had handed out by then.
        run: The run's public key.
        files: Size and checksum of each file in `megatron/`.
        crc32: Of all the others, as they are encoded with 0 in its place.
    """

    version: Version
    sequence: int
    num_visits: int
    run: str
    files: Sums
    crc32: int = 0

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """That of a checkpoint.

        Raises:
            DamageError: There is none, or it is not what was written.
            RunDirectoryError: It may not be read.
        """
        path = checkpoint / VERSION
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise DamageError(
                f"{checkpoint}: found no {VERSION}, expected a whole checkpoint such as RUN/checkpoints/step-000050"
            ) from error
        except OSError as error:
            raise read_error(path, error) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DamageError(f"{path}: found no version, sequence and run in it: {error}") from error
        if (crc32 := found.with_checksum().crc32) != found.crc32:
            raise DamageError(f"{path}: found checksum {crc32:08x}, expected the {found.crc32:08x} that it names")
        return found

    @property
    def commit(self) -> wire.Committed:
        """What the ledger said when the weights were made."""
        return wire.Committed(sequence=self.sequence, num_visits=self.num_visits)

    def write(self, checkpoint: Path) -> None:
        """Writes that of a checkpoint, with its checksum."""
        write_atomically(checkpoint / VERSION, msgspec.json.encode(self.with_checksum()))

    def with_checksum(self) -> Self:
        """The same with the checksum of its fields."""
        content = msgspec.json.encode(msgspec.structs.replace(self, crc32=0))
        return msgspec.structs.replace(self, crc32=zlib.crc32(content))


def directories(parent: Path) -> list[Path]:
    """Those that have the name of a checkpoint, oldest first."""
    named = (path for path in parent.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted((path for path in named if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))

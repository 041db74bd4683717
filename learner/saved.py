"""What the directory of a checkpoint says of itself."""

from pathlib import Path
from typing import Self

import msgspec

from common.errors import RunDirectoryError
from common.files import write_atomically
from common.versions import Version

VERSION, MEGATRON, HUGGING_FACE = "version.json", "megatron", "huggingface"
WEIGHT = "weight."  # how the names of weights in `megatron/` begin: Hugging Face's follow


class SavePoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`version.json`, which is written last: where it is, the checkpoint is whole.

    Attributes:
        version: Of the weights.
        sequence: Number of the commit that made them, in the ledger's order.
        run: The run's public key.
    """

    version: Version
    sequence: int
    run: str

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """That of a checkpoint.

        Raises:
            RunDirectoryError: There is none, or it is broken.
        """
        path = checkpoint / VERSION
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise RunDirectoryError(
                f"{checkpoint}: found no {VERSION} ({error.strerror}), expected a whole checkpoint such as "
                "RUN/checkpoints/step-000050"
            ) from error
        except msgspec.MsgspecError as error:
            raise RunDirectoryError(f"{path}: found no version, sequence and run in it: {error}") from error

    def write(self, checkpoint: Path) -> None:
        """Writes that of a checkpoint."""
        write_atomically(checkpoint / VERSION, msgspec.json.encode(self))

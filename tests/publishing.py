"""Versions of small weights, handed out by real publishers."""

import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import wire
from common.rendezvous import RENDEZVOUS, Rendezvous
from common.versions import Version
from common.weights.parts import DType, part_header
from learner.publisher.link import PublisherLink
from tests.clocks import PATIENCE_S

Tensors = Mapping[str, NDArray[Any]]
_DTYPES: dict[str, DType] = {"float32": "F32", "uint32": "F32", "uint16": "BF16"}


def write_part(path: Path, tensors: Tensors) -> Path:
    """A part of float32 tensors, and of bfloat16 ones that are given by their bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, entries = part_header([(name, _DTYPES[str(t.dtype)], t.shape) for name, t in tensors.items()])
    path.write_bytes(header + b"".join(tensors[entry.name].tobytes() for entry in entries))
    return path


def changed(tensors: Tensors, seed: int, *, share: float = 0.02) -> dict[str, NDArray[Any]]:
    """The tensors with some elements changed."""
    random = np.random.default_rng(seed)
    found = {name: tensor.copy() for name, tensor in tensors.items()}
    for tensor in found.values():
        bits = tensor.reshape(-1).view(f"u{tensor.itemsize}")
        where = random.random(bits.size) < share
        bits[where] += random.integers(1, 9, where.sum()).astype(bits.dtype)
    return found


class Publishing:
    """What a learner of one or several ranks hands out: a publisher process for each part.

    Attributes:
        links: To each publisher.
    """

    def __init__(self, run_dir: Path, directory: Path, num_parts: int) -> None:
        self._directories = [directory / f"{part:05d}" for part in range(num_parts)]
        for path in self._directories:
            path.mkdir(parents=True)
        if not (run_dir / RENDEZVOUS).exists():
            Rendezvous("tcp://127.0.0.1:1", "", 0).write(run_dir)
        self.links = [
            PublisherLink(run_dir, path, part, deadline_s=PATIENCE_S, max_restarts=3)
            for part, path in enumerate(self._directories)
        ]

    def publish(self, version: Version, parts: Sequence[Tensors | Path], **probe: bytes) -> wire.Manifest:
        """Publishes a version whose parts are tensors, or files to copy; it can be pulled when this returns."""
        for link, directory, part in zip(self.links, self._directories, parts, strict=True):
            path = directory / f"{version}.safetensors"
            shutil.copyfile(part, path) if isinstance(part, Path) else write_part(path, part)
            link.encode(version, path)
        for link in self.links:
            link.await_encoded()
        return self.manifest(version, **probe)

    def manifest(self, version: Version, **probe: bytes) -> wire.Manifest:
        """Of a version, without a probe unless one is given."""
        probe = probe or {"probe_token_ids": b"", "probe_logprobs": b""}
        endpoints = tuple(link.endpoint for link in self.links)
        return wire.Manifest(version=version, publishers=endpoints, size_bytes=1, **probe)

    def close(self) -> None:
        """Ends the publishers."""
        for link in self.links:
            link.close()


@contextmanager
def publishing(run_dir: Path, directory: Path, num_parts: int = 1) -> Generator[Publishing]:
    """Publishers until the block ends."""
    publisher = Publishing(run_dir, directory, num_parts)
    try:
        yield publisher
    finally:
        publisher.close()

"""Embeddings on disk, by content: the same clip under the same protocol and model is encoded once.

One small file per embedding, written whole; any number of processes may share a folder.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ttmray.errors import UserError
from ttmray.local_files import TEMPORARY_PREFIX
from ttmray.storage import Folder, explained

_CHECK_BYTES = 32
_KEEP = 0.9  # of the bound, after an eviction


def audio_key(wave: np.ndarray, sample_rate: int, protocol: str, model: str) -> str:
    """Key of an embedding: 64 hex digits over everything that decides it.

    Args:
        wave: float32, any shape.
        sample_rate: Hz.
        protocol: e.g. `Protocol.id()`.
        model: hash of the weights.

    Raises:
        ValueError: `wave` is not float32 (a silent cast would give two clips one key).
    """
    if wave.dtype != np.float32:
        raise ValueError(f"wave must be float32, not {wave.dtype}")
    about = json.dumps([list(wave.shape), sample_rate, protocol, model])
    digest = hashlib.sha256(about.encode() + b"\0")
    digest.update(np.ascontiguousarray(wave, dtype="<f4").data)
    return digest.hexdigest()


class EmbeddingCache:
    """Float32 arrays under content keys, least recently used first out.

    Args:
        folder: local; made if absent. May be shared by processes.
        max_bytes: bound of all files. Each process looks at the folder when it has written a sixteenth of the bound
            since its last look, so P writers can exceed it by P / 16 for a while.

    Raises:
        UserError: an object store, whose files have no access times.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, not {max_bytes}")
        self._folder = Folder.at(str(folder))
        if self._folder.remote:
            raise UserError(f"{folder}: the embedding cache must be a local folder.", "Name one on a fast local disk.")
        self._max_bytes = max_bytes
        self._unseen_bytes = max_bytes  # nobody has looked yet: the first write does

    def get_or_make(self, keys: Sequence[str], make: Callable[[list[int]], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """The embeddings of `keys`, in order.

        Args:
            keys: of `audio_key`; the same one may appear twice.
            make: called at most once, with the positions in `keys` that are needed, ascending; returns as many float32
                arrays (or the rows of one). Without a cache it would be called with all positions.

        Returns:
            As `make` gives them, of any shape, bit for bit.

        Raises:
            ValueError: a key that is not hexadecimal, or something else than float32 from `make`.
        """
        for key in keys:
            if len(key) != 64 or set(key) - set("0123456789abcdef"):
                raise ValueError(f"{key!r} is not a key of audio_key")
        embeddings: dict[str, np.ndarray | None] = {key: self._read(key) for key in dict.fromkeys(keys)}
        missing = {key: keys.index(key) for key, value in embeddings.items() if value is None}
        if missing:
            computed = make(list(missing.values()))
            for key, embedding in zip(missing, computed, strict=True):
                if embedding.dtype != np.float32:
                    raise ValueError(f"embeddings must be float32, not {embedding.dtype}")
                embeddings[key] = embedding
                self._write(key, embedding)
        return [value.copy() for key in keys if (value := embeddings[key]) is not None]

    def _name(self, key: str) -> str:
        return f"{key[:2]}/{key}.npy"

    def _read(self, key: str) -> np.ndarray | None:
        """None for absent, cut and altered files."""
        path = self._folder.path(self._name(key))
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        if _check(key, body) != check:
            return None
        # evicted meanwhile, or written by another user: only its age is lost
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(path)
        return np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)

    def _write(self, key: str, value: np.ndarray) -> None:
        body = io.BytesIO()
        np.lib.format.write_array(body, np.asarray(value, order="C"), allow_pickle=False)
        # npy says nothing about flipped bits, and a file could carry another one's name
        data = body.getvalue() + _check(key, body.getvalue())
        self._folder.write(self._name(key), data)
        self._unseen_bytes += len(data)
        if self._unseen_bytes >= self._max_bytes / 16:
            self._evict()

    def _evict(self) -> None:
        self._folder.sweep_temporary()
        self._unseen_bytes = 0
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        if total <= self._max_bytes:
            return
        for _, size, path in sorted(entries):
            with contextlib.suppress(FileNotFoundError):  # another process evicts the same ones
                os.unlink(path)
            total -= size
            if total <= _KEEP * self._max_bytes:
                return

    def _entries(self) -> list[tuple[int, int, str]]:
        """(time of last use in ns, bytes, path) of every file."""
        entries = []
        with explained(str(self._folder)):
            for folder, _, names in os.walk(self._folder.uri):
                for name in names:
                    if name.startswith(TEMPORARY_PREFIX):
                        continue
                    path = os.path.join(folder, name)
                    try:
                        status = os.stat(path)
                    except FileNotFoundError:
                        continue  # evicted by another process
                    entries.append((status.st_mtime_ns, status.st_size, path))
        return entries


def _check(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).digest()

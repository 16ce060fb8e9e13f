"""Intermediate results of a preparation, in DIR/.work, so that interrupted work continues."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbs_rl.data.manifest import MANIFEST, Manifest
from fbs_rl.data.whole_files import write_whole

_WORK, _LOCK, _IDENTITY = ".work", ".lock", "identity.json"
_OURS = {_WORK, _LOCK, MANIFEST}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a result depends on. settings: configuration and versions by key. inputs: [name, bytes, fingerprint]."""

    settings: Mapping[str, Any]
    inputs: tuple[tuple[str, int, str], ...]

    @property
    def digest(self) -> str:
        """sha256 of the settings and of the inputs' content; their names may change."""
        content = [dict(self.settings), [entry[1:] for entry in self.inputs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def difference(self, earlier: Mapping[str, Any]) -> str:
        """In words, what differs from the identity stored as `earlier`."""
        settings = earlier.get("settings", {})
        keys = sorted(
            key
            for key in settings.keys() | self.settings.keys()
            if settings.get(key) != self.settings.get(key)
        )
        return f"other {', '.join(keys[:4])}" if keys else "other input files"


class WorkFolder:
    """The folder of one preparation, held by one process at a time. Use as a context."""

    def __init__(self, out: Path, identity: Identity) -> None:
        self.out, self.identity, self.path = out, identity, out / _WORK
        self._lock: int | None = None

    def check(self) -> bool:
        """Whether the result is there already.

        Raises FileExistsError for a folder with other content or another preparation in it.
        """
        if not self.out.exists():
            return False
        if not self.out.is_dir():
            raise FileExistsError(f"{self.out} is a file; name a folder with --out")
        names = {entry.name for entry in self.out.iterdir()}
        if names and not names & _OURS:
            raise FileExistsError(
                f"{self.out} is not empty and was not made by this command; name a new folder with --out"
            )
        finished = (self.out / MANIFEST).is_file()
        if finished:
            self._compare(Manifest.read(self.out).record.get("identity", {}))
        elif (self.path / _IDENTITY).is_file():
            noted = json.loads((self.path / _IDENTITY).read_text(encoding="utf-8"))
            self._compare(noted["identity"])
        return finished

    def _compare(self, earlier: Mapping[str, Any]) -> None:
        if earlier.get("digest") != self.identity.digest:
            raise FileExistsError(
                f"{self.out} holds data prepared with {self.identity.difference(earlier)}; "
                f"name another folder with --out, or remove it"
            )

    def __enter__(self) -> WorkFolder:
        """Take the lock; BlockingIOError if another process holds it."""
        self.out.mkdir(parents=True, exist_ok=True)
        while self._lock is None:
            handle = os.open(self.out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(handle, 32, 0).decode() or "?"
                os.close(handle)
                raise BlockingIOError(
                    f"another process (pid {holder}) is preparing data into {self.out}; wait for it or stop it"
                ) from error
            # Its last holder may have removed the file between the two calls.
            if (self.out / _LOCK).exists() and os.path.samestat(
                os.fstat(handle), os.stat(self.out / _LOCK)
            ):
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                self._lock = handle
            else:
                os.close(handle)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        (self.out / _LOCK).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def begin(self, unit_bytes: int) -> None:
        """Make the folders and note what is being prepared; results of another division of labour go."""
        noted = self.path / _IDENTITY
        if noted.exists():
            if json.loads(noted.read_text(encoding="utf-8"))["unit_bytes"] == unit_bytes:
                return
            self.remove()
        for name in ("clean", "selection", "groups", "shards"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        content = {"identity": self.stored_identity(), "unit_bytes": unit_bytes}
        write_whole(noted, json.dumps(content))

    def stored_identity(self) -> dict[str, Any]:
        """The identity as manifest.json keeps it."""
        return {"digest": self.identity.digest, "settings": dict(self.identity.settings)}

    def remove(self) -> None:
        """Remove the intermediate results."""
        shutil.rmtree(self.path, ignore_errors=True)

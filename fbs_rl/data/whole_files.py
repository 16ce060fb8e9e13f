"""Files that appear whole or not at all.

Until then each has a name of its writer's own, so that a worker that outlives its interrupted run cannot
spoil the next one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name when the block ends without an error."""
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def partial_name(path: str | Path) -> Path:
    """A name beside `path` that no other writer uses."""
    return Path(f"{path}.{uuid.uuid4().hex[:8]}.partial")

"""Small inputs for the tests of data preparation: real documents, files of every kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fbs_rl.data.samples import load_sample
from tests.small_tokenizer import saveable_tokenizer


def texts(lang: str, count: int) -> list[str]:
    """Real documents, different from one another."""
    return [d.text for split in ("train", "heldout") for d in load_sample(lang, split)][:count]


def tokenizer_folder(folder: Path) -> str:
    """A saved byte-level tokenizer with an end token, quick to load."""
    saveable_tokenizer().save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """One row a line: objects as JSON, strings and bytes as they are."""
    lines = []
    for row in rows:
        line = row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False)
        lines.append(line if isinstance(line, bytes) else line.encode())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def result_digests(folder: Path) -> dict[str, str]:
    """sha256 of the manifest and of every shard file."""
    files = [folder / "manifest.json", *folder.glob("*/*.npy")]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }

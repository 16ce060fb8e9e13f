"""manifest.json: what a folder of shards holds, file by file, and how it came about.

The manifest is written last and in one rename: a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fbs_rl.data.whole_files import write_whole

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "heldout")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a shard. name: path inside the folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: `sequences` rows, in three files. documents: those that start in it."""

    sequences: int
    tokens: int
    documents: int
    chinese_tokens: int
    ids: FileEntry
    marks: FileEntry
    rows: FileEntry

    @classmethod
    def of(cls, described: dict[str, Any]) -> ShardEntry:
        """The entry that `asdict` made this of."""
        ids, marks, rows = (FileEntry(**described.pop(name)) for name in ("ids", "marks", "rows"))
        return cls(**described, ids=ids, marks=marks, rows=rows)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (self.ids, self.marks, self.rows)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json says.

    vocabulary: number of token ids. tokenizer: the name it was asked for by. tokenizer_digest: sha256 of its
    definition. end_token_id: closes every document. record: how the shards were made (configuration, inputs,
    what each filter removed, example rows); nothing in it is needed to read them.
    """

    sequence_tokens: int
    vocabulary: int
    tokenizer: str
    tokenizer_digest: str
    end_token_id: int
    splits: Mapping[str, tuple[ShardEntry, ...]]
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """sha256 over the names and digests of all shard files."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            for file in (file for shard in self.splits[split] for file in shard.files):
                digest.update(f"{file.name} {file.sha256}\n".encode())
        return digest.hexdigest()

    def write(self, folder: Path) -> None:
        """Write manifest.json, whole or not at all."""
        splits = {
            split: {
                "sequences": sum(shard.sequences for shard in shards),
                "tokens": sum(shard.tokens for shard in shards),
                "documents": sum(shard.documents for shard in shards),
                "chinese_tokens": sum(shard.chinese_tokens for shard in shards),
                "shards": [asdict(shard) for shard in shards],
            }
            for split, shards in self.splits.items()
        }
        content = {
            "format": FORMAT,
            "digest": self.digest,
            "sequence_tokens": self.sequence_tokens,
            "vocabulary": self.vocabulary,
            "tokenizer": self.tokenizer,
            "tokenizer_digest": self.tokenizer_digest,
            "end_token_id": self.end_token_id,
            "splits": splits,
            **self.record,
        }
        write_whole(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`; FileNotFoundError or ValueError, in one sentence, if there is none to read."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {MANIFEST}; give a folder that "
                f"`python -m fbs_rl.data prepare ... --out DIR` has finished"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            return cls._of(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be used ({error}); prepare the data again") from error

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Manifest:
        splits = {
            split: tuple(ShardEntry.of(shard) for shard in described["shards"])
            for split, described in content.pop("splits").items()
        }
        names = ("sequence_tokens", "vocabulary", "tokenizer", "tokenizer_digest", "end_token_id")
        read = {name: content.pop(name) for name in names}
        stated = content.pop("digest")
        content.pop("format")
        manifest = cls(**read, splits=splits, record=content)
        if manifest.digest != stated:
            raise ValueError("its digest does not match what it lists")
        return manifest


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Which files a user's word means, and what their paths say about the questions in them.

A word is a file, a folder, a pattern, or hf:OWNER/NAME[/PATTERN] for a data set of the Hugging Face hub.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fbs_rl.data import hub
from fbs_rl.data.readers import COMPRESSIONS, Format, format_of

SPLITS = {
    "dev": "dev",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "train": "train",
    "auxiliary_train": "auxiliary_train",
}
"""Names of splits in paths, and what each is called here."""
SETS = ("mmlu", "cmmlu", "ceval", "cmath", "gsm8k")
_SET = re.compile(rf"(c-?eval|{'|'.join(SETS)})([-_](exam|data|no_train|{'|'.join(SPLITS)}))?")
_SAYS_NOTHING = ("", "all", "data", "default", "main")
_SHARD = re.compile(r"(-\d+-of-\d+|^\d+)$")
_TRAILING_PARTS = 4


@dataclass(frozen=True, slots=True)
class Place:
    """What a path says: the set's name, subject and split, each "" if nothing."""

    source: str
    subject: str
    split: str

    @classmethod
    def of(cls, path: PurePosixPath) -> Place:
        """By folders and name: `mmlu/dev/anatomy_dev.csv`, `cmmlu/agronomy/dev/0000.parquet`, ..."""
        stem = _SHARD.sub("", path.name.split(".")[0])
        head, _, tail = stem.rpartition("_")
        if stem in SPLITS:
            subject, split = "", SPLITS[stem]
        elif head and tail in SPLITS:
            subject, split = head, SPLITS[tail]
        else:
            subject, split = stem, ""
        folders = [part for part in reversed(path.parts[:-1]) if part not in _SAYS_NOTHING]
        source = next((name for part in (*folders, stem) if (name := _set_name(part))), "")
        for part in folders:
            if part in SPLITS:
                split = split or SPLITS[part]
                continue
            if not subject and not _set_name(part) and source:
                subject = part
            source = source or part
            break
        if _set_name(subject) or not (source or split):
            subject, source = "", source or subject
        return cls(source, subject, split)


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """A file on this machine. name: as the manifest calls it. place: what its path says."""

    path: str
    name: str
    place: Place


def find_files(word: str) -> list[QuestionFile]:
    """The files that the word means, in order of their names.

    Raises FileNotFoundError, ValueError or OSError in one sentence.
    """
    if word.startswith(hub.PREFIX):
        return [_of_hub(path, name) for path, name in hub.download(word)]
    path = Path(word).expanduser()
    if path.is_dir():
        inside = (found.relative_to(path) for found in sorted(path.rglob("*")) if found.is_file())
        found = [
            _local(path / part, path)
            for part in inside
            if is_table(part) and not any(name.startswith(".") for name in part.parts)
        ]
        if not found:
            raise FileNotFoundError(f"the folder {word} holds no .csv, .jsonl or .parquet file")
        return found
    if path.is_file():
        return [_local(path, None)]
    if glob.has_magic(word):
        names = sorted(n for n in glob.glob(str(path), recursive=True) if Path(n).is_file())
        if not names:
            raise FileNotFoundError(f"no file matches {word}")
        return [_local(Path(name), None) for name in names]
    hint = f" (for a data set of the hub write {hub.PREFIX}{word})" if word.count("/") == 1 else ""
    raise FileNotFoundError(f"there is no file or folder {word}{hint}")


def is_table(path: str | Path) -> bool:
    """Whether a folder's file of this name holds rows: CSV, JSONL or Parquet (a .json is often something else)."""
    if csv_compression(path) is not None:
        return True
    try:
        kind, compression = format_of(path)
    except ValueError:
        return False
    name = Path(path).name.lower().removesuffix(compression)
    return kind is not Format.TEXT and not name.endswith(".json")


def csv_compression(path: str | Path) -> str | None:
    """Compression ("", ".gz", ".zst") of a CSV file by its name; None for another kind."""
    name = Path(path).name.lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(c)), "")
    return compression if name.removesuffix(compression).endswith(".csv") else None


def _of_hub(path: str, name: str) -> QuestionFile:
    repository, _, inside = name.removeprefix(hub.PREFIX).partition("@")
    inside = inside.partition("/")[2]  # after the commit
    return QuestionFile(path, name, Place.of(PurePosixPath(repository.split("/")[1], inside)))


def _local(path: Path, folder: Path | None) -> QuestionFile:
    """folder: the one that was named; what is above its parent says nothing."""
    whole = PurePosixPath(path.resolve().as_posix())
    depth = _TRAILING_PARTS if folder is None else len(path.relative_to(folder).parts) + 2
    return QuestionFile(str(path), str(path), Place.of(PurePosixPath(*whole.parts[-depth:])))


def _set_name(part: str) -> str:
    found = _SET.fullmatch(part.lower())
    return found[1].replace("-", "") if found else ""

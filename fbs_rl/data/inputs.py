"""What a user's INPUT words mean, checked by a first look into every file, and cut into units of work."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from fbs_rl.data import hub
from fbs_rl.data.prepare_config import RowConfig
from fbs_rl.data.readers import (
    COMPRESSIONS,
    DAMAGED,
    EXTENSIONS,
    Format,
    Piece,
    PieceReader,
    format_of,
    open_binary,
)

UNIT_BYTES = 2**26
"""Bytes of input in one unit of work. Nothing in the result depends on it."""
_COMPRESSED_GAIN = 4  # guess of how much larger compressed text becomes
_PEEKED_ROWS = 20
_SAMPLES, _SAMPLE_BYTES = 16, 2**16


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read. name: as the manifest will call it. text_field: "" in plain text."""

    path: str
    name: str
    bytes: int
    fingerprint: str
    text_field: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Work for one task. first_piece: number of its first piece among all pieces, in input order."""

    number: int
    first_piece: int
    pieces: tuple[Piece, ...]
    input_bytes: int


def fingerprint(path: str) -> str:
    """blake2b of the size and of 16 blocks spread over the file.

    Limit: an edit that keeps the size and misses the blocks is not seen.
    """
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def find_inputs(
    words: Sequence[str], config: RowConfig, out: Path | None = None
) -> list[InputFile]:
    """The files that the words mean, in their order, each once.

    A word is a file, a folder (all known files below it), a pattern, or hf:OWNER/NAME[/PATTERN] for a data set
    of the Hugging Face hub. Files below `out`, the output folder, are left out of folders and patterns.

    Raises FileNotFoundError, ValueError or OSError in one sentence.
    """
    if not words:
        raise ValueError("no input was given; name files, folders, patterns or hf:OWNER/NAME")
    named = [pair for word in words for pair in _outside(out, word, _expand(word))]
    once: dict[str, tuple[str, str]] = {}
    for path, name in named:
        once.setdefault(os.path.realpath(path), (path, name))
    return [_look_into(path, name, config) for path, name in once.values()]


def _outside(out: Path | None, word: str, named: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if out is None or not out.is_dir():
        return named
    kept = [(p, name) for p, name in named if not Path(p).resolve().is_relative_to(out.resolve())]
    if named and not kept:
        raise ValueError(f"the input {word} is in the output folder {out}; name another --out")
    return kept


def _expand(word: str) -> list[tuple[str, str]]:
    if word.startswith(hub.PREFIX):
        return hub.download(word)
    path = Path(word).expanduser()
    if path.is_dir():
        found = [str(p) for p in sorted(path.rglob("*")) if p.is_file() and _known(p, path)]
        if not found:
            raise FileNotFoundError(
                f"the folder {word} holds no file with a known extension ({', '.join(EXTENSIONS)}, "
                f"and {' or '.join(COMPRESSIONS)} after them)"
            )
        return [(name, name) for name in found]
    if path.is_file():
        return [(str(path), word)]
    if glob.has_magic(word):
        found = sorted(
            name for name in glob.glob(str(path), recursive=True) if Path(name).is_file()
        )
        if not found:
            raise FileNotFoundError(f"no file matches {word}")
        return [(name, name) for name in found]
    hint = f" (for a data set of the hub write {hub.PREFIX}{word})" if word.count("/") == 1 else ""
    raise FileNotFoundError(f"there is no file {word}{hint}")


def _known(path: Path, below: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(below).parts)
    try:
        format_of(path)
    except ValueError:
        return False
    return not hidden


def _look_into(path: str, name: str, config: RowConfig) -> InputFile:
    kind, compression = format_of(path)
    size = os.path.getsize(path)
    if compression and size == 0:
        raise ValueError(f"{path} is empty, which no {compression} file is; get it again")
    if kind is Format.PARQUET:
        field = _parquet_field(path, config)
    elif kind is Format.JSONL:
        field = _json_field(path, config)
    else:
        field = ""
        if config.plain_text_split == "file" and not compression and size > config.max_bytes:
            raise ValueError(
                f"{path} is one document of {size} bytes, more than rows.max_bytes; "
                f"set rows.plain_text_split to blank_line or line"
            )
    return InputFile(path, name, size, fingerprint(path), field)


def _json_field(path: str, config: RowConfig) -> str:
    """The text field of the first row that has one of those asked for."""
    seen: dict[str, None] = {}
    _, compression = format_of(path)
    # Damage further on is found when the file is read.
    try:
        with open_binary(path, compression) as file:
            for line in islice(iter(lambda: file.readline(config.max_bytes), b""), _PEEKED_ROWS):
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, list) and path.lower().endswith(".json"):
                    raise ValueError(
                        f"{path} is one JSON array; write one object a line, for example with jq -c '.[]'"
                    )
                if isinstance(row, dict):
                    found = next((name for name in config.text_fields if name in row), None)
                    if found is not None:
                        return found
                    seen |= dict.fromkeys(map(str, row))
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); get the file again") from error
    if seen:
        raise ValueError(
            f"{path} has no text field: its rows have {', '.join(islice(seen, 12))}; "
            f"name one with rows.text_fields"
        )
    return config.text_fields[0]


def _parquet_field(path: str, config: RowConfig) -> str:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        schema = parquet.read_schema(path)
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path} cannot be read as Parquet ({reason}); get the file again"
        ) from error
    field = next((name for name in config.text_fields if name in schema.names), None)
    if field is None:
        raise ValueError(
            f"{path} has no text column: it has {', '.join(schema.names[:12])}; name one with rows.text_fields"
        )
    kind = schema.field(field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise ValueError(f"the column {field} of {path} holds {kind}, not text; name another one")
    return field


def plan_units(files: Sequence[InputFile], unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes`, in input order: large files are divided, small ones put together."""
    units: list[Unit] = []
    gathered: list[Piece] = []
    weight = read = first = 0
    for piece, piece_weight, piece_bytes in (p for f in files for p in _pieces(f, unit_bytes)):
        if gathered and weight + piece_weight > unit_bytes:
            units.append(Unit(len(units), first, tuple(gathered), read))
            first, gathered, weight, read = first + len(gathered), [], 0, 0
        gathered.append(piece)
        weight += piece_weight
        read += piece_bytes
    if gathered:
        units.append(Unit(len(units), first, tuple(gathered), read))
    return units


def _pieces(file: InputFile, unit_bytes: int) -> Iterator[tuple[Piece, int, int]]:
    """Pieces of a file, each with the bytes it will probably hold and the bytes it takes on disk."""
    kind, compression = format_of(file.path)
    whole = Piece(file.path, 0, file.bytes, file.text_field)
    if kind is Format.PARQUET:
        groups = list(_row_groups(whole, unit_bytes))
        total = max(1, sum(weight for _, weight in groups))
        yield from ((piece, weight, file.bytes * weight // total) for piece, weight in groups)
    elif kind is Format.JSONL and not compression:
        for start in range(0, file.bytes, unit_bytes):
            end = min(start + unit_bytes, file.bytes)
            yield replace(whole, start=start, end=end), end - start, end - start
    else:
        yield whole, file.bytes * (_COMPRESSED_GAIN if compression else 1), file.bytes


def _row_groups(whole: Piece, unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    import pyarrow.parquet as parquet

    metadata = parquet.read_metadata(whole.path)
    start = weight = first_row = rows = 0
    for group in range(metadata.num_row_groups):
        described = metadata.row_group(group)
        size = described.total_byte_size
        if group > start and weight + size > unit_bytes:
            yield replace(whole, start=start, end=group, first_row=first_row), weight
            start, weight, first_row = group, 0, rows
        weight, rows = weight + size, rows + described.num_rows
    yield replace(whole, start=start, end=metadata.num_row_groups, first_row=first_row), weight


def sample_text(file: InputFile, config: RowConfig, chars: int) -> str:
    """The first texts of a file, `chars` or a little more."""
    texts: list[str] = []
    for row in islice(PieceReader(next(_pieces(file, 2**62))[0], config), 1000):
        texts.append(row.text or "")
        if sum(map(len, texts)) >= chars:
            break
    return "\n".join(texts)[: 2 * chars]

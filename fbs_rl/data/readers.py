"""Rows of input files, one at a time, whatever the format, in bounded memory.

A piece is the part of a file that is read in one go: a byte range of plain JSONL, row groups of Parquet,
all of a compressed or plain text file. A row that cannot be used comes out with its `problem`; a file that
cannot be read to its end is an error.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, cast

import zstandard

from fbs_rl.data.prepare_config import RowConfig

_BLOCK = 2**20
_MAX_ZSTD_WINDOW = 2**31  # files made with `zstd --long=31`


class Format(StrEnum):
    JSONL = "jsonl"
    PARQUET = "parquet"
    TEXT = "text"


EXTENSIONS = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".txt": Format.TEXT,
    ".text": Format.TEXT,
    ".md": Format.TEXT,
}
COMPRESSIONS = (".gz", ".zst")
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What reading a compressed file raises that is broken or cut off."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a file. start, end: bytes of plain JSONL, row groups of Parquet, else 0 and the file's size.

    text_field: where the text is; "" in plain text. first_row: rows of the file before this piece, where
    that is known without reading (Parquet).
    """

    path: str
    start: int
    end: int
    text_field: str
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One row. line: from 1 within the piece. text is None where there is a problem."""

    line: int
    text: str | None
    problem: str = ""
    source: str = ""


def format_of(path: str | Path) -> tuple[Format, str]:
    """Format and compression ("", ".gz" or ".zst") by the file's name; ValueError for an unknown one."""
    name = Path(path).name.lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(c)), "")
    kind = EXTENSIONS.get(Path(name.removesuffix(compression)).suffix)
    if kind is None or (kind is Format.PARQUET and compression):
        raise ValueError(
            f"{path} has an unknown extension; known are {', '.join(EXTENSIONS)}, "
            f"and {' or '.join(COMPRESSIONS)} after them"
        )
    return kind, compression


class PieceReader:
    """The rows of one piece. `lines` is how many it has, once they have all been read."""

    def __init__(self, piece: Piece, config: RowConfig) -> None:
        self.piece, self.config, self.lines = piece, config, 0

    def __iter__(self) -> Iterator[Row]:
        """Raises ValueError, naming the file, when its compression is damaged or cut off."""
        kind, compression = format_of(self.piece.path)
        if kind is Format.PARQUET:
            yield from self._parquet_rows()
            return
        try:
            with open_binary(self.piece.path, compression) as file:
                rows = self._json_rows(file) if kind is Format.JSONL else self._text_rows(file)
                yield from rows
        except DAMAGED as error:
            raise ValueError(
                f"{self.piece.path} is damaged or cut off after line {self.lines} ({error}); get the file again"
            ) from error

    def _lines(self, file: BinaryIO) -> Iterator[bytes | None]:
        """Lines that start inside the piece; None for one longer than the limit."""
        position = self.piece.start
        if position:
            file.seek(position - 1)
            position += sum(map(len, _rest_of_line(file))) - 1
        limited = not file_is_compressed(self.piece.path)
        while not limited or position < self.piece.end:
            line = file.readline(self.config.max_bytes)
            if not line:
                return
            position += len(line)
            self.lines += 1
            if len(line) == self.config.max_bytes and not line.endswith(b"\n"):
                position += sum(map(len, _rest_of_line(file)))
                yield None
            else:
                yield line

    def _json_rows(self, file: BinaryIO) -> Iterator[Row]:
        for line in self._lines(file):
            if line is None:
                yield Row(self.lines, None, f"longer than {self.config.max_bytes} bytes")
            elif not line.isspace():
                yield self._json_row(line)

    def _json_row(self, line: bytes) -> Row:
        try:
            row = json.loads(line.decode("utf-8-sig" if self.lines == 1 else "utf-8"))
        except UnicodeDecodeError:
            return Row(self.lines, None, "not UTF-8")
        except (ValueError, RecursionError) as error:
            return Row(self.lines, None, f"not JSON ({_brief(error)})")
        if not isinstance(row, dict):
            return Row(self.lines, None, f"not a JSON object but {_kind(row)}")
        if self.piece.text_field not in row:
            return Row(self.lines, None, f"no field {self.piece.text_field!r}")
        return self._row(row[self.piece.text_field], row.get(self.config.source_field))

    def _row(self, text: object, source: object) -> Row:
        if not isinstance(text, str):
            return Row(
                self.lines, None, f"field {self.piece.text_field!r} is not text but {_kind(text)}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            return Row(self.lines, None, "half a surrogate pair, which no UTF-8 text can hold")
        return Row(self.lines, text, source=source if isinstance(source, str) else "")

    def _text_rows(self, file: BinaryIO) -> Iterator[Row]:
        split = self.config.plain_text_split
        if split == "file":
            content = file.read(self.config.max_bytes + 1)
            self.lines = 1
            if len(content) > self.config.max_bytes:
                raise ValueError(
                    f"{self.piece.path} is one document of more than {self.config.max_bytes} bytes; "
                    f"set rows.plain_text_split to blank_line or line"
                )
            yield self._decoded(content, 1)
            return
        block, first = b"", 1
        for line in self._lines(file):
            if line is None or len(block) + len(line) > self.config.max_bytes:
                yield Row(self.lines, None, f"longer than {self.config.max_bytes} bytes")
                block = b""
                continue
            if split == "line" or line.isspace():
                block = line if split == "line" else block
                if block.strip():
                    yield self._decoded(block, self.lines if split == "line" else first)
                block = b""
                continue
            first = first if block else self.lines
            block += line
        if block.strip():
            yield self._decoded(block, first)

    def _decoded(self, content: bytes, line: int) -> Row:
        try:
            return Row(line, content.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError:
            return Row(line, None, "not UTF-8")

    def _parquet_rows(self) -> Iterator[Row]:
        # pyarrow takes most of a second to import, and most inputs are not Parquet.
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(self.piece.path) as file:
                columns = [self.piece.text_field]
                if self.config.source_field in file.schema_arrow.names:
                    columns.append(self.config.source_field)
                groups = range(self.piece.start, self.piece.end)
                for batch in file.iter_batches(256, row_groups=groups, columns=columns):
                    yield from self._batch_rows(batch)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{self.piece.path} cannot be read as Parquet after row {self.piece.first_row + self.lines} "
                f"({_brief(error)}); get the file again"
            ) from error

    def _batch_rows(self, batch: Any) -> Iterator[Row]:
        texts = batch.column(0).to_pylist()
        sources = batch.column(1).to_pylist() if batch.num_columns > 1 else [""] * len(texts)
        for text, source in zip(texts, sources, strict=True):
            self.lines += 1
            yield self._row(text, source)


def file_is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSIONS)


def open_binary(path: str, compression: str) -> BinaryIO:
    """The file's bytes, decompressed; reading raises EOFError where a compressed file is cut off."""
    if compression == ".gz":
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(path, "rb"), _BLOCK))
    file = Path(path).open("rb", buffering=_BLOCK)  # noqa: SIM115 - the caller closes what it is given
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(file), _BLOCK))
    return file


def expansion(path: str, compression: str) -> float:
    """Bytes of content for each byte of a compressed file, from its first megabyte; 1 for a plain one."""
    if not compression:
        return 1.0
    with Path(path).open("rb") as packed:
        content = gzip.GzipFile(fileobj=packed) if compression == ".gz" else _ZstdFile(packed)
        with io.BufferedReader(cast(io.RawIOBase, content), _BLOCK) as reader:
            return len(reader.read(_BLOCK)) / max(1, packed.tell())


class _ZstdFile(io.RawIOBase):
    """All frames of a zst file. (zstandard's own stream reader ends silently where a frame is cut off.)"""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._ready = file, memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._decompress_more():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress_more(self) -> bool:
        """Fill `_ready`; False at the end of the file."""
        rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        # Small blocks: one of highly repetitive text unpacks to thousands of times its size.
        block = rest or self._file.read(2**14)
        if not block:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("it ends inside a zstd frame")
            return False
        if self._frame is None or self._frame.eof:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
            self._frame = decompressor.decompressobj()
        self._ready = memoryview(self._frame.decompress(block))
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _rest_of_line(file: BinaryIO) -> Iterator[bytes]:
    while block := file.readline(_BLOCK):
        yield block
        if block.endswith(b"\n"):
            return


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        NoneType: "null",
        bool: "true or false",
    }
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else "something else"
    )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]

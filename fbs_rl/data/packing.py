"""Token streams cut into rows of fixed length.

Documents stand one after another, each closed by the end token, and the stream is cut every
`sequence_tokens`. A document that a cut divides goes on in the next row as a document of its own: its
context is gone. Row k is tokens [k*T, (k+1)*T) of the stream, so a range of rows can be packed without
the others, and no boundary depends on who packs it.

Per token one `mark` byte is kept beside the id: bits 0-2 the BIOS class (7: none), bit 3 "starts a
document", bit 4 "padding". Per row, coverage and the share of Chinese tokens.

Letters: N tokens of a stream, B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fbs_rl.data.chunk_labels import coverage_frac
from fbs_rl.types import IGNORED_LABEL

NO_LABEL, STARTS, PADDING = 7, 8, 16
_LABEL_BITS = 7
NO_CLAUSE = -1
_LABEL_OF_CODE = np.array([0, 1, 2, 3] + [IGNORED_LABEL] * 4, dtype=np.int8)


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Consecutive tokens. mark_N: see the module. clause_N: number of the Chinese span, -1 outside one."""

    id_N: np.ndarray
    mark_N: np.ndarray
    clause_N: np.ndarray

    def __post_init__(self) -> None:
        assert self.id_N.shape == self.mark_N.shape == self.clause_N.shape

    def __len__(self) -> int:
        return len(self.id_N)

    def part(self, start: int, end: int) -> TokenStream:
        """Tokens [start, end)."""
        return TokenStream(self.id_N[start:end], self.mark_N[start:end], self.clause_N[start:end])


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows as they are stored. row_B2: coverage (NaN without Chinese) and share of Chinese tokens."""

    id_BT: np.ndarray
    mark_BT: np.ndarray
    row_B2: np.ndarray


def document_stream(
    ids: Sequence[int] | np.ndarray, labels_N: np.ndarray, clause_N: np.ndarray, end_token_id: int
) -> TokenStream:
    """One document as a stream: its tokens and the end token, the first one marked as a start."""
    id_N = np.append(np.asarray(ids, dtype=np.uint32), np.uint32(end_token_id))
    code_N = np.where(labels_N == IGNORED_LABEL, NO_LABEL, labels_N).astype(np.uint8)
    mark_N = np.append(code_N, np.uint8(NO_LABEL))
    mark_N[0] |= STARTS
    return TokenStream(id_N, mark_N, np.append(clause_N, NO_CLAUSE).astype(np.int32))


def join_streams(streams: Sequence[TokenStream]) -> TokenStream:
    """The streams one after another. Clause numbers may repeat: adjacent documents differ by the end token."""
    if not streams:
        return TokenStream(np.zeros(0, np.uint32), np.zeros(0, np.uint8), np.zeros(0, np.int32))
    return TokenStream(
        np.concatenate([stream.id_N for stream in streams]),
        np.concatenate([stream.mark_N for stream in streams]),
        np.concatenate([stream.clause_N for stream in streams]),
    )


def pack_rows(stream: TokenStream, sequence_tokens: int, end_token_id: int) -> RowBlock:
    """The stream cut into rows; the last one is filled up with padding (the end token, marked)."""
    rows = -(-len(stream) // sequence_tokens)
    missing = rows * sequence_tokens - len(stream)
    shape = (rows, sequence_tokens)
    id_BT = np.pad(stream.id_N, (0, missing), constant_values=end_token_id).reshape(shape)
    filler = NO_LABEL | PADDING
    mark_BT = np.pad(stream.mark_N, (0, missing), constant_values=filler).reshape(shape)
    clause_BT = np.pad(stream.clause_N, (0, missing), constant_values=NO_CLAUSE).reshape(shape)
    mark_BT[:, 0] |= STARTS
    return RowBlock(id_BT, mark_BT, _row_measures(mark_BT, clause_BT))


def _row_measures(mark_BT: np.ndarray, clause_BT: np.ndarray) -> np.ndarray:
    label_BT = _LABEL_OF_CODE[mark_BT & _LABEL_BITS]
    chinese_BT = label_BT != IGNORED_LABEL
    filled_B = np.count_nonzero(mark_BT & PADDING == 0, axis=1)
    row_B2 = np.empty((len(mark_BT), 2), dtype=np.float32)
    row_B2[:, 0] = np.nan
    row_B2[:, 1] = np.count_nonzero(chinese_BT, axis=1) / filled_B
    for row in np.flatnonzero(chinese_BT.any(axis=1)):
        row_B2[row, 0] = coverage_frac(label_BT[row], clause_BT[row])
    return row_B2


def labels_of(mark_BT: np.ndarray) -> np.ndarray:
    """int64 BIOS classes, IGNORED_LABEL where there is none."""
    return _LABEL_OF_CODE[mark_BT & _LABEL_BITS].astype(np.int64)


def documents_of(mark_BT: np.ndarray) -> np.ndarray:
    """int32 number of each token's document within its row, from 0; -1 for padding."""
    number_BT = np.cumsum(mark_BT & STARTS != 0, axis=1, dtype=np.int32) - 1
    return np.where(mark_BT & PADDING != 0, np.int32(-1), number_BT)

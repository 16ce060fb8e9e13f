"""The Chunk-Head's memory while vLLM serves: open and closed chunks of every request, by request row.

Chunks of a step's tokens follow from the boundary labels alone, so they are worked out once, on the host;
chunk layers then add their summaries. The closing rule is that of fbs_rl.model.chunk_head.

Letters: N tokens of a step, R requests, C places in a ring of closed chunks, M chunks that a step closes for
one request, W chunk width, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fbs_rl.model.chunk_head import ChunkReader, bias_columns
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.types import B_LABEL, I_LABEL


@dataclass(slots=True)
class _Span:
    """The tokens of one request in a step that holds more than one token of some request.

    first: index of the first. chunk_T: each token's chunk, counted from the request's first one.
    visible_T: chunks closed before the token. open_size: tokens of the chunk that was open before.
    """

    row: int
    first: int
    chunk_T: np.ndarray
    visible_T: np.ndarray
    open_size: int
    _placed: _Placed | None = None

    @property
    def closed(self) -> int:
        """Chunks closed before the step."""
        return int(self.visible_T[0])

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + len(self.chunk_T))

    def placed(self, config: FBSConfig, device: torch.device) -> _Placed:
        """Worked out by the first reader, the same for all: to bring numbers to the device waits for it."""
        if self._placed is None:
            self._placed = _Placed.of(self, config, device)
        return self._placed


@dataclass(frozen=True, slots=True)
class _Placed:
    """Of the M chunks that a span closes, and of the open one behind them.

    own_T: each token's, from 0 on. size_M1: tokens of each. kept, kept_at: those that stay, and their places in the
    ring. old_at: places of the chunks closed before that are still there. column_1TN: as in bias_columns, of those
    and the M.
    """

    own_T: Tensor
    size_M1: Tensor
    kept: Tensor
    kept_at: Tensor
    old_at: Tensor
    column_1TN: Tensor

    @classmethod
    def of(cls, span: _Span, config: FBSConfig, device: torch.device) -> _Placed:
        cap, own_T = config.chunk_cache, span.chunk_T - span.closed
        finished = int(own_T[-1])
        size_M = np.bincount(own_T, minlength=finished + 1)
        size_M[0] += span.open_size
        own, size, visible = (
            torch.from_numpy(x).to(device) for x in (own_T, size_M[:finished], span.visible_T)
        )
        kept = torch.arange(max(0, finished - cap), finished, device=device)
        oldest = max(0, span.closed - cap)
        chunk_N = torch.arange(oldest, span.closed + finished, device=device)
        distance_1TN = (visible.unsqueeze(-1) - 1 - chunk_N).unsqueeze(0)
        in_reach_1TN = (distance_1TN >= 0) & (distance_1TN < cap)
        column = bias_columns(distance_1TN, in_reach_1TN, config.chunk_distance_buckets, cap)
        old_at = torch.arange(oldest, span.closed, device=device) % cap
        return cls(own, size.unsqueeze(-1), kept, (span.closed + kept) % cap, old_at, column)


@dataclass(slots=True)
class _Singles:
    """A decode step: one token of each request.

    used: places of the rings that any request has written. column_R1C: as in bias_columns. written_RC1:
    which places a request has written (None: all). done_M: requests whose open chunk closes, with its row_M,
    place_M and size_M1. kept_R1: 0 where a chunk begins, else 1.
    """

    row_R: Tensor
    used: int
    column_R1C: Tensor
    written_RC1: Tensor | None
    row_M: Tensor
    place_M: Tensor
    size_M1: Tensor
    kept_R1: Tensor


@dataclass(slots=True)
class ChunkStep:
    """What one step's tokens do to the chunks. closes_N: the token closes one. visible_N: closed before it."""

    closes_N: np.ndarray
    visible_N: np.ndarray
    spans: list[_Span]
    singles: _Singles | None = None


class ChunkRows:
    """Rings of closed chunks and sums of open ones for each chunk layer, growing with the rows in use."""

    def __init__(self, config: FBSConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.rows = 0
        self.closed = torch.zeros(0, dtype=torch.int64, device=device)
        self.open_size = self.closed.clone()
        self.continuable = (
            self.closed.bool()
        )  # the open chunk began with a B: an I would continue it
        self.key: dict[int, Tensor] = {}
        self.value: dict[int, Tensor] = {}
        self.open_sum: dict[int, Tensor] = {}

    def reserve(self, rows: int) -> bool:
        """Make room for this many requests. True if that took other memory."""
        if rows <= self.rows:
            return False
        grown = max(rows, 2 * self.rows, 8)
        for name in ("closed", "open_size", "continuable"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(grown - self.rows)]))
        # The place behind a ring takes what nobody reads (FixedChunks).
        shape = (grown - self.rows, self.config.chunk_cache + 1, self.config.chunk_width)
        for layer in self.config.reader_layers:
            # NaN: what was never written must never be read.
            new = torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)
            sums = torch.zeros(
                shape[0], self.config.hidden_size, dtype=torch.float32, device=self.device
            )
            for table, more in ((self.key, new), (self.value, new.clone()), (self.open_sum, sums)):
                table[layer] = torch.cat([table[layer], more]) if layer in table else more
        self.rows = grown
        return True

    def reset(self, row: int) -> None:
        """A request begins, or begins again, in this row."""
        self.closed[row] = self.open_size[row] = 0
        self.continuable[row] = False
        for sums in self.open_sum.values():
            sums[row] = 0

    def advance(self, row_R: np.ndarray, length_R: np.ndarray, label_N: np.ndarray) -> ChunkStep:
        """Apply the closing rule to a step's tokens and count their chunks."""
        if (length_R == 1).all():
            return self._advance_singles(row_R, label_N)
        spans: list[_Span] = []
        first = 0
        for row, length in zip(row_R.tolist(), length_R.tolist(), strict=True):
            spans.append(self._advance_row(row, first, label_N[first : first + length].tolist()))
            first += length
        visible_N = np.concatenate([span.visible_T for span in spans])
        return ChunkStep(
            np.concatenate([span.chunk_T for span in spans]) > visible_N, visible_N, spans
        )

    def _advance_row(self, row: int, first: int, labels: list[int]) -> _Span:
        closed, size = int(self.closed[row]), int(self.open_size[row])
        continuable, open_size = bool(self.continuable[row]), int(self.open_size[row])
        chunk, visible = [], []
        for label in labels:
            visible.append(closed)
            if label != I_LABEL or not continuable:
                closed, size = closed + (size > 0), 0
                continuable = label == B_LABEL
            size += 1
            chunk.append(closed)
        self.closed[row], self.open_size[row], self.continuable[row] = closed, size, continuable
        return _Span(row, first, np.array(chunk), np.array(visible), open_size)

    def _advance_singles(self, row_R: np.ndarray, label_R: np.ndarray) -> ChunkStep:
        row, cap = self._tensor(row_R), self.config.chunk_cache
        step = SingleTokens.of(self, row, self._tensor(label_R))
        closes_R, closed_R = step.closes_R.cpu().numpy(), step.closed_R.cpu().numpy()
        used, done_M = min(int(closed_R.max()), cap), step.closes_R.nonzero()[:, 0]
        singles = _Singles(
            row,
            used,
            step.columns(self.config, used),
            step.written(used) if int(closed_R.min()) < used else None,
            row[done_M],
            step.closed_R[done_M] % cap,
            step.size_R[done_M].unsqueeze(-1),
            (~step.breaks_R).float().unsqueeze(-1),
        )
        return ChunkStep(closes_R, closed_R, [], singles)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


@dataclass(slots=True)
class SingleTokens:
    """One token of each request, and the closing rule applied to it. closed_R, size_R: before the token."""

    closed_R: Tensor
    size_R: Tensor
    breaks_R: Tensor
    closes_R: Tensor

    @classmethod
    def of(cls, rows: ChunkRows, row_R: Tensor, label_R: Tensor) -> SingleTokens:
        """Applies the rule and moves the rows on."""
        closed_R, size_R = rows.closed[row_R], rows.open_size[row_R]
        continuable_R = rows.continuable[row_R]
        breaks_R = (label_R != I_LABEL) | ~continuable_R
        closes_R = breaks_R & (size_R > 0)
        rows.closed[row_R] = closed_R + closes_R
        rows.open_size[row_R] = torch.where(breaks_R, 0, size_R) + 1
        rows.continuable[row_R] = torch.where(breaks_R, label_R == B_LABEL, continuable_R)
        return cls(closed_R, size_R, breaks_R, closes_R)

    def written(self, places: int) -> Tensor:
        """[R, C, 1]: the first places of a ring that a request has written."""
        place_C = torch.arange(places, device=self.closed_R.device)
        return (place_C < self.closed_R.unsqueeze(-1)).unsqueeze(-1)

    def columns(self, config: FBSConfig, places: int) -> Tensor:
        """[R, 1, 1 + C], as in bias_columns."""
        closed_R11 = self.closed_R.view(-1, 1, 1)
        place_C = torch.arange(places, device=closed_R11.device)
        distance_R1C = (closed_R11 - 1 - place_C) % config.chunk_cache
        buckets, reach = config.chunk_distance_buckets, config.chunk_cache
        return bias_columns(distance_R1C, place_C < closed_R11, buckets, reach)


class ChunkReading(Protocol):
    """What a layer does with the chunks in one step."""

    def read(self, index: Tensor | None) -> Tensor:
        """The addition to h̃ [N, d] of the tokens in `index` (None: all)."""
        ...

    def leave(self) -> None:
        """Put the step's tokens into the open chunks, and the chunks that they closed into the rings.

        After `read`: a full ring overwrites a chunk that the closing token still sees.
        """
        ...


class ReaderPass:
    """One chunk layer in one step: what its tokens read, and what they leave behind. Made at the layer's entry."""

    def __init__(
        self, rows: ChunkRows, layer: int, reader: ChunkReader, step: ChunkStep, normed_Nd: Tensor
    ) -> None:
        self.rows, self.layer, self.reader, self.step = rows, layer, reader, step
        self.normed_Nd = normed_Nd
        # A prompt's tokens read chunks that close within the step; a decoded token never does.
        self.made = [self._summarise(span) for span in step.spans]

    def read(self, index: Tensor | None) -> Tensor:
        if self.step.singles is not None:
            return self._read_singles(self.step.singles, index)
        parts = [
            self._read_span(span, key_MW, value_MW)
            for span, (key_MW, value_MW, _) in zip(self.step.spans, self.made, strict=True)
        ]
        addition_Nd = torch.cat(parts)
        return addition_Nd if index is None else addition_Nd[index]

    def leave(self) -> None:
        if self.step.singles is not None:
            return self._leave_singles(self.step.singles)
        for span, (key_MW, value_MW, open_d) in zip(self.step.spans, self.made, strict=True):
            placed = span.placed(self.rows.config, open_d.device)
            self.rows.key[self.layer][span.row, placed.kept_at] = key_MW[placed.kept]
            self.rows.value[self.layer][span.row, placed.kept_at] = value_MW[placed.kept]
            self.rows.open_sum[self.layer][span.row] = open_d

    # --- prompts ----------------------------------------------------------------------------------

    def _summarise(self, span: _Span) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [M, W] of the chunks that a request's tokens close, and the sum of the one left open."""
        sums = self.rows.open_sum[self.layer]
        placed = span.placed(self.rows.config, sums.device)
        finished = len(placed.size_M1)
        total_Md = torch.zeros(finished + 1, sums.shape[1], device=sums.device)
        total_Md[0] = sums[span.row]
        total_Md.index_add_(0, placed.own_T, self.normed_Nd[span.tokens].float())
        mean_Md = total_Md[:finished] / placed.size_M1
        summary_MW = self.reader.summarise(mean_Md.to(self.normed_Nd.dtype))
        return self.reader.key(summary_MW), self.reader.value(summary_MW), total_Md[finished]

    def _read_span(self, span: _Span, key_MW: Tensor, value_MW: Tensor) -> Tensor:
        placed = span.placed(self.rows.config, key_MW.device)
        key, value = (
            torch.cat((table[self.layer][span.row, placed.old_at], new_MW)).unsqueeze(0)
            for table, new_MW in ((self.rows.key, key_MW), (self.rows.value, value_MW))
        )
        normed_1Td = self.normed_Nd[span.tokens].unsqueeze(0)
        return self.reader.attend(normed_1Td, key, value, placed.column_1TN)[0]

    # --- decoded tokens ---------------------------------------------------------------------------

    def _read_singles(self, singles: _Singles, index: Tensor | None) -> Tensor:
        row_R, column, written = singles.row_R, singles.column_R1C, singles.written_RC1
        normed = self.normed_Nd
        if index is not None:
            row_R, column, normed = row_R[index], column[index], normed[index]
            written = None if written is None else written[index]
        key = self.rows.key[self.layer][row_R, : singles.used]
        value = self.rows.value[self.layer][row_R, : singles.used]
        if written is not None:
            key, value = torch.where(written, key, 0.0), torch.where(written, value, 0.0)
        return self.reader.attend(normed.unsqueeze(1), key, value, column)[:, 0]

    def _leave_singles(self, singles: _Singles) -> None:
        sums = self.rows.open_sum[self.layer]
        if len(singles.row_M):
            mean_Md = sums[singles.row_M] / singles.size_M1
            summary_MW = self.reader.summarise(mean_Md.to(self.normed_Nd.dtype))
            ring = (singles.row_M, singles.place_M)
            self.rows.key[self.layer][ring] = self.reader.key(summary_MW)
            self.rows.value[self.layer][ring] = self.reader.value(summary_MW)
        open_Rd = sums[singles.row_R]
        sums[singles.row_R] = torch.addcmul(self.normed_Nd.float(), open_Rd, singles.kept_R1)


class FixedChunks:
    """The chunks of a decode step in fixed shapes: whole rings are read, and a row that closes nothing writes
    behind its ring."""

    def __init__(self, rows: ChunkRows, row_R: Tensor, label_R: Tensor) -> None:
        self.rows, self.row_R = rows, row_R
        self.tokens = SingleTokens.of(rows, row_R, label_R)
        cap = rows.config.chunk_cache
        self.column_R1C = self.tokens.columns(rows.config, cap)
        self.written_RC1 = self.tokens.written(cap)
        self.place_R = torch.where(self.closes_R, self.closed_R % cap, cap)

    @property
    def closes_R(self) -> Tensor:
        return self.tokens.closes_R

    @property
    def closed_R(self) -> Tensor:
        return self.tokens.closed_R

    def reader(self, layer: int, reader: ChunkReader, normed_Rd: Tensor) -> ChunkReading:
        return _FixedReader(self, layer, reader, normed_Rd)


class _FixedReader:
    def __init__(
        self, chunks: FixedChunks, layer: int, reader: ChunkReader, normed_Rd: Tensor
    ) -> None:
        self.chunks, self.layer, self.reader, self.normed_Rd = chunks, layer, reader, normed_Rd

    def read(self, index: Tensor | None) -> Tensor:
        assert index is None, "a step of fixed shape reads for all rows"
        chunks, rows = self.chunks, self.chunks.rows
        cap = rows.config.chunk_cache
        key, value = (
            torch.where(chunks.written_RC1, ring[self.layer][chunks.row_R, :cap], 0.0)
            for ring in (rows.key, rows.value)
        )
        return self.reader.attend(self.normed_Rd.unsqueeze(1), key, value, chunks.column_R1C)[:, 0]

    def leave(self) -> None:
        chunks, rows = self.chunks, self.chunks.rows
        sums, tokens = rows.open_sum[self.layer], chunks.tokens
        open_Rd = sums[chunks.row_R]
        mean_Rd = open_Rd / tokens.size_R.clamp_min(1).unsqueeze(-1)
        summary_RW = self.reader.summarise(mean_Rd.to(self.normed_Rd.dtype))
        place = (chunks.row_R, chunks.place_R)
        rows.key[self.layer][place] = self.reader.key(summary_RW)
        rows.value[self.layer][place] = self.reader.value(summary_RW)
        kept_R1 = (~tokens.breaks_R).float().unsqueeze(-1)
        sums[chunks.row_R] = torch.addcmul(self.normed_Rd.float(), open_Rd, kept_R1)

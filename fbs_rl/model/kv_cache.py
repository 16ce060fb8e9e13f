"""FBSCache: everything that one decoding step reads from the steps before it.

Per layer the keys and values, per chunk layer the closed chunks and the running sum of the open one.
Under `noop` a layer's entries are compact: a step in which every row skips adds no column; where only
some rows skip, theirs is written as zeros and marked absent. So no entry is ever read that was not
written, and `poison=True` fills new memory with NaN to prove it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fbs_rl.model.chunk_head import ChunkReader, Segmentation
from fbs_rl.types import B_LABEL

_GROWTH = 256  # columns added at a time; doubling from there


@dataclass(slots=True)
class OwedKeys:
    """What the newest columns of a layer that all rows skipped will be made of, once somebody reads them.

    project: (normed inputs [B, T, d], (cosine, sine) [B, T, D]) → rotated keys and values [B, G, T, D]. input_CBd,
    cosine_CBH, sine_CBH: of column C, in float32; H is half of a head. count: columns in use.
    """

    project: Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
    input_CBd: Tensor
    cosine_CBH: Tensor
    sine_CBH: Tensor
    count: int = 0

    def __deepcopy__(self, memo: dict[int, object]) -> OwedKeys:
        """The model behind `project` is not copied."""
        held = (self.input_CBd.clone(), self.cosine_CBH.clone(), self.sine_CBH.clone())
        return OwedKeys(self.project, *held, self.count)

    def made(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the columns in use."""
        turns = (self.cosine_CBH, self.sine_CBH)
        cosine, sine = (
            torch.cat((t, t), dim=-1)[: self.count].transpose(0, 1).to(dtype) for t in turns
        )
        return self.project(self.input_CBd[: self.count].transpose(0, 1).to(dtype), (cosine, sine))


class LayerKV:
    """Keys and values of one layer in growing buffers."""

    def __init__(self, poison: bool) -> None:
        self.poison = poison
        self.length = 0
        self.keys_BGSD: Tensor | None = None
        self.values_BGSD: Tensor | None = None
        self.entry_BS: Tensor | None = None  # None: every entry exists
        self.owed: OwedKeys | None = None

    @torch.no_grad()
    def settle(self) -> None:
        """Write the columns that are owed."""
        if self.owed is None or not self.owed.count:
            return
        assert self.keys_BGSD is not None and self.values_BGSD is not None
        columns = slice(self.length - self.owed.count, self.length)
        made = self.owed.made(self.keys_BGSD.dtype)
        self.keys_BGSD[:, :, columns], self.values_BGSD[:, :, columns] = made
        if self.entry_BS is not None:
            self.entry_BS[:, columns] = True
        self.owed.count = 0

    def append(self, key_BGTD: Tensor, value_BGTD: Tensor, exists_BT: Tensor | None) -> None:
        """Add T columns; exists_BT marks which rows have an entry there (None: all)."""
        self.settle()
        added, start = key_BGTD.shape[2], self.length
        self.reserve(key_BGTD, start + added)
        if exists_BT is not None:
            self.mark_entries()
        columns = slice(start, start + added)
        assert self.keys_BGSD is not None and self.values_BGSD is not None
        self.keys_BGSD[:, :, columns] = key_BGTD
        self.values_BGSD[:, :, columns] = value_BGTD
        if self.entry_BS is not None:
            self.entry_BS[:, columns] = True if exists_BT is None else exists_BT
        self.length += added

    def view(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, G, S, D] and which of them exist [B, S]."""
        assert self.keys_BGSD is not None and self.values_BGSD is not None, (
            "read before the first append"
        )
        self.settle()
        entry = None if self.entry_BS is None else self.entry_BS[:, : self.length]
        return self.keys_BGSD[:, :, : self.length], self.values_BGSD[:, :, : self.length], entry

    @property
    def capacity(self) -> int:
        return 0 if self.keys_BGSD is None else self.keys_BGSD.shape[2]

    def mark_entries(self) -> None:
        """From now on say of each entry whether it exists; those so far do."""
        if self.entry_BS is None:
            assert self.keys_BGSD is not None
            shape, device = (len(self.keys_BGSD), self.capacity), self.keys_BGSD.device
            self.entry_BS = torch.zeros(shape, dtype=torch.bool, device=device)
            self.entry_BS[:, : self.length] = True

    def reserve(self, like_BGTD: Tensor, columns: int) -> None:
        """Make room for this many columns of keys and values like these."""
        if columns <= self.capacity:
            return
        capacity = max(columns, 2 * self.capacity, _GROWTH)
        self.keys_BGSD = self._grown(self.keys_BGSD, like_BGTD, capacity)
        self.values_BGSD = self._grown(self.values_BGSD, like_BGTD, capacity)
        if self.entry_BS is not None:
            grown = self.entry_BS.new_zeros(self.entry_BS.shape[0], capacity)
            grown[:, : self.length] = self.entry_BS[:, : self.length]
            self.entry_BS = grown

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        new = like.new_empty(like.shape[0], like.shape[1], capacity, like.shape[3])
        if self.poison:
            new.fill_(float("nan"))
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def select(self, rows: Tensor) -> None:
        self.settle()
        self.owed = None  # its rows are other ones now
        for name in ("keys_BGSD", "values_BGSD", "entry_BS"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows))


@dataclass(slots=True)
class ReaderChunks:
    """One chunk layer's side of the cache: ring of closed chunks, running sum of the open one."""

    key_BCW: Tensor
    value_BCW: Tensor
    open_sum_Bd: Tensor

    @classmethod
    def empty(cls, reader: ChunkReader, state_Bd: Tensor, poison: bool) -> ReaderChunks:
        """Before any chunk, for rows of these states."""
        blank = float("nan") if poison else 0.0
        shape = (len(state_Bd), reader.cap, reader.key.out_features)
        return cls(
            state_Bd.new_full(shape, blank),
            state_Bd.new_full(shape, blank),
            torch.zeros_like(state_Bd, dtype=torch.float32),
        )


@dataclass(slots=True)
class ChunkState:
    """Where the rows stand in their chunks; the boundaries are shared by all chunk layers.

    closed_B: chunks closed so far. open_size_B: tokens of the open chunk. continuable_B: the open
    chunk began with a B, so an I would continue it.
    """

    closed_B: Tensor
    open_size_B: Tensor
    continuable_B: Tensor
    readers: dict[int, ReaderChunks] = field(default_factory=dict)

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> ChunkState:
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(zeros, zeros.clone(), torch.zeros(batch, dtype=torch.bool, device=device))

    @classmethod
    def after_prompt(cls, segmentation: Segmentation, label_BT: Tensor) -> ChunkState:
        """The state after whole prompts were read in parallel; label_BT: the boundary head's classes."""
        newest_B = segmentation.chunk_id_BT.amax(1)
        in_newest_BT = (segmentation.chunk_id_BT == newest_B.unsqueeze(1)) & (
            newest_B >= 0
        ).unsqueeze(1)
        opener_BT = in_newest_BT & segmentation.opens_BT
        continuable_B = (opener_BT & (label_BT == B_LABEL)).any(1)
        return cls(newest_B.clamp_min(0), in_newest_BT.sum(1), continuable_B)

    def select(self, rows: Tensor) -> None:
        self.closed_B, self.open_size_B = self.closed_B[rows], self.open_size_B[rows]
        self.continuable_B = self.continuable_B[rows]
        for reader in self.readers.values():
            reader.key_BCW, reader.value_BCW = reader.key_BCW[rows], reader.value_BCW[rows]
            reader.open_sum_Bd = reader.open_sum_Bd[rows]


class FBSCache:
    """The cache of FBSForCausalLM. Rows are sequences; generate() reorders them for beam search."""

    is_compileable = False

    def __init__(self, layers: int, poison: bool = False) -> None:
        self.poison = poison
        self.layers = [LayerKV(poison) for _ in range(layers)]
        self.columns = 0  # tokens fed, padding included
        self.position_B: Tensor | None = None  # position of the next token
        self.decode_start_B: Tensor | None = None
        self.chunks: ChunkState | None = None
        self.segments: Tensor | None = None
        self.native: object = None  # what the compiled step keeps of it

    def chunk_state(self, batch: int, device: torch.device) -> ChunkState:
        """Where the rows stand in their chunks; made on first use."""
        if self.chunks is None:
            self.chunks = ChunkState.empty(batch, device)
        return self.chunks

    def ring(self, layer: int, reader: ChunkReader, state_Bd: Tensor) -> ReaderChunks:
        """The chunks of one chunk layer, for rows of these states; made on first use."""
        readers = self.chunk_state(len(state_Bd), state_Bd.device).readers
        if layer not in readers:
            readers[layer] = ReaderChunks.empty(reader, state_Bd, self.poison)
        return readers[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far, padding included (generate() slices its inputs by it)."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was (beam search)."""
        for layer in self.layers:
            layer.select(beam_idx)
        for name in ("position_B", "decode_start_B", "segments"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[beam_idx])
        if self.chunks is not None:
            self.chunks.select(beam_idx)

    def crop(self, max_length: int) -> None:
        """Not possible: closed chunks and compact entries cannot be taken back."""
        raise NotImplementedError(
            "an FBS cache cannot be shortened, so assisted and speculative generation do not work with it; "
            "use greedy, sampled or beam search"
        )

    def activate_past_recording(self) -> None:
        """What assisted generation asks of a cache before it starts: refused, as in `crop`."""
        self.crop(0)

    def bytes(self) -> int:
        """Bytes held by existing keys and values, of all rows."""
        total = 0
        for layer in self.layers:
            if layer.keys_BGSD is not None:
                keys, _, entry = layer.view()
                entries = keys.shape[0] * keys.shape[2] if entry is None else int(entry.sum())
                total += 2 * entries * keys.shape[1] * keys.shape[3] * keys.element_size()
        return total


def open_chunk_sum(normed_BTd: Tensor, segmentation: Segmentation) -> Tensor:
    """Sum of x̂ over each row's open chunk after a whole prompt: [B, d] float32."""
    ids_BT = segmentation.chunk_id_BT
    newest_BT = (ids_BT == ids_BT.amax(1, keepdim=True)) & (ids_BT >= 0)
    return (normed_BTd.float() * newest_BT.unsqueeze(-1)).sum(1)

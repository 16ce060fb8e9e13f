"""Reading and writing vLLM's paged cache for some of a step's tokens. All that differs between vLLM versions is here.

A step's attention metadata describe every token of the batch; a layer that some tokens skip needs others:
fewer queries, and under `noop` shorter key sequences. Metadata are shared by all layers, so they are
copied, never changed.

Letters: N tokens of a step, R requests, G key heads, D head width.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from fbs_rl.serving.step_plan import StepPlan


@dataclass(slots=True)
class PagedBatch:
    """The tokens of one step and where their cache lines are.

    base: the backend's metadata of all tokens. length_R: new tokens per request; before_R: tokens in the
    cache before them. slot_N: where each token's dense entry goes. block_RP: pages of each request.
    held: its tensors are memory of its own, which is filled again for other steps.
    """

    base: Any
    length_R: np.ndarray
    before_R: np.ndarray
    slot_N: Tensor
    block_RP: Tensor
    page: int
    sample: Any  # one vLLM Attention module, for the sizes that all share
    held: bool = False
    _made: dict[tuple[bytes, bytes, bytes], Any] = field(default_factory=dict)

    @classmethod
    def current(cls, attention: Any, page: int, plan: StepPlan | None) -> PagedBatch | None:
        """The step that vLLM's forward context describes; None in a profiling run, which has no cache. plan: of the
        step, whose lengths are known without a look at the device."""
        context = get_forward_context()
        table: Any = context.attn_metadata
        if not isinstance(table, dict):
            return None
        base = table[attention.layer_name]
        assert plan is not None, "a step must come through the FBS runner"
        slot_N = base.slot_mapping[: int(plan.length_R.sum())]
        return cls(base, plan.length_R, plan.before_R, slot_N, base.block_table, page, attention)

    def fixed(self, longest: int) -> PagedBatch:
        """This decode step in memory of its own, with metadata that hold for any lengths up to `longest`."""
        base = copy.copy(self.base)
        for name, tensor in self._tensors().items():
            setattr(base, name, tensor.clone())
        base.max_query_len, base.max_seq_len = 1, longest
        return PagedBatch(
            base, self.length_R, self.before_R, base.slot_mapping, base.block_table, self.page,
            self.sample, held=True,
        )  # fmt: skip

    def fill(self, other: PagedBatch) -> None:
        """Take over what another decode step of as many requests says."""
        for name, tensor in other._tensors().items():
            getattr(self.base, name).copy_(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        """Metadata of a decode step that differ from step to step."""
        rows, base = len(self.length_R), self.base
        return {
            "query_start_loc": base.query_start_loc[: rows + 1],
            "seq_lens": base.seq_lens[:rows],
            "block_table": base.block_table[:rows],
            "slot_mapping": self.slot_N,
        }

    def dense(self) -> Any:
        """Metadata of a decode step in which all tokens have an entry."""
        # A backend's plan of its work is for the lengths that it was made for.
        return self.with_lengths(self.base.seq_lens) if self.held else self.base

    @property
    def decodes(self) -> bool:
        """Every request has exactly one token."""
        return bool((self.length_R == 1).all())

    @property
    def row_N(self) -> np.ndarray:
        """Which request a token belongs to."""
        return np.repeat(np.arange(len(self.length_R)), self.length_R)

    def of_rows(self, rows: np.ndarray) -> Any:
        """Metadata for one query of each of these requests, over their dense entries (decode steps)."""
        return self.view(rows, np.ones(len(rows), np.int64), self.before_R[rows] + 1)

    def slots(self, row_M: np.ndarray, entry_M: np.ndarray) -> Tensor:
        """The slot of entry number entry_M of request row_M: pages hold entries in their order."""
        device = self.block_RP.device
        rows, entries = (torch.from_numpy(x).to(device) for x in (row_M, entry_M))
        block_M = self.block_RP[rows, entries // self.page].long()
        return block_M * self.page + entries % self.page

    def device_slots(self, entry_R: Tensor) -> Tensor:
        """The slot of one entry of every request, without leaving the device."""
        block_R1 = self.block_RP[: len(entry_R)].gather(1, (entry_R // self.page).unsqueeze(-1))
        return block_R1[:, 0].long() * self.page + entry_R % self.page

    def view(self, rows: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> Any:
        """Metadata for the last `queries` of `keys` entries of each of these requests."""
        name = (rows.tobytes(), queries.tobytes(), keys.tobytes())
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._view(rows, queries, keys)
        return made

    def _view(self, rows: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> Any:
        device = self.base.seq_lens.device
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(queries, out=starts[1:])
        made = copy.copy(self.base)
        made.num_actual_tokens = int(starts[-1])
        made.max_query_len = int(queries.max())
        made.query_start_loc = torch.from_numpy(starts).to(device)
        made.seq_lens = torch.from_numpy(keys.astype(np.int32)).to(device)
        made.max_seq_len = int(keys.max())
        made.block_table = self.block_RP[torch.from_numpy(rows).to(self.block_RP.device)]
        made.scheduler_metadata = self._schedule(made)
        return made

    def with_lengths(self, key_R: Tensor) -> Any:
        """Metadata for one query a request over key_R entries, without looking at their values."""
        made = copy.copy(self.base)
        made.seq_lens = key_R
        made.scheduler_metadata = self._schedule(made)
        return made

    def _schedule(self, made: Any) -> Any:
        """The CPU backend plans its work by lengths; FlashAttention may go without a plan."""
        if made.seq_lens.device.type != "cpu":
            return None
        ops = importlib.import_module("vllm._custom_ops")
        attention, implementation = self.sample, self.sample.impl
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(made.seq_lens),
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_size,
            seq_lens=made.seq_lens,
            dtype=cache_of(attention).dtype,
            query_start_loc=made.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=attention.isa,
            enable_kv_split=False,
            **_known(ops.cpu_attn_get_scheduler_metadata, kv_cache_dtype=implementation.kv_cache_dtype),
        )  # fmt: skip


def write_entries(attention: Any, key_NX: Tensor, value_NX: Tensor, slot_N: Tensor) -> None:
    """Put keys and values [N, G·D] into their slots; a slot of −1 is not written."""
    shape = (len(slot_N), attention.num_kv_heads, attention.head_size)
    attention.impl.do_kv_cache_update(
        attention, key_NX.view(shape), value_NX.reshape(shape), cache_of(attention), slot_N
    )


def attend(attention: Any, query_NX: Tensor, metadata: Any) -> Tensor:
    """[N, H·D]: what N queries read from the cache, per `metadata`."""
    shape = (len(query_NX), attention.num_heads, attention.head_size)
    out = torch.empty_like(query_NX).view(shape)
    query = query_NX.view(shape)
    # Keys and values are in the cache by now; backends take the arguments and do not read them.
    unread = query[:, : attention.num_kv_heads]
    attention.impl.forward(
        attention, query, unread, unread, cache_of(attention), metadata, output=out
    )
    return out.view(len(query_NX), -1)


def keeps_columns(attention: Any) -> bool:
    """Whether a page holds, a key head, keys column by column and then values row by row, as the vector kernels of
    vLLM 0.32 for CPUs keep them. Those for AMX and NEON, and earlier versions, have other orders.
    """
    pages = cache_of(attention)
    shape = (attention.num_kv_heads, 2 * attention.head_size)
    return (
        getattr(attention, "isa", None) in ("vec", "vec16")
        and pages.ndim == 4
        and (pages.shape[1], pages.shape[3]) == shape
        and pages[0].is_contiguous()
    )


def cache_of(attention: Any) -> Tensor:
    """The layer's pages."""
    cache = attention.kv_cache
    return cache[0] if isinstance(cache, list) else cache  # 0.26: one for each pipeline stage


def _known(function: Any, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that this version's function has."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return {name: value for name, value in arguments.items() if name in names}

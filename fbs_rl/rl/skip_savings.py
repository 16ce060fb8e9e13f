"""What one skip saves, gate by gate: the coefficients of the analytic compute gradient (SPEC 8.3)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.cost_model import CostModel
from fbs_rl.types import KVPolicy


def skip_savings(
    config: FBSConfig,
    keys_LBT: Tensor,
    closed_chunks_BT: Tensor | None = None,
    never_skip: Iterable[int] = (),
) -> Tensor:
    """FLOPs that a decision saves by skipping its own token, int64 [L, B, T], in count_trace's convention.

    A decision of a gate block saves on all of its layers that may be skipped; it stands at the layer that
    `deciding_layers` names, and the others are 0. keys_LBT: what the token sees (`visible_keys` of the trace),
    closed_chunks_BT: as there. never_skip: of the call, beyond the configuration's.
    Limit: with `noop` a skip also spares later tokens a key each, which is not counted here.
    """
    cost = CostModel.of(config)
    projects = config.kv_on_skip == KVPolicy.PROJECT
    kept = cost.adapter.macs + projects * cost.key_value.macs
    macs_LBT = cost.layer.macs - kept + cost.key_macs * keys_LBT.long()
    macs_LBT[list(config.preview_layers)] += cost.inject.macs
    slots_BT = torch.ones_like(macs_LBT[0])  # the null slot
    if closed_chunks_BT is not None:
        slots_BT = slots_BT + closed_chunks_BT.long().clamp_max(config.chunk_cache)
    macs_LBT[list(config.reader_layers)] += cost.read.macs + cost.chunk_macs * slots_BT
    return 2 * _on_deciding(macs_LBT, config.gate_block, config.forced_layers(never_skip))


def _on_deciding(macs_LBT: Tensor, block: int, forced: Collection[int]) -> Tensor:
    """Sums over the layers of each block that may be skipped, at the first of them."""
    summed_LBT = torch.zeros_like(macs_LBT)
    for start in range(0, len(macs_LBT), block):
        free = [i for i in range(start, min(start + block, len(macs_LBT))) if i not in forced]
        if free:
            summed_LBT[free[0]] = macs_LBT[free].sum(0)
    return summed_LBT

"""What a skip saves against the exact counter, one decision flipped at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fbs_rl.model.flops import count_trace, visible_keys
from fbs_rl.rl.ppo_loss import deciding_layers, decision_mask
from fbs_rl.rl.skip_savings import skip_savings
from tests.tiny import LAYERS, NOOP, fresh

ROWS, COLUMNS = 2, 4


@pytest.mark.parametrize(
    "options", [{}, {"gate_block": 3}, {"paw": False, "chunk": False, "gate_inputs": "residual"}, NOOP]
)  # fmt: skip
def test_one_more_skip_costs_less_by_what_it_saves(options: dict[str, Any]) -> None:
    """Dense but for one decision. With `noop` the last column alone: an earlier one also spares later keys."""
    config = fresh(**options).config
    never_skip = (5,)
    deciding = deciding_layers(LAYERS, config.gate_block, config.forced_layers(never_skip))
    start_B, chunks_BT = torch.tensor([3, 7]), torch.tensor([[0, 1, 2, 9], [1, 1, 8, 8]])
    opens_BT = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    none_LBT = torch.zeros(LAYERS, ROWS, COLUMNS, dtype=torch.bool)

    def flops(skip_LBT: torch.Tensor) -> torch.Tensor:
        return count_trace(config, skip_LBT, start_B, True, chunks_BT, opens_BT).flops_BT

    saved_LBT = skip_savings(config, visible_keys(config, none_LBT, start_B), chunks_BT, never_skip)
    decides_LBT = decision_mask(LAYERS, deciding, torch.ones(ROWS, COLUMNS))
    assert torch.equal(saved_LBT != 0, decides_LBT)
    for layer in deciding:
        end = layer - layer % config.gate_block + config.gate_block
        block = [
            i for i in range(layer, min(end, LAYERS)) if i not in config.forced_layers(never_skip)
        ]
        for t in range(COLUMNS - 1 if options is NOOP else 0, COLUMNS):
            skip_LBT = none_LBT.clone()
            skip_LBT[block, :, t] = True
            saved_BT = flops(none_LBT) - flops(skip_LBT)
            assert torch.equal(saved_BT[:, t], saved_LBT[layer, :, t])
            assert int(saved_BT.sum()) == int(saved_LBT[layer, :, t].sum())

"""Decoding steps in which rows that skip are masked: equal to those that drop them, and silent towards the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fbs_rl.model import FBSCache
from fbs_rl.model.sequence_pass import PassResult
from fbs_rl.types import GateMode, GateRequest, SkippingRows
from tests.tiny import NOOP, VOCAB, left_padded, lively


@torch.no_grad()
def walked(model: Any, skipping: SkippingRows, **gates: Any) -> list[PassResult]:
    """A padded prompt and 40 random tokens behind it, in poisoned memory."""
    ids, mask = left_padded(2, [9, 4, 7])
    cache = FBSCache(model.config.layer_count, poison=True)
    start_B = mask.sum(1)
    model.model.run(ids, GateRequest(GateMode.DENSE, start_B, start_B), mask, cache=cache)
    draw = torch.Generator().manual_seed(8)
    fed = torch.randint(0, VOCAB, (40, 3, 1), generator=draw)
    request = GateRequest(decode_start_B=start_B, **gates)
    return [model.model.run(token_B1, request, cache=cache, skipping=skipping) for token_B1 in fed]


@pytest.mark.parametrize(
    "options",
    [{}, NOOP, {**NOOP, "gate_block": 2}, {"gate_ahead": 1}, {"family": "qwen3", "chunk": False}],
)
@pytest.mark.parametrize("tau", [0.5, 0.0])
def test_masked_rows_give_what_dropped_ones_give(options: dict[str, Any], tau: float) -> None:
    """Past the ring of chunks (6), and with layers that all rows skip (τ = 0)."""
    model, tau_B = lively(**options), torch.full((3,), tau)
    gates = {"mode": GateMode.THRESHOLD, "tau_B": tau_B}
    if tau:
        gates = {"mode": GateMode.SAMPLE, "tau_B": tau_B, "seed_B": torch.tensor([3, 1, 4])}
    masked = walked(model, SkippingRows.MASKED, **gates)
    dropped = walked(model, SkippingRows.DROPPED, **gates)
    for ours, theirs in zip(masked, dropped, strict=True):
        assert torch.equal(ours.skip_LBT, theirs.skip_LBT)
        torch.testing.assert_close(ours.prob_LBT, theirs.prob_LBT)
        torch.testing.assert_close(ours.state_BTd, theirs.state_BTd, rtol=1e-4, atol=1e-4)
    skipped = torch.cat([step.skip_LBT for step in masked], 2).float().mean()
    assert skipped > 0.1


@pytest.mark.parametrize("options", [{}, NOOP])
def test_masked_steps_never_ask_what_a_tensor_holds(options: dict[str, Any]) -> None:
    """On tensors without numbers; a GPU that is asked has to finish first."""
    model = lively(**options)
    ids, mask = left_padded(2, [9, 4, 7])
    start_B, seed_B = mask.sum(1), torch.tensor([3, 1, 4])
    cache = FBSCache(model.config.layer_count)
    prompt = GateRequest(GateMode.DENSE, start_B, start_B)
    request = GateRequest(GateMode.SAMPLE, start_B, start_B, seed_B=seed_B)
    with torch.no_grad():
        model.model.run(ids, prompt, mask, cache=cache)
        model.model.run(ids[:, :1], request, cache=cache, skipping=SkippingRows.MASKED)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            token_B1 = fake.from_tensor(ids[:, :1])
            model.model.run(token_B1, request, cache=cache, skipping=SkippingRows.MASKED)
            with pytest.raises(DataDependentOutputException):
                model.model.run(token_B1, request, cache=cache)

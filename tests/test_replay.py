"""Replay: p of a rollout's gate columns, whatever they are batched with, and gradients to gates alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.ppo_loss import deciding_layers, decision_mask
from fbs_rl.rl.replay import ReplayBatch, check_segment, cut_batches, fed_tokens, replay
from fbs_rl.rl.reward import SegmentKind
from fbs_rl.rl.rollout import SegmentRollout
from fbs_rl.rl.update_batches import UpdateSegments
from tests.gate_rollouts import make_episodes, make_questions
from tests.tiny import LAYERS, NOOP, fresh, lively, stepwise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"gate_block": 3},
    {"gate_ahead": 1},
    {"paw": False, "chunk": False, "gate_inputs": "residual"},
    NOOP,
]
NEVER = (5,)


def drawn(model: Any, protected: float = 0.0) -> list[SegmentRollout]:
    """Segments of two questions, of uneven length, drawn by the model's own gates."""
    episodes = make_episodes(
        model, make_questions(model, 2, tokens=7), 2, never_skip=NEVER, protected=protected
    )
    return [segment for episode in episodes for segment in episode.segments]


@pytest.mark.parametrize(
    "options", VARIANTS, ids=["default", "blocks", "ahead", "residual", "noop"]
)
def test_a_replay_finds_the_probabilities_that_the_rollout_had(options: dict[str, Any]) -> None:
    """The rollouts are checked too: the step-by-step engine draws the same from p itself."""
    model = lively(**options)
    unbounded = GatePolicy(low=1e-9, high=1 - 1e-9)
    episodes = make_episodes(
        model, make_questions(model, 2, tokens=7), 2, policy=unbounded, never_skip=NEVER
    )
    found = UpdateSegments.of(episodes)
    [batch] = cut_batches(found.segments, range(len(found.segments)), 10_000)
    with torch.no_grad():
        prob_LBC = replay(model, batch, NEVER).prob_LBC
    for place, row in enumerate(batch.rows):
        segment = found.segments[row]
        start, trace = len(segment.prompt_ids), segment.trace
        found_TL = prob_LBC[:, place, : len(trace.skip_TL)].T
        torch.testing.assert_close(found_TL, torch.from_numpy(trace.prob_TL), atol=1e-5, rtol=0)
        ids = torch.tensor([[*segment.prompt_ids, *segment.token_ids[:-1]]])
        steps = stepwise(
            model, ids, torch.ones_like(ids), start, gates="sample", gate_seed=found.seeds[row],
            decode_start=start, never_skip=NEVER,
        )  # fmt: skip
        assert steps.skip is not None and steps.gate_prob is not None
        assert torch.equal(steps.skip[:, 0, start:].T, torch.from_numpy(trace.skip_TL))
        torch.testing.assert_close(steps.gate_prob[:, 0, start:].T, found_TL, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", VARIANTS, ids=["default", "blocks", "ahead", "residual", "noop"]
)
def test_neighbours_and_padding_change_nothing(options: dict[str, Any]) -> None:
    model = lively(**options)
    segments = drawn(model)
    [together] = cut_batches(segments, range(len(segments)), 10_000)
    lengths = {fed_tokens(segment) for segment in segments}
    assert len(lengths) > 2
    with torch.no_grad():
        whole_LBC = replay(model, together, NEVER).prob_LBC
        for place, row in enumerate(together.rows):
            alone_L1C = replay(model, ReplayBatch.of(segments, [row]), NEVER).prob_LBC
            torch.testing.assert_close(
                alone_L1C[:, 0], whole_LBC[:, place, : alone_L1C.shape[2]], atol=1e-6, rtol=0
            )


def test_gradients_reach_the_gates_that_decided_and_nothing_else() -> None:
    model = fresh()
    model.requires_grad_(False)
    gates = {n: p for n, p in model.named_parameters() if ".skip_gate." in n}
    for parameter in gates.values():
        parameter.requires_grad_(True)
    segments = drawn(model)
    [batch] = cut_batches(segments, range(len(segments)), 10_000)
    prob_LBC = replay(model, batch, NEVER).prob_LBC
    deciding = deciding_layers(LAYERS, 1, model.config.forced_layers(NEVER))
    prob_LBC[decision_mask(LAYERS, deciding, batch.free_BC)].sum().backward()
    moved = {n for n, p in gates.items() if p.grad is not None and bool(p.grad.any())}
    assert moved == {n for n in gates if int(n.split(".")[2]) in deciding}
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= gates.keys()


def test_a_reference_is_replayed_without_touching_the_model() -> None:
    model, other = fresh(), lively()
    segments = drawn(other)
    [batch] = cut_batches(segments, range(len(segments)), 10_000)
    # Any part of PAW too: what the model derives from it must not outlive the call.
    names = [n for n, _ in model.model.new_parameters() if "skip_gate" in n or "preview" in n]
    theirs = {f"model.{n}": other.get_parameter(f"model.{n}").detach() for n in names}
    with torch.no_grad():
        before = replay(model, batch).prob_LBC
        borrowed = replay(model, batch, (), theirs).prob_LBC
        assert torch.equal(replay(model, batch).prob_LBC, before)
        for name, tensor in theirs.items():
            model.get_parameter(name).copy_(tensor)
        assert torch.equal(replay(model, batch).prob_LBC, borrowed)
    assert not torch.allclose(before, borrowed, atol=1e-3)


def test_the_state_that_is_asked_for_is_the_columns_own() -> None:
    model = lively()
    segments = drawn(model)
    batch = ReplayBatch.of(segments, [1, 0])
    with torch.no_grad():
        state_BCd = replay(model, batch, NEVER, state_layer=2).state_BCd
        assert state_BCd is not None
        for place, row in enumerate(batch.rows):
            start, count = len(segments[row].prompt_ids), len(segments[row].trace.skip_TL)
            length = start + count
            states = model(
                batch.ids_BT[place : place + 1, :length], gates="replay", output_hidden_states=True,
                skip=batch.skip_LBT[:, place : place + 1, :length], decode_start=start,
            ).hidden_states  # fmt: skip
            torch.testing.assert_close(states[2][0, start:], state_BCd[place, :count])


@pytest.mark.parametrize("micro_tokens", [1, 20, 40, 10_000])
def test_batches_hold_every_decided_segment_once_and_no_more_than_asked(micro_tokens: int) -> None:
    model = lively()
    segments = drawn(model)
    whole = segments[0]
    bare = replace(
        whole,
        kind=SegmentKind.SELF,
        token_ids=whole.token_ids[:1],
        nll_gated_N=whole.nll_gated_N[:1],
        nll_dense_N=whole.nll_dense_N[:1],
        trace=whole.trace.first(0),
    )
    batches = cut_batches([*segments, bare], range(len(segments) + 1), micro_tokens)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(segments)))
    assert all(len(b.rows) == 1 or b.ids_BT.numel() <= micro_tokens for b in batches)
    widths = [batch.ids_BT.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    if micro_tokens == 10_000:
        assert len(batches) == 1
    if micro_tokens == 1:
        assert len(batches) == len(segments)


def test_protected_tokens_are_no_decisions() -> None:
    segments = drawn(lively(), protected=0.5)
    batch = ReplayBatch.of(segments, range(len(segments)))
    protected = sum(int((s.trace.protected_T > 0).sum()) for s in segments)
    columns = sum(len(s.trace.protected_T) for s in segments)
    assert 0 < protected < columns
    assert int(batch.free_BC.sum()) == columns - protected
    assert not (batch.skip_LBC & ~batch.free_BC).any()


def test_values_per_column_find_their_places() -> None:
    segments = drawn(lively())
    rows = [3, 0]
    batch = ReplayBatch.of(segments, rows)
    values = [torch.arange(1.0, len(segments[row].trace.skip_TL) + 1) for row in rows]
    spread_BC = batch.columns(values)
    for place, value_T in enumerate(values):
        assert torch.equal(spread_BC[place, : len(value_T)], value_T)
        assert not spread_BC[place, len(value_T) :].any()


def test_foreign_traces_are_refused() -> None:
    model = lively()
    segment = drawn(model)[0]
    trace = segment.trace
    with pytest.raises(ValueError, match="7 layers and this model 8"):
        narrow = replace(trace, skip_TL=trace.skip_TL[:, :7], prob_TL=trace.prob_TL[:, :7])
        check_segment(replace(segment, trace=narrow), model.config)
    with pytest.raises(ValueError, match="starts at token 1 of a prompt of"):
        check_segment(replace(segment, trace=replace(trace, decode_start=1)), model.config)
    protected = np.ones_like(trace.skip_TL)
    with pytest.raises(ValueError, match="skip names layers that never skip"):
        replay(model, ReplayBatch.of([replace(segment, trace=replace(trace, skip_TL=protected))], [0]))  # fmt: skip

"""What ends a PPO run: rollouts of other gates, and gates that have collapsed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fbs_rl.rl.collapse import CollapseError, CollapseGuard
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.learner_settings import CollapseLimits, MismatchLimits
from fbs_rl.rl.mismatch import MismatchError, MismatchSums
from fbs_rl.rl.ranks import Ranks
from tests.gate_rollouts import make_episodes
from tests.learners import episodes, learner, made, questions
from tests.tiny import LAYERS

# --- self-test ------------------------------------------------------------------------------------------------


def test_the_self_test_passes_on_own_rollouts_and_fails_on_others() -> None:
    whole, limits = episodes(), MismatchLimits(logp_max=1e-4, kl=1e-8, flip_frac=0.0)
    own = learner(made()).self_test(whole, limits)
    traces = [segment.trace for episode in whole for segment in episode.segments]
    assert own.columns == sum(int((t.protected_T == 0).sum()) for t in traces)
    assert own.decisions == own.columns * (LAYERS - 1)
    with pytest.raises(ValueError, match=f"saw {own.columns} gate columns and needs 5000"):
        learner(made()).self_test(whole, replace(limits, tokens=5000))
    model = made()
    with torch.no_grad():
        model.model.layers[4].skip_gate.out.bias += 0.3
    with pytest.raises(
        MismatchError, match=r"their \|Δ log p\| is 0\.\d+, above 0\.0001; give both"
    ):
        learner(model).self_test(whole, limits)
    # The gates agree, but decisions were drawn with another policy than the plan's.
    other = learner(made(), policy={"low": 0.3, "high": 0.7})
    with pytest.raises(MismatchError, match="share of flipped decisions"):
        other.self_test(whole, MismatchLimits(logp_max=1e-4, kl=1e-8, flip_frac=0.02))


def test_mismatch_figures_by_hand() -> None:
    policy = GatePolicy(low=0.1, high=0.9)  # p_b = 0.1 + 0.8 p
    theirs, mine = torch.tensor([0.5, 0.5, 0.25, 0.0]), torch.tensor([0.5, 0.75, 0.25, 0.9])
    skip, uniform = torch.tensor([True, False, True, True]), torch.tensor([0.4, 0.55, 0.2, 0.5])
    decides = torch.tensor([True, True, True, False])
    sums = MismatchSums(torch.device("cpu"))
    whole = (decides, skip, theirs, mine, uniform)
    for part in (slice(0, 1), slice(1, 4)):
        one, two, three, four, five = (tensor[part].view(1, 1, -1) for tensor in whole)
        sums.add(one, two, three, four, five, policy)
    found = sums.total(Ranks())
    # Only the second decision differs: p_b 0.5 against 0.7; at u = 0.55 it would skip instead of run.
    kl = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    assert (found.columns, found.decisions) == (3, 3)
    assert found.logp_max == pytest.approx(math.log(0.5 / 0.3))
    assert found.kl == pytest.approx(kl / 3, rel=1e-5)
    assert found.flip_rate == pytest.approx(1 / 3)
    broken = replace(found, columns=64, logp_max=math.nan)
    with pytest.raises(MismatchError, match="is nan"):
        broken.check(MismatchLimits())


# --- collapse ----------------------------------------------------------------------------------------------------


def test_the_guard_counts_updates_in_a_row() -> None:
    guard = CollapseGuard(CollapseLimits(patience=3))
    for prob in (0.999, 0.999, 0.5, 0.999, 0.001):
        guard.check({0: 0.5, 4: prob}, 0.1)
    with pytest.raises(CollapseError, match=r"layer 4 .* for 3 updates \(now 0\.9980\)"):
        guard.check({0: 0.5, 4: 0.998}, 0.1)
    with pytest.raises(CollapseError, match=r"0\.600 nats a decision from the reference, above 0\.5"):  # fmt: skip
        CollapseGuard(CollapseLimits()).check({0: 0.5}, 0.6)


def test_a_gate_that_always_skips_ends_the_run() -> None:
    model = made()
    with torch.no_grad():
        model.model.layers[5].skip_gate.out.bias.fill_(60.0)
    stuck = learner(model, collapse={"patience": 2})
    whole = make_episodes(model, questions(), 2)
    stuck.update(whole, 0)
    with pytest.raises(CollapseError, match="the gate of layer 5 "):
        stuck.update(whole, 1)
